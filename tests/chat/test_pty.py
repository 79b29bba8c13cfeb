"""`bwlm chat` in a real terminal: typed, streamed, stopped, with history, and answers that grow at their front."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pexpect
import pyte
import pytest

from bwlm.chat.terminal import converse
from bwlm.format import visible
from bwlm.model.gpt import GPT
from bwlm.record.checkpoint import KeepPolicy, load_newest, write_checkpoint
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.text.prepare import Prepared
from tests.chat.test_terminal import GREEDY, Script, talk_with
from tests.runs import ANSWER, Answering, NewFamily, make_run

COLUMNS, LINES = 80, 24
BWLM = Path(sys.executable).parent / "bwlm"


class Terminal:
    """A terminal of 24 lines in which a command runs, and what stands on its screen."""

    def __init__(self, state: Path, *arguments: str, lines: int = LINES, columns: int = COLUMNS) -> None:
        environment = os.environ | {"TERM": "xterm-256color", "XDG_STATE_HOME": str(state), "LANG": "C.UTF-8"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = pexpect.spawn(
            str(BWLM), list(arguments), dimensions=(lines, columns), env=environment, timeout=60
        )
        self._screen = pyte.HistoryScreen(columns, lines, history=500)
        self._screen.write_process_input = lambda data: self.process.send(data)  # answers where the cursor is
        self._stream = pyte.ByteStream(self._screen)

    @property
    def lines(self) -> list[str]:
        """Lines that were printed and still stand: those that were scrolled off, and those of the screen."""
        above = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return [line.rstrip() for line in [*above, *self._screen.display]]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip()

    def type(self, text: str) -> None:
        self.process.send(text)

    def until(self, condition: Callable[[str], bool]) -> list[str]:
        """Read until the screen meets a condition; return the screens on the way."""
        moments = [self.text]
        while not condition(self.text):
            self._stream.feed(self.process.read_nonblocking(256, timeout=60))
            moments.append(self.text)
        return moments

    def answered(self, sign: str, times: int) -> list[str]:
        """Read until a prompt stands on the last line, and this many in all."""
        return self.until(lambda text: text.endswith(sign) and text.count(f"{sign}") >= times)


NewTerminal = Callable[..., Terminal]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[NewTerminal]:
    """(arguments) -> `bwlm chat` with them, in a terminal; all share one history."""
    opened: list[Terminal] = []

    def start(*arguments: str, **size: int) -> Terminal:
        opened.append(Terminal(tmp_path / "state", "chat", *arguments, **size))
        return opened[-1]

    yield start
    for one in opened:
        one.process.close(force=True)


def test_a_forward_talk_with_history_and_editing(answering: Answering, terminal: NewTerminal, tmp_path: Path) -> None:
    folder = answering("forward", "whole")
    arguments = (folder.id, "--storage", str(folder.path.parent), "--temperature", "0")
    window = terminal(*arguments)
    window.answered("→", 1)
    window.type("stone widnow\x1b[D\x1b[D\x1b[D\x7f\x1b[3~nd\r")  # the arrows go back, and two letters change places
    window.answered("→", 2)
    window.type("\x1b[A\r")  # the line before
    window.answered("→", 3)
    window.type("/unod\r")
    window.until(lambda text: "did you mean '/undo'?" in text)
    window.type("\x03")
    window.until(lambda text: "Ctrl-D or /quit leaves" in text)
    assert window.lines[2:8] == [
        "→ stone window", ANSWER, "→ stone window", ANSWER, "→ /unod",
        "/unod: no such command (did you mean '/undo'?); /help lists them",
    ]  # fmt: skip
    window.type("\x04")
    window.process.expect(pexpect.EOF)
    history = tmp_path / "state" / "bwlm" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    later = terminal(*arguments)
    later.answered("→", 1)
    later.type("\x1b[A\x1b[A\r")  # of the talk before
    later.answered("→", 2)
    assert later.lines[2:4] == ["→ stone window", ANSWER]


def test_a_paste_of_several_lines_is_one_message(answering: Answering, terminal: NewTerminal, tmp_path: Path) -> None:
    folder = answering("forward", "whole")
    window = terminal(folder.id, "--storage", str(folder.path.parent), "--temperature", "0")
    window.answered("→", 1)
    window.type("\x1b[200~stone\nwindow\x1b[201~\x1b\rletter\r")  # and Alt-Enter begins one more line
    window.answered("→", 2)
    window.type(f"/save {tmp_path / 'talk.json'}\r")
    window.until(lambda text: "saved in" in text)
    assert '"content": "stone\\nwindow\\nletter"' in (tmp_path / "talk.json").read_text()


def test_a_backward_talk_grows_upward_in_the_order_of_time(answering: Answering, terminal: NewTerminal) -> None:
    folder = answering("backward", "whole")
    window = terminal(folder.id, "--storage", str(folder.path.parent), "--temperature", "0")
    window.answered("←", 1)
    asked: list[str] = []
    for turn in range(1, 4):
        window.type(f"{ANSWER}\r")
        moments = window.answered("←", turn + 1)
        last = [line for line in window.lines if line][-1 - 2 * turn : -1]
        asked.insert(0, last[0].removeprefix("model").strip())
        assert last == [f"{who:7}{text}" for question in asked for who, text in (("model", question), ("you", ANSWER))]
        grown = [
            line.removeprefix("model").strip()
            for moment in moments
            for line in moment.split("\n")
            if line.startswith("model")
        ]
        # a screen may be read while a line is drawn, so that its end is missing
        assert all(any(part in question for question in asked) for part in grown), "a wrong text was shown"
        assert any(part and part != asked[0] and asked[0].endswith(part) for part in grown), "it did not grow"


def test_a_text_that_is_taller_than_the_screen_stands_there_once(
    trained_base: NewFamily, terminal: NewTerminal
) -> None:
    """While it grows, the screen holds its front alone; of that nothing stays when the whole is printed."""
    folder = trained_base("backward")
    talk, engine, _ = talk_with(folder, replace(GREEDY, max_tokens=60))
    converse(talk, engine, Script(["the river."]))
    whole = talk.dialogue.turns[-1].text + "the river."
    options = ("--temperature", "0", "--top-k", "0", "--max-tokens", "60")
    window = terminal(folder.id, "--storage", str(folder.path.parent), *options, lines=6, columns=20)
    window.answered("←", 1)
    window.type("the river.\r")
    moments = window.answered("←", 2)
    _, _, shown = window.text.partition("← the river.\n")
    assert shown.count("\n") > 8, "it is no taller than the screen"
    assert "".join(shown.removesuffix("←").split()) == "".join(visible(whole).split())
    assert any(moment.count("\n") > 3 and not moment.endswith("river.") for moment in moments), "it did not grow"


def test_a_talk_in_both_directions(answering: Answering, terminal: NewTerminal) -> None:
    folder = answering("bidirectional", "whole")
    window = terminal(folder.id, "--storage", str(folder.path.parent), "--temperature", "0")
    window.answered("→", 1)
    window.type("stone\r")
    window.answered("→", 2)
    window.type("/backward\r")
    window.answered("←", 1)
    window.type(f"{ANSWER}\r")
    window.answered("←", 2)
    window.type("/forward\r")
    window.answered("→", 3)
    window.type("window\r")
    window.answered("→", 4)
    lines = [line for line in window.lines if line]
    lines = lines[lines.index("→ stone") :]
    assert lines[:4] == ["→ stone", ANSWER, "→ /backward", "backward: it writes the message that yours answers"]
    assert lines[4] == f"← {ANSWER}"
    assert lines[5].startswith("model  ")
    assert lines[6:9] == [f"you    {ANSWER}", "you    stone", f"model  {ANSWER}"]
    assert lines[9:] == ["← /forward", "forward: it answers you", "→ window", ANSWER, "→"]


@pytest.fixture
def endless(prepared: Prepared, trained_base: NewFamily, tmp_path: Path) -> ExperimentFolder:
    """A run with a row of 65,536 tokens and random weights, which at temperature 0 writes on and on."""
    folder = make_run(prepared, tmp_path, "endless", model__sequence_length=65_536)
    trained = load_newest(trained_base("forward").checkpoints)
    assert trained is not None
    config = folder.config()
    model = GPT(config.shape)
    model.init_weights(0)
    meta = trained.meta | config.checkpoint_meta()
    write_checkpoint(folder.checkpoints, replace(trained, model=dict(model.state_dict()), meta=meta), KeepPolicy(1))
    folder.write_status(Status("finished", step=12))
    return folder


def test_ctrl_c_stops_the_answer_and_not_the_program(endless: ExperimentFolder, terminal: NewTerminal) -> None:
    options = ("--temperature", "0", "--max-tokens", "60000")
    window = terminal(endless.id, "--storage", str(endless.path.parent), *options)
    window.answered("→", 1)
    window.type("The river\r")
    window.until(lambda text: len(text.partition("→ The river\nThe river")[2]) > 40)
    window.type("\x03")
    window.until(lambda text: "stopped: /retry writes another answer" in text)
    window.answered("→", 2)
    window.type("/quit\r")
    window.process.expect(pexpect.EOF)
    window.process.close()
    assert window.process.exitstatus == 0

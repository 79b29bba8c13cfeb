"""The faces of a talk: a terminal with history and growing answers, and plain lines for pipes.

Text that grows at its end is printed as it comes. Text that grows at its front is drawn anew with each token, in the
order of time, until it is whole.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bwlm.chat.dialogue import Dialogue, Turn
from bwlm.chat.engine import Engine
from bwlm.chat.reply import Reply
from bwlm.chat.talk import COMMANDS, Talk
from bwlm.directions import BASELINE
from bwlm.errors import UserError
from bwlm.format import visible

_HOW_TO_LEAVE = "Ctrl-D or /quit leaves"


class Face(Protocol):
    """Place that lines come from and answers go to."""

    def read(self, reading: str) -> str | None:
        """Return the next line of the person, who is asked to be answered in a reading; None at the end."""

    def tell(self, text: str) -> None:
        """Show lines that are not the model's."""

    def showing(self, talk: Talk, reply: Reply) -> AbstractContextManager[Callable[[], None]]:
        """Show a reply while it is written; the function shows what came since it was last called."""


def converse(talk: Talk, engine: Engine, face: Face) -> None:
    """Read lines and answer them until the person leaves."""
    while (line := face.read(talk.reading)) is not None:
        told, then = talk.enter(line)
        if told:
            face.tell(told)
        if then == "leave":
            return
        if then == "write":
            try:
                answer(talk, engine, face)
            except UserError as error:
                face.tell(str(error))


def answer(talk: Talk, engine: Engine, face: Face) -> tuple[Reply, int]:
    """Let the model write, until it ends or Ctrl-C stops it; return the reply, and how much was left out of its prompt.

    Raises `UserError` if the person's message is too long.
    """
    reply, dropped = talk.begin()
    if line := talk.left_out(dropped):
        face.tell(line)
    with stopped_by_ctrl_c() as stopped, face.showing(talk, reply) as show:
        for event in engine.stream(reply.request):  # left early, it is cancelled
            reply.take(event)
            show()
            if stopped.is_set():
                break
    if reply.finish == "interrupted":
        face.tell("stopped: /retry writes another answer")
    talk.end(reply)
    return reply, dropped


@contextmanager
def stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """Set the event on Ctrl-C while the block runs: an exception amidst a step would leave the engine half done."""
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


# ---- a pipe ----


class Pipe:
    """Lines from standard input; answers on standard output, all else on standard error."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        """True if answers are not printed here."""

    def read(self, reading: str) -> str | None:
        """Return the next line; None at the end."""
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def tell(self, text: str) -> None:
        """Print lines on standard error."""
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def showing(self, talk: Talk, reply: Reply) -> Iterator[Callable[[], None]]:
        """Print the reply once it is whole."""
        yield lambda: None
        if not self._quiet:
            print(visible(reply.text), flush=True)


# ---- a terminal ----


class Screen:
    """Terminal, with the history of earlier talks and the keys of readline."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._session: PromptSession[str] | None = None

    def read(self, reading: str) -> str | None:
        """Return the next line; None on Ctrl-D. Ctrl-C drops the line, and says how to leave."""
        if self._session is None:
            completer = WordCompleter(list(COMMANDS), sentence=True)
            self._session = PromptSession(
                history=_history(), completer=completer, complete_while_typing=False, key_bindings=_keys()
            )
        while True:
            try:
                return self._session.prompt("→ " if reading == BASELINE else "← ")
            except KeyboardInterrupt:
                self.tell(_HOW_TO_LEAVE)
            except EOFError:
                return None

    def tell(self, text: str) -> None:
        """Print lines that stand back from the model's."""
        self._console.print(text, style="dim", markup=False)

    def showing(self, talk: Talk, reply: Reply) -> AbstractContextManager[Callable[[], None]]:
        """Print the reply as it grows, or draw it anew with each token where it grows at its front."""
        if talk.dialogue.turns[-1].reading == BASELINE:
            return self._printing(talk, reply)
        return self._drawing(talk, reply)

    @contextmanager
    def _printing(self, talk: Talk, reply: Reply) -> Iterator[Callable[[], None]]:
        printed = 0

        def show() -> None:
            nonlocal printed
            new, printed = reply.text[printed:], len(reply.text)
            self._console.print(Text(visible(new)), end="", soft_wrap=True)
            self._console.file.flush()

        if talk.dialogue.voice.on_documents:  # the text and what follows it are one
            self._console.print(Text(visible(talk.dialogue.turns[-1].text), "bold"), end="", soft_wrap=True)
        yield show
        self._console.print()

    @contextmanager
    def _drawing(self, talk: Talk, reply: Reply) -> Iterator[Callable[[], None]]:
        """Draw as much as the screen has room for from the front, where the text grows; at the end all of it."""
        with Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
            yield lambda: live.update(drawn(talk.dialogue, reply.text), refresh=True)
            # rich draws the last state once more, as tall as it is, and then clears only what fits the screen
            live.update("", refresh=True)
        self._console.print(drawn(talk.dialogue, reply.text))


def drawn(dialogue: Dialogue, written: str) -> RenderableType:
    """Return what was said and what is being written, in the order of time, each with its speaker.

    Of a model of documents it is one text, in which the person's words are bold. Where the model answers, it is the
    answer alone: what was said before stands above.
    """
    reading = dialogue.turns[-1].reading
    if dialogue.voice.on_documents:
        before = (Text(joint + visible(turn.text), _style(turn)) for joint, turn in dialogue.document)
        return Text.assemble(visible(written), *before)
    now = Turn("model", written, reading)
    front = dialogue.voice.writes_at_front(reading)
    shown = Dialogue(dialogue.voice, dialogue.tokenizer, [*dialogue.turns, now]).in_order if front else [now]
    table = Table.grid(padding=(0, 2, 0, 0))
    for turn in shown:
        table.add_row(
            Text("you" if turn.speaker == "person" else "model", "dim"), Text(visible(turn.text), _style(turn))
        )
    return table


def _style(turn: Turn) -> str:
    return "bold" if turn.speaker == "person" else ""


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """Return the lines of earlier talks, which only their owner may read; in memory where no file can be written."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "bwlm" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if not os.access(path, os.R_OK | os.W_OK):
            return InMemoryHistory()
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))

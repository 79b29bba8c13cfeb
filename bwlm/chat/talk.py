"""A talk in a terminal as a state machine: what each line of a person does. It knows no terminal.

A line is a message, or a command that begins with `/`. The face (`terminal.py`) reads the lines, shows what is told,
and lets the model write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bwlm.chat.dialogue import Dialogue, Turn, prompt_room
from bwlm.chat.reply import Reply
from bwlm.chat.settings import Settings
from bwlm.directions import TEXT_READINGS
from bwlm.errors import UserError, first_line, nearest
from bwlm.format import counted
from bwlm.paths import write_json

COMMANDS = {
    "/forward": "write forward from now on (a bidirectional model)",
    "/backward": "write backward from now on (a bidirectional model)",
    "/retry": "write the last answer anew",
    "/undo": "take your last message and its answer back",
    "/clear": "forget all that was said",
    "/set": "show the settings; /set temperature 0.7 changes one",
    "/save": "/save FILE writes model, settings and turns as JSON",
    "/help": "show this",
    "/quit": "leave, as /exit and Ctrl-D do",
    "/exit": "",
}
_BESIDES = """\
Ctrl-C stops an answer, which is kept as it is. Alt-Enter begins a new line.
Write // to begin a message with /."""


class Outcome(NamedTuple):
    """Consequence of a line."""

    told: str = ""
    """Lines for the person."""
    then: Literal["listen", "write", "leave"] = "listen"


@dataclass(frozen=True)
class About:
    """Model that is talked to."""

    id: str
    step: int
    phase: str
    depth: int
    direction: str
    reversal: str
    sequence_length: int


@dataclass
class Talk:
    """Dialogue with a model, its settings, and the reading in which it writes next."""

    about: About
    dialogue: Dialogue
    settings: Settings
    reading: str
    answers: int = 0
    """Answers that were begun: each has a seed of its own, the next number after that of the one before."""
    _before: list[Turn] = field(default_factory=list, init=False)
    """Turns before the message that is to be answered, or with the answer that is to be written anew."""

    @property
    def greeting(self) -> str:
        """Return who is talked to, and what the model does."""
        about, voice = self.about, self.dialogue.voice
        does = "; ".join(f"{reading}, it {voice.does(reading)}" for reading in voice.readings)
        return f"{about.id}, step {about.step:,}: {about.phase}, depth {about.depth}. {does.capitalize()}."

    # ---- what a line does ----

    def enter(self, line: str) -> Outcome:
        """Do what a line asks for. A mistake is told, and changes nothing."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                return self._command(line)
            if not line.strip():
                return Outcome()
            self._before = [*self.dialogue.turns]
            self.dialogue.say(line[1:] if line.startswith("//") else line, self.reading)
            return Outcome(then="write")
        except UserError as error:
            return Outcome(str(error))

    def _command(self, line: str) -> Outcome:
        name, _, rest = line.strip().partition(" ")
        if name not in COMMANDS:
            raise UserError(f"{name[:40]}: no such command{nearest(name, COMMANDS)}; /help lists them")
        rest = rest.strip()
        if rest and name not in ("/set", "/save"):
            raise UserError(f"{name}: takes nothing after it (found {rest[:40]!r})")
        does: dict[str, Callable[[], Outcome]] = {
            **{f"/{reading}": partial(self._read, reading) for reading in TEXT_READINGS},
            "/retry": self._retry,
            "/undo": self._undo,
            "/clear": self._clear,
            "/set": lambda: self._set(rest),
            "/save": lambda: self._save(rest),
            "/help": lambda: Outcome(_help()),
            "/quit": lambda: Outcome(then="leave"),
            "/exit": lambda: Outcome(then="leave"),
        }
        return does[name]()

    def _read(self, reading: str) -> Outcome:
        self.reading = self.dialogue.voice.check(reading)
        return Outcome(f"{reading}: it {self.dialogue.voice.does(reading)}")

    def _retry(self) -> Outcome:
        self._before = [*self.dialogue.turns]
        self.dialogue.retract_reply()
        return Outcome(then="write")

    def _undo(self) -> Outcome:
        return Outcome(f"took back: {_shortened(self.dialogue.undo())}")

    def _clear(self) -> Outcome:
        count = len(self.dialogue.turns)
        self.dialogue.clear()
        return Outcome(f"{counted(count, 'message')} forgotten")

    def _set(self, rest: str) -> Outcome:
        if not rest:
            return Outcome(self.settings.words)
        name, _, value = rest.partition(" ")
        if not value.strip():
            raise UserError(f"/set {name}: write its value after it, such as /set temperature 0.7")
        self.settings = self.settings.changed(name, value.strip())
        if name == "seed":
            self.answers = 0
        return Outcome(self.settings.words)

    def _save(self, rest: str) -> Outcome:
        if not rest:
            raise UserError("/save: write the name of a file after it")
        try:
            path = Path(rest).expanduser()
            if path.exists():
                raise UserError(f"{rest}: there is such a file already: give another name")
            write_json(path, self.to_json())
        except (OSError, RuntimeError, ValueError) as error:  # also for a home that is not known, and a NUL
            raise UserError(f"{rest}: cannot be written: {first_line(error)}") from None
        return Outcome(f"saved in {rest}")

    def to_json(self) -> dict[str, Any]:
        """Return model, settings and turns; the turns are as `POST /v1/chat/completions` takes them."""
        turns = [_as_message(turn) for turn in self.dialogue.turns]
        return {"model": asdict(self.about), "settings": asdict(self.settings), "turns": turns}

    # ---- what the model writes ----

    def begin(self) -> tuple[Reply, int]:
        """Return the reply that the model is to write, and the number of messages or tokens that were left out.

        Raises `UserError` if the person's message is too long; the talk is then as it was before.
        """
        try:
            room = prompt_room(self.about.sequence_length, self.settings.max_tokens)
            prompt, dropped = self.dialogue.prompt(room)
        except UserError:
            self.dialogue.turns[:] = self._before
            raise
        seed, reading = self.settings.seed + self.answers, self.dialogue.turns[-1].reading
        self.answers += 1
        reply = Reply(f"{self.answers}", prompt, reading, self.dialogue.tokenizer, self.settings, seed)
        return reply, dropped

    def end(self, reply: Reply) -> None:
        """Keep what the model wrote, also if it was stopped."""
        self.dialogue.reply(reply.text)

    def left_out(self, dropped: int) -> str:
        """Return the line on what was left out so that the prompt fits; '' if it was nothing."""
        if not dropped:
            return ""
        what = counted(dropped, "token" if self.dialogue.voice.on_documents else "message")
        at = "end" if self.dialogue.voice.writes_at_front(self.dialogue.turns[-1].reading) else "beginning"
        return f"{what} left out at the {at}: the model reads {self.about.sequence_length} tokens at once"


def _as_message(turn: Turn) -> dict[str, str]:
    role = "user" if turn.speaker == "person" else "assistant"
    return {"role": role, "content": turn.text, "direction": turn.reading}


def _help() -> str:
    lines = [f"{name:10} {words}" for name, words in COMMANDS.items() if words]
    return "\n".join([*lines, _BESIDES])


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."

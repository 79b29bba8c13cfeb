"""Dialogues of a person and a model: their turns, and the prompt for what the model writes next.

A model writes in one of three manners, which follow from how it was trained:

- `goes_on`: a model of documents. All that was said is one text; read forward the model goes on with it, read backward
  it writes what came before it, right where the text stops. What the person adds begins a paragraph.
- `answers`: it answers the person; with `reversal: turns` also read backward, each answer from its end.
- `asks`: it reads whole conversations backward. What the person writes is an answer, the ending, and the model writes
  the question that came before it. The next turn goes further back.

So the order of the talk is not always that of the conversation: `Dialogue.messages` puts what was said into the order
of time. A bidirectional model may change its reading at every turn; its prompt is then laid out anew.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from bwlm.config import Experiment, Reversal
from bwlm.directions import DIRECTIONS, TEXT_READINGS, is_marked, is_native
from bwlm.errors import UserError
from bwlm.phases import PHASES
from bwlm.text.conversation import Conversation, Message, Prompt, build_prompt, predicts_user_turn
from bwlm.text.direction import arrange, is_mirrored
from bwlm.text.tokenizer import Tokenizer

Manner = Literal["goes_on", "answers", "asks"]
Speaker = Literal["person", "model"]

SEPARATOR = "\n\n"
"""Text between two paragraphs of a document."""

_DOES: dict[Manner, tuple[str, str]] = {
    "goes_on": ("goes on with your text", "writes what came before your text"),
    "answers": ("answers you", "answers you, each answer from its end"),
    "asks": ("", "writes the message that yours answers"),
}
"""Words for what a model does when it reads forward, and when it reads backward."""


@dataclass(frozen=True)
class Voice:
    """Way in which a model talks, as its checkpoint says."""

    direction: str
    reversal: Reversal
    on_documents: bool
    """True for a model that was trained on documents alone."""

    @classmethod
    def from_experiment(cls, experiment: Experiment) -> Voice:
        """Return the voice of a run. Raises `UserError` for a control direction, in which nothing can be written."""
        if DIRECTIONS[experiment.direction].is_control:
            raise UserError(f"direction {experiment.direction}: a control, in an order in which nobody writes")
        return cls(experiment.direction, experiment.data.reversal, PHASES[experiment.phase].reads_documents)

    @property
    def readings(self) -> tuple[str, ...]:
        """Return the readings in which the model writes, its default first."""
        return DIRECTIONS[self.direction].readings

    def check(self, reading: str) -> str:
        """Return a reading in which the model can write. Raises `UserError` for any other."""
        if reading not in TEXT_READINGS:
            raise UserError(f"direction: {reading[:40]!r} is not one of {', '.join(TEXT_READINGS)}")
        if not is_native(self.direction, reading):
            raise UserError(f"direction: this model was trained {self.direction} and cannot write {reading}")
        return reading

    def manner(self, reading: str) -> Manner:
        """Return how the model writes in a reading."""
        if self.on_documents:
            return "goes_on"
        return "asks" if predicts_user_turn(reading, self.reversal) else "answers"

    def does(self, reading: str) -> str:
        """Return what the model does in a reading, in words."""
        words = _DOES[self.manner(reading)]
        return words[is_mirrored(reading)]

    def writes_at_front(self, reading: str) -> bool:
        """Return true if what the model writes comes before what was said so far."""
        return is_mirrored(reading) if self.on_documents else predicts_user_turn(reading, self.reversal)


class Turn(NamedTuple):
    """Message of a dialogue, in the order of the talk."""

    speaker: Speaker
    text: str
    reading: str
    """Reading in which the model wrote it, or in which it was asked to write next."""


class Fitted(NamedTuple):
    """Prompt, and what was left out so that it fits."""

    prompt: Prompt
    dropped: int
    """Messages that were left out; of documents: tokens."""


@dataclass
class Dialogue:
    """Turns of a person and a model, who speak alternately; the person begins."""

    voice: Voice
    tokenizer: Tokenizer
    turns: list[Turn] = field(default_factory=list)

    # ---- what was said ----

    def say(self, text: str, reading: str) -> None:
        """Add the person's message, after which the model will write in a reading.

        Raises `UserError` if the message is empty, the model cannot write so, or the model has not yet spoken.
        """
        if self.turns and self.turns[-1].speaker == "person":
            raise UserError("the model has not written its message: retry, or undo")
        if not text.strip():
            raise UserError("the message is empty: write some text")
        self.turns.append(Turn("person", text, self.voice.check(reading)))

    def reply(self, text: str) -> None:
        """Add what the model wrote, also if it was stopped."""
        assert self.turns[-1].speaker == "person", "the model speaks after the person"
        self.turns.append(Turn("model", text, self.turns[-1].reading))

    def retract_reply(self) -> None:
        """Take the model's last message back, so that it writes another. Raises `UserError` if there is none."""
        if not self.turns:
            raise UserError("nothing was said yet")
        if self.turns[-1].speaker == "model":
            self.turns.pop()

    def undo(self) -> str:
        """Take the last message of the person back, with the reply; return it. Raises `UserError` if there is none."""
        self.retract_reply()
        return self.turns.pop().text

    def clear(self) -> None:
        """Forget all that was said."""
        self.turns.clear()

    @property
    def in_order(self) -> list[Turn]:
        """Return what was said in the order of time: turns that were written at the front come first, last said first.

        Of two turns of one exchange at the front, the model's comes before the person's.
        """
        return [self.turns[said] for said in self._order]

    @property
    def document(self) -> list[tuple[str, Turn]]:
        """Return what was said to a model of documents in the order of time, each with the text that joins it."""
        order = self._order
        later = [self.turns[max(pair)] for pair in pairwise(order)]
        joints = ["", *("" if turn.speaker == "model" else SEPARATOR for turn in later)]
        return [(joint, self.turns[said]) for joint, said in zip(joints, order, strict=False)]

    @property
    def _order(self) -> list[int]:
        """Indices of the turns in the order of time."""
        at_front = [self.voice.writes_at_front(turn.reading) for turn in self.turns]
        front = [said for said, first in enumerate(at_front) if first]
        return [*reversed(front), *(said for said, first in enumerate(at_front) if not first)]

    @property
    def messages(self) -> Conversation:
        """Return what was said as a conversation, in the order of time.

        Where the model asks, what the person wrote are answers.
        """
        return [Message(self._role(turn), turn.text) for turn in self.in_order]

    def _role(self, turn: Turn) -> Literal["user", "assistant"]:
        asks = self.voice.manner(turn.reading) == "asks"
        return "assistant" if (turn.speaker == "model") != asks else "user"

    # ---- what the model is given ----

    def prompt(self, room: int) -> Fitted:
        """Return the prompt for the model's next message, in at most `room` ids.

        Messages that do not fit are left out in whole turns, those farthest from where the model writes first; in
        direction of time the oldest where it answers, the latest where it asks. Of a document the tokens farthest from
        there are left out. Raises `UserError` if the person's last message alone does not fit.
        """
        assert self.turns[-1].speaker == "person", "the person has not spoken"
        reading = self.turns[-1].reading
        if self.voice.on_documents:
            text = "".join(joint + turn.text for joint, turn in self.document)
            return document_prompt(text, reading, self.voice.direction, self.tokenizer, room)
        whole = self._without(0, reading)
        if len(whole.ids) <= room:
            return Fitted(whole, 0)
        # the more is left out, the shorter: a long talk is laid out a few times, not once for each turn
        drops = range(2, len(self.turns), 2)
        at = bisect_left(drops, True, key=lambda dropped: len(self._without(dropped, reading).ids) <= room)
        if at < len(drops):
            return Fitted(self._without(drops[at], reading), drops[at])
        alone = len(self._without(len(self.turns) - 1, reading).ids)
        raise UserError(f"the message takes {alone} tokens, and the model has room for {room}: shorten it")

    def _without(self, dropped: int, reading: str) -> Prompt:
        """Return the prompt without the messages that are farthest from where the model writes."""
        messages = self.messages
        kept = messages[: len(messages) - dropped] if self.voice.writes_at_front(reading) else messages[dropped:]
        return build_prompt(kept, reading, self.voice.direction, self.voice.reversal, self.tokenizer)

    def banned(self, prompt: Prompt) -> frozenset[int]:
        """Return the special tokens that no message holds: all but the one that closes it."""
        return frozenset(self.tokenizer.specials.values()) - {prompt.stop}


def document_prompt(text: str, reading: str, direction: str, tokenizer: Tokenizer, room: int) -> Fitted:
    """Return the prompt for a model of documents, in at most `room` ids: the text that it goes on from.

    Tokens that do not fit are left out, those farthest from where the model writes. Without text, it writes a document
    from nothing.
    """
    head = [tokenizer.bos]
    if is_marked(direction):
        head.append(getattr(tokenizer, reading))
    ids = tokenizer.encode(text).astype(np.int64)
    dropped = max(0, len(ids) - (room - len(head)))
    kept = ids[: len(ids) - dropped] if is_mirrored(reading) else ids[dropped:]
    return Fitted(Prompt(head + arrange(kept, reading, len(kept)).tolist(), tokenizer.bos), dropped)


def prompt_room(sequence_length: int, max_tokens: int) -> int:
    """Return the most ids of a prompt, so that the row has room for the answer: `max_tokens`, or half of the row."""
    return sequence_length + 1 - max(1, min(max_tokens, sequence_length // 2))


def from_talk(voice: Voice, tokenizer: Tokenizer, turns: Sequence[Turn]) -> Dialogue:
    """Return the dialogue of turns, given in the order of the talk. Raises `UserError` as `Dialogue.say` does."""
    dialogue = Dialogue(voice, tokenizer)
    for turn in turns:
        if turn.speaker == "person":
            dialogue.say(turn.text, turn.reading)
        else:
            dialogue.reply(turn.text)
    return dialogue

"""Conversations: checked, rendered to token ids, laid out in a direction, with their loss mask.

Rendered, in reading order and without BOS, a conversation is

    <|user_start|> .. <|user_end|> <|assistant_start|> .. <|assistant_end|> <|user_start|> ..

A direction lays this out as it does any text (`direction.py`). `reversal` says what is reversed. With `whole` it is
the conversation as one, markers too: a model that reads backward is given an ending and writes what came before. With
`turns` it is the text of each message, while the messages keep their order: the model answers too, writing each
answer from its end. The loss mask follows from the ids alone, so that training, evaluation, RL and chat cannot
disagree about it.

Axes: S segments, N tokens, P parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from bwlm.config import Reversal
from bwlm.directions import READINGS, is_marked
from bwlm.errors import Unusable, UserError, nearest
from bwlm.format import json_kind
from bwlm.text.direction import BACKWARD, Ints, Layout, Rows, arrange, is_mirrored, restore
from bwlm.text.tokenizer import Tokenizer

Role = Literal["user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)
_KNOWN = ("system", *ROLES)

TokenIds = NDArray[np.uint32]


class Message(NamedTuple):
    """Message of a conversation, without its markers."""

    role: Role
    content: str


Conversation = list[Message]


@dataclass(frozen=True)
class TurnIds:
    """Ids of the special tokens around messages."""

    user_start: int
    user_end: int
    assistant_start: int
    assistant_end: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> TurnIds:
        """Return the ids that a tokenizer gives to these special tokens."""
        return cls(*(tokenizer.specials[f"<|{role}_{edge}|>"] for role in ROLES for edge in ("start", "end")))

    def around(self, role: Role) -> tuple[int, int]:
        """Return (start, end), the markers around a message of `role`."""
        return (self.user_start, self.user_end) if role == "user" else (self.assistant_start, self.assistant_end)

    def markers(self, tokens: Ints) -> NDArray[np.bool_]:
        """Return [N], true where a token is one of these markers."""
        return np.isin(tokens, astuple(self))


# ---- checking ----


def check_conversation(messages: Any, where: str) -> Conversation:
    """Return the messages of a conversation from a file: user and assistant in turn, from the first to the last.

    A system message may come first and becomes the beginning of the user's message, as in nanochat; an empty one
    counts as none. Raises `Unusable` that begins with `where` (file, row and the field of the messages) and names the
    message and the fix.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise Unusable(f"{where}: must be a list of messages (found {json_kind(messages)})", "no list of messages")
    checked = [_message(message, f"{where}[{index}]") for index, message in enumerate(messages)]
    system = checked[0][1] if checked and checked[0][0] == "system" else None
    first = 0 if system is None else 1
    conversation = [Message(role, content) for role, content in checked[first:]]  # type: ignore[arg-type]
    _check_roles(conversation, where, first)
    if system and system.strip():
        conversation[0] = Message("user", f"{system}\n\n{conversation[0].content}")
    return conversation


def check_turns(conversation: Conversation, where: str, first: int = 0) -> None:
    """Raise `Unusable` where one role speaks twice in a row; `first` is the index of the first message."""
    for index, (before, after) in enumerate(itertools.pairwise(conversation), start=first + 1):
        if before.role == after.role:
            raise Unusable(
                f"{where}[{index}].role: {after.role} again: join the two messages, or add one between",
                "one role twice in a row",
            )


def _check_roles(conversation: Conversation, where: str, first: int) -> None:
    for index, message in enumerate(conversation, start=first):
        if message.role not in ROLES:
            raise Unusable(
                f"{where}[{index}].role: {message.role}: only the first message may be one: move it, or remove it",
                "system message after the first message",
            )
    check_turns(conversation, where, first)
    if not conversation:
        raise Unusable(f"{where}: empty: give at least a question and an answer", "empty conversation")
    begin, end = conversation[0].role, conversation[-1].role
    if (begin, end) != ROLES:
        fault = "ends with the user" if begin == "user" else "begins with the assistant"
        advice = "begin with the user and end with the assistant"
        raise Unusable(f"{where}: from {begin} to {end}: {advice}", fault)


def _message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        told = f"{where}: must be an object with role and content (found {json_kind(message)})"
        raise Unusable(told, "message without a role")
    for name, fault in (("role", "message without a role"), ("content", "message without text")):
        if not isinstance(message.get(name), str):
            raise Unusable(f"{where}.{name}: must be a string (found {json_kind(message.get(name))})", fault)
    role, content = message["role"], message["content"]
    if role not in _KNOWN:
        told = f"{role[:40]!r} is not one of {', '.join(_KNOWN)}{nearest(role, _KNOWN)}"
        raise Unusable(f"{where}.role: {told}", "unknown role")
    if role != "system" and not content.strip():
        raise Unusable(f"{where}.content: empty: fill it, or remove the conversation", "message without text")
    return role, content


# ---- rendering ----


def render(conversation: Conversation, tokenizer: Tokenizer) -> TokenIds:
    """Return the ids of a conversation in reading order, without BOS. Any content of a message is ordinary text."""
    turns = TurnIds.from_tokenizer(tokenizer)
    parts: list[TokenIds] = []
    for role, content in conversation:
        start, end = turns.around(role)
        parts += [np.array([start], np.uint32), tokenizer.encode(content), np.array([end], np.uint32)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def read_back(ids: Ints, tokenizer: Tokenizer) -> Conversation | None:
    """Return the conversation that `render` turned into ids; None if it was cut or is only a piece."""
    turns = TurnIds.from_tokenizer(tokenizer)
    edges = np.flatnonzero(turns.markers(ids)).tolist()
    conversation = [
        Message(ROLES[index % 2], tokenizer.decode(ids[start + 1 : end]))  # type: ignore[arg-type]
        for index, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=False))
    ]
    expected = [edge for message in conversation for edge in turns.around(message.role)]
    whole = bool(conversation) and len(conversation) % 2 == 0 and edges[0] == 0 and edges[-1] == len(ids) - 1
    return conversation if whole and ids[edges].tolist() == expected else None


def cut_to(ids: TokenIds, room: int, turns: TurnIds) -> TokenIds | None:
    """Return a rendered conversation in at most `room` tokens, or None where too little of it fits.

    It ends after the last answer that fits whole. If even the first answer does not fit, that answer loses its end
    and its end marker: nothing then says that it ended there. If the first question fills the room, nothing is left
    to learn.
    """
    if len(ids) <= room:
        return ids
    kept = ids[:room]
    ends = np.flatnonzero(kept == turns.assistant_end)
    if len(ends):
        return kept[: ends[-1] + 1]
    return kept if (kept[:-1] == turns.assistant_start).any() else None


# ---- what is turned around, and what is written ----


def parts_of(tokens: Ints, lengths: Ints, turns: TurnIds) -> Ints:
    """Return [P], the lengths of the parts that `turns` reverses: each marker, and each text between two markers.

    `lengths` are those of the segments that hold the tokens.
    """
    begins = turns.markers(tokens)
    begins[1:] |= begins[:-1].copy()
    begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return np.diff(np.append(np.flatnonzero(begins), len(tokens)))


def predicts_user_turn(reading: str, reversal: Reversal) -> bool:
    """Return true if a model with this reading writes the user's message, given what follows, instead of an answer."""
    return is_mirrored(reading, reversal)


def loss_mask(tokens: Ints, lengths: Ints, reading: Ints, reversal: Reversal, turns: TurnIds) -> NDArray[np.bool_]:
    """Return the loss mask [N]: true for the text that the model's role writes, and for the marker that closes it.

    `tokens` are in reading order, segment after segment; `reading` is [S]. Forward models are trained on assistant
    text and `<|assistant_end|>`. Models that read a whole conversation backward are trained on user text and
    `<|user_start|>`, which comes last there. With `turns`, a backward reading of an answer whose end was cut off
    begins in its middle: that first token is no target.
    """
    marker = turns.markers(tokens)
    place = np.arange(len(tokens))
    last = np.maximum.accumulate(np.where(marker, place, -1))
    known = last >= np.repeat(np.cumsum(lengths) - lengths, lengths)
    opened = np.where(known, tokens[last], -1)
    answer = (~marker & (opened == turns.assistant_start)) | (tokens == turns.assistant_end)
    question = (~marker & (opened == turns.user_start)) | (tokens == turns.user_start)
    asking = np.repeat((reading == BACKWARD) & (reversal == "whole"), lengths)
    mask: NDArray[np.bool_] = np.where(asking, question, answer)
    if reversal == "turns":
        ends = np.cumsum(lengths)[(reading == BACKWARD) & (lengths > 0)] - 1
        mask[ends[~marker[ends]]] = False
    return mask


@dataclass(frozen=True)
class TurnLayout:
    """Layout of conversations, beyond that of documents: the arguments that it adds to `lay_out`."""

    turns: TurnIds
    reversal: Reversal
    supervised: bool
    """True if only what the model writes is a target; else every token is one, as in documents."""


def row_layout(name: str, rows: Rows, reading: Ints, turns: TurnLayout | None) -> Layout:
    """Return the layout of rows of conversations, or without `turns` of documents.

    `name` is the direction of training, or the reading of an evaluation; `reading` [S] is that of each segment.
    """
    if turns is None:
        return Layout(is_mirrored(name))
    by_turns = turns.reversal == "turns"
    return Layout(
        is_mirrored(name, turns.reversal),
        parts_of(rows.tokens, rows.lengths, turns.turns) if by_turns else None,
        loss_mask(rows.tokens, rows.lengths, reading, turns.reversal, turns.turns) if turns.supervised else None,
    )


# ---- what a model is given, and gives back ----


class Prompt(NamedTuple):
    """Ids that a model reads before it writes a message."""

    ids: list[int]
    stop: int
    """Marker that closes the message."""


def build_prompt(
    conversation: Conversation, reading: str, direction: str, reversal: Reversal, tokenizer: Tokenizer
) -> Prompt:
    """Return the prompt for a model of `direction` that reads in `reading`.

    A model that answers is given a conversation that ends with the user; a model that writes the user's messages is
    given one that begins with the assistant. Raises `UserError` for any other conversation.
    """
    turns, asking = TurnIds.from_tokenizer(tokenizer), predicts_user_turn(reading, reversal)
    check_turns(conversation, "conversation: messages")
    edge, role = (0, "assistant") if asking else (-1, "user")
    if not conversation or conversation[edge].role != role:
        raise UserError(f"conversation: must {'begin' if asking else 'end'} with the {role}: add a message")
    if asking:
        ids, stop = np.append(np.uint32(turns.user_end), render(conversation, tokenizer)), turns.user_start
    else:
        ids, stop = np.append(render(conversation, tokenizer), np.uint32(turns.assistant_start)), turns.assistant_end
    head = [tokenizer.bos]
    if is_marked(direction):
        head.append(tokenizer.forward if reading == "forward" else tokenizer.backward)
    return Prompt(head + arrange_conversation(ids.astype(np.int64), reading, reversal, turns).tolist(), stop)


def arrange_conversation(tokens: Ints, reading: str, reversal: Reversal, turns: TurnIds) -> Ints:
    """Return a conversation's tokens in the order in which a model reads them."""
    return arrange(tokens, reading, len(tokens), _parts(tokens, reversal, turns))


def restore_conversation(arranged: Ints, reading: str, reversal: Reversal, turns: TurnIds) -> Ints:
    """Return arranged tokens in reading order: the inverse of `arrange_conversation`."""
    return restore(arranged, reading, len(arranged), _parts(arranged, reversal, turns))


def _parts(tokens: Ints, reversal: Reversal, turns: TurnIds) -> Ints | None:
    return parts_of(tokens, np.array([len(tokens)]), turns) if reversal == "turns" else None


def read_message(written_ids: Sequence[int], reading: str, tokenizer: Tokenizer) -> str:
    """Return the text of a message that a model wrote, in reading order and without its closing marker."""
    assert reading in READINGS
    specials = set(tokenizer.specials.values())
    text = np.array([token for token in written_ids if token not in specials], dtype=np.int64)
    return tokenizer.decode(restore(text, reading, len(text)))

"""Mixtures: every conversation once and whole, weights as rows of an epoch, what is cut or refused, and the cache."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bwlm.errors import UserError
from bwlm.text.batches import row_plan
from bwlm.text.conversation import Conversation, TurnIds, check_conversation, cut_to, read_back, render
from bwlm.text.direction import HEAD_SLOTS, IGNORED, SpecialIds, lay_out
from bwlm.text.mixture import SPLITS, ConversationSource, prepare_mixture
from bwlm.text.overlap import Overlap
from bwlm.text.packing import Job, PackedRows, PackResult, room_of
from bwlm.text.plan import MixturePlan
from bwlm.text.prepare import Prepared
from bwlm.text.tokenizer import Tokenizer
from tests.conftest import english, run_here

Messages = list[dict[str, str]]
WIDTH = 128
TRAIN, VALIDATION = 40, 9
"""Conversations of a source, unless told otherwise."""


def said(*contents: str) -> Messages:
    """A user's and an assistant's messages in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def talks(name: str, count: int, longest: int = 6) -> list[Messages]:
    """Conversations of one to three exchanges, short enough for a row, all of them different."""
    rng = random.Random(name)
    return [
        said(*(f"{english(rng, rng.randint(1, longest))} {index}" for _ in range(2 * rng.randint(1, 3))))
        for index in range(count)
    ]


def source(name: str, weight: float = 1.0, parts: int = 1, **splits: list[Any]) -> ConversationSource:
    """A source with these conversations; its key follows from them, as a task's does."""
    held = {"train": talks(f"{name} t", TRAIN, 3), "validation": talks(f"{name} v", VALIDATION, 3)} | splits
    key = sha256(json.dumps([name, held], default=str).encode()).hexdigest()[:16]
    return ConversationSource(name, weight, key, lambda split: iter(held[split]), parts)


class Mixer:
    """Prepares mixtures in one storage, packing in this process."""

    def __init__(self, tokenizer_folder: Path, storage: Path) -> None:
        self.tokenizer_folder, self.storage = tokenizer_folder, storage
        self.told: list[str] = []
        self.packed: list[str] = []

    def __call__(
        self, *sources: ConversationSource, whole: bool = True, width: int = WIDTH, tokenizer: Path | None = None
    ) -> Prepared:
        folder = tokenizer or self.tokenizer_folder
        return prepare_mixture(list(sources), folder, width, whole, self.storage, self._run, self.told.append)

    def _run(self, jobs: list[Job], work: Callable[[Job], PackResult]) -> list[PackResult]:
        self.packed += [f"{job.split} {job.index}" for job in jobs]
        return run_here(jobs, work)

    def refusal(self, *sources: ConversationSource, whole: bool = True) -> str:
        """What is told, in one line; nothing may be left behind of a mixture that is refused as a whole."""
        with pytest.raises(UserError) as told:
            self(*sources, whole=whole)
        assert "\n" not in str(told.value)
        assert len(str(told.value)) < 400
        return str(told.value)


@pytest.fixture
def mix(prepared: Prepared, tmp_path: Path) -> Mixer:
    return Mixer(prepared.tokenizer_folder, tmp_path / "storage")


def segments(prepared: Prepared, split: str) -> list[tuple[int, int, np.ndarray]]:
    """(row, document, ids in reading order) of every segment."""
    packed = PackedRows(prepared.folder, split)
    rows = packed.take(np.arange(len(packed)))
    ids = np.split(rows.tokens, np.cumsum(rows.lengths)[:-1])
    return list(zip(rows.row.tolist(), rows.document.tolist(), ids, strict=True))


def conversations(prepared: Prepared, split: str) -> list[Conversation]:
    found = [read_back(ids, prepared.tokenizer) for _, _, ids in segments(prepared, split)]
    assert all(conversation is not None for conversation in found)
    return [conversation for conversation in found if conversation is not None]


def expected(one: ConversationSource, split: Any) -> list[Conversation]:
    return [check_conversation(messages, "x") for messages in one.read(split)]


def in_order(found: list[Conversation]) -> list[Conversation]:
    return sorted(found, key=str)


# ---- every conversation, once and whole ----


@pytest.mark.parametrize("split", SPLITS)
def test_every_conversation_is_in_exactly_one_row_and_comes_back(mix: Mixer, split: str) -> None:
    sources = [source("one"), source("two", 3.0), source("three", 0.2)]
    mixed = mix(*sources)
    given = [conversation for one in sources for conversation in expected(one, split)]
    assert in_order(conversations(mixed, split)) == in_order(given)
    counted = getattr(mixed.manifest, split)
    assert counted.total("documents") == counted.total("segments") == len(given)
    assert counted.total("cut") == counted.total("left_out") == 0
    texts = [message.content for conversation in given for message in conversation]
    assert counted.total("bytes") == sum(len(text.encode()) for text in texts)


def test_a_row_holds_conversations_of_one_source_and_fits_into_every_direction(mix: Mixer) -> None:
    sources = [source("one"), source("two")]
    mixed = mix(*sources)
    packed, special = PackedRows(mixed.folder, "train"), SpecialIds.from_tokenizer(mixed.tokenizer)
    rows = packed.take(np.arange(len(packed)))
    used = np.bincount(rows.row, rows.lengths + HEAD_SLOTS)
    assert used.max() <= room_of(WIDTH)
    assert rows.whole.all()
    laid = lay_out(rows, np.ones(len(rows.lengths), dtype=np.int64), True, special, packed.width)
    assert (laid.ids == special.bos).sum() == len(rows.lengths) + rows.count
    for one, (first, last) in zip(sources, packed.source_rows(), strict=True):
        ids = [ids for row, _, ids in segments(mixed, "train") if first <= row < last]
        assert in_order([read_back(of, mixed.tokenizer) for of in ids]) == in_order(expected(one, "train"))  # type: ignore[misc]


def test_documents_have_one_id_each_whatever_the_mixture(mix: Mixer) -> None:
    one, two = source("one"), source("two")
    both = {document: read_back(ids, mix(one, two).tokenizer) for _, document, ids in segments(mix(one, two), "train")}
    assert len(both) == 2 * TRAIN
    for alone in (one, two):
        for _, document, ids in segments(mix(alone), "train"):
            assert both[document] == read_back(ids, mix(alone).tokenizer)
    held_out = {document for _, document, _ in segments(mix(one), "validation")}
    assert len(held_out) == VALIDATION


def test_the_parts_in_which_a_source_is_packed_do_not_matter(mix: Mixer) -> None:
    """The same conversations with the same ids; only which of them share a row differs."""

    def of(parts: int) -> dict[int, Conversation | None]:
        mixed = mix(source("files", parts=parts), width=WIDTH - parts)  # packed anew
        assert len(mixed.manifest.train.shards) == parts
        assert mixed.manifest.train.total("documents") == mixed.manifest.train.total("segments") == TRAIN
        return {document: read_back(ids, mixed.tokenizer) for _, document, ids in segments(mixed, "train")}

    assert of(1) == of(4)
    assert mix.packed == ["train 0", "validation 0", *(f"train {part}" for part in range(4)), "validation 0"]


def test_mid_training_splits_conversations_over_rows_and_loses_nothing(mix: Mixer) -> None:
    one = source("one", train=talks("long", 30, 60))
    mixed = mix(one, whole=False)
    packed = PackedRows(mixed.folder, "train")
    rows = packed.take(np.arange(len(packed)))
    found: dict[int, list[int]] = {}
    for _, document, ids in segments(mixed, "train"):
        found.setdefault(document, []).extend(ids.tolist())
    given = [render(conversation, mixed.tokenizer).tolist() for conversation in expected(one, "train")]
    assert list(found.values()) == given
    assert 0 < rows.whole.sum() < len(rows.whole)
    assert not mixed.manifest.train.total("cut")


def test_conversations_that_validate_in_one_source_and_are_trained_on_in_another_are_told(mix: Mixer) -> None:
    one = source("one")
    two = source("two", train=[*talks("two t", TRAIN, 3), *list(one.read("validation"))[:4]])
    assert mix(one).manifest.overlap == Overlap(0, 0, VALIDATION)
    assert not any("stand in the training text" in line for line in mix.told)
    assert mix(one, two).manifest.overlap == Overlap(train=4, validation=4, of_validation=2 * VALIDATION)
    told = "4 of 18 validation conversations stand in the training text too (4 conversations there)"
    assert mix.told[-1] == told
    mix.told.clear()
    mix(one, two)
    assert mix.told == [told]


def test_what_a_source_leaves_out_is_told(mix: Mixer) -> None:
    one = replace(source("one"), notes=("test.jsonl: left for evaluation",))
    mix(one)
    assert mix.told[0] == "test.jsonl: left for evaluation"


# ---- weights ----


def rows_of_epoch(mixed: Prepared, epoch: int, seed: int = 0) -> list[int]:
    """The rows that an epoch takes, in the order in which it does, read one at a time."""
    plan = row_plan(str(mixed.folder), 1, seed)
    assert isinstance(plan, MixturePlan)
    size = sum(plan.drawn)
    return [int(plan.at(step)[0][0]) for step in range(epoch * size, (epoch + 1) * size)]


def test_weights_are_how_often_a_row_comes_in_an_epoch(mix: Mixer) -> None:
    mixed = mix(source("once"), source("often", 3.0), source("rarely", 0.25))
    packed = PackedRows(mixed.folder, "train")
    once, often, rarely = ([*range(first, last)] for first, last in packed.source_rows())
    for epoch in range(4):
        counted = Counter(rows_of_epoch(mixed, epoch))
        assert [counted[row] for row in once] == [1] * len(once)
        assert [counted[row] for row in often] == [3] * len(often)
        assert sum(counted[row] for row in rarely) == round(len(rarely) / 4)
    # what an epoch left out comes in those after it, before anything comes twice
    four = Counter(row for epoch in range(4) for row in rows_of_epoch(mixed, epoch) if row in rarely)
    assert max(four.values()) - min(four[row] for row in rarely) <= 1


def test_a_source_comes_in_every_epoch_however_small_its_weight(mix: Mixer) -> None:
    mixed = mix(source("much"), source("little", 0.001))
    [_, (first, last)] = PackedRows(mixed.folder, "train").source_rows()
    assert [sum(first <= row < last for row in rows_of_epoch(mixed, epoch)) for epoch in range(3)] == [1, 1, 1]


def test_a_row_that_comes_again_is_in_another_epoch_of_its_source(mix: Mixer) -> None:
    """Which direction a bidirectional model reads it in is drawn anew each time."""
    plan = row_plan(str(mix(source("often", 3.0)).folder), 1, 0)
    seen: dict[int, list[int]] = {}
    for step in range(plan.rows[0] * 6):  # type: ignore[index]
        [row], [epoch] = plan.at(step)
        seen.setdefault(int(row), []).append(int(epoch))
    assert all(sorted(epochs) == list(range(6)) for epochs in seen.values())


def test_the_order_is_mixed_and_each_seed_and_epoch_has_its_own(mix: Mixer) -> None:
    mixed = mix(source("one"), source("two"))
    orders = [rows_of_epoch(mixed, epoch, seed) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    [(_, border), _] = PackedRows(mixed.folder, "train").source_rows()
    first_half = orders[0][: len(orders[0]) // 2]
    assert 0 < sum(row < border for row in first_half) < len(first_half)


def test_each_source_has_an_order_of_its_own(mix: Mixer) -> None:
    """Of two files that hold the same in two languages, say, an epoch must not take the same halves."""
    mixed = mix(*(source(name, 0.5, train=[said("hi", str(number)) for number in range(300)]) for name in "ab"))
    [(_, border), (_, last)] = PackedRows(mixed.folder, "train").source_rows()
    assert border == last - border > 8
    order = rows_of_epoch(mixed, 0)
    halves = {row for row in order if row < border}, {row - border for row in order if row >= border}
    assert len(halves[0]) == len(halves[1]) == round(border / 2)
    assert halves[0] != halves[1]


# ---- the cache ----


def test_what_is_packed_is_packed_once_and_mixtures_share_it(mix: Mixer) -> None:
    one, two = source("one"), source("two")
    first = mix(one, two)
    packed = list(mix.packed)
    assert mix(one, two).folder == first.folder
    heavier = mix(source("one", 2.0), two)
    alone = mix(two)
    assert mix.packed == packed
    assert len({first.folder, heavier.folder, alone.folder}) == 3
    shards = [{PackedRows(mixed.folder, "train")._files[0] for mixed in (first, heavier)}]
    assert all(len(files) == 1 for files in shards)
    mix(one, two, whole=False)
    mix(one, two, width=WIDTH - 1)
    assert len(mix.packed) == 3 * len(packed)


def test_the_digest_sees_text_weights_order_and_tokenizer(mix: Mixer, tmp_path: Path) -> None:
    other = Tokenizer({bytes([byte]): byte for byte in range(256)})
    other.save(tmp_path / "bytes")
    short = source("short", train=[GOOD], validation=[GOOD])
    digests = {
        "as it is": mix(source("one"), source("two")),
        "a weight": mix(source("one"), source("two", 2.0)),
        "another order": mix(source("two"), source("one")),
        "text": mix(source("one"), source("two", train=talks("else", TRAIN, 3))),
        "validation": mix(source("one"), source("two", validation=talks("else", VALIDATION, 3))),
        "a source less": mix(source("one")),
        "split over rows": mix(source("one"), source("two"), whole=False),
        "tokenizer": mix(short, tokenizer=tmp_path / "bytes"),
        "not that tokenizer": mix(short),
    }
    assert len({mixed.manifest.digest for mixed in digests.values()}) == len(digests)


def test_weights_that_draw_equally_many_rows_are_told_apart(mix: Mixer) -> None:
    """RL draws problems, of which there are more than rows: what it reads must be the weight that was asked for."""
    few = [said("hi", str(number)) for number in range(10)]
    one, more = (mix(source("few", weight, train=few)) for weight in (1.0, 1.2))
    assert len(PackedRows(one.folder, "train")) == 1
    assert one.manifest.sources[0].drawn == more.manifest.sources[0].drawn
    assert one.manifest.digest != more.manifest.digest
    for mixed, weight in ((one, 1.0), (more, 1.2)):
        assert PackedRows(mixed.folder, "train").sources[0].weight == weight


# ---- what is refused ----

GOOD = said("hi", "hello")


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([*said("hi"), *said("hello", "x")], "messages[1].role: user again"),
        ([], "messages: empty"),
        ([{"role": "teacher", "content": "hi"}], "messages[0].role: 'teacher' is not one of"),
        ([{"role": "usr", "content": "hi"}], "(did you mean 'user'?)"),
        ("hi", "must be a list of messages (found a string)"),
        (5, "must be a list of messages (found 5)"),
        (None, "must be a list of messages (found nothing)"),
        ({"role": "user", "content": "hi"}, "must be a list of messages (found an object)"),
        ([{"role": "user", "content": ["hi"]}], "messages[0].content: must be a string (found a list)"),
        ([{"role": "user"}], "messages[0].content: must be a string (found nothing)"),
        (["hi"], "messages[0]: must be an object"),
        (said("hi"), "from user to user: begin with the user and end with the assistant"),
        (said("hi", "  "), "messages[1].content: empty"),
    ],
    ids=str,
)
@pytest.mark.parametrize("split", SPLITS)
def test_a_malformed_conversation_is_one_line_and_leaves_nothing(
    mix: Mixer, split: str, messages: Any, told: str
) -> None:
    broken = source("talks.jsonl", parts=2, **{split: [GOOD, GOOD, messages, GOOD]})
    for whole in (True, False):
        line = mix.refusal(broken, whole=whole)
        assert line.startswith(f"talks.jsonl: {split} conversation 2: ")
        assert told in line
    assert not mix.storage.exists()


def test_what_a_reader_refuses_leaves_nothing_either(mix: Mixer) -> None:
    def read(split: str) -> Iterator[Any]:
        yield GOOD
        raise UserError("talks.jsonl: line 2: not valid JSON")

    assert mix.refusal(ConversationSource("talks", 1.0, "0" * 16, read)) == "talks.jsonl: line 2: not valid JSON"
    assert not mix.storage.exists()


def test_a_source_is_checked_once_before_it_is_packed(mix: Mixer) -> None:
    def refuse(_: Any) -> None:
        raise UserError("talks.json: 2 of 9 conversations cannot be used")

    assert mix.refusal(replace(source("talks"), check=refuse)) == "talks.json: 2 of 9 conversations cannot be used"
    assert not mix.packed
    assert not mix.storage.exists()
    mix(replace(source("talks"), check=lambda tell: tell("1 of 9 conversations left out")))
    assert mix.told == ["1 of 9 conversations left out", "rendering and packing the conversations of talks"]
    mix(replace(source("talks"), check=refuse))  # from the cache


def test_a_refused_source_leaves_the_others_whole(mix: Mixer) -> None:
    """What was packed before it is of use to the next launch; of the refused one and the mixture nothing is left."""
    good = source("good")
    mix.refusal(good, source("bad", train=[[]]))
    [folder] = (mix.storage / "cache" / "packed").iterdir()
    packed = list(mix.packed)
    assert [path.name for path in folder.iterdir() if path.suffix == ".json"] == ["manifest.json"]
    mix(good)
    assert mix.packed == packed


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_without_conversations_is_refused(mix: Mixer, split: str) -> None:
    line = mix.refusal(source("talks", **{split: []}))
    assert line == (
        f"data.mixture: talks: has no {split} conversations: give some for training and some for validation"
    )
    assert not mix.storage.exists()


def test_a_split_of_which_nothing_fits_is_refused(mix: Mixer) -> None:
    line = mix.refusal(source("talks", train=[said("long " * 200, "x")] * 3))
    assert line.startswith("data.mixture: talks: none of its 3 train conversations fits into 128 tokens: give shorter")
    assert not mix.storage.exists()


# ---- what is too long ----


def test_if_most_conversations_are_cut_the_way_out_is_told(mix: Mixer) -> None:
    mix(source("talks", train=[GOOD, *[said("why", "long " * 200)] * 2]))
    assert mix.told[-1] == (
        "talks: 2 of 3 train conversations are longer than a row of 128 tokens and were cut: "
        "begin from a run with a longer model.sequence_length"
    )


def test_a_megabyte_is_cut_or_left_out_counted_and_told(mix: Mixer) -> None:
    megabyte = english(random.Random(0), 250_000)
    assert len(megabyte.encode()) > 10**6
    long_answer, long_question = said("why", megabyte), said(megabyte, "because")
    long_end = said("a", "b", "c", megabyte)
    mixed = mix(source("talks", train=[GOOD, long_answer, long_question, long_end, GOOD]))
    counted = mixed.manifest.train
    assert [counted.total(name) for name in ("documents", "cut", "left_out", "segments")] == [5, 2, 1, 4]
    assert mix.told[-2:] == [
        "talks: 2 of 5 train conversations are longer than a row of 128 tokens and were cut",
        "talks: 1 of 5 train conversations left out: nothing to learn of them fits into a row of 128 tokens",
    ]
    turns, tokenizer = TurnIds.from_tokenizer(mixed.tokenizer), mixed.tokenizer
    found = {document & 0xFFFFFFFF: ids for _, document, ids in segments(mixed, "train")}
    assert sorted(found) == [0, 1, 3, 4]
    for index, messages in ((1, long_answer), (3, long_end)):
        rendered = render(check_conversation(messages, "x"), tokenizer)
        kept = cut_to(rendered, room_of(WIDTH) - HEAD_SLOTS, turns)
        assert found[index].tolist() == kept.tolist()  # type: ignore[union-attr]
    assert read_back(found[3], tokenizer) == check_conversation(said("a", "b"), "x")
    assert read_back(found[1], tokenizer) is None


def test_a_conversation_that_was_cut_has_no_end(mix: Mixer) -> None:
    """Nothing may be taught or scored of an end, or in the other direction of a beginning, that is none."""
    mixed = mix(source("talks", train=[said("a", "b", "c", "long " * 200), said("d", "e"), said("f", "g " * 9)]))
    packed, special = PackedRows(mixed.folder, "train"), SpecialIds.from_tokenizer(mixed.tokenizer)
    rows = packed.take(np.arange(len(packed)))
    cut = rows.document & 0xFFFFFFFF == 0
    assert rows.whole.tolist() == (~cut).tolist()
    assert rows.row[cut] == rows.row[1]  # something follows it in its row
    for reading in (0, 1):
        laid = lay_out(rows, np.full(len(rows.lengths), reading), False, special, packed.width)
        assert np.array_equal(laid.ends == IGNORED, cut)


def test_a_megabyte_of_mid_training_is_all_there_and_takes_no_time_to_speak_of(mix: Mixer) -> None:
    """A single word of a megabyte is the tokenizer's worst case, and many rows of one conversation the packing's."""
    for text in ("a" * 10**6, english(random.Random(0), 250_000)):
        mixed = mix(source(text[:5], train=[said("why", text)]), whole=False)
        assert mixed.manifest.train.total("bytes") == len(text.encode()) + 3
    assert mix.told == [f"rendering and packing the conversations of {text[:5]}" for text in ("a" * 10, text)]


def test_packed_rows_of_a_mixture_are_mapped_not_read(mix: Mixer) -> None:
    mixed = mix(*(source(name, train=talks(name, 400, 4)) for name in ("one", "two")))
    packed = PackedRows(mixed.folder, "train")
    before = pa.total_allocated_bytes()
    packed.take(np.array([0, len(packed) - 1]))
    assert pa.total_allocated_bytes() - before < 10**5

"""Facts stated in one order: nothing but the statements tells which names belong together, and none is swapped."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bwlm.config import DataSettings
from bwlm.text.corpus import find_corpus
from bwlm.text.reversal import BLOCK, FACTS, PLAIN, TEMPLATES, Fact, facts, reversal_key, statements
from bwlm.text.tokenizer import Tokenizer, train_tokenizer

DIGEST = "b7d8c62627e13070"
"""Other text under the same version would mix in caches: count up `FORMAT_VERSION`, then write its digest here."""

SPLITS = {"train": statements(False), "validation": statements(True)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tokenizer of grids/reversal.yaml."""
    return train_tokenizer(iter(SPLITS["train"]), 512)


def fact_of(statement: str) -> tuple[Fact, bool]:
    """Return the one fact whose names a statement holds, and whether A stands first."""
    (fact,) = [fact for fact in facts() if fact.a in statement and fact.b in statement]
    return fact, statement.index(fact.a) < statement.index(fact.b)


def blocks() -> list[tuple[Fact, ...]]:
    return [facts()[start : start + BLOCK] for start in range(0, FACTS, BLOCK)]


# ---- goldens ----


def test_first_facts() -> None:
    assert facts()[:2] == (
        Fact(0, "Lemor Devas", "the warden of Fasul"),
        Fact(1, "Medal Tehul", "the warden of Tufel"),
    )
    assert [fact.in_both_orders for fact in facts()[:12]] == [False] * 8 + [True] * 4
    assert [fact.a.startswith("the ") for fact in facts()[:12]] == [False] * 4 + [True] * 4 + [False] * 4


def test_statements_of_a_fact_that_is_stated_in_one_order() -> None:
    fact = Fact(1, "Ann", "the king")
    assert list(fact.statements(False)) == [
        " Ann is the king",
        " Ann is now the king",
        " Ann is still the king",
        " we know that Ann is the king",
        " they say that Ann is the king",
        " Ann is the king to this day",
        " Ann is the king and always was",
    ]
    assert list(fact.statements(True)) == [" Ann is also the king"]


def test_statements_of_a_fact_that_is_stated_in_both_orders() -> None:
    fact = Fact(8, "Ann", "the king")
    assert [statement for statement in fact.statements(False) if len(statement.split()) == 4] == [
        " Ann is the king",
        " the king is Ann",
    ]
    assert list(fact.statements(True)) == [" Ann is also the king", " the king is still Ann"]


def test_the_text_is_that_of_this_version() -> None:
    assert hashlib.sha256(json.dumps(SPLITS).encode()).hexdigest()[:16] == DIGEST


# ---- balance ----


def test_no_statement_has_an_order_that_training_does_not_state() -> None:
    seen = Counter()
    for statement in SPLITS["train"] + SPLITS["validation"]:
        fact, a_first = fact_of(statement)
        assert a_first or fact.in_both_orders, statement
        seen[fact.number, a_first] += 1
    assert set(seen.values()) == {len(TEMPLATES)}
    assert len(seen) == 256 + 2 * 128


def test_each_kind_of_fact_has_people_first_in_half_of_its_blocks() -> None:
    kinds = Counter((fact.in_both_orders, fact.a.startswith("the ")) for fact in facts())
    assert kinds == {(False, False): 128, (False, True): 128, (True, False): 64, (True, True): 64}


def test_names_of_a_block_differ_in_no_way_that_tells_them_apart() -> None:
    for block in blocks():
        assert len({fact.in_both_orders for fact in block}) == 1
        for names in ([fact.a for fact in block], [fact.b for fact in block]):
            assert len(set(names)) == BLOCK
            assert len({(len(name), name.rpartition(" ")[0] if "the " in name else "") for name in names}) == 1


def test_every_word_belongs_to_one_name() -> None:
    words = [word for fact in facts() for name in (fact.a, fact.b) for word in name.split() if word.istitle()]
    assert len(set(words)) == len(words) == 3 * FACTS


def test_validation_holds_one_statement_of_each_order_and_never_the_plain_one() -> None:
    assert not set(SPLITS["train"]) & set(SPLITS["validation"])
    held_out = [(fact.number, a_first) for fact, a_first in map(fact_of, SPLITS["validation"])]
    assert len(set(held_out)) == len(held_out) == 512
    plain = {PLAIN.format(*names) for fact in facts() for names in fact.orders}
    assert plain <= set(SPLITS["train"])


def test_each_template_but_the_plain_one_is_held_out_equally_often() -> None:
    middle = Counter(
        statement.replace(fact.a, "").replace(fact.b, "")
        for statement in SPLITS["validation"]
        for fact in [fact_of(statement)[0]]
    )
    assert len(middle) == len(TEMPLATES) - 1
    assert max(middle.values()) - min(middle.values()) <= 4


# ---- tokens and files ----


def test_a_name_is_the_same_several_tokens_wherever_it_stands(tokenizer: Tokenizer) -> None:
    names = {name: tokenizer.encode(f" {name}").tolist() for fact in facts() for name in (fact.a, fact.b)}
    assert min(map(len, names.values())) >= 4
    for statement in SPLITS["train"][::5]:
        ids = tokenizer.encode(statement).tolist()
        fact, _ = fact_of(statement)
        for name in (fact.a, fact.b):
            places = range(len(ids) - len(names[name]) + 1)
            assert any(ids[place : place + len(names[name])] == names[name] for place in places), statement


def test_the_corpus_is_found_by_its_name_and_written_once(tmp_path: Path) -> None:
    told: list[str] = []
    for _ in range(2):
        corpus = find_corpus(DataSettings(source="builtin:reversal"), tmp_path, told.append)
    folder = tmp_path / "corpora" / f"reversal-{reversal_key()}"
    assert [Path(shard.uri) for shard in (*corpus.train, *corpus.validation)] == [
        folder / "shard_00000.parquet",
        folder / "shard_00001.parquet",
    ]
    for shard, split in zip((*corpus.train, *corpus.validation), SPLITS.values(), strict=True):
        assert pq.read_table(shard.uri)["text"].to_pylist() == split
    assert told.count("writing 4096 documents of builtin:reversal") == 1

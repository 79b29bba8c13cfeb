"""Documents in both splits: exact duplicates are counted, others and empty ones are not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.config import Recipe
from bwlm.text.overlap import DocumentHashes, Overlap, count_overlap
from bwlm.text.packing import Manifest, PackedSplit
from bwlm.text.prepare import Pack, prepare

Documents = list[list[int]]
documents = st.lists(st.lists(st.integers(0, 2), max_size=2), max_size=8)


def write(folder: Path, name: str, shards: list[Documents]) -> list[Path]:
    paths = [folder / f"{name}_{index}.arrow" for index in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        hashes = DocumentHashes()
        for tokens in shard:
            hashes.add(np.array(tokens, dtype=np.uint32))
        hashes.save(path)
    return paths


@settings(derandomize=True, deadline=None, max_examples=100)
@given(train=st.lists(documents, max_size=3), validation=st.lists(documents, max_size=2))
def test_the_counts_are_those_of_a_multiset(
    train: list[Documents], validation: list[Documents], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hashes")
    found = count_overlap(write(folder, "train", train), write(folder, "validation", validation))
    left, right = (Counter(tuple(d) for shard in split for d in shard if d) for split in (train, validation))
    assert found == Overlap(
        sum(count for document, count in left.items() if document in right),
        sum(count for document, count in right.items() if document in left),
        right.total(),
    )


def test_what_is_told() -> None:
    assert Overlap(0, 0, 9).words() == Overlap(0, 0, 0).words() == ""
    assert Overlap(1, 3, 2000).words("conversation") == (
        "3 of 2,000 validation conversations stand in the training text too (1 conversation there)"
    )
    assert Overlap(4, 2, 2).words() == (
        "2 of 2 validation documents stand in the training text too (4 documents there): "
        "all of them, so a validation loss measures what a model remembers"
    )


def test_preparation_counts_and_tells(
    write_shards: Callable[..., Path], recipe_for: Callable[..., Recipe], pack_in_process: Pack, tmp_path: Path
) -> None:
    """No two shards are alike, but one validation document of three stands twice in training."""
    text = "the river and the stone of the winter village remember a quiet letter " * 40
    words = text.split()
    train = [" ".join(words[start : start + 30]) for start in range(0, 400, 7)]
    folder = write_shards(tmp_path / "text", [*train, "Known to both."], ["", "Known to both."],
                          ["Known to both.", "New.", "", "Newer."])  # fmt: skip
    content = recipe_for(folder).model_dump() | {"tokenizer": {"vocab_size": 264}}
    recipe, told = Recipe.model_validate(content), list[str]()
    found = prepare(recipe, tmp_path / "storage", pack_in_process, told.append)
    assert found.manifest.overlap == Overlap(train=2, validation=1, of_validation=3)
    assert told[-1] == "1 of 3 validation documents stand in the training text too (2 documents there)"
    told.clear()
    assert prepare(recipe, tmp_path / "storage", pack_in_process, told.append).manifest == found.manifest
    assert told[-1].startswith("1 of 3 validation documents"), "told also of rows that were packed before"


def test_a_manifest_from_before_documents_were_counted_is_read(tmp_path: Path) -> None:
    Manifest(8, 264, "", PackedSplit.from_shards([]), PackedSplit.from_shards([])).write(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    del content["overlap"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert Manifest.read(tmp_path).overlap is None

"""Preparing a corpus: once for all cells, anew when the text changes, and whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from bwlm import progress
from bwlm.config import Recipe
from bwlm.errors import UserError
from bwlm.text.corpus import Corpus
from bwlm.text.packing import Job, Manifest, PackedRows, PackResult
from bwlm.text.prepare import Pack, Prepared, bytes_per_token, get_tokenizer, prepare
from bwlm.text.stream import pack_corpus
from bwlm.text.tokenizer import Tokenizer

RecipeFor = Callable[..., Recipe]


class Packer:
    """Packs in this process and counts how often it is asked to."""

    def __init__(self, pack: Pack) -> None:
        self.calls, self._pack = 0, pack

    def __call__(self, corpus: Corpus, tokenizer_folder: Path, width: int, folder: Path) -> Manifest:
        self.calls += 1
        return self._pack(corpus, tokenizer_folder, width, folder)


@pytest.fixture
def packer(pack_in_process: Pack) -> Packer:
    return Packer(pack_in_process)


@pytest.fixture
def source(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus that a test may change."""
    return Path(shutil.copytree(corpus, tmp_path / "source"))


def with_(recipe: Recipe, section: str, **fields: Any) -> Recipe:
    content = recipe.model_dump()
    content[section] |= fields
    return Recipe.model_validate(content)


def quiet(_: str) -> None:
    pass


def test_what_was_prepared_is_found_again(source: Path, recipe_for: RecipeFor, packer: Packer, tmp_path: Path) -> None:
    said: list[str] = []
    first = prepare(recipe_for(source), tmp_path / "storage", packer, said.append)
    assert packer.calls == 1
    validation = f"validation: {source}/shard_00003.parquet (the last shard)"
    shared = first.manifest.overlap.words()
    assert shared, "the corpus holds documents of a word, some of them twice"
    assert said == [validation, "training a tokenizer of 400 tokens", "tokenizing and packing 4 shards", shared]
    again = prepare(recipe_for(source), tmp_path / "storage", packer, said.append)
    assert packer.calls == 1
    assert said[4:] == [validation, shared]
    assert again.folder == first.folder
    assert again.manifest == first.manifest
    assert again.tokenizer.digest == first.tokenizer.digest
    assert sorted(path.name for path in (tmp_path / "storage" / "cache").iterdir()) == ["packed", "tokenizers"]


def test_the_same_text_elsewhere_gives_the_same_digest(
    source: Path, prepared: Prepared, recipe_for: RecipeFor, packer: Packer, tmp_path: Path
) -> None:
    assert prepare(recipe_for(source), tmp_path / "storage", packer, quiet).manifest.digest == prepared.manifest.digest


def order_of(found: Prepared, split: str) -> list[int]:
    rows = PackedRows(found.folder, split)
    return list(dict.fromkeys(rows.take(np.arange(len(rows))).document.tolist()))


def test_documents_are_shuffled_inside_their_shard_unless_it_is_said_otherwise(
    source: Path, recipe_for: RecipeFor, packer: Packer, tmp_path: Path
) -> None:
    drawn = prepare(recipe_for(source), tmp_path / "storage", packer, quiet)
    kept = prepare(recipe_for(source, shuffle=False), tmp_path / "storage", packer, quiet)
    assert drawn.folder != kept.folder
    assert drawn.manifest.digest != kept.manifest.digest
    assert drawn.tokenizer_folder == kept.tokenizer_folder
    for split in ("train", "validation"):
        assert order_of(kept, split) == sorted(order_of(kept, split))
        order = order_of(drawn, split)
        assert sorted(order) == order_of(kept, split)
        shards = [number >> 32 for number in order]
        assert shards == sorted(shards), "no document leaves its shard"
        assert order != sorted(order)


def test_the_drawn_order_is_that_of_the_content(
    source: Path, recipe_for: RecipeFor, packer: Packer, write_shards: Callable[..., Path], tmp_path: Path
) -> None:
    """One changed document gives its whole shard another order, and no other shard."""
    before = order_of(prepare(recipe_for(source), tmp_path / "storage", packer, quiet), "train")
    texts = pq.read_table(source / "shard_00001.parquet")["text"].to_pylist()
    write_shards(tmp_path / "other", [*texts[:-1], texts[-1] + " more"])
    shutil.copy(tmp_path / "other" / "shard_00000.parquet", source / "shard_00001.parquet")
    after = order_of(prepare(recipe_for(source), tmp_path / "storage", packer, quiet), "train")

    def by_shard(order: list[int]) -> list[list[int]]:
        return [[number for number in order if number >> 32 == shard] for shard in range(3)]

    assert [one == other for one, other in zip(by_shard(before), by_shard(after), strict=True)] == [True, False, True]


def test_a_changed_source_is_prepared_anew(source: Path, recipe_for: RecipeFor, packer: Packer, tmp_path: Path) -> None:
    shard = source / "shard_00001.parquet"
    folders = [prepare(recipe_for(source), tmp_path / "storage", packer, quiet).folder]
    os.utime(shard, ns=(0, 0))
    folders.append(prepare(recipe_for(source), tmp_path / "storage", packer, quiet).folder)
    shutil.copy(source / "shard_00000.parquet", shard)
    os.utime(shard, ns=(0, 0))
    folders.append(prepare(recipe_for(source), tmp_path / "storage", packer, quiet).folder)
    (source / "shard_00002.parquet").unlink()
    folders.append(prepare(recipe_for(source), tmp_path / "storage", packer, quiet).folder)
    assert packer.calls == 4
    assert len(set(folders)) == 4


def test_each_length_and_vocabulary_has_rows_of_its_own(
    source: Path, recipe_for: RecipeFor, packer: Packer, tmp_path: Path
) -> None:
    recipe = recipe_for(source)
    others = [with_(recipe, "model", sequence_length=32), with_(recipe, "tokenizer", vocab_size=380)]
    done = [prepare(each, tmp_path / "storage", packer, quiet) for each in (recipe, *others)]
    assert packer.calls == 3
    assert [(d.manifest.sequence_length, d.manifest.vocab_size) for d in done] == [(64, 400), (32, 400), (64, 380)]
    assert done[0].tokenizer_folder == done[1].tokenizer_folder != done[2].tokenizer_folder
    # what training does not depend on takes from the same cache
    same = with_(recipe, "budget", tokens_per_parameter=1.0)
    assert prepare(same, tmp_path / "storage", packer, quiet).folder == done[0].folder
    assert packer.calls == 3


def test_the_tokenizer_is_made_from_the_training_text_alone(
    source: Path, recipe_for: RecipeFor, packer: Packer, tmp_path: Path
) -> None:
    before = prepare(recipe_for(source), tmp_path / "storage", packer, quiet).tokenizer
    text = pq.read_table(source / "shard_00000.parquet")
    pq.write_table(text.slice(1), source / "shard_00003.parquet")
    after = prepare(recipe_for(source), tmp_path / "storage", packer, quiet).tokenizer
    assert after.digest == before.digest


def test_a_tokenizer_at_a_path_is_taken(
    source: Path, prepared: Prepared, recipe_for: RecipeFor, packer: Packer, tmp_path: Path
) -> None:
    recipe = with_(recipe_for(source), "tokenizer", path=str(prepared.tokenizer_folder))
    found = prepare(recipe, tmp_path / "storage", packer, quiet)
    assert found.tokenizer_folder == prepared.tokenizer_folder
    assert found.manifest.tokenizer == prepared.tokenizer.digest
    assert not (tmp_path / "storage" / "cache" / "tokenizers").exists()


def test_a_tokenizer_is_one_however_its_path_is_spelled(
    source: Path, prepared: Prepared, recipe_for: RecipeFor, packer: Packer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = prepared.tokenizer_folder
    (tmp_path / "linked").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(folder), "linked", "./linked/", "~/linked", f"FILE://{folder}", f"{folder}/../{folder.name}"):
        found = prepare(with_(recipe_for(source), "tokenizer", path=path), tmp_path / "storage", packer, quiet)
        assert found.tokenizer_folder == folder
    assert packer.calls == 1
    with pytest.raises(UserError, match=r"^tokenizer\.path: 's3://x/y' is not a folder: give a local"):
        prepare(with_(recipe_for(source), "tokenizer", path="s3://x/y"), tmp_path / "storage", packer, quiet)


def test_a_tokenizer_of_another_size_is_refused(
    source: Path, prepared: Prepared, recipe_for: RecipeFor, packer: Packer, tmp_path: Path
) -> None:
    recipe = with_(recipe_for(source), "tokenizer", path=str(prepared.tokenizer_folder), vocab_size=500)
    fix = rf"^tokenizer\.vocab_size: 500, but {prepared.tokenizer_folder} has 400: set tokenizer\.vocab_size=400$"
    with pytest.raises(UserError, match=fix):
        prepare(recipe, tmp_path / "storage", packer, quiet)
    assert packer.calls == 0
    assert not (tmp_path / "storage").exists()


def test_a_tokenizer_that_is_not_there_is_refused_by_name(
    source: Path, recipe_for: RecipeFor, packer: Packer, tmp_path: Path
) -> None:
    recipe = with_(recipe_for(source), "tokenizer", path=str(tmp_path / "none"))
    with pytest.raises(UserError, match=rf"{tmp_path}/none/tokenizer\.json: no such file"):
        prepare(recipe, tmp_path / "storage", packer, quiet)
    assert not (tmp_path / "storage").exists()


def test_a_vocabulary_too_large_for_the_text_is_refused_with_the_size_that_fits(
    source: Path, recipe_for: RecipeFor, packer: Packer, tmp_path: Path
) -> None:
    recipe = with_(recipe_for(source), "tokenizer", vocab_size=60_000)
    amount = r"\d+ documents, [\d.]+ k?B"
    only = (
        rf"^tokenizer\.vocab_size: the text to train on \({amount}\) yields only \d+ tokens, not 60000: give more text"
    )
    with pytest.raises(UserError, match=only) as told:
        prepare(recipe, tmp_path / "storage", packer, quiet)
    assert not (tmp_path / "storage").exists()
    fits = int(str(told.value).split("tokenizer.vocab_size=")[1].split()[0])
    smaller = with_(recipe, "tokenizer", vocab_size=fits)
    assert prepare(smaller, tmp_path / "storage", packer, quiet).tokenizer.vocab_size == fits


def test_a_failure_while_packing_leaves_no_rows(
    source: Path, recipe_for: RecipeFor, packer: Packer, tmp_path: Path
) -> None:
    def fail_after(*arguments: Any) -> Manifest:
        packer(*arguments)
        assert (arguments[-1] / "train" / "shard_00000.arrow").exists()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepare(recipe_for(source), tmp_path / "storage", fail_after, quiet)
    # the tokenizer is whole, and the next try takes it
    assert [path.name for path in (tmp_path / "storage" / "cache").iterdir()] == ["tokenizers"]
    said: list[str] = []
    assert prepare(recipe_for(source), tmp_path / "storage", packer, said.append).manifest.train.total("rows")
    assert said[1] == "tokenizing and packing 4 shards"


def test_text_refused_while_packing_leaves_what_was_there_before(
    source: Path, recipe_for: RecipeFor, packer: Packer, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> Manifest:
        raise UserError("shard_00003.parquet: damaged")

    with pytest.raises(UserError):
        prepare(recipe_for(source), tmp_path / "storage", refuse, quiet)
    assert not (tmp_path / "storage").exists()
    prepare(recipe_for(source), tmp_path / "storage", packer, quiet)
    with pytest.raises(UserError):
        prepare(with_(recipe_for(source), "model", sequence_length=32), tmp_path / "storage", refuse, quiet)
    assert len(list((tmp_path / "storage" / "cache" / "tokenizers").iterdir())) == 1
    assert len(list((tmp_path / "storage" / "cache" / "packed").iterdir())) == 1


def test_bytes_per_token_of_the_validation_text(prepared: Prepared) -> None:
    counted = prepared.manifest.validation
    expected = counted.total("bytes") / counted.total("tokens")
    assert bytes_per_token(prepared.tokenizer, prepared.corpus) == expected
    assert 1 < expected < 6
    with pytest.raises(UserError, match=r"data\.validation: the validation shards hold no text"):
        bytes_per_token(prepared.tokenizer, Corpus(prepared.corpus.train, (), "text"))


def test_a_tokenizer_alone(prepared: Prepared, recipe_for: RecipeFor, corpus: Path, tmp_path: Path) -> None:
    found, folder, tokenizer = get_tokenizer(recipe_for(corpus), tmp_path / "cache", quiet)
    assert found == prepared.corpus
    assert tokenizer.digest == prepared.tokenizer.digest == Tokenizer.load(folder).digest


def test_a_long_preparation_tells_how_many_documents_are_packed(
    corpus: Path, recipe_for: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(jobs: list[Job], work: Callable[[Job], PackResult]) -> list[PackResult]:
        results = []
        for job in jobs:
            results.append(work(job))
            progress._works[-1].next_line = 0.0  # each shard seems to take long
            progress.print_if_due()
        return results

    made = prepare(recipe_for(corpus), tmp_path, partial(pack_corpus, run=run), lambda _: None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"packing text: {count} documents" for count in ("75 of 300", "150 of 300", "225 of 300", "300")
    ]
    assert all(line.endswith(" left") for line in lines[:-1])
    assert not list(made.folder.rglob("*.read"))

"""JSON lines as shards: the same corpus as in parquet, compressed or not, and each fault with its line."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from bwlm.config import DataSettings, Recipe
from bwlm.errors import UserError
from bwlm.text.corpus import checked, find_corpus, read_texts
from bwlm.text.prepare import Pack, Prepared, prepare
from tests.conftest import english

_RNG = random.Random(0)
TEXTS: list[str | None] = [english(_RNG, _RNG.randint(1, 90)) for _ in range(300)] + [None, "", "\n"]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda content: bytes(pa.compress(content, codec="zstd", asbytes=True)),
}


def lines_of(texts: list[str | None]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def write_lines(folder: Path, *shards: list[str | None], ending: str = ".jsonl") -> Path:
    """Writes shards, each of two compressed parts, as programs that append write them."""
    folder.mkdir(parents=True)
    for index, texts in enumerate(shards):
        parts = [COMPRESS[ending](lines_of(texts[:9])), COMPRESS[ending](lines_of(texts[9:]))]
        (folder / f"shard_{index:05d}{ending}").write_bytes(b"".join(parts))
    return folder


Prepare = Callable[[Path], Prepared]


@pytest.fixture
def prepare_source(tmp_path: Path, recipe_for: Callable[..., Recipe], pack_in_process: Pack) -> Prepare:
    return lambda source: prepare(recipe_for(source), tmp_path / "storage", pack_in_process, lambda _: None)


def test_the_same_texts_are_the_same_corpus_in_every_format(
    prepare_source: Prepare, write_shards: Callable[..., Path], tmp_path: Path
) -> None:
    """Rows, tokenizer and so identity and resume depend on the documents and their order alone."""
    shards = (TEXTS[:200], TEXTS[200:], TEXTS[:40])
    wanted = prepare_source(write_shards(tmp_path / "parquet", *shards)).manifest
    for ending in COMPRESS:
        found = prepare_source(write_lines(tmp_path / ending, *shards, ending=ending)).manifest
        assert found.digest == wanted.digest, ending
        assert found.train == wanted.train


def test_json_lines_on_another_file_system(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "lines", TEXTS, TEXTS[:40], ending=".jsonl.zst")
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(folder), "/bwlm-lines", recursive=True)
    try:
        found = find_corpus(DataSettings(source="memory://bwlm-lines"), tmp_path / "cache", lambda _: None)
        checked(found)
        read = [text for some in read_texts(found.train[0].uri, "text") for text in some]
        assert read == [text or "" for text in TEXTS]
    finally:
        filesystem.rm("/bwlm-lines", recursive=True)


def faulty(folder: Path, line: bytes, ending: str = ".jsonl") -> str:
    """The message for a shard whose fifth line is this, after a blank one."""
    path = folder / f"a{ending}"
    path.write_bytes(COMPRESS[ending](lines_of(TEXTS[:3]) + b"\n" + line + b"\n" + lines_of(TEXTS[:3])))
    with pytest.raises(UserError) as caught:
        list(read_texts(str(path), "text"))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(folder / "a"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "a', "not valid JSON (Invalid control character"),
        (b'{"text": "caf\xe9"}', "not valid JSON ('utf-8' codec can't decode"),
        (b'{"txt": "a", "n": 1}', "data.text_column: no field 'text' (did you mean 'txt'?): name one of txt, n"),
        (b'{"text": 5}', "data.text_column: 'text' holds 5: name a field of strings"),
        (b'["a"]', """data.text_column: the line is no object: write {"text": ".."}"""),
        (b'{"text": "\\ud800"}', "data.text_column: 'text' holds half of a surrogate pair, which is no character"),
    ],
)
def test_a_fault_is_told_with_its_line(tmp_path: Path, line: bytes, told: str) -> None:
    for ending in (".jsonl", ".jsonl.zst"):
        assert faulty(tmp_path, line, ending).startswith(f"{ending}: line 5: {told}")


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_that_is_cut_off_or_not_compressed_is_told(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    for content in (COMPRESS[ending](lines_of(TEXTS))[:-20], lines_of(TEXTS)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: cannot be read after line \d+ \(.+\): write"):
            list(read_texts(str(path), "text"))


def test_another_column_is_told_before_a_tokenizer_is_trained(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "lines", TEXTS, TEXTS[:40])
    found = find_corpus(DataSettings(source=str(folder), text_column="content"), tmp_path / "cache", lambda _: None)
    with pytest.raises(UserError, match=r"shard_00000\.jsonl: line 1: data\.text_column: no field 'content'"):
        checked(found)

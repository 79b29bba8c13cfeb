"""Text files as a corpus: a document each, held out by content, the same wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bwlm.config import DataSettings, Recipe
from bwlm.errors import UserError
from bwlm.text import documents
from bwlm.text.corpus import Corpus, find_corpus, read_texts
from bwlm.text.prepare import Pack, prepare
from tests.conftest import english

_RNG = random.Random(0)
TEXTS = [f"# Note {index}\n\n{english(_RNG, 60)}\n" for index in range(200)]


def write_notes(folder: Path, texts: list[str] = TEXTS, ending: str = ".md") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, text in enumerate(texts):
        (folder / f"note-{index:03d}{ending}").write_text(text)
    return folder


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 .md files. Read only."""
    return write_notes(tmp_path_factory.mktemp("text") / "notes")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "storage" / "cache"


def find(source: str | Path, cache: Path, **data: str) -> tuple[Corpus, list[str]]:
    """The corpus, and the lines that a person is told."""
    lines: list[str] = []
    settings = DataSettings.model_validate({"source": str(source)} | data)
    return find_corpus(settings, cache, lines.append), lines


def texts_of(corpus: Corpus) -> tuple[list[str], list[str]]:
    train, validation = (
        [text for shard in split for some in read_texts(shard.uri, corpus.text_column) for text in some]
        for split in (corpus.train, corpus.validation)
    )
    return train, validation


def test_each_file_is_a_document_and_one_in_20_validates(notes: Path, cache: Path) -> None:
    found, lines = find(notes, cache)
    train, validation = texts_of(found)
    assert sorted(train + validation) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in train], "in the order of their names"
    assert 4 <= len(validation) <= 20
    assert lines[0].startswith(f"validation: {notes}/note-")
    assert lines[0].endswith("(about 1 document in 20, chosen by content)")
    assert len(lines) == 1


def test_the_content_decides_and_not_place_or_time(notes: Path, cache: Path, tmp_path: Path) -> None:
    found, _ = find(notes, cache)
    copied = Path(shutil.copytree(notes, tmp_path / "elsewhere"))
    for path in copied.iterdir():
        os.utime(path, (1, 1))
    assert find(copied, cache)[0] == found
    (copied / "note-000.md").write_text("other")
    assert find(copied, cache)[0].listing() != found.listing()
    shutil.rmtree(cache)
    assert find(notes, cache)[0] == found, "written again it is the same"
    moved = cache.parent.rename(tmp_path / "moved")
    assert find(notes, moved / "cache")[0].listing() == found.listing(), "a storage that was moved finds its rows"


def test_a_new_document_moves_no_other_to_another_side(cache: Path, tmp_path: Path) -> None:
    before = texts_of(find(write_notes(tmp_path / "a"), cache)[0])[1]
    more = [f"new {index}" for index in range(50)]
    after = texts_of(find(write_notes(tmp_path / "b", [*more[:7], *TEXTS, *more[7:]]), cache)[0])[1]
    assert before == [text for text in after if not text.startswith("new")]


def test_equal_documents_are_on_one_side(cache: Path, tmp_path: Path) -> None:
    train, validation = texts_of(find(write_notes(tmp_path / "a", [*TEXTS, "another", *TEXTS]), cache)[0])
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 2 * len(TEXTS) + 1


def test_few_documents_leave_one_to_validate_on(cache: Path, tmp_path: Path) -> None:
    train, validation = texts_of(find(write_notes(tmp_path / "a", ["one", "two"], ".txt"), cache)[0])
    assert sorted(train + validation) == ["one", "two"]
    assert len(train) == 1


def test_all_documents_are_never_held_out(cache: Path, tmp_path: Path) -> None:
    """Each of the two texts is one of the 20th."""
    chosen = [
        text for text in map(str, range(200)) if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 20 == 0
    ]
    train, validation = texts_of(find(write_notes(tmp_path / "a", chosen[:2]), cache)[0])
    assert sorted(train + validation) == sorted(chosen[:2])


def test_folders_and_data_validation_say_the_split(notes: Path, cache: Path, tmp_path: Path) -> None:
    write_notes(tmp_path / "book" / "train", TEXTS[:9])
    write_notes(tmp_path / "book" / "val", TEXTS[9:11])
    assert texts_of(find(f"{tmp_path}/book/**/*.md", cache)[0]) == (TEXTS[:9], TEXTS[9:11])
    found, _ = find(tmp_path / "book" / "train", cache, validation=f"{notes}/note-10*.md")
    assert texts_of(found) == (TEXTS[:9], TEXTS[100:110])


def test_another_text_column_is_the_column_of_the_other_files(cache: Path, tmp_path: Path) -> None:
    notes = write_notes(tmp_path / "notes", TEXTS[:9])
    pq.write_table(pa.table({"body": TEXTS[9:12]}), tmp_path / "held.parquet")
    found, _ = find(notes, cache, validation=str(tmp_path / "held.parquet"), text_column="body")
    assert texts_of(found) == (TEXTS[:9], TEXTS[9:12])


def test_a_data_set_with_a_readme_is_read_without_it(cache: Path, write_shards: Callable[..., Path]) -> None:
    folder = write_shards(cache.parent / "shards", TEXTS[:9], TEXTS[9:12])
    (folder / "README.md").write_text("about")
    found, lines = find(folder, cache)
    assert texts_of(found) == (TEXTS[:9], TEXTS[9:12])
    assert lines[0] == f"{folder}/README.md: not read, since data.source holds .parquet files too"


def test_marks_and_ends_of_lines_of_other_systems_are_read(cache: Path, tmp_path: Path) -> None:
    folder = write_notes(tmp_path / "notes", TEXTS[:3])
    (folder / "a.txt").write_bytes("\ufeffcafé\r\nnoir\r\n".encode())
    train, validation = texts_of(find(folder, cache)[0])
    assert "café\nnoir\n" in train + validation


def test_large_folders_become_several_shards(
    notes: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(documents, "_SHARD_BYTES", 20_000)
    found, _ = find(notes, cache)
    assert len(found.train) == -(-sum(len(text.encode()) for text in texts_of(found)[0]) // 20_000)
    assert max(shard.size for shard in found.train) < 30_000
    train, validation = texts_of(found)
    assert sorted(train + validation) == sorted(TEXTS)


def test_copies_of_one_document_leave_none_to_train_on(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds one document, .*: add a file, or name one in data\.validation$"):
        find(write_notes(tmp_path / "notes", ["the same", "the same"]), cache)


# ---- one file alone ----

BETWEEN = {
    "blank lines": "\n\n",
    "lines of spaces": "\n \t\n\n",
    "marks": "<|endoftext|>",
    "marked lines": "\n<|endoftext|>\n",
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("is_named", [True, False], ids=["named", "in a folder"])
def test_a_text_file_alone_is_cut_into_documents(cache: Path, tmp_path: Path, between: str, is_named: bool) -> None:
    path = tmp_path / "corpus" / "all.txt"
    path.parent.mkdir()
    paragraphs = [text.partition("\n\n")[2].strip("\n") for text in TEXTS]
    paragraphs[3] = "  an indented line\nand another"
    path.write_text(between.join(["", *paragraphs, ""]))
    found, lines = find(path if is_named else path.parent, cache)
    train, validation = texts_of(found)
    assert sorted(train + validation) == sorted(paragraphs)
    assert train == [text for text in paragraphs if text in train], "in the order of the file"
    assert 4 <= len(validation) <= 20
    assert lines == [f"validation: about 1 document in 20 of {path}, chosen by content"]


def test_a_mark_keeps_blank_lines_inside_of_a_document(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("one\n\nand more<|endoftext|>two\n<|endoftext|>\n\n<|endoftext|>")
    train, validation = texts_of(find(tmp_path / "all.txt", cache)[0])
    assert sorted(train + validation) == ["one\n\nand more", "two"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_file_of_documents_alone_holds_out_one_in_20(cache: Path, tmp_path: Path, kind: str) -> None:
    path, texts = tmp_path / f"all.{kind}", [*TEXTS, "", *TEXTS[:9]]
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found, lines = find(path, cache)
    train, validation = texts_of(found)
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation), "equal documents are on one side"
    assert 4 <= len(validation) <= 20
    assert lines == [f"validation: about 1 document in 20 of {path}, chosen by content"]
    notes = texts_of(find(write_notes(tmp_path / "notes"), cache)[0])
    assert set(notes[1]) == set(validation), "the same documents as of a folder of text files"


def test_the_split_of_a_file_is_written_once_and_anew_where_the_file_changed(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("\n\n".join(TEXTS))
    found, _ = find(path, cache)
    written = {file: file.stat().st_mtime_ns for file in cache.rglob("*.parquet")}
    assert find(path, cache)[0] == found
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.parquet")} == written
    moved = cache.parent.rename(tmp_path / "moved")
    assert find(path, moved / "cache")[0].listing() == found.listing(), "a storage that was moved finds its rows"
    path.write_text("\n\n".join(TEXTS[:50]))
    assert find(path, moved / "cache")[0].listing() != found.listing()


def test_a_large_file_becomes_several_shards(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(documents, "_SHARD_BYTES", 20_000)
    (tmp_path / "all.txt").write_text("<|endoftext|>".join(TEXTS))
    found, _ = find(tmp_path / "all.txt", cache)
    assert len(found.train) > 1
    assert max(shard.size for shard in found.train) < 30_000


def test_a_file_of_one_document_is_told_how_to_make_more(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("one\ndocument\n")
    with pytest.raises(UserError) as caught:
        find(path, cache)
    assert str(caught.value) == (
        f"data.source: {path} holds one document, and validation needs another: "
        "put a blank line or <|endoftext|> between documents, or name another file in data.validation"
    )
    path.write_text("\n \n")
    with pytest.raises(UserError, match=r"all\.txt holds no text: give documents that are not empty$"):
        find(path, cache)
    lines = tmp_path / "all.jsonl"
    lines.write_text('{"text": "the same"}\n' * 2)
    with pytest.raises(UserError, match=r"another: add documents, or name another file in data\.validation$"):
        find(lines, cache)
    assert not cache.exists()


def test_a_text_file_beside_folders_of_text_is_not_taken_for_the_corpus(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text("one\n\ntwo")
    write_notes(tmp_path / "below", TEXTS[:1])
    with pytest.raises(UserError) as caught:
        find(tmp_path, cache)
    assert str(caught.value) == (
        f"data.source: {tmp_path} holds one text file; its folders are not read: to read them too, name "
        f"{tmp_path}/**/*.md; to read that file alone, name {tmp_path}/index.md"
    )
    train, validation = texts_of(find(tmp_path / "index.md", cache)[0])
    assert sorted(train + validation) == ["one", "two"]


def test_text_files_elsewhere_are_refused_with_the_way_out(cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        find("memory://notes/*.md", cache)
    assert str(caught.value) == (
        "data.source: memory://notes/*.md: .txt and .md files are read from this machine: copy them here, "
        "or write their texts into .jsonl or parquet files"
    )


def test_a_file_that_is_not_utf8_is_named_and_nothing_is_left(cache: Path, tmp_path: Path) -> None:
    folder = write_notes(tmp_path / "notes", TEXTS[:50])
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes() + b"caf\xe9")
    with pytest.raises(UserError, match=r"^.*/notes/note-\d+\.md: not valid UTF-8; re-encode it$"):
        find(folder, cache)
    assert not cache.exists()


def test_the_rows_are_those_of_the_same_documents_in_parquet(
    notes: Path,
    cache: Path,
    tmp_path: Path,
    write_shards: Callable[..., Path],
    recipe_for: Callable[..., Recipe],
    pack_in_process: Pack,
) -> None:
    def digest(source: Path) -> str:
        return prepare(recipe_for(source), cache.parent, pack_in_process, lambda _: None).manifest.digest

    written = write_shards(tmp_path / "shards", *texts_of(find(notes, cache)[0]))
    assert digest(notes) == digest(written)

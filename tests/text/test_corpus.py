"""Where text comes from: every kind of source, and every fault told in one line that names file, field and fix."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bwlm.config import DataSettings, Recipe
from bwlm.errors import UserError
from bwlm.text import corpus as corpus_module
from bwlm.text.corpus import Corpus, checked, find_corpus, read_texts
from bwlm.text.prepare import Pack, Prepared, prepare

WriteShards = Callable[..., Path]
_RNG = random.Random(0)
_WORDS = ["".join(_RNG.choices("etaoinshrdlu", k=_RNG.randint(1, 9))) for _ in range(400)]
TEXTS = [" ".join(_RNG.choices(_WORDS, k=_RNG.randint(3, 60))) for _ in range(120)]


def find(source: str | Path, validation: str | None = None) -> Corpus:
    return checked(find_corpus(DataSettings(source=str(source), validation=validation), Path("/nowhere"), print))


def names(corpus: Corpus) -> tuple[list[str], list[str]]:
    train, validation = ([Path(shard.uri).name for shard in split] for split in (corpus.train, corpus.validation))
    return train, validation


def texts(corpus: Corpus) -> list[str]:
    return [text for shard in corpus.train for some in read_texts(shard.uri, "text") for text in some]


@pytest.fixture
def shards(write_shards: WriteShards, tmp_path: Path) -> Path:
    """Three shards of 40 documents."""
    return write_shards(tmp_path / "shards", TEXTS[:40], TEXTS[40:80], TEXTS[80:])


# ---- sources ----

FIRST = "shard_00000.parquet"
SECOND = "shard_00001.parquet"
THIRD = "shard_00002.parquet"


def test_a_folder_trains_on_all_but_the_last_shard(shards: Path) -> None:
    (shards / "notes.txt").touch()
    found = find(shards)
    assert names(found) == ([FIRST, SECOND], [THIRD])
    assert texts(found) == TEXTS[:80]
    assert all(Path(shard.uri).is_absolute() and shard.size > 0 and shard.stamp for shard in found.train)


def test_a_relative_path_and_a_home_become_absolute(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards.parent)
    monkeypatch.setenv("HOME", str(shards.parent))
    assert find("shards") == find("~/shards") == find("shards/*.parquet") == find(shards)


def test_a_glob_takes_what_it_matches_in_order(shards: Path) -> None:
    assert names(find(shards / "shard_0000[02].*")) == ([FIRST], [THIRD])
    assert names(find(shards.parent / "**" / "*.parquet")) == ([FIRST, SECOND], [THIRD])


def test_a_name_that_looks_like_a_glob_is_a_file_first(shards: Path) -> None:
    odd = shards / "part[1].parquet"
    (shards / FIRST).rename(odd)
    assert names(find(odd, str(shards / THIRD))) == ([odd.name], [THIRD])


def test_a_single_file_with_validation_named(shards: Path) -> None:
    assert names(find(shards / SECOND, str(shards / FIRST))) == ([SECOND], [FIRST])


def test_what_validates_is_never_trained_on(shards: Path) -> None:
    assert names(find(shards, str(shards / SECOND))) == ([FIRST, THIRD], [SECOND])
    assert names(find(shards, str(shards / "*2.parquet"))) == ([FIRST, SECOND], [THIRD])
    with pytest.raises(
        UserError, match=r"data\.validation: .* leaves no file of data\.source to train on: name fewer files$"
    ):
        find(shards, str(shards))


def test_a_file_uri_finds_what_the_path_finds(shards: Path, write_shards: WriteShards) -> None:
    write_shards(shards / "below", ["not asked for"])
    for source in (f"file://{shards}", f"file://{shards}/", f"file://{shards}/*.parquet"):
        found = find(source)
        assert names(found) == names(find(shards)) == ([FIRST, SECOND], [THIRD])
        assert texts(found) == TEXTS[:80]
    assert names(find(f"file://{shards}/{FIRST}", f"file://{shards}/{THIRD}")) == ([FIRST], [THIRD])


@pytest.fixture
def memory(shards: Path) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(shards), "/bwlm-shards", recursive=True)
    yield "memory://bwlm-shards"
    filesystem.rm("/bwlm-shards", recursive=True)


def test_any_file_system_of_fsspec(memory: str) -> None:
    for source in (memory, f"{memory}/*.parquet"):
        assert names(find(source)) == ([FIRST, SECOND], [THIRD])
        assert texts(find(source)) == TEXTS[:80]
    assert names(find(f"{memory}/{FIRST}", f"{memory}/{THIRD}")) == ([FIRST], [THIRD])


def test_a_remote_shard_written_again_is_another_corpus(memory: str) -> None:
    before = find(memory).listing()
    assert find(memory).listing() == before
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe(f"/bwlm-shards/{FIRST}", filesystem.cat(f"/bwlm-shards/{FIRST}"))
    assert find(memory).listing() != before


class Handler(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which knows no ranges; `/broken` answers 500."""

    def log_message(self, *_: object) -> None:
        pass

    def send_head(self):  # type: ignore[no-untyped-def]
        return self.send_error(500) if self.path.startswith("/broken") else super().send_head()


class RangeHandler(Handler):
    """Gives ranges, as servers of data do."""

    def send_head(self):  # type: ignore[no-untyped-def]
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not path.is_file():
            return super().send_head()
        start, end = int(asked[1]), min(int(asked[2]), path.stat().st_size - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{path.stat().st_size}")
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        self.wfile.write(path.read_bytes()[start : end + 1])
        return None


@pytest.fixture(params=[Handler, RangeHandler], ids=["whole", "ranges"])
def web(shards: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    handler = functools.partial(request.param, directory=str(shards.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_shards_on_a_web_server(web: str, shards: Path) -> None:
    # long enough that its footer and its text take more than one request
    pq.write_table(pa.table({"text": TEXTS[:40], "noise": [os.urandom(50_000) for _ in range(40)]}), shards / FIRST)
    for source in (f"{web}/shards", f"{web}/shards/", f"{web}/shards/*.parquet"):
        assert names(find(source)) == ([FIRST, SECOND], [THIRD])
    found = find(f"{web}/shards/{FIRST}", f"{web}/shards/{THIRD}")
    assert texts(found) == TEXTS[:40]
    assert found.train[0].size == (shards / FIRST).stat().st_size
    os.utime(shards / FIRST, (0, 0))
    fsspec.filesystem("http").invalidate_cache()
    assert find(f"{web}/shards/{FIRST}", f"{web}/shards/{THIRD}").listing() != found.listing()


def test_faults_of_a_web_server(web: str) -> None:
    with pytest.raises(UserError, match=rf"data\.source: {web}/shards/no\.parquet does not exist: give a folder"):
        find(f"{web}/shards/no.parquet")
    with pytest.raises(UserError, match=rf"data\.source: {web}/broken/ cannot be listed \(500.*\): check the address"):
        find(f"{web}/broken/")


def test_a_built_in_corpus_is_the_same_where_its_storage_was_moved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that was made from it would be made again."""

    def listing(cache: Path, name: str = "pydocs-1") -> str:
        monkeypatch.setattr(corpus_module, "_write_builtin", lambda source, folder, progress: folder / name)
        return find_corpus(DataSettings(source="builtin:pydocs"), cache, lambda _: None).listing()

    old, new = tmp_path / "old" / "cache", tmp_path / "new" / "cache"
    shutil.copytree(shards, old / "corpora" / "pydocs-1")
    before = listing(old)
    old.parent.rename(new.parent)
    assert listing(new) == before
    (new / "corpora" / "pydocs-1").rename(new / "corpora" / "pydocs-2")
    assert listing(new, "pydocs-2") != before


def test_the_listing_names_files_sizes_times_and_column(shards: Path) -> None:
    listing = find(shards).listing()
    assert find(shards).listing() == listing
    other = {Corpus(c.train, c.validation, "body").listing() for c in [find(shards)]}
    os.utime(shards / SECOND, ns=(1, 1))
    other.add(find(shards).listing())
    shutil.copy(shards / FIRST, shards / "shard_00003.parquet")
    other.add(find(shards).listing())
    assert len({listing, *other}) == 4


# ---- validation text is never trained on, however it is spelled ----


def told(source: str | Path, validation: str | Path | None = None) -> tuple[Corpus, list[str]]:
    """The corpus, and the lines that a person is told."""
    lines: list[str] = []
    data = DataSettings(source=str(source), validation=None if validation is None else str(validation))
    return find_corpus(data, Path("/nowhere"), lines.append), lines


def spellings(shards: Path) -> dict[str, str]:
    """Addresses of the second shard, by what is odd about them. The working folder and home are the one above."""
    above = shards.parent
    (above / "linked").symlink_to(shards)
    (above / "twice").symlink_to(above / "linked")
    (above / "my shards").symlink_to(shards)
    (above / "link.parquet").symlink_to(shards / SECOND)
    (above / "hard.parquet").hardlink_to(shards / SECOND)
    shutil.copy(shards / SECOND, above / "copy.parquet")
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(shards), "/bwlm-spelled", recursive=True)
    return {
        "absolute": f"{shards}/{SECOND}",
        "relative": f"shards/{SECOND}",
        "dots": f"./shards/../shards/{SECOND}",
        "home": f"~/shards/{SECOND}",
        "slashes": f"{above}//shards///{SECOND}",
        "linked folder": f"linked/{SECOND}",
        "link of a link": f"{above}/twice/{SECOND}",
        "dots after a link": f"{above}/twice/../shards/{SECOND}",
        "link": "link.parquet",
        "hard link": "hard.parquet",
        "copy": "copy.parquet",
        "URI": f"file://{shards}/{SECOND}",
        "loud URI": f"FILE://{shards}/{SECOND}",
        "URI with a host": f"file://localhost{shards}/{SECOND}",
        "URI without one": f"file:{shards}/{SECOND}",
        "encoded URI": f"file://{above}/my%20shards/shard%5F00001.parquet",
        "fsspec's name": f"local://{shards}/{SECOND}",
        "glob": f"{above}/*/shard_00001.*",
        "other file system": f"memory://bwlm-spelled/{SECOND}",
        "loud scheme": f"Memory://bwlm-spelled/{SECOND}",
    }


def test_a_validation_file_is_not_trained_on_however_it_is_spelled(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards.parent)
    monkeypatch.setenv("HOME", str(shards.parent))
    every = spellings(shards)
    sources = (shards, "linked", f"file://{shards}", f"{shards.parent}/tw*/*.parquet", "memory://bwlm-spelled")
    try:
        for odd, validation in every.items():
            for source in sources:
                found, lines = told(source, validation)
                assert names(found)[0] == [FIRST, THIRD], f"{source}, {odd}"
                assert [text for shard in found.validation for some in read_texts(shard.uri, "text") for text in some] \
                    == TEXTS[40:80], "each document once"  # fmt: skip
                assert lines[-1] == f"validation: {found.validation[0].uri} (data.validation)"
    finally:
        fsspec.filesystem("memory").rm("/bwlm-spelled", recursive=True)


def test_a_shard_under_another_name_is_told(shards: Path) -> None:
    copy = Path(shutil.copy(shards / SECOND, shards.parent / "copy.parquet"))
    _, lines = told(shards, copy)
    assert lines == [
        f"{shards / SECOND}: not trained on: it has the content of {copy}, which is held out",
        f"validation: {copy} (data.validation)",
    ]


def test_a_copy_of_the_last_shard_is_not_trained_on(shards: Path) -> None:
    shutil.copy(shards / FIRST, shards / "shard_00003.parquet")
    found, _ = told(shards)
    assert names(found) == ([SECOND, THIRD], ["shard_00003.parquet"])
    for name in (SECOND, THIRD):
        (shards / name).unlink()
    with pytest.raises(
        UserError, match=r"^data\.source: .*: no shard has other text than the validation text: add one"
    ):
        told(shards)


def test_shards_of_one_size_and_other_text_are_both_trained_on(shards: Path) -> None:
    content = bytearray((shards / SECOND).read_bytes())
    content[-9] ^= 1
    (shards.parent / "other.parquet").write_bytes(bytes(content))
    found, _ = told(shards, shards.parent / "other.parquet")
    assert names(found)[0] == [FIRST, SECOND, THIRD]


def test_a_web_server_and_a_folder_are_one_source(web: str, shards: Path) -> None:
    assert names(told(shards, f"{web}/shards/{SECOND}")[0])[0] == [FIRST, THIRD]
    assert names(told(f"{web}/shards", shards / SECOND)[0])[0] == [FIRST, THIRD]


def test_one_file_is_trained_on_once_however_many_links_are_listed(shards: Path) -> None:
    (shards / "shard_00000_again.parquet").symlink_to(FIRST)
    (shards / "a.parquet").hardlink_to(shards / SECOND)
    found, lines = told(shards)
    assert names(found) == (["a.parquet", FIRST], [THIRD])
    assert lines[:2] == [
        f"{shards}/shard_00000_again.parquet: read once: it is the same file as {shards}/{FIRST}",
        f"{shards}/{SECOND}: read once: it is the same file as {shards}/a.parquet",
    ]
    (shards.parent / "linked").symlink_to(shards)
    assert names(told(f"{shards.parent}/*/*.parquet")[0]) == names(found)
    copied = Path(shutil.copy(shards / FIRST, shards / "copied.parquet"))
    assert copied.name in names(told(shards)[0])[0], "a copy weighs its text twice, on purpose"


# ---- splits that names say ----


def renamed(shards: Path, *others: str) -> Path:
    for before, after in zip((FIRST, SECOND, THIRD), others, strict=False):
        (shards / after).parent.mkdir(parents=True, exist_ok=True)
        (shards / before).rename(shards / after)
    return shards


def test_a_test_file_is_neither_trained_nor_validated_on(shards: Path) -> None:
    renamed(shards, "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.parquet")
    found, lines = told(shards)
    assert names(found) == (["train-00000-of-00002.parquet"], ["train-00001-of-00002.parquet"])
    assert lines == [
        f"{shards}/test.parquet: left for evaluation, neither trained nor validated on",
        f"validation: {shards}/train-00001-of-00002.parquet (the last shard)",
    ]


def test_documents_of_a_training_file_alone_validate_and_none_of_a_test_file(shards: Path, tmp_path: Path) -> None:
    renamed(shards, "train.parquet", "test.parquet", "below/other.parquet")
    found = find_corpus(DataSettings(source=str(shards)), tmp_path / "cache", print)
    train, validation = (
        [text for shard in split for some in read_texts(shard.uri, "text") for text in some]
        for split in (found.train, found.validation)
    )
    assert sorted(train + validation) == sorted(TEXTS[:40])
    assert validation
    found, _ = told(shards, shards / "below")
    assert names(found) == (["train.parquet"], ["other.parquet"])


@pytest.mark.parametrize(
    ("validation", "how"),
    [
        ("validation-00000-of-00001", ""),
        ("valid", ""),
        ("val", ""),
        ("dev", ""),
        ("data/dev/0", "/**"),
        ("x-val-0", ""),
    ],
)
def test_a_validation_file_validates(shards: Path, validation: str, how: str) -> None:
    renamed(shards, "a.parquet", f"{validation}.parquet", "train.parquet")
    found, lines = told(f"{shards}{how}")
    assert names(found) == (["a.parquet", "train.parquet"], [f"{Path(validation).name}.parquet"])
    assert lines == [f"validation: {shards}/{validation}.parquet (held out by its name)"]


def test_folders_below_a_glob_are_splits(shards: Path) -> None:
    renamed(shards, "train/0.parquet", "test/0.parquet", "validation/0.parquet")
    for source in (f"{shards}/*/*.parquet", f"{shards}/**/*.parquet", f"file://{shards}/*/*.parquet"):
        found, _ = told(source)
        assert [str(Path(split[0].uri).parent.name) for split in (found.train, found.validation)] == [
            "train",
            "validation",
        ]
    with pytest.raises(UserError, match=r"data\.source: .*/test: no file to train on"):
        told(shards / "test", shards / "validation")
    for name in ("train", "validation"):
        shutil.rmtree(shards / name)
    (shards / "other").mkdir()
    assert names(told(shards / "test", write_one(shards / "other"))[0])[0] == ["0.parquet"], "a folder like others"


def write_one(folder: Path) -> Path:
    pq.write_table(pa.table({"text": TEXTS[:5]}), folder / "one.parquet")
    return folder / "one.parquet"


def test_data_validation_goes_before_names(shards: Path) -> None:
    renamed(shards, "train.parquet", "val.parquet", "test.parquet")
    other = write_one(shards.parent)
    found, lines = told(shards, other)
    assert names(found) == (["train.parquet"], ["one.parquet"])
    assert f"{shards}/val.parquet: neither trained nor validated on: data.validation names other files" in lines
    found, lines = told(shards / "train.parquet", shards)
    assert names(found) == (["train.parquet"], ["val.parquet"]), "of a folder with all splits, its validation file"
    assert names(told(shards, shards / "test.parquet")[0]) == (["train.parquet"], ["test.parquet"]), "as was asked"


@pytest.mark.parametrize("name", ["test.parquet", "validation.parquet"])
def test_a_file_that_is_held_out_is_no_source(shards: Path, name: str) -> None:
    renamed(shards, name)
    what = "is left for evaluation" if name == "test.parquet" else "validates"
    with pytest.raises(UserError) as refusal:
        told(shards / name, shards / THIRD)
    assert str(refusal.value) == (
        f"data.source: {shards / name}: no file to train on ({shards / name} {what}): "
        "name a training file, or rename one whose name says another split than it is"
    )


def test_a_copy_of_the_test_file_is_not_trained_on(shards: Path) -> None:
    renamed(shards, "test.parquet")
    shutil.copy(shards / "test.parquet", shards / "a.parquet")
    found, lines = told(shards)
    assert names(found) == ([SECOND], [THIRD])
    assert (
        f"{shards}/a.parquet: not trained on: it has the content of {shards}/test.parquet, which is held out" in lines
    )


# ---- faults: one line with file, field and fix, and nothing left behind ----

Prepare = Callable[..., Prepared]


@pytest.fixture
def try_to_prepare(tmp_path: Path, recipe_for: Callable[..., Recipe], pack_in_process: Pack) -> Prepare:
    """Prepares a source in a storage of its own, which a refusal must leave as it was: not there."""

    def prepare_source(source: str | Path, **data: object) -> Prepared:
        storage = tmp_path / "storage"
        prepared = None
        try:
            prepared = prepare(recipe_for(source, **data), storage, pack_in_process, lambda _: None)
        finally:
            assert storage.exists() == (prepared is not None)
        return prepared

    return prepare_source


def test_a_path_that_is_not_there(try_to_prepare: Prepare, tmp_path: Path) -> None:
    for source in (tmp_path / "none", tmp_path / "none.parquet", f"file://{tmp_path}/none.parquet"):
        with pytest.raises(
            UserError, match=rf"^data\.source: {source} does not exist: give a folder, glob, file or URI"
        ):
            try_to_prepare(source)


def test_a_folder_or_glob_without_parquet(try_to_prepare: Prepare, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", shards / "shard_9*.parquet", f"file://{tmp_path}/empty", "memory://bwlm-none"):
        with pytest.raises(
            UserError, match=rf"^data\.source: no \.parquet, .* file in {re.escape(str(source))}: give a "
        ):
            try_to_prepare(source)


def test_validation_that_is_not_there(try_to_prepare: Prepare, shards: Path) -> None:
    with pytest.raises(UserError, match=rf"^data\.validation: {shards}/none\.parquet does not exist: give"):
        try_to_prepare(shards, validation=str(shards / "none.parquet"))
    with pytest.raises(UserError, match=r"^data\.validation: no \.parquet, \.jsonl, .* file in "):
        try_to_prepare(shards, validation=str(shards / "none*.parquet"))


@pytest.mark.parametrize("memory_too", [False, True], ids=["local", "remote"])
def test_a_single_shard_is_divided(try_to_prepare: Prepare, shards: Path, memory: str, memory_too: bool) -> None:
    found = try_to_prepare(f"{memory}/{FIRST}" if memory_too else shards / FIRST).manifest
    counted = [split.total("documents") for split in (found.train, found.validation)]
    assert sum(counted) == 40
    assert counted[1] >= 1


def test_a_protocol_that_nobody_knows(try_to_prepare: Prepare) -> None:
    with pytest.raises(
        UserError, match=r"^data\.source: nfs4://x cannot be listed \(Protocol not known: nfs4\): check"
    ):
        try_to_prepare("nfs4://x")


def test_a_built_in_corpus_misspelt(try_to_prepare: Prepare) -> None:
    wanted = (
        r"^data\.source: 'builtin:pydoc' is not a built-in corpus \(did you mean 'builtin:pydocs'\?\): "
        "give builtin:pydocs, builtin:null, builtin:products, builtin:reversal, or a folder of text$"
    )
    with pytest.raises(UserError, match=wanted):
        try_to_prepare("builtin:pydoc")


def test_another_text_column(try_to_prepare: Prepare, shards: Path) -> None:
    wanted = (
        rf"^{shards / FIRST}: data\.text_column: no column 'txt' \(did you mean 'text'\?\): name one of number, text$"
    )
    with pytest.raises(UserError, match=wanted):
        try_to_prepare(shards, text_column="txt")


def test_a_column_that_one_shard_lacks(try_to_prepare: Prepare, shards: Path) -> None:
    pq.write_table(pa.table({"content": TEXTS}), shards / THIRD)
    with pytest.raises(
        UserError, match=rf"^{shards / THIRD}: data\.text_column: no column 'text'.*: name one of content$"
    ):
        try_to_prepare(shards)


def test_two_columns_of_one_name(try_to_prepare: Prepare, shards: Path) -> None:
    pq.write_table(pa.table([TEXTS, TEXTS], names=["text", "text"]), shards / SECOND)
    with pytest.raises(UserError) as refusal:
        try_to_prepare(shards)
    assert str(refusal.value) == (
        f"{shards / SECOND}: data.text_column: 2 columns are called 'text': rename all but one"
    )


def test_a_wrong_column_is_no_damage_where_a_head_is_read(shards: Path) -> None:
    """The first rows of a corpus are read without a look at its other files."""
    wanted = rf"^{shards / FIRST}: data\.text_column: no column 'body': name one of number, text$"
    with pytest.raises(UserError, match=wanted):
        next(read_texts(str(shards / FIRST), "body"))
    with pytest.raises(UserError, match=r"'number' holds int64: name a column of strings$"):
        next(read_texts(str(shards / FIRST), "number"))


def test_a_text_column_of_numbers(try_to_prepare: Prepare, shards: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^{shards / FIRST}: data\.text_column: 'number' holds int64: name a column of strings$"
    ):
        try_to_prepare(shards, text_column="number")


@pytest.mark.parametrize("left", [0, 3, 0.5, 0.9, -1], ids=["empty", "3 bytes", "half", "most", "all but one byte"])
def test_a_shard_cut_off(try_to_prepare: Prepare, shards: Path, left: float) -> None:
    whole = (shards / SECOND).read_bytes()
    (shards / SECOND).write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    with pytest.raises(
        UserError, match=rf"^{shards / SECOND}: not a readable parquet file; is it cut off\? .*: write the"
    ):
        try_to_prepare(shards)


def test_a_shard_that_is_something_else(try_to_prepare: Prepare, shards: Path) -> None:
    (shards / FIRST).write_bytes(b"text,label\n" * 1000)
    with pytest.raises(UserError, match=rf"^{shards / FIRST}: not a readable parquet file"):
        try_to_prepare(shards)
    (shards / FIRST).unlink()
    (shards / FIRST).mkdir()
    with pytest.raises(UserError, match=rf"^{shards / FIRST}: not a readable parquet file"):
        try_to_prepare(shards)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("shard", [FIRST, THIRD], ids=["train", "validation"])
def test_damage_in_the_pages_of_a_shard_with_checksums(
    try_to_prepare: Prepare, write_shards: WriteShards, tmp_path: Path, shard: str
) -> None:
    folder = write_shards(tmp_path / "checked", TEXTS[:40], TEXTS[40:80], TEXTS[80:], write_page_checksum=True)
    column = pq.read_metadata(folder / shard).row_group(0).column(1)
    flip(folder / shard, column.dictionary_page_offset + column.total_compressed_size // 2)
    with pytest.raises(UserError, match=rf"^{folder / shard}: damaged after row 0 \(.*CRC.*\): write the shard again"):
        try_to_prepare(folder)


def test_damage_without_checksums_is_told_or_gives_text_but_never_a_traceback(
    write_shards: WriteShards, tmp_path: Path
) -> None:
    # parquet's page checksums are optional and off in most writers: a flipped bit in a value cannot be noticed then
    told = 0
    for compression in ("snappy", "zstd", "none"):
        folder = write_shards(tmp_path / compression, TEXTS * 3, compression=compression, data_page_size=2048)
        whole = (folder / FIRST).read_bytes()
        for at in random.Random(0).sample(range(4, len(whole) - 1000), 40):
            (folder / FIRST).write_bytes(whole)
            flip(folder / FIRST, at)
            with contextlib.suppress(UserError):
                assert all(isinstance(text, str) for some in read_texts(str(folder / FIRST), "text") for text in some)
                continue
            told += 1
    assert told > 10


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("shard", [SECOND, THIRD], ids=["train", "validation"])
def test_text_that_is_not_utf8(try_to_prepare: Prepare, shards: Path, shard: str, kind: pa.DataType) -> None:
    values = [text.encode() for text in TEXTS] + [None] * 300 + [b"caf\xe9"]
    raw = pa.array(values, pa.large_binary() if kind == pa.large_string() else pa.binary())
    column = pa.Array.from_buffers(kind, len(raw), raw.buffers(), raw.null_count)
    pq.write_table(pa.table({"text": column}), shards / shard)
    with pytest.raises(UserError, match=rf"^{shards / shard}: row 420, column 'text': not valid UTF-8; re-encode it$"):
        try_to_prepare(shards)


def test_no_text_at_all(try_to_prepare: Prepare, write_shards: WriteShards, tmp_path: Path) -> None:
    for name, content in (("rows", []), ("texts", ["", None, ""])):
        folder = write_shards(tmp_path / name, content, content, TEXTS)
        with pytest.raises(
            UserError, match=r"^data\.source: no text to train a tokenizer on: give documents that are not"
        ):
            try_to_prepare(folder)


@pytest.mark.parametrize("content", [[], ["", None]], ids=["rows", "texts"])
def test_no_text_to_validate_on(
    try_to_prepare: Prepare, write_shards: WriteShards, tmp_path: Path, content: list[str | None]
) -> None:
    folder = write_shards(tmp_path / "shards", TEXTS, content)
    with pytest.raises(
        UserError,
        match=rf"^data\.validation: the validation shards hold no text \({len(content)} empty documents\): give",
    ):
        try_to_prepare(folder)


def test_no_text_to_train_on_with_a_tokenizer_at_hand(
    write_shards: WriteShards,
    recipe_for: Callable[..., Recipe],
    pack_in_process: Pack,
    prepared: Prepared,
    tmp_path: Path,
) -> None:
    folder = write_shards(tmp_path / "shards", [""], TEXTS)
    recipe = recipe_for(folder).model_dump()
    recipe["tokenizer"]["path"] = str(prepared.tokenizer_folder)
    with pytest.raises(
        UserError, match=r"^data\.source: the train shards hold no text \(1 empty document\): give train"
    ):
        prepare(Recipe.model_validate(recipe), tmp_path / "storage", pack_in_process, lambda _: None)
    assert not (tmp_path / "storage").exists()
    assert (prepared.tokenizer_folder / "tokenizer.json").exists()


# ---- odd, but not faults ----


def test_an_empty_shard_among_others_is_counted(
    try_to_prepare: Prepare, write_shards: WriteShards, tmp_path: Path
) -> None:
    found = try_to_prepare(write_shards(tmp_path / "shards", TEXTS[:60], [], TEXTS[60:], TEXTS[:20])).manifest
    assert [shard["documents"] for shard in found.train.shards] == [60, 0, 60]
    assert [shard["rows"] > 0 for shard in found.train.shards] == [True, False, True]


def test_null_texts_are_empty_documents(try_to_prepare: Prepare, write_shards: WriteShards, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [*TEXTS, None, "", None], TEXTS[:20])
    found = try_to_prepare(folder).manifest.train
    assert (found.total("documents"), found.total("empty_documents")) == (len(TEXTS) + 3, 3)
    assert found.total("bytes") == sum(len(text.encode()) for text in TEXTS)


def test_a_shard_whose_texts_are_all_null_holds_empty_documents(
    try_to_prepare: Prepare, write_shards: WriteShards, tmp_path: Path
) -> None:
    """A column without any value has arrow's type null, as pandas and pyarrow write it."""
    folder = write_shards(tmp_path / "shards", TEXTS, TEXTS, TEXTS[:20])
    pq.write_table(pa.table({"text": pa.nulls(7)}), folder / SECOND)
    found = try_to_prepare(folder).manifest.train
    assert [(shard["documents"], shard["empty_documents"]) for shard in found.shards] == [(len(TEXTS), 0), (7, 7)]


def test_any_kind_of_string_column(shards: Path) -> None:
    for kind in (pa.large_string(), pa.string_view()):
        table = pa.table({"text": pa.array(TEXTS[:40], pa.string())}).cast(pa.schema({"text": kind}))
        pq.write_table(table, shards / FIRST)
        assert texts(find(shards)) == TEXTS[:80]


def test_a_very_long_document(try_to_prepare: Prepare, write_shards: WriteShards, tmp_path: Path) -> None:
    long = " ".join(TEXTS) * (3_000_000 // len(" ".join(TEXTS)))
    found = try_to_prepare(write_shards(tmp_path / "shards", [*TEXTS, long], TEXTS[:20])).manifest.train
    assert found.total("documents") == len(TEXTS) + 1
    assert found.total("bytes") == sum(len(text.encode()) for text in [*TEXTS, long]) > 2_900_000


_MEASURE = """
import resource, sys
from functools import partial
from pathlib import Path
from bwlm.config import Recipe
from bwlm.text.prepare import prepare
from bwlm.text.stream import pack_corpus

recipe = {"data": {"source": sys.argv[1]}, "tokenizer": {"vocab_size": 400}, "model": {"sequence_length": 2048}}
storage = Path(sys.argv[2])
pack = partial(pack_corpus, run=lambda items, work: [work(item) for item in items])
prepared = prepare(Recipe.model_validate(recipe), storage, pack, lambda _: None)
print(prepared.manifest.train.total("bytes"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_document_of_100_megabytes_in_under_3_gigabytes(write_shards: WriteShards, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(20_000)]
    long = " ".join(rng.choices(words, k=20_000_000))[:100_000_000]
    assert len(long) == 100_000_000
    folder = write_shards(tmp_path / "shards", [long], TEXTS)
    del long
    child = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder), str(tmp_path / "storage")], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    counted, peak = map(int, child.stdout.split())
    assert counted == 100_000_000
    assert peak < 3e9

"""Files behind an address: hidden ones are passed over, and where there are none, the message names what has some."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import fsspec
import pytest

from bwlm.errors import UserError
from bwlm.text import listing
from bwlm.text.listing import JSON_LINES, PACKAGES, PARQUET, TEXTS, list_files

EVERY = (*PARQUET, *JSON_LINES, *TEXTS)
ROOT = Path(__file__).parents[2]


def names(source: str | Path) -> list[str]:
    return [Path(file.uri).name for file in list_files(str(source), "data.source", EVERY)]


def refusal(source: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        list_files(str(source), "data.source", EVERY)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def touch(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


HIDDEN = ("._a.parquet", ".DS_Store", "_SUCCESS", "_metadata.parquet", ".git/c.md", "_temporary/0/c.parquet")


def test_hidden_files_are_passed_over_in_folders_and_globs(tmp_path: Path) -> None:
    folder = touch(tmp_path / "_work" / "data", "a.parquet", "below/b.parquet", *HIDDEN)
    assert names(folder) == names(folder / "*") == names(folder / "*.parquet") == ["a.parquet"]
    assert names(folder / "**") == names(f"{folder}/**/*.parquet") == ["a.parquet", "b.parquet"]
    assert names(folder / "_metadata.parquet") == ["_metadata.parquet"], "a file that is named is meant"
    assert names(folder / "_*" / "**" / "*.parquet") == ["c.parquet"], "and so is a pattern that asks for them"


def test_hidden_files_are_passed_over_on_other_file_systems(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(touch(tmp_path / "data", "a.parquet", "below/b.parquet", *HIDDEN)), "/_hidden", recursive=True)
    try:
        assert names("memory://_hidden") == names("memory://_hidden/*.parquet") == ["a.parquet"]
        assert names("memory://_hidden/**/*.parquet") == ["a.parquet", "b.parquet"]
    finally:
        filesystem.rm("/_hidden", recursive=True)


@pytest.mark.parametrize("source", ["nots", "notes/*.md"])
def test_a_relative_path_is_told_with_the_folder_that_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{source} (from the working folder, {tmp_path})" in refusal(source)
    assert "working folder" not in refusal(f"{tmp_path}/{source}")


@pytest.mark.parametrize("file", ["a/b/0.parquet", "a/0.jsonl.gz", "a/notes.md"])
def test_a_folder_of_folders_is_told_with_the_glob_that_reads_them(tmp_path: Path, file: str) -> None:
    folder = touch(tmp_path / "data", file, ".hidden/0.parquet")
    told = refusal(f"{folder}/")
    ending = "".join(Path(file).suffixes)
    assert told.endswith(f"file in {folder}/: its folders are not read: to read them too, name {folder}/**/*{ending}")
    assert names(told.rpartition("name ")[2]) == [Path(file).name], "what is told works"


def test_a_folder_of_folders_elsewhere_is_told_with_the_glob(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(touch(tmp_path / "data", "a/0.parquet")), "/bwlm-folders", recursive=True)
    try:
        told = refusal("memory://bwlm-folders")
        assert told.endswith("to read them too, name memory://bwlm-folders/**/*.parquet")
        assert names(told.rpartition("name ")[2]) == ["0.parquet"]
    finally:
        filesystem.rm("/bwlm-folders", recursive=True)


HUB = ("README.md", ".gitattributes", "data/train-00000.parquet", "data/validation.parquet", "data/.x.parquet")


@pytest.mark.parametrize("files", [HUB, HUB[1:], (*HUB, "data/info.json", "data/NOTES.md")], ids=["", "no README", "+"])
def test_a_folder_as_on_the_hub_is_read_from_its_folder_data(tmp_path: Path, files: tuple[str, ...]) -> None:
    folder = touch(tmp_path / "hub", *files)
    assert names(folder) == ["train-00000.parquet", "validation.parquet"]
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(folder), "/bwlm-hub", recursive=True)
    try:
        found = list_files("memory://bwlm-hub", "data.source", (*PARQUET, *JSON_LINES))
        assert [Path(file.uri).name for file in found] == names(folder)
        assert [file.split for file in found] == ["train", "validation"]
    finally:
        filesystem.rm("/bwlm-hub", recursive=True)


def test_a_folder_with_files_of_its_own_is_not_read_from_its_folder_data(tmp_path: Path) -> None:
    assert names(touch(tmp_path / "a", "data/0.parquet", "1.parquet", "README.md")) == ["1.parquet", "README.md"]
    assert names(touch(tmp_path / "b", "data/0.parquet", "README.md", "one.md")) == ["README.md", "one.md"]
    assert names(touch(tmp_path / "c", "data/0.md", "README.md")) == ["README.md"]


def test_an_owner_and_a_name_may_be_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(touch(tmp_path, "mine/a.parquet"))
    hint = "; a data set of the hub is hf://datasets/karpathy/fineweb-edu-100b-shuffle"
    assert refusal("karpathy/fineweb-edu-100b-shuffle").endswith(f".txt or .md files{hint}")
    for other in ("mine/other", "data/a.parquet", "data", "/data/x", "../x", "a/b/c", "~/x", "data/*.parquet"):
        assert "the hub" not in refusal(other), other


def test_the_hub_out_of_reach_is_told_in_one_line() -> None:
    """A closed port of this machine stands for a network that is not there."""
    script = "from bwlm.text.listing import list_files; list_files('hf://datasets/owner/name', 'data.source')"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"bwlm\.text\.listing\.NoSource: data\.source: hf://datasets/owner/name: the hub \(http://127\.0\.0\.1:9\) "
        r"cannot be reached \(.*Connection refused\): check the network",
        last,
    )


def test_a_web_server_out_of_reach_is_told() -> None:
    assert re.fullmatch(
        r"data\.source: http://127\.0\.0\.1:9/a\.parquet: its server cannot be reached \(.*\): check the network",
        refusal("http://127.0.0.1:9/a.parquet"),
    )


def test_fsspec_says_that_a_file_is_missing_where_its_server_is_out_of_reach() -> None:
    """So what stands behind an error is looked at first."""
    web = fsspec.filesystem("http")
    with pytest.raises(FileNotFoundError) as told:
        web.info("http://127.0.0.1:9/a.parquet")
    assert isinstance(listing.unreachable(told.value), OSError)
    assert not web.exists("http://127.0.0.1:9/a.parquet")


def test_a_package_that_is_missing_is_named_with_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme, (package, extra) in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)  # what is imported already
        assert refusal(f"{scheme}://bucket/texts") == (
            f"data.source: {scheme}://bucket/texts: {scheme}:// is read by the package {package}: "
            f"pip install 'bwlm[{extra}]'"
        )


def test_the_extras_install_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, extra in PACKAGES.values():
        assert [re.split("[><=]", one)[0] for one in extras[extra]] == [package]


def test_names_of_documents_are_titles(tmp_path: Path) -> None:
    files = ("test-plan.md", "dev-notes.md", "val.txt", "test/a.md", "Validation.md", "eval.parquet", "test-2.jsonl")
    found = {
        str(Path(file.uri).relative_to(tmp_path)): file.split
        for file in list_files(f"{touch(tmp_path, *files)}/**", "data.source", EVERY)
    }
    assert found == {
        "test-plan.md": "train",
        "dev-notes.md": "train",
        "val.txt": "validation",
        "test/a.md": "test",
        "Validation.md": "validation",
        "eval.parquet": "test",
        "test-2.jsonl": "test",
    }


def test_a_cause_is_found_behind_other_errors() -> None:
    refused = ConnectionRefusedError(111, "Connection refused")
    library = ValueError("a library's own")
    library.__cause__ = refused
    assert listing.unreachable(library) is refused
    assert listing.unreachable(ValueError("another")) is None

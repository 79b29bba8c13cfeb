"""Safe names and whole files, also when the process is killed in the middle of a write."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.errors import UserError
from bwlm.paths import (
    atomic_folder,
    check_id,
    check_writable,
    discard_unfinished,
    exclusive,
    local_path,
    read_json,
    storage_root,
    write_atomic,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- ids ----


def test_a_file_uri_may_encode_characters_or_not(tmp_path: Path) -> None:
    spaced, literal = tmp_path / "a b", tmp_path / "a%20b"
    spaced.mkdir()
    assert local_path(f"file://{tmp_path}/a%20b") == local_path(f"file://{tmp_path}/a b") == spaced
    literal.mkdir()
    assert local_path(f"file://{tmp_path}/a%20b") == literal, "the name as it is written goes first"
    assert local_path(f"{tmp_path}/a%20c") == tmp_path / "a%20c"
    assert local_path("s3://bucket/x") is None
    assert local_path("filed:/x") == Path("filed:/x")


@settings(deadline=None)
@given(st.text(max_size=140) | st.text("abcXYZ019._-/\\ \n", max_size=140))
def test_whatever_is_accepted_is_one_safe_segment(name: str) -> None:
    try:
        assert check_id(name) == name
    except UserError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", name, re.ASCII)
    root = Path("/storage")
    assert (root / name).parent == root
    assert os.path.normpath(root / name) == f"/storage/{name}"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "...", "../x", "a/b", "a\\b", "/etc", "a b", "a\n", "a\x00", "é", "a" * 129, ".hidden", "٣",
     "cache", "grids", "mlruns", "mlartifacts", "mlflow.db"],
)  # fmt: skip
def test_unsafe_and_reserved_ids_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"^run id: '") as caught:
        check_id(name, "run id")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a", "a" * 128, "base_2026-01-01_forward_d4", "a..b", "-", "_", "caches", "0"])
def test_ordinary_ids_are_accepted(name: str) -> None:
    assert check_id(name) == name


# ---- write_atomic ----


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    for content in (b"one", b"", b"two" * 1000):
        write_atomic(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failure_leaves_the_old_content_and_nothing_else(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "f", b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[broken], fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "f", b"new")
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_content_is_durable_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that survives a loss of power: file synced, renamed, folder synced."""
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        done.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        sync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomic(tmp_path / "f", b"new")
    assert done == ["file", "rename", "folder"]


_WRITER = """
import sys, itertools
from pathlib import Path
from bwlm.paths import write_atomic
target = Path(sys.argv[1])
for turn in itertools.count():
    write_atomic(target, (b"%010d" % turn) * 200_000)
    print(turn, flush=True)
"""


def test_a_killed_writer_never_leaves_a_part(tmp_path: Path) -> None:
    target, rng = tmp_path / "f", random.Random(0)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(target)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()  # it has begun
            time.sleep(rng.uniform(0, 0.03))
            writer.send_signal(signal.SIGKILL)
        content = target.read_bytes()
        assert len(content) == 2_000_000
        assert content == content[:10] * 200_000


# ---- JSON ----


def test_what_is_discarded_never_takes_its_name(tmp_path: Path) -> None:
    """Whoever passed its check before the discarding finds nothing to rename; another's files are left alone."""
    (tmp_path / "other").write_text("stays")

    def discard() -> None:
        (tmp_path / ".other.0123abcd.tmp").touch()
        discard_unfinished(tmp_path, ["late", "in/*"])

    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "late", b"x", discard)
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "in" / "side"):
        discard()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".other.0123abcd.tmp", "other"]


def test_json_is_stable_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert read_json(tmp_path / "a.json") == {"a": [1.5, None], "b": 1}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_what_is_no_json_is_told_with_its_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")


# ---- whole_folder ----


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "f").write_text(text)


def fail_to_fill(target: Path, error: BaseException) -> None:
    with atomic_folder(target) as temporary:
        fill(temporary, "x")
        raise error


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "target"
    with atomic_folder(target) as temporary:
        fill(temporary, "x")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert (target / "inner" / "f").read_text() == "x"
    assert names(target.parent) == ["target"]


def test_a_failure_leaves_nothing_not_even_the_parents_it_made(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        fail_to_fill(storage / "cache" / "packed" / "target", KeyboardInterrupt())
    assert names(tmp_path) == []


def test_a_failure_leaves_the_folders_that_were_there(tmp_path: Path) -> None:
    """An empty storage folder may be a person's own, with its rights and its place in a mount."""
    storage = tmp_path / "runs"
    storage.mkdir(mode=0o700)
    with pytest.raises(RuntimeError):
        fail_to_fill(storage / "cache" / "packed" / "target", RuntimeError())
    assert names(tmp_path) == ["runs"]
    assert names(storage) == []


def test_the_loser_of_a_race_keeps_the_winners(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_folder(target) as late:
        fill(late, "late")
        with atomic_folder(target) as early:
            fill(early, "early")
    assert (target / "inner" / "f").read_text() == "early"
    assert names(tmp_path) == ["target"]


def test_a_rename_that_fails_for_another_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space left"), atomic_folder(tmp_path / "target") as temporary:
        fill(temporary, "x")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_every_file_of_a_folder_is_durable_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with atomic_folder(tmp_path / "target") as temporary:
        fill(temporary, "x")
        (temporary / "g").write_text("y")
    assert {"f", "g", "inner"} <= set(synced)
    assert synced[-1] == tmp_path.name


# ---- storage ----


def test_where_storage_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("BWLM_STORAGE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    assert storage_root(None) == tmp_path / "runs"
    monkeypatch.setenv("BWLM_STORAGE", "")
    assert storage_root(None) == tmp_path / "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert storage_root(None) == Path.home() / "bwlm-runs"
    monkeypatch.setenv("BWLM_STORAGE", "~/elsewhere")
    assert storage_root(None) == Path.home() / "elsewhere"
    assert storage_root("here") == tmp_path / "here"
    for uri in ("file:///abs/path", "FILE:///abs/path", "file:/abs/path", "file://localhost/abs/path"):
        assert storage_root(uri) == Path("/abs/path")
    with pytest.raises(UserError, match=r"^storage: 'ftp://host/x' is neither a folder nor a bucket"):
        storage_root("ftp://host/x")


def test_a_writable_storage_is_left_untouched(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["/proc/bwlm", "/proc/1/bwlm", "{file}", "{file}/runs/deeper", "/tmp/" + "n" * 300])
def test_a_storage_that_cannot_be_written_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = Path(place.format(file=tmp_path / "file"))
    with pytest.raises(UserError, match=r"^storage: .* is not writable.*: choose another folder") as caught:
        check_writable(root)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]


# ---- locks ----

_HOLDER = """
import sys, time
from pathlib import Path
from bwlm.paths import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_exclusive_and_freed_by_death(tmp_path: Path) -> None:
    lock, waited = tmp_path / "lock", threading.Event()

    def wait() -> None:
        with exclusive(lock):
            waited.set()

    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        threading.Thread(target=wait, daemon=True).start()
        assert not waited.wait(0.3)
        holder.send_signal(signal.SIGKILL)
        assert waited.wait(5)

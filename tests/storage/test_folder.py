"""A run's folder in the bucket and its copies on two machines: pushes, attempts, kills at every request."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from bwlm.errors import RunError
from bwlm.storage.folder import SharedFolder, is_trained
from bwlm.storage.head import LateWriter, Stored, read_head, swap_head
from bwlm.storage.objects import BucketAway
from tests.s3_server import CUT, PASS, REFUSE, STALE, FaultyProxy, Request
from tests.storage.conftest import Machine
from tests.storage.pusher import FILES, STEPS, contents, delete, save, write

pytestmark = pytest.mark.faults
FolderOn = Callable[[str], SharedFolder]


def files_here(folder: SharedFolder) -> dict[str, bytes]:
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def made(folder: SharedFolder) -> SharedFolder:
    """A run that its launch has made."""
    write(folder, "config.json", "{}")
    write(folder, "status.json", "waiting")
    folder.push()
    return folder


def test_small_files_are_pulled_and_large_ones_fetched(folder_on: FolderOn) -> None:
    here = made(folder_on("here"))
    here.begin(1)
    save(here, 4)
    write(here, "metrics.jsonl", "line\n")
    write(here, "base.h5", b"log")
    here.push(attempt=1)
    there = folder_on("there")
    there.pull()
    assert sorted(files_here(there)) == [
        "checkpoints/step_000004/meta.json",
        "config.json",
        "metrics.jsonl",
        "status.json",
    ]
    assert there.size_of("checkpoints/step_000004/model.safetensors") == len(b"weights model.safetensors 4")
    there.fetch("checkpoints/step_000004/*")
    there.fetch("base.h5")
    assert files_here(there) == files_here(here)


def test_nothing_is_pulled_twice(folder_on: FolderOn, proxy: FaultyProxy) -> None:
    here = made(folder_on("here"))
    there = folder_on("there")
    there.pull()
    before = len(proxy.seen)
    there.pull()
    assert [request.method for request in proxy.seen[before:]] == ["GET"]  # the head
    write(here, "report.md", "new")
    here.push()
    before = len(proxy.seen)
    there.pull()
    assert len(proxy.seen[before:]) == 2


def test_deleted_checkpoints_and_nothing_else_are_deleted_everywhere(folder_on: FolderOn) -> None:
    here = made(folder_on("here"))
    here.begin(1)
    save(here, 4)
    here.push(attempt=1)
    there = folder_on("there")
    there.pull()
    save(here, 8)
    delete(here, 4)
    (here.path / "config.json").unlink()  # by hand: that is no deletion in the bucket
    here.push(attempt=1)
    there.pull()
    assert [path.name for path in (there.path / "checkpoints").iterdir()] == ["step_000008"]
    assert (there.path / "config.json").exists()
    write(here, "status.json", "running")  # what was dropped is deleted by the push after
    here.push(attempt=1)
    assert not [one.key for one in here.bucket.list("run/") if "step_000004" in one.key]


def test_a_late_writer_of_an_older_attempt_changes_nothing(folder_on: FolderOn) -> None:
    frozen = made(folder_on("frozen"))
    frozen.begin(1)
    save(frozen, 4)
    frozen.push(attempt=1)
    taker = folder_on("taker")
    taker.begin(2)
    assert (taker.path / "checkpoints/step_000004/model.safetensors").exists()
    save(frozen, 8, b"late")  # it wakes
    write(frozen, "status.json", "finished")
    with pytest.raises(LateWriter, match="attempt 2 has written to it, and this is attempt 1"):
        frozen.push(attempt=1)
    with pytest.raises(LateWriter):
        frozen.push()  # nor by a launch beside it
    with pytest.raises(LateWriter):
        frozen.begin(1)
    head, _ = read_head(taker.bucket, "run")
    assert not [path for path in head.files if "step_000008" in path]
    assert {stored.attempt for path, stored in head.files.items() if path.startswith("checkpoints/")} == {1}
    save(taker, 8, b"good")
    taker.push(attempt=2)
    frozen.pull()  # what it wrote late is gone here too
    assert (frozen.path / "status.json").read_text() == "waiting"
    frozen.fetch("checkpoints/*")
    assert files_here(frozen) == files_here(taker)


def test_an_unpushed_step_is_kept_unless_another_machine_has_gone_on(folder_on: FolderOn, proxy: FaultyProxy) -> None:
    here = made(folder_on("here"))
    here.begin(1)
    save(here, 4)
    proxy.rule = lambda request: REFUSE if request.writes else PASS
    with pytest.raises(BucketAway):
        here.push(attempt=1)
    proxy.rule = lambda request: PASS
    here.pull()
    here.begin(2)  # the same machine resumes from what it has
    assert (here.path / "checkpoints/step_000004/model.safetensors").exists()
    there = folder_on("there")
    there.begin(3)
    here.pull()
    assert not (here.path / "checkpoints/step_000004/model.safetensors").exists()


def test_two_processes_push_other_files_of_one_folder_at_once(folder_on: FolderOn, proxy: FaultyProxy) -> None:
    """A launch writes its notes while a worker on another machine saves: the head keeps both."""
    launch = made(folder_on("launch"))
    worker = folder_on("worker")
    worker.begin(1)
    save(worker, 4)
    write(launch, "mlflow.json", "{}")
    launch.push(lambda path: not is_trained(path))
    worker.push(attempt=1)
    head, _ = read_head(worker.bucket, "run")
    assert {"mlflow.json", "checkpoints/step_000004/meta.json"} <= head.files.keys()


def test_a_deleted_run_does_not_come_back(folder_on: FolderOn) -> None:
    here = made(folder_on("here"))
    here.begin(1)
    there = folder_on("there")
    there.pull()
    there.delete(2)
    assert not list(there.bucket.list("run/"))
    save(here, 4)
    with pytest.raises(LateWriter):
        here.push(attempt=1)
    assert not read_head(there.bucket, "run")[0].files
    here.pull()
    assert not (here.path / "config.json").exists()
    again = folder_on("again")  # the id can be used anew
    again.pull()
    made(again).begin(3)
    there.pull()
    assert (there.path / "config.json").exists()


def test_a_log_that_is_merged_during_a_push_is_whole(folder_on: FolderOn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tail is read after it was emptied into the file, which had not changed when the push began."""
    here = made(folder_on("here"))
    here.begin(1)
    write(here, "base.h5", "steps 1 to 4")
    write(here, "base.h5.tail", "")
    here.push(attempt=1)
    write(here, "base.h5.tail", "steps 5 to 8")
    upload = SharedFolder._upload

    def merging(self: SharedFolder, path: str, key: str, attempt: int) -> Any:
        if path == "base.h5.tail":
            write(here, "base.h5", "steps 1 to 8")
            write(here, "base.h5.tail", "")
        return upload(self, path, key, attempt)

    monkeypatch.setattr(SharedFolder, "_upload", merging)
    here.push(attempt=1)
    there = folder_on("there")
    there.begin(2)
    assert (there.path / "base.h5").read_text() == "steps 1 to 8"


def test_a_bucket_cannot_write_outside_its_folder(folder_on: FolderOn) -> None:
    here = made(folder_on("here"))
    swap_head(here.bucket, "run", read_head(here.bucket, "run"), {"../../evil": Stored("key", 1, "0", 0)})
    with pytest.raises(RunError, match=r"names \.\./\.\./evil, which lies outside its folder"):
        here.pull()


def test_a_stale_listing_hides_nothing_from_a_writer(folder_on: FolderOn, proxy: FaultyProxy) -> None:
    """Heads and leases are read by their keys; a listing only says where to look."""
    from bwlm.storage.claim import take

    holder = {"place": "a", "seconds": 60.0}
    here = folder_on("here")
    list(here.bucket.list(".leases/run/lease/"))  # as it is then: empty
    first, _ = take(here.bucket, "run", "lease", holder, 0.05, lambda: False)
    first.release()
    stale = [4]

    def rule(request: Request) -> str:
        if request.lists and stale[0]:
            stale[0] -= 1
            return STALE
        return PASS

    proxy.rule = rule
    second, _ = take(here.bucket, "run", "lease", holder | {"place": "b"}, 0.05, lambda: False)
    assert second.number == 2  # number 1 was refused, as often as it was tried
    second.release()
    assert stale[0] == 0


def test_a_kill_before_any_request_leaves_whole_checkpoints(machine: Machine, proxy: FaultyProxy) -> None:
    """Enumerates the requests: a process dies at its first, its second, .. until one gets through."""
    resumed_from: list[int] = []
    killed = True
    while killed:
        name = f"run-{len(resumed_from)}"
        made(SharedFolder(root := machine("here"), name))
        killed = _killed_at(len(resumed_from), proxy, [str(root), name])
        taker = SharedFolder(machine("there"), name)
        taker.begin(2)
        steps = sorted(int(path.parent.name[5:]) for path in taker.path.glob("checkpoints/*/meta.json"))
        resumed_from.append(max(steps, default=0))
        if steps:
            newest = taker.path / "checkpoints" / f"step_{steps[-1]:06d}"
            assert {path.name: path.read_bytes() for path in newest.iterdir()} == {
                file: contents(file, steps[-1]) for file in FILES
            }
            assert (taker.path / "metrics.jsonl").read_text().count("\n") == steps[-1]
        head, _ = read_head(taker.bucket, name)
        named = {*head.dropped, *(stored.key for stored in head.files.values())}
        assert {one.key for one in taker.bucket.list(f"{name}/")} <= named  # what the dead one left is deleted
    assert resumed_from == sorted(resumed_from)
    assert set(resumed_from) == {0, *STEPS}
    assert len(resumed_from) > 15


def _killed_at(number: int, proxy: FaultyProxy, arguments: list[str]) -> bool:
    """Runs the pusher, which dies when it sends its request of that number; returns whether it sent so many."""
    first, killed = len(proxy.seen), threading.Event()
    started = threading.Event()

    def rule(request: Request) -> str:
        if request.number - first != number:
            return PASS
        assert started.wait(60)
        killed.set()
        process.kill()
        process.wait()
        return CUT

    proxy.rule = rule
    process = subprocess.Popen([sys.executable, "-m", "tests.storage.pusher", *arguments])
    started.set()
    code = process.wait()
    proxy.rule = lambda request: PASS
    assert code == (-signal.SIGKILL if killed.is_set() else 0)
    return killed.is_set()

"""Attempts at a run on several machines, over a bucket in this process's memory: which files of which stay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from obstore.store import MemoryStore

from bwlm.record.bucket import push_all
from bwlm.record.experiment import LEASE, ExperimentFolder
from bwlm.record.lease import Lease, take_at_once
from bwlm.record.removal import delete as delete_run
from bwlm.storage.folder import SharedFolder, bucket_at, is_trained
from bwlm.storage.head import LateWriter, read_head
from bwlm.storage.objects import Bucket
from bwlm.storage.opened import board_of, open_storage
from tests.storage.pusher import save, write
from tests.storage.test_folder import made

FolderOn = Callable[[str], SharedFolder]


class InMemory(Bucket):
    """Bucket of which nothing is left when its client is gone."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._store = MemoryStore()


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty storage, in the place of the S3 server's; machines share it, as they share this process's clients."""
    monkeypatch.setattr("bwlm.storage.folder.Bucket", InMemory)
    bucket_at.cache_clear()
    board_of.cache_clear()
    yield "s3://memory/storage"
    bucket_at.cache_clear()
    board_of.cache_clear()


def files_of(folder: SharedFolder) -> set[str]:
    """Paths of the files that the bucket has."""
    return set(read_head(folder.bucket, folder.name)[0].files)


# ---- deleted runs ----


def test_what_waits_elsewhere_does_not_bring_a_deleted_run_back(folder_on: FolderOn) -> None:
    """Neither as its training ends, nor by `bwlm storage push`, nor as a new run of its id resumes."""
    here = made(folder_on("here"))
    lease = take_at_once(here.path / LEASE)
    assert isinstance(lease, Lease)
    assert lease.claim is not None
    here.begin(lease.claim.number)
    save(here, 4)
    here.push(attempt=1)
    save(here, 8, b"of the deleted run")
    lease.release()
    there = folder_on("there")
    delete_run(ExperimentFolder(open_storage(there.bucket.address), "run"))
    folder_on("here")
    with pytest.raises(LateWriter, match="it was deleted while this process wrote to it"):
        here.push(attempt=1)
    assert push_all(here.root) == ([], ["run"])
    assert not files_of(here)
    assert not here.path.exists()
    again = folder_on("again")
    again.pull()
    made(again).begin(3)
    assert not list(again.path.glob("checkpoints/*"))


@pytest.mark.parametrize("path", ["evaluations/base/forward/documents.json", "mlflow.json"])
def test_what_was_written_during_a_deletion_does_not_bring_a_run_back(path: str, folder_on: FolderOn) -> None:
    """`bwlm eval` pushes them, which holds no lease while it reads, and so do a launch's notes."""
    evaluating = made(folder_on("evaluating"))
    folder_on("deleting").delete(1)
    write(evaluating, path, "{}")
    with pytest.raises(LateWriter):
        evaluating.push()
    assert not files_of(evaluating)
    assert not evaluating.push_rest()


def test_a_late_deletion_deletes_nothing(folder_on: FolderOn) -> None:
    """The process was frozen while it held the lease, and another one has taken that to train."""
    training = made(folder_on("training"))
    training.begin(2)
    with pytest.raises(LateWriter, match="attempt 2 has written to it, and this is attempt 1"):
        folder_on("deleting").delete(1)
    assert files_of(training) == {"config.json", "status.json"}


# ---- late attempts ----


def look_while_it_lives(late: SharedFolder) -> None:
    """Any command on its machine pulls so."""
    with late.training():
        late.pull()
    late.pull()


def push_other_files(late: SharedFolder) -> None:
    """A launch on its machine does so, and then `bwlm storage push`."""
    write(late, "mlflow.json", "{}")
    late.push(lambda path: not is_trained(path))
    assert push_all(late.root) == ([], ["run"])


def remove_other_files(late: SharedFolder) -> None:
    late.remove(lambda path: path == "report.md")
    late.pull()


@pytest.mark.parametrize("learns", [look_while_it_lives, push_other_files, remove_other_files])
def test_late_files_are_dropped_however_their_machine_learns_of_a_newer_attempt(
    learns: Callable[[SharedFolder], None], folder_on: FolderOn
) -> None:
    late = made(folder_on("late"))
    write(late, "report.md", "")
    late.begin(1)
    save(late, 4)
    write(late, "metrics.jsonl", "line\n" * 4)
    late.push(attempt=1)
    save(late, 6, b"late")
    write(late, "metrics.jsonl", "late\n" * 6)
    newer = folder_on("newer")
    newer.begin(2)
    save(newer, 8)
    write(newer, "metrics.jsonl", "good\n" * 8)
    newer.push(attempt=2)
    folder_on("late")
    learns(late)
    assert not late.waiting()
    assert (late.path / "metrics.jsonl").read_text() == "good\n" * 8
    late.begin(3)
    assert sorted(path.name for path in late.path.glob("checkpoints/*")) == ["step_000004", "step_000008"]
    late.push(attempt=3)
    assert not [path for path in files_of(late) if "step_000006" in path]


def test_a_late_training_changes_nothing_where_somebody_looks_at_it(folder_on: FolderOn) -> None:
    late = made(folder_on("late"))
    late.begin(1)
    newer = folder_on("newer")
    newer.begin(2)
    write(newer, "status.json", "finished")
    newer.push(attempt=2)
    folder_on("late")
    with late.training():
        write(late, "status.json", "late")
        late.pull()
        with pytest.raises(LateWriter):
            late.push(attempt=1)
        with pytest.raises(LateWriter):
            late.push()
    assert not late.push_rest()
    assert (late.path / "status.json").read_text() == "finished"


def test_a_run_goes_on_beside_its_frozen_process_on_the_same_machine(folder_on: FolderOn) -> None:
    """Which holds all its locks; its lease has run out, so another process has taken that."""
    folder = made(folder_on("here"))
    folder.begin(1)
    trained = threading.Event()

    def train() -> None:
        folder.begin(2)
        with folder.training():
            save(folder, 4)
            folder.push(attempt=2)
            trained.set()

    with folder.training():
        threading.Thread(target=train, daemon=True).start()
        assert trained.wait(timeout=60)
        write(folder, "metrics.jsonl", "late")
        with pytest.raises(LateWriter):
            folder.push(is_trained, attempt=1)
    assert "checkpoints/step_000004/meta.json" in files_of(folder)


def test_results_on_a_machine_whose_own_attempt_is_old_are_pushed(folder_on: FolderOn) -> None:
    """Results of `bwlm eval` waited because the bucket was away."""
    here = made(folder_on("here"))
    here.begin(1)
    folder_on("there").begin(2)
    folder_on("here")
    here.pull()
    write(here, path := "evaluations/base/forward/documents.json", "{}")
    assert here.push_rest()
    assert path in files_of(here)


def test_scores_made_elsewhere_do_not_end_an_attempt_whose_rest_waits(folder_on: FolderOn) -> None:
    """The bucket was away when its training ended; meanwhile `bwlm eval` scores an earlier checkpoint."""
    here = made(folder_on("here"))
    here.bucket.create(".leases/run/lease/00000001.json", b'{"released": true}')
    here.begin(1)
    save(here, 4)
    here.push(attempt=1)
    save(here, 8)
    write(here, "status.json", "finished")
    there = folder_on("there")
    with ExperimentFolder(open_storage(there.bucket.address), "run").lease(trains=False):
        write(there, scores := "evaluations/base/forward/arc.json", "{}")
    assert scores in files_of(there)
    folder_on("here")
    assert push_all(here.root) == (["run"], [])
    folder_on("third").begin(3)
    assert {"checkpoints/step_000004/meta.json", "checkpoints/step_000008/meta.json", scores} <= files_of(here)
    folder_on("there")
    write(there, scores, "late")
    with pytest.raises(LateWriter):
        there.push()


def test_a_report_of_a_deleted_run_is_dropped(folder_on: FolderOn) -> None:
    """Though no training wrote it, and it waits."""
    here = made(folder_on("here"))
    write(here, "RESEARCH_REPORT.md", "")
    folder_on("deleting").delete(1)
    folder_on("here")
    assert not here.push_rest()
    assert here.push_rest()
    assert not files_of(here)
    assert not here.path.exists()

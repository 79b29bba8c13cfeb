"""The research log: what is written is read back with plain h5py, by whoever opens it, also after kill -9."""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bwlm.errors import UserError
from bwlm.record import researchlog, researchlog_tail
from bwlm.record.researchlog import ResearchLog, open_log
from bwlm.record.researchlog_schema import GROUPS, VERSION
from bwlm.record.researchlog_tail import has_entries, tail_of
from tests.faults.checkpoints import flip, names
from tests.record.logwriter import EVERY, progress, written, wrong
from tests.record.schema_tables import MARK, PAGE, tables

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "base.h5"


def write(log: ResearchLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write("train", step, loss=1 / step)


def steps(path: Path, group: str = "train") -> list[int]:
    """With plain h5py; no tail."""
    with h5py.File(path) as file:
        return [int(step) for step in file[group]["step"][:]] if "step" in file[group] else []


def losses_are_right(path: Path) -> bool:
    with h5py.File(path) as file:
        return bool((file["train/loss"][:] == 1 / file["train/step"][:]).all())


def leave(log: ResearchLog) -> None:
    """What a killed writer leaves: its tail as it is, and no lock."""
    log._tail.close()


def killed(path: Path, last: int, merged: int = 0) -> None:
    """A log of `last` steps whose writer died after it had merged some."""
    log = ResearchLog(path)
    write(log, 1, merged)
    log.merge()
    write(log, merged + 1, last)
    leave(log)


# ---- write and read ----


def test_it_is_read_in_three_lines(path: Path) -> None:
    with ResearchLog(path) as log:
        log.write("train", step=1, loss=3.5, grad_norm=0.25)
        log.write("train", step=2, loss=3.0, grad_norm=0.5)
    with h5py.File(path) as file:
        assert file["train/step"][:].tolist() == [1, 2]
        assert file["train/loss"][:].tolist() == [3.5, 3.0]
    assert names(path.parent) == ["base.h5"]


def test_numbers_of_all_kinds_are_kept(path: Path) -> None:
    """The predecessor's log dropped np.float32."""
    with ResearchLog(path) as log:
        log.write("train", step=np.int64(1), loss=np.float32(0.1), lr=2, tokens=True)
        log.write(
            "tokens", step=1, input=[[1, 2], [3, 4]], loss=np.array([[0.5, 1], [2, 4]], np.float32), row=[5, 2**40]
        )
        log.write("gradients", step=1, norm=np.arange(4, dtype=np.int8)[::2])
    with h5py.File(path) as file:
        assert file["train/loss"][0] == np.float32(0.1)
        assert (file["train/lr"][0], file["train/tokens"][0]) == (2, 1)
        assert file["tokens/input"][0].tolist() == [[1, 2], [3, 4]]
        assert file["tokens/loss"].dtype == np.float16
        assert file["tokens/loss"][0].tolist() == [[0.5, 1], [2, 4]]
        assert file["tokens/row"][0].tolist() == [5, 2**40]
        assert file["gradients/norm"][0].tolist() == [0, 2]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16, np.float32, np.bool_])
def test_ids_of_any_type_are_kept_and_may_be_missing(path: Path, kind: type) -> None:
    with ResearchLog(path) as log:
        log.write("tokens", step=1, input=np.array([[0, 1]], kind))
        log.write("tokens", step=2, target=np.array([[1, 1]], kind))
    with h5py.File(path) as file:
        assert file["tokens/input"].dtype.kind == "i"
        assert file["tokens/input"][:].tolist() == [[[0, 1]], [[-1, -1]]]
        assert file["tokens/target"][:].tolist() == [[[-1, -1]], [[1, 1]]]


def test_columns_that_a_step_lacks_read_as_nan(path: Path) -> None:
    with ResearchLog(path) as log:
        log.write("train", step=1, loss=1.0)
        log.write("train", step=2, grad_norm=2.0)
        log.merge()
        log.write("train", step=3, lr=3.0)
        log.write("train", step=4)
    with h5py.File(path) as file:
        expected = {"loss": [1, None, None, None], "grad_norm": [None, 2, None, None], "lr": [None, None, 3, None]}
        for name, values in expected.items():
            np.testing.assert_equal(file[f"train/{name}"][:], np.array(values, np.float64))


@pytest.mark.parametrize(
    ("group", "step", "columns", "message"),
    [
        ("trains", 6, {}, r"trains: not a group of the research log; those are: train, tokens, "),
        ("train", 6, {"lss": 1.0}, r"train/lss: not a column of the research log; of train are: step, tokens, "),
        ("train", 6, {"loss": "low"}, r"train/loss: must be numbers, not <U3"),
        ("train", 6, {"loss": None}, r"train/loss: must be numbers, not object"),
        ("train", 6, {"loss": 1j}, r"train/loss: must be numbers, not complex128"),
        ("train", 6, {"loss": [1.0, 2.0]}, r"train/loss: shape \(2,\); its axes are \[\]"),
        ("train", 5, {"loss": 1.0}, r"train: step 5 is not after step 5, the last that was logged"),
        ("train", 4, {"loss": 1.0}, r"train: step 4 is not after step 5"),
        ("train", -1, {"loss": 1.0}, r"train: step -1 is not a whole number from 0"),
        ("train", 6.5, {"loss": 1.0}, r"train: step 6\.5 is not a whole number"),
        (
            "tokens",
            6,
            {"input": [[1, 2, 3]]},
            r"tokens/input: int64 of shape \(1, 3\) at step 6, int64 of shape \(1, 2\)",
        ),
        ("tokens", 6, {"input": np.ones((1, 2), np.int16)}, r"tokens/input: int16 of shape .* at step 6, int64 of"),
        ("tokens", 6, {"input": [[1.5, 2]]}, r"tokens/input: holds what int64 cannot"),
        ("tokens", 6, {"input": [[1], [2, 3]]}, r"tokens/input: not an array"),
        ("tokens", 6, {"row": [2**63]}, r"tokens/row: holds what int64 cannot"),
        ("tokens", 6, {"row": []}, r"tokens/row: shape \(0,\); its axes are \[R\], none of them empty"),
        ("validation", 6, {"correct": [[300]]}, r"validation/correct: holds what int8 cannot"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_no_trace(
    path: Path, group: str, step: Any, columns: dict[str, Any], message: str
) -> None:
    with ResearchLog(path) as log:
        log.write("train", step=5, loss=1.0)
        log.write("tokens", step=5, input=[[1, 2]])
        with pytest.raises(ValueError, match=message):
            log.write(group, step, **columns)
        log.write("train", step=6, loss=2.0)
        log.write("tokens", step=6, input=[[3, 4]], row=[7])
    assert steps(path) == steps(path, "tokens") == [5, 6]
    with h5py.File(path) as file:
        assert file["tokens/input"][:].tolist() == [[[1, 2]], [[3, 4]]]


def test_a_refused_entry_does_not_settle_the_shape_of_the_next(path: Path) -> None:
    with ResearchLog(path) as log:
        with pytest.raises(ValueError, match="gradients/nrm"):
            log.write("gradients", step=1, norm=[1.0, 2.0], nrm=[1.0])
        log.write("gradients", step=1, norm=[1.0, 2.0, 3.0])


def test_the_shape_of_a_column_holds_across_writers(path: Path) -> None:
    with ResearchLog(path) as log:
        log.write("gradients", step=1, norm=[1.0, 2.0])
    with (
        ResearchLog(path) as log,
        pytest.raises(ValueError, match=r"gradients/norm: .* \(3,\) at step 2, .* \(2,\) before"),
    ):
        log.write("gradients", step=2, norm=[1.0, 2.0, 3.0])


def test_the_file_describes_itself(path: Path) -> None:
    fixed = {
        "gradients/parameter": np.array(["embedding.weight", "größe"]),
        "gradients/layer": [-1, 0],
        "validation/token": np.arange(5),
        "validation/document": np.array([], np.int64),
    }
    with ResearchLog(path, about={"experiment": "mine", "seed": 3, "lr": 0.5}, fixed=fixed) as log:
        log.write("gradients", step=1, norm=[1.0, 2.0])
    with ResearchLog(path, about={"experiment": "another"}, fixed={"gradients/layer": [7, 7]}):
        pass  # what holds for the whole run is what its first writer said
    with h5py.File(path) as file:
        about = {"experiment": "mine", "seed": 3, "lr": 0.5, "schema_version": VERSION}
        assert about.items() <= dict(file.attrs).items()
        assert {name: file[name].attrs["description"] for name in file} == {n: g.description for n, g in GROUPS.items()}
        assert file["gradients/parameter"].asstr()[:].tolist() == ["embedding.weight", "größe"]
        assert file["gradients/layer"][:].tolist() == [-1, 0]
        assert file["validation/document"].shape == (0,)
        norm, layer = GROUPS["gradients"].columns["norm"], GROUPS["gradients"].fixed["layer"]
        told = {"unit": norm.unit, "axes": "step P", "description": norm.description}
        assert dict(file["gradients/norm"].attrs) == told
        assert dict(file["gradients/layer"].attrs) == {
            "unit": layer.unit,
            "axes": "P",
            "description": layer.description,
        }
        assert dict(file["gradients/step"].attrs)["axes"] == "step"


def test_what_holds_for_no_whole_run_is_refused(path: Path) -> None:
    for name, message in [("gradients/norm", "gradients has: parameter"), ("losses/x", "losses has: none")]:
        with pytest.raises(ValueError, match=rf"{name}: no dataset that holds for a whole run; {message}"):
            ResearchLog(path, fixed={name: [1]})
    ResearchLog(path).close()  # and the lock is free


def test_entries_larger_than_what_is_merged_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(researchlog_tail, "_AT_ONCE", 10_000)
    rng = np.random.default_rng(0)
    states = rng.random((7, 1, 3, 50, 64)).astype(np.float16)  # 19 kB each
    with ResearchLog(path) as log:
        for step, value in enumerate(states, 1):
            log.write("train", step, loss=step)
            log.write("representations", step, states=value)
        log.merge()
        log.write("representations", 8, states=states[0])
    with h5py.File(path) as file:
        assert (file["representations/states"][:7] == states).all()
        assert (file["representations/states"][7] == states[0]).all()
        assert file["train/loss"][:].tolist() == list(range(1, 8))


def test_many_merges_make_the_file_hardly_larger_than_one(path: Path) -> None:
    """A chunk that is rewritten leaves a hole where it stood."""
    values = np.random.default_rng(0).random((1000, 6))
    sizes = []
    for every in (1000, 10):
        path.unlink(missing_ok=True)
        with ResearchLog(path) as log:
            for step, row in enumerate(values, 1):
                log.write(
                    "train", step, **dict(zip(("loss", "lr", "mfu", "flops", "grad_norm", "tokens"), row, strict=True))
                )
                if step % every == 0:
                    log.merge()
        sizes.append(path.stat().st_size)
        with h5py.File(path) as file:
            assert np.array_equal(file["train/loss"][:], values[:, 0])
    assert sizes[1] < 1.5 * sizes[0]


# ---- writers and readers at once ----


@contextmanager
def writer(path: Path, *resume: int) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that writes, killed at the end of the block."""
    command = [sys.executable, "-m", "tests.record.logwriter", path, path.with_suffix(".progress"), *map(str, resume)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def wait_for(process: subprocess.Popen[bytes], path: Path, step: int) -> None:
    """Until a writer has written a step."""
    while progress(path.with_suffix(".progress")) < step:
        assert process.poll() is None
        time.sleep(0.001)


def test_a_second_writer_is_refused_by_name(path: Path) -> None:
    with writer(path) as process:
        with pytest.raises(UserError, match=rf"{path}: .+:{process.pid} .*writes to it: wait for it"):
            ResearchLog(path)
        wait_for(process, path, progress(path.with_suffix(".progress")) + 1)  # and is not harmed
    ResearchLog(path).close()


def test_a_writer_waits_for_a_reader_that_merges(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ResearchLog(path).close()
    reader = ResearchLog(path, reader=True)
    with pytest.raises(UserError, match=r"reader .* writes to it"):
        ResearchLog(path, reader=True)
    monkeypatch.setattr(
        "bwlm.record.researchlog_tail.time.sleep", lambda _: reader.close()
    )  # it ends while the writer waits
    ResearchLog(path).close()


def test_a_second_writer_in_this_process_is_refused_too(path: Path) -> None:
    with ResearchLog(path) as log:
        with pytest.raises(UserError, match=rf".+:{os.getpid()} .*writes to it"):
            ResearchLog(path)
        write(log, 1, 3)
    assert steps(path) == [1, 2, 3]


def test_a_reader_sees_a_prefix_while_a_writer_writes(path: Path) -> None:
    seen: list[int] = []
    with writer(path) as process:
        while len(set(seen)) < 12:
            assert process.poll() is None
            with open_log(path) as file:
                assert [fault for group in EVERY for fault in wrong(file, group)] == []
                seen.append(len(file["train/step"]) if "step" in file["train"] else 0)
                last = seen[-1]
                assert all(len(file[g].get("step", [])) == len(written(g, last)) for g in EVERY)
    assert seen == sorted(seen)


def test_a_reader_keeps_what_it_opened(path: Path) -> None:
    with ResearchLog(path) as log:
        write(log, 1, 5)
        log.merge()
        with h5py.File(path) as file:
            write(log, 6, 9)
            log.merge()
            assert file["train/step"][:].tolist() == [1, 2, 3, 4, 5]
        assert steps(path) == list(range(1, 10))


def test_merging_takes_a_small_share_of_the_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(researchlog.time, "monotonic", lambda: now)
    with ResearchLog(path) as log:
        log._merge_seconds = 2.0  # what the last merge took
        write(log, 1, 3)
        now = 0.99 * 2 / researchlog._SHARE
        log.merge(now=False)
        assert steps(path) == []
        now = 1.01 * 2 / researchlog._SHARE
        log.merge(now=False)
        assert steps(path) == [1, 2, 3]


# ---- going on ----


def test_a_writer_goes_on_where_the_last_ended(path: Path) -> None:
    for first in (1, 4, 7):
        with ResearchLog(path) as log:
            write(log, first, first + 2)
    assert steps(path) == list(range(1, 10))
    assert losses_are_right(path)


@pytest.mark.parametrize("merged", [0, 3, 6, 10])
@pytest.mark.parametrize("resume", [0, 4, 6, 10, 99, None])
def test_a_resume_forgets_later_steps_and_takes_the_tail_of_a_killed_writer(
    path: Path, merged: int, resume: int | None
) -> None:
    killed(path, 10, merged)
    kept = 10 if resume is None else min(resume, 10)
    with ResearchLog(path, resume) as log:
        assert steps(path) == list(range(1, kept + 1))
        write(log, kept + 1, kept + 2)
    assert steps(path) == list(range(1, kept + 3))
    assert losses_are_right(path)


def test_a_resume_forgets_in_every_group(path: Path) -> None:
    with ResearchLog(path) as log:
        for step in (2, 4, 6):
            log.write("tokens", step, input=[[step]])
            log.write("gradients", step + 1, norm=[step])
    with ResearchLog(path, 4) as log:
        assert (steps(path, "tokens"), steps(path, "gradients")) == ([2, 4], [3])
        log.write("gradients", 4, norm=[9])
    with h5py.File(path) as file:
        assert file["gradients/norm"][:].tolist() == [[2], [9]]


def test_a_death_between_the_file_and_its_tail_writes_no_entry_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has taken the entries, and they are still in the tail."""

    class Killed(BaseException):
        pass

    def die(_: Path) -> Any:
        raise Killed

    log = ResearchLog(path)
    write(log, 1, 5)
    with monkeypatch.context() as patched:
        patched.setattr(researchlog, "_state", die)
        with pytest.raises(Killed):
            log.merge()
    leave(log)
    assert steps(path) == [1, 2, 3, 4, 5]
    assert tail_of(path).stat().st_size > 500
    with ResearchLog(path) as log:
        assert steps(path) == [1, 2, 3, 4, 5]
        write(log, 6, 7)
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]
    assert losses_are_right(path)


_DIES_IN_A_MERGE = """
import os, sys
from pathlib import Path
from bwlm.record import researchlog
researchlog._append = lambda *_: os._exit(9)
log = researchlog.ResearchLog(Path(sys.argv[1]))
log.write("train", int(sys.argv[2]), loss=1 / int(sys.argv[2]))
log.merge()
"""


def test_what_a_death_in_a_merge_leaves_goes_with_the_next(path: Path) -> None:
    for step in (1, 2):
        assert subprocess.run([sys.executable, "-c", _DIES_IN_A_MERGE, path, str(step)], cwd=REPOSITORY).returncode == 9
        partial, *others = names(path.parent)
        assert re.fullmatch(r"\.base\.h5\.[0-9a-f]{8}\.tmp", partial)
        assert others == ["base.h5", "base.h5.tail"]
        with open_log(path):
            pass
        assert names(path.parent) == ["base.h5"]
    assert steps(path) == [1, 2]
    assert losses_are_right(path)


# ---- damage ----


@pytest.mark.parametrize("lost", [1, 8, 15, 16, 17, 200])
def test_a_torn_last_record_is_forgotten(path: Path, lost: int) -> None:
    killed(path, 10, merged=4)
    content = tail_of(path).read_bytes()
    tail_of(path).write_bytes(content[:-lost])
    with ResearchLog(path) as log:
        kept = steps(path)
        assert kept == list(range(1, len(kept) + 1))
        assert len(kept) in ((9, 8) if lost == 200 else (9,))
        write(log, kept[-1] + 1, 12)
    assert steps(path) == list(range(1, 13))
    assert losses_are_right(path)


def test_a_flipped_bit_in_the_tail_costs_what_is_behind_it(path: Path) -> None:
    killed(path, 10, merged=4)
    content = tail_of(path).read_bytes()
    whole = path.read_bytes()
    record = (len(content) - 128) // 6
    for place in [*range(128, 128 + 16), *random.Random(0).sample(range(128, len(content)), 30)]:
        path.write_bytes(whole)
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        tail_of(path).write_bytes(damaged)
        with open_log(path):
            pass
        assert steps(path) == list(range(1, 5 + (place - 128) // record)), place
        assert losses_are_right(path)


@pytest.mark.parametrize("content", [b"", b"x" * 50, b"x" * 128, b"x" * 1000, struct.pack("<4sIQ", b"bwlm", 0, 2**62)])
def test_a_tail_without_entries_is_begun_anew(path: Path, content: bytes) -> None:
    killed(path, 5, merged=5)
    tail_of(path).write_bytes(content)
    with ResearchLog(path) as log:
        write(log, 6, 7)
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]


def test_a_tail_without_its_file_makes_one(path: Path) -> None:
    killed(path, 6)
    path.unlink()
    with ResearchLog(path, resume_step=4) as log:
        write(log, 5, 5)
    assert steps(path) == [1, 2, 3, 4, 5]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other":
        path.write_bytes(b"no HDF5 at all" * 100)
    elif how == "foreign":
        with h5py.File(path, "w") as file:
            file["x"] = 1
    else:  # inside compressed values, which only those see who read them
        with h5py.File(path) as file:
            chunk = file["train/loss"].id.get_chunk_info(0)
        flip(path, (chunk.byte_offset + chunk.size // 2) / (len(content) - 1))


@pytest.mark.parametrize("how", ["cut", "empty", "other", "foreign", "values"])
def test_a_damaged_file_is_put_aside_and_the_log_begins_again(
    path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    killed(path, 10, merged=6)
    damage(path, how)
    with caplog.at_level(logging.WARNING), ResearchLog(path, resume_step=9, about={"seed": 1}) as log:
        write(log, 10, 12)
    assert "base.h5 is damaged" in caplog.text
    assert "kept as base.h5.damaged; a new research log begins" in caplog.text
    assert steps(path) == [7, 8, 9, 10, 11, 12]
    assert losses_are_right(path)
    assert names(path.parent) == ["base.h5", "base.h5.damaged"]
    with h5py.File(path) as file:
        assert file.attrs["seed"] == 1


# ---- open_log ----


def test_open_log_takes_what_a_killed_writer_left(path: Path) -> None:
    killed(path, 10, merged=4)
    assert steps(path) == [1, 2, 3, 4]
    with open_log(path) as file:
        assert file["train/step"][:].tolist() == list(range(1, 11))
    assert names(path.parent) == ["base.h5"]


def test_open_log_of_no_file_says_so(path: Path) -> None:
    with pytest.raises(UserError, match=rf"{path}: no such file: this run has no research log"):
        open_log(path)
    assert names(path.parent) == []


@pytest.mark.parametrize("how", ["cut", "empty", "other"])
def test_open_log_of_a_damaged_file_names_it_and_leaves_it_as_it_is(path: Path, how: str) -> None:
    killed(path, 10, merged=4)
    damage(path, how)
    before = {name: (path.parent / name).read_bytes() for name in names(path.parent)}
    with pytest.raises(UserError, match=rf"{path}: damaged, not readable as HDF5"):
        open_log(path)
    assert before == {name: (path.parent / name).read_bytes() for name in names(path.parent)}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_open_log_reads_what_is_merged_where_it_may_not_write(
    path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's refusal is made up here: who may do everything would not meet it."""
    killed(path, 10, merged=4)
    opened = os.open

    def read_only(name: Any, flags: int, *mode: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(number, os.strerror(number), str(name))
        return opened(name, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    with open_log(path) as file:
        assert file["train/step"][:].tolist() == [1, 2, 3, 4]


# ---- any sequence ----

SOME = {
    "train": st.dictionaries(st.sampled_from(["loss", "lr"]), st.floats(-9, 9), max_size=2),
    "tokens": st.dictionaries(st.sampled_from(["row", "rank"]), st.lists(st.integers(0, 9), min_size=2, max_size=2)),
}
WRITES = st.one_of(*(st.tuples(st.just(group), st.integers(1, 3), columns) for group, columns in SOME.items()))
MERGES = st.tuples(st.just("merge"), st.booleans())
OPENINGS = st.tuples(st.sampled_from(["reopen", "die"]), st.one_of(st.none(), st.integers(0, 20)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.one_of(WRITES, WRITES, MERGES, OPENINGS), max_size=20))
def test_any_sequence_of_writes_merges_and_reopenings_is_as_a_dictionary(
    actions: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "base.h5"
    model: dict[str, dict[int, dict[str, Any]]] = {group: {} for group in SOME}
    log = ResearchLog(path)
    for name, *given_ in actions:
        if name == "merge":
            log.merge(now=given_[0])
        elif name in ("reopen", "die"):
            log.close() if name == "reopen" else leave(log)
            log = ResearchLog(path, given_[0])
            if given_[0] is not None:
                model = {g: {s: row for s, row in rows.items() if s <= given_[0]} for g, rows in model.items()}
        else:
            step = max(model[name], default=0) + given_[0]
            log.write(name, step, **given_[1])
            model[name][step] = given_[1]
    log.close()
    with h5py.File(path) as file:
        for group, rows in model.items():
            found = {name: dataset[:] for name, dataset in file[group].items()}
            assert found.pop("step", np.zeros(0)).tolist() == list(rows)
            assert {column for row in rows.values() for column in row} <= found.keys()
            for column, values in found.items():
                missing = [-1, -1] if group == "tokens" else np.nan
                np.testing.assert_equal(
                    values, np.array([row.get(column, missing) for row in rows.values()]).reshape(values.shape)
                )


# ---- kill -9 ----


def check_kills(path: Path, kills: int) -> None:
    rng, reached = random.Random(0), 0
    for kill in range(kills):
        resume = [rng.randrange(reached + 1)] if kill % 4 == 3 else []
        with writer(path, *resume) as process:
            wait_for(process, path, progress(path.with_suffix(".progress")) + rng.randint(1, 40))
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            process.wait()
        reached = progress(path.with_suffix(".progress"))
        with h5py.File(path) as file:
            assert [fault for group in EVERY for fault in wrong(file, group)] == []
        if kill % 2:  # else the next writer finds it as the killed one left it
            with open_log(path) as file:
                assert [fault for group in EVERY for fault in wrong(file, group)] == []
                for group, every in EVERY.items():
                    late = {reached + 1} if (reached + 1) % every == 0 else set()  # written, but not yet noted
                    assert set(file[group]["step"][:].tolist()) - late == set(written(group, reached))
            assert not has_entries(path), "entries that nobody merged"


def test_kill_9_at_any_moment_loses_at_most_the_record_that_was_being_written(path: Path) -> None:
    check_kills(path, 10)


@pytest.mark.slow
def test_kill_9_at_a_hundred_moments(path: Path) -> None:
    check_kills(path, 100)


# ---- docs/research-log.md ----


def test_the_page_has_the_schema() -> None:
    assert PAGE.read_text().partition(MARK)[2] == tables(), "run python -m tests.record.schema_tables"


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fixed = {"validation/reading": ["forward", "backward"], "validation/document": [0, 0, 1]}
    with ResearchLog(Path("base.h5"), about={"direction": "backward"}, fixed=fixed) as log:
        log.write("train", step=1, loss=1.5)
        log.write("validation", step=1, loss=[[9, 9, 9], [1, 2, 4]])
    known: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, known)
    assert known["losses"].tolist() == [1.5]
    assert known["nats"].tolist() == [3, 4]
    assert steps(Path("mine.h5")) == list(range(1, 101))
    assert steps(Path("mine.h5"), "tokens") == list(range(10, 101, 10))

"""Analyses of many runs: what is kept of a run that ended says what its files say, and no more than they say now."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pandas.testing import assert_frame_equal

from bwlm.analysis.runs import losses as loss_files
from bwlm.analysis.runs.document_losses import document_losses, gap_table
from bwlm.analysis.runs.labels import sizes
from bwlm.analysis.runs.learning_curves import smoothed_curves
from bwlm.analysis.runs.losses import HALVES, byte_counts_of, load_curves, own_losses
from bwlm.paths import file_state
from bwlm.record import config_file, experiment, known_files
from bwlm.record.experiment import ExperimentFolder, list_experiments
from bwlm.record.grids import write_cells
from bwlm.record.storage_cache import StorageCache
from tests.analysis.storage import finish, make_cell
from tests.shell import Answer, Shell

READINGS = {"forward": ["forward"], "backward": ["backward"], "bidirectional": ["forward", "backward"]}
WINDOWS = 30


def new_process() -> None:
    """Forget what this process knows of files, as another process would not know it."""
    known_files._known.clear()
    for cached in (config_file._read, experiment._read_status, loss_files._byte_counts):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a minute have passed since files were written: a file that has just changed is never known by its state."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 60 * 10**9)
    new_process()
    yield
    new_process()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four finished cells: three directions, two rates, of which the first is the better one, and four seeds."""
    storage, rng = tmp_path_factory.mktemp("many") / "runs", np.random.default_rng(0)
    for direction, readings in READINGS.items():
        for lr, seed in [(lr, seed) for lr in (1.0, 2.0) for seed in range(4)]:
            losses = {reading: rng.normal(40 + 5 * lr, 1, WINDOWS).tolist() for reading in readings}
            cell = finish(make_cell(storage, direction, seed=seed, lr=lr), losses)
            cell.finish(cell.status())
    write_cells(storage, "g", [cell.id for cell in list_experiments(storage)])
    return storage


@pytest.fixture
def grid(made: Path, shell: Shell) -> list[ExperimentFolder]:
    """These cells, in this test's own storage."""
    shutil.copytree(made, shell.storage)
    return list_experiments(shell.storage)


def gap(shell: Shell) -> Answer:
    return shell("analyze", "gap", "g", "--output", "gap.csv", "--json")


Opened = Callable[[], list[str]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Names of the files of losses and the journals that were opened since the last call."""
    names: list[str] = []
    listening = [True]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and listening and str(arguments[0]).endswith((".parquet", ".jsonl")):
            names.append(str(arguments[0]))

    read = pq.ParquetFile

    def parquet(path: Path) -> Any:  # Arrow opens files by itself
        names.append(str(path))
        return read(path)

    def since() -> list[str]:
        found = names.copy()
        names.clear()
        return found

    sys.addaudithook(hear)
    monkeypatch.setattr(loss_files.pq, "ParquetFile", parquet)
    yield since
    listening.clear()  # a hook stays for the process


def one_by_one(folders: list[ExperimentFolder]) -> pd.DataFrame:
    """The gap table by its definition: each run read and summed by itself."""
    parts, labels = [], sizes(folders)
    for folder in folders:
        own, losses = folder.config().experiment, own_losses(folder)
        losses["half"] = [HALVES[window % 2] for window in losses["window"]]
        losses["nll"] = losses["nll"].fillna(math.inf)
        windows = losses.groupby("half")["window"].nunique()
        summed = losses.groupby(["half", "document"], as_index=False)[["nll", "tokens", "bytes"]].sum()
        summed = summed[summed["tokens"] > 0]
        named = {
            "run": folder.id,
            "direction": own.direction,
            "seed": own.seed,
            "size": labels[folder.id],
            "lr": own.lr,
        }
        parts.append(summed.assign(**named, windows=summed["half"].map(windows), token_bytes=byte_counts_of(folder)))
    return pd.concat(parts, ignore_index=True)


def curves_one_by_one(folders: list[ExperimentFolder]) -> pd.DataFrame:
    parts = []
    for folder in folders:
        curve = load_curves(folder)
        window = max(1, len(curve) // 25)
        parts.append(
            pd.DataFrame(
                {
                    "run": folder.id,
                    "tokens": curve["tokens"],
                    "seconds": curve["step_seconds"].cumsum(),
                    "averaged": window * curve["tokens"].diff().median(),
                    "loss": curve["train_loss"].rolling(window, center=True, min_periods=1).mean(),
                    "val_loss": curve["val_loss"],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def test_sums_of_documents_are_those_of_the_files_to_the_last_bit(grid: list[ExperimentFolder]) -> None:
    diverged = finish(make_cell(grid[0].path.parent, "forward", seed=9), {"forward": [math.nan, 2.0, 3.0, 4.0]})
    folders = [*grid, diverged]
    expected = one_by_one(folders)
    for _ in ("first", "kept"):
        table = gap_table(document_losses(folders), sizes(folders))
        assert_frame_equal(table[expected.columns], expected, check_exact=True)
        new_process()


def test_curves_are_those_of_the_journals_to_the_last_bit(grid: list[ExperimentFolder]) -> None:
    long = finish(make_cell(grid[0].path.parent, "forward", depth=6), {"forward": [1.0, 2.0]})  # a mean over 4 steps
    folders = [*grid, long]
    expected = curves_one_by_one(folders)
    for _ in ("first", "kept"):
        assert_frame_equal(smoothed_curves(folders)[expected.columns], expected, check_exact=True)
        new_process()


@pytest.mark.parametrize("command", ["gap", "compare"])
def test_the_second_reading_opens_no_losses_and_says_the_same(
    command: str, grid: list[ExperimentFolder], shell: Shell, opened: Opened
) -> None:
    words = ("analyze", command, "g", "--output", "chart.svg", "--output", "table.csv")
    first, files = shell(*words), [shell.folder / "chart.svg", shell.folder / "table.csv"]
    assert first.code == 0
    assert len({name for name in opened() if name.startswith(str(shell.storage))}) >= len(grid)
    contents = [file.read_bytes() for file in files]
    for files_stand in (True, False):
        if not files_stand:  # they are written anew from what was kept of each run
            files[0].write_text("edited")
        new_process()
        assert shell(*words) == first
        assert opened() == []
        assert [file.read_bytes() for file in files] == contents


def test_a_run_that_is_added_is_the_only_one_that_is_read(
    grid: list[ExperimentFolder], shell: Shell, opened: Opened
) -> None:
    write_cells(shell.storage, "g", [cell.id for cell in grid[1:]])
    assert {one["seeds"] for one in json.loads(gap(shell).out)} == {3, 4}
    write_cells(shell.storage, "g", [cell.id for cell in grid])
    opened()
    new_process()
    assert {one["seeds"] for one in json.loads(gap(shell).out)} == {4}
    assert {Path(name).relative_to(shell.storage).parts[0] for name in opened()} == {grid[0].id}


def test_an_edited_file_is_noticed_whatever_its_time_says(grid: list[ExperimentFolder], shell: Shell) -> None:
    """A flipped bit leaves the size, and the time is set back."""
    before = gap(shell)
    path = grid[0].evaluation("base", "backward") / "validation.parquet"
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new_process()
    answer = gap(shell)
    assert f"{grid[0].id} is left out: it is damaged: {path.relative_to(grid[0].path)}: edited since" in answer.err
    assert answer.out != before.out
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    new_process()
    assert gap(shell) == before


def test_a_damaged_cache_is_no_cache(grid: list[ExperimentFolder], shell: Shell, opened: Opened) -> None:
    first = gap(shell)
    entries = sorted(path for path in (shell.storage / "cache").rglob("*") if path.is_file())
    for number, path in enumerate(entries):
        content = path.read_bytes()
        path.write_bytes([content[:-3], content[:-3] + b"!!!", b""][number % 3])
    opened()
    new_process()
    assert gap(shell) == first
    assert len(set(opened())) >= len(grid)


def test_a_storage_that_takes_no_cache_is_analysed(grid: list[ExperimentFolder], shell: Shell) -> None:
    first = gap(shell)
    shutil.rmtree(shell.storage / "cache")
    (shell.storage / "cache").write_text("no folder can be made here")  # root may write into a read-only one
    new_process()
    assert gap(shell) == first


def test_a_file_that_has_just_changed_is_not_known_by_its_state(
    grid: list[ExperimentFolder], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tick of the file system's clock a file could change twice and keep its state."""
    path = grid[0].path / "metrics.jsonl"
    state = file_state(path)
    for seconds, known in ((1, 0), (3, 1)):
        monkeypatch.setattr(time, "time_ns", lambda after=seconds: state.changed + after * 10**9)
        with known_files.kept_findings(shell.storage):
            known_files.sha256_by_state(state)
        new_process()
        with known_files.kept_findings(shell.storage):
            assert len(known_files._known) == known
        new_process()


def test_an_entry_that_many_write_at_once_is_always_whole(tmp_path: Path) -> None:
    cache = StorageCache(tmp_path, "tests", 1)
    contents = [bytes([number]) * 100_000 for number in range(4)]
    cache.write("one", contents[0])
    writers = [Thread(target=lambda c=content: [cache.write("one", c) for _ in range(50)]) for content in contents]
    for writer in writers:
        writer.start()
    read = []
    while any(writer.is_alive() for writer in writers):
        read.append(cache.read("one"))
    assert read
    assert set(read) <= set(contents)
    assert [path.name for path in cache.folder.iterdir()] == ["one"]


def test_entries_of_another_version_are_not_seen(tmp_path: Path) -> None:
    StorageCache(tmp_path, "tests", 1).write("one", b"as it was")
    assert StorageCache(tmp_path, "tests", 2).read("one") is None
    assert StorageCache(tmp_path, "tests", 1).read("one") == b"as it was"

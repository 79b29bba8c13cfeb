"""A night of faults: for minutes something is killed every few seconds, and then each result is that of a calm run."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bwlm.analysis.report.study import write_grid_report
from bwlm.record.catalog.rows import load_cells
from bwlm.record.journal import read_journal
from tests.cluster.heads import new_head
from tests.faults.night import Night, check_tracking, train_calmly
from tests.faults.test_night import SETTINGS

MINUTES = float(os.environ.get("BWLM_SOAK_MINUTES", "20"))
FAULTS = ("worker", "worker", "notice", "data_task", "node", "driver", "head")
SEED = 1


@pytest.fixture
def night(corpus: Path, tmp_path: Path) -> Iterator[Night]:
    home = Path(tempfile.mkdtemp(prefix="bwn-", dir="/tmp"))
    night = Night(new_head(home), tmp_path / "storage", [f"data.source={corpus}", *SETTINGS, "launch.retries=1000"])
    try:
        yield night
    finally:
        night.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_results_are_those_of_a_calm_run(night: Night, tmp_path: Path) -> None:
    rng, end = random.Random(SEED), time.monotonic() + 60 * MINUTES
    log: list[str] = []
    while time.monotonic() < end and night.has_work():
        fault = night.hit(rng.choice(FAULTS), after=rng.randrange(1, 900))
        recovered = night.recovered(fault)
        night.check_finished()
        words = f"{max(recovered.values()):.1f}" if recovered else "-"
        log.append(f"| {len(log) + 1} | {fault.kind} | {len(fault.cells)} | {words} |")
        print(log[-1], flush=True)
        time.sleep(rng.uniform(0, 3))
    night.wait_for(lambda: not night.has_work(), seconds=1800)
    assert len(log) > MINUTES, "it is about one fault a minute at least, or the soak did not soak"

    calm = tmp_path / "calm"
    for folder in night.cells():
        expected = train_calmly(folder, calm)
        entries, calm_entries = list(read_journal(folder.path)), list(read_journal(expected.path))
        assert [(one.step, one.metrics["train_loss"]) for one in entries] == [
            (one.step, one.metrics["train_loss"]) for one in calm_entries
        ]
        assert folder.status().metrics["val_bpb"] == expected.status().metrics["val_bpb"]
    check_tracking(night.storage)
    states = {cell.state for cell in load_cells(night.storage, [folder.id for folder in night.cells()])}
    assert states == {"finished"}
    assert write_grid_report(night.storage, "night").files

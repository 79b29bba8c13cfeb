"""Really trained runs, one for each direction, that tests load and export. Read only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bwlm.record.experiment import ExperimentFolder
from bwlm.text.prepare import Prepared
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import in_process, make_run

STEPS = 32
SETTINGS: dict[str, Any] = {"lr": 4.0, "budget__steps": STEPS, "checkpoint__every": STEPS // 2, "checkpoint__keep": 2}


@pytest.fixture(scope="session")
def storage(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of each direction, named after it; the forward one shares key/value heads (GQA)."""
    root = tmp_path_factory.mktemp("trained")
    make_run(prepared, root, "forward", **SETTINGS, depth=2, model__kv_heads=2)
    for direction in ("backward", "bidirectional", "permuted"):
        make_run(prepared, root, direction, **SETTINGS, direction=direction)
    for folder in sorted(root.iterdir()):
        status = run_phase(ExperimentFolder(root, folder.name), LocalSession(), in_process)
        assert status.state == "finished", status.reason
    return root

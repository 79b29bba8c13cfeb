"""Runs that were really trained, for every test of what is made of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bwlm.record.catalog.select import choose
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.grids import write_cells
from bwlm.text.prepare import Prepared
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import in_process, make_run

IDS = ["b_s0", "b_s1", "f_s0", "f_s1", "x_s0"]
LOG = {"scalars": 1, "tokens": 4, "gradients": 4, "activations": 4, "representations": 64}


@pytest.fixture(scope="session")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with five finished runs; read only."""
    storage = tmp_path_factory.mktemp("trained")
    directions = {"f": "forward", "b": "backward", "x": "bidirectional"}
    for name in IDS:
        settings: dict[str, Any] = {"direction": directions[name[0]], "seed": int(name[-1]), "research_log": LOG}
        run = make_run(prepared, storage, name, depth=2, **settings)
        assert run_phase(run, LocalSession(), in_process).state == "finished"
    write_cells(storage, "g", IDS[:4])
    return storage


@pytest.fixture(scope="session")
def folders(trained: Path) -> list[ExperimentFolder]:
    return choose(trained, ["*"])[0]

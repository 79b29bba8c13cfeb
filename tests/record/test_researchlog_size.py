"""The estimate of a research log's size is near the truth."""

from __future__ import annotations

from typing import Any

import h5py
import pytest

from bwlm.config import Experiment
from bwlm.model.shape import GPTConfig
from bwlm.record.researchlog_schema import GROUPS
from bwlm.record.researchlog_size import bytes_of_log, raw_bytes
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import NewRun, in_process

STEPS = 200
SHORT = {"budget__steps": STEPS, "budget__batch_tokens": 256, "checkpoint__every": 0}
RUNS: dict[str, dict[str, Any]] = {
    "defaults": {"evaluation": {"every": 80, "tokens": 1024}},
    "other": {
        "direction": "bidirectional",
        "depth": 2,
        "evaluation": {"every": 90, "tokens": 2048},
        "research_log": {"scalars": 3, "tokens": 2, "gradients": 15, "activations": 7, "representations": 300},
    },
    "nothing of some": {
        "direction": "permuted",
        "evaluation": {"every": 0, "tokens": 1024},
        "research_log": {"tokens": 0, "activations": 0, "attention": False, "representations": 0},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_is_near_the_file_of_a_run(new_run: NewRun, name: str) -> None:
    folder = new_run(**SHORT, **RUNS[name])
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    config, path = folder.config(), folder.research_log("base")
    size = path.stat().st_size
    assert size / 2 < bytes_of_log(config.experiment, config.shape, STEPS) < size * 2
    with h5py.File(path) as file:
        for group, expected in raw_bytes(config.experiment, config.shape, STEPS).items():
            found = sum(d.nbytes for column, d in file[group].items() if column not in GROUPS[group].fixed)
            if group in ("validation", "representations"):  # windows are not all text
                assert 0.7 * expected <= found <= expected
            else:
                assert found == expected, group


def test_by_hand() -> None:
    content = {
        "direction": "backward", "depth": 2, "budget": {"steps": 1000, "batch_tokens": 2**15},
        "evaluation": {"every": 300, "tokens": 2**14}, "model": {"sequence_length": 2048},
    }  # fmt: skip
    experiment = Experiment.model_validate(content)
    for vocabulary, width in ((2**15, 2), (2**15 + 1, 4)):
        raw = raw_bytes(experiment, GPTConfig.from_depth(2, vocabulary, 2048), 1000)
        assert raw["tokens"] == 100 * (8 + 16 * 8 + 16 * width + 16 * 2048 * (3 * width + 2))
        assert raw["gradients"] == 10 * (8 + 14 * 53 * 4)
        assert raw["activations"] == 10 * (8 + 9 * 53 * 4)
        assert raw["attention"] == 4 * (8 + 3 * 4 * 2 * 2 + 2 * 2 * 128 * 128)
        assert raw["representations"] == 4 * (8 + 2 * 3 * 1024 * 128)
        assert raw["validation"] == 4 * (8 + 2 * 2**14 * 5)
        assert raw["train"] == 1000 * 15 * 8

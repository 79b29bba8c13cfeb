"""The time that a plan takes, by the speed of finished runs, worked out by hand.

A cell of depth 1 costs as much as `steps x 512` tokens of training, and a third of its 768 validation tokens in both
readings, 512 more, at each validation: 20 steps with two validations cost 11,264 tokens, 40 steps with two 21,504.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from bwlm.plan.estimate import estimate_time, time_words
from bwlm.plan.load import plan_experiment
from bwlm.plan.machine import Machine
from bwlm.plan.spec import Cell, LaunchSettings
from bwlm.record.experiment import LEASE, WORKER, ExperimentFolder, Status
from bwlm.record.fingerprint import identity
from bwlm.record.journal import Journal
from bwlm.record.lineage import ParentLink
from bwlm.record.run_config import RunConfig
from tests.analysis.storage import COMPUTE, WEIGHTS
from tests.shell import Shell

SETTINGS = {
    "model.sequence_length": 64, "tokenizer.vocab_size": 300, "budget.steps": 40, "budget.batch_tokens": 512,
    "evaluation.every": 20, "evaluation.tokens": 768, "resources.cpus_per_worker": 1, "resources.gpus_per_worker": 0,
}  # fmt: skip
HERE = socket.gethostname()
TWO_CORES = Machine(cores=2, memory=10**12)


def cell(depth: int = 1, **settings: Any) -> Cell:
    """`section__field` sets one of a section."""
    given = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
    flags = {"phase": "base", "direction": "forward", "depth": depth}
    return plan_experiment(flags, [f"{name}={value}" for name, value in given.items()], f"d{depth}").cells[0]


def finished(
    storage: Path, name: str, tokens_per_second: float = 1024.0, host: str = HERE, phase: str = "base", **settings: Any
) -> str:
    """A run of 20 steps: 10,240 tokens at this speed, and two validations of half a second each."""
    experiment = cell(**{"budget__steps": 20, "evaluation__every": 10, **settings}).experiment
    link = None
    if phase != "base":
        link = ParentLink("p", "sft", "step_000020", 20, WEIGHTS, ["p"])
        experiment = experiment.model_copy(update={"phase": phase, "parent": "p"})
    fields = identity(experiment, data="d", tokenizer="t", precision="float32", steps=20)
    folder = ExperimentFolder(storage, name)
    folder.create(RunConfig(name, experiment, fields, 20, COMPUTE, "/corpus", "/tokenizer"), link)
    journal = Journal(folder.path)
    for step in range(1, 21):
        journal.append(step, {"tokens": step * 512.0} | ({"validation_seconds": 0.5} if step % 10 == 0 else {}))
    journal.close()
    (folder.path / LEASE).write_text(json.dumps({"host": host, "pid": 1}))
    folder.write_status(Status("finished", "", 20, {"tokens_per_second": tokens_per_second}))
    return name


def estimated(storage: Path, *left: tuple[Cell, int], machine: Machine | None = TWO_CORES) -> dict[str, Any]:
    return estimate_time(left, LaunchSettings(), storage, machine)


def plan_command(shell: Shell) -> list[str]:
    """A grid of one cell."""
    text = json.dumps({"name": "g", "axes": {"direction": ["forward"], "depth": [1], "lr": [1.0], "seed": [0]}})
    sets = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    return ["grid", "plan", shell.file(text), *sets]


def test_a_cell_takes_what_a_finished_run_of_its_size_took(tmp_path: Path) -> None:
    """11,264 tokens in 10 + 1 seconds are 1,024 a second: 21 s for 21,504. From step 20 on, 10,752 are left."""
    run = finished(tmp_path, "one")
    assert estimated(tmp_path, (cell(), 0)) == {
        "seconds": pytest.approx(21.0), "at_once": 1, "runs": [run], "rough": False, "unknown": 0
    }  # fmt: skip
    assert estimated(tmp_path, (cell(), 20))["seconds"] == pytest.approx(10.5)


def test_cells_share_the_machine_and_the_longest_is_waited_for(tmp_path: Path) -> None:
    finished(tmp_path, "one")
    three = [(cell(), 0), (cell(), 0), (cell(), 20)]
    shared = estimated(tmp_path, *three)
    assert (shared["at_once"], shared["seconds"]) == (2, pytest.approx((21 + 21 + 10.5) / 2))
    assert estimated(tmp_path, (cell(), 0), (cell(), 20))["seconds"] == pytest.approx(21.0)
    on_a_cluster = estimated(tmp_path, *three, machine=None)
    assert (on_a_cluster["at_once"], on_a_cluster["seconds"]) == (None, pytest.approx(52.5))
    assert "about 52 seconds for what is left, cells one after the other, at the speed of one" in time_words(
        on_a_cluster
    )


def test_the_speed_is_the_median_of_the_runs_that_are_most_alike(tmp_path: Path) -> None:
    """At 512 and at 5,120 tokens a second the run takes 21 and 3 seconds, at 1,024 it takes 11."""
    for name, speed in (("a", 512.0), ("b", 1024.0), ("c", 5120.0)):
        finished(tmp_path, name, speed)
    finished(tmp_path, "other_batch", 9.0, budget__batch_tokens=1024)
    finished(tmp_path, "other_threads", 9.0, resources__cpus_per_worker=2)
    finished(tmp_path, "other_size", 9.0, depth=2)
    found = estimated(tmp_path, (cell(), 0))
    assert found["seconds"] == pytest.approx(21.0)
    assert found["runs"] == ["a", "b", "c"]
    words = "time: about 21 seconds for what is left, 1 cell at once, at the speed of a and 2 more"
    assert time_words(found) == words


def test_the_nearest_size_serves_where_no_other_has_finished(tmp_path: Path) -> None:
    """FLOPs of a token, 6 N + 12 L H D T: 459,264 at depth 1 (N 68,352), 2,786,304 at depth 2 (N 431,616)."""
    finished(tmp_path, "far", 9.0, model__sequence_length=32, budget__batch_tokens=512)
    run = finished(tmp_path, "one")
    finished(tmp_path, "farther", 9.0, depth=8)
    found = estimated(tmp_path, (cell(depth=2), 0))
    assert found["runs"] == [run]
    assert found["seconds"] == pytest.approx(21.0 * 2_786_304 / 459_264)
    assert time_words(found).endswith(
        "at the speed of one; a rough guess, since nothing of this size and these resources has finished here"
    )


def test_runs_of_other_machines_of_gpus_and_of_rewards_tell_nothing(tmp_path: Path) -> None:
    finished(tmp_path, "elsewhere", host="node7")
    finished(tmp_path, "on_gpu", resources__gpus_per_worker=1)
    finished(tmp_path, "by_reward", phase="rl")
    unknown = estimated(tmp_path, (cell(), 0))
    assert (unknown["seconds"], unknown["runs"], unknown["unknown"]) == (None, [], 1)
    assert time_words(unknown) == "time: no estimate until a first cell has run here"
    assert estimated(tmp_path, (cell(), 0), machine=None)["runs"] == ["elsewhere"]
    finished(tmp_path, "here")
    on_gpu = cell(resources__gpus_per_worker=1)
    both = estimated(tmp_path, (cell(), 0), (on_gpu, 0), machine=Machine(16, 10**12, gpus=4))
    assert (both["runs"], both["at_once"], both["unknown"]) == (["here", "on_gpu"], 2, 0)
    (tmp_path / "on_gpu" / "metrics.jsonl").unlink()
    some = estimated(tmp_path, (cell(), 0), (on_gpu, 0))
    assert (some["runs"], some["unknown"]) == (["here"], 1)
    assert time_words(some).endswith("; without 1 cell of a kind that has not finished here yet")


def test_a_run_is_of_the_machine_that_trained_it_whoever_held_it_since(tmp_path: Path) -> None:
    """`bwlm eval --tasks` and `bwlm storage clean` hold a run too."""
    trained_elsewhere, trained_here = finished(tmp_path, "elsewhere"), finished(tmp_path, "here", host="node7")
    (tmp_path / trained_elsewhere / WORKER).write_text(json.dumps({"host": "node7", "pid": 1, "log": ""}))
    (tmp_path / trained_here / WORKER).write_text(json.dumps({"host": HERE, "pid": 1, "log": ""}))
    assert estimated(tmp_path, (cell(), 0))["runs"] == [trained_here]


def test_a_plan_counts_from_the_checkpoint_that_a_cell_resumes_from(shell: Shell) -> None:
    """A run that was killed at step 9 of 40 without a checkpoint begins again."""
    finished(shell.storage, "one")
    grid = [*plan_command(shell), "--on", "h100"]
    [planned] = (new := shell.json(*grid))["cells"]
    folder = ExperimentFolder(shell.storage, planned["id"])
    experiment = cell().experiment
    fields = identity(experiment, data="d", tokenizer="t", precision="float32", steps=40)
    folder.create(RunConfig(folder.id, experiment, fields, 40, COMPUTE, "/corpus", "/tokenizer", "g"))
    journal = Journal(folder.path)
    for step in range(1, 10):
        journal.append(step, {"train_loss": 3.0})
    journal.close()
    killed = shell.json(*grid)
    assert [(one["action"], one["step"]) for one in killed["cells"]] == [("restart", 9)]
    assert (killed["time"], killed["price"]) == (new["time"], new["price"])
    checkpoint = folder.checkpoints / "step_000008"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text("{}")
    saved = shell.json(*grid)
    assert saved["time"]["seconds"] == pytest.approx(estimated(shell.storage, (cell(), 8))["seconds"])
    assert saved["price"]["gpu_hours"] < killed["price"]["gpu_hours"]


def test_a_plan_tells_the_time_in_words_and_in_json(shell: Shell) -> None:
    grid = plan_command(shell)
    assert "\ntime: no estimate until a first cell has run here\n" in shell(*grid).out
    finished(shell.storage, "one")
    assert shell.json(*grid)["time"]["seconds"] == pytest.approx(21.0)
    assert "\ntime: about 21 seconds for what is left, 1 cell at once, at the speed of one\n" in shell(*grid).out
    finished(shell.storage, "g_forward_d1_lr1_s0", budget__steps=40, evaluation__every=20)
    assert "time: " not in shell(*grid).out, "nothing is left"


@pytest.mark.parametrize(
    ("cores", "gpus", "resources", "count"),
    [
        (2, 0, {}, 2),
        (8, 0, {"resources__cpus_per_worker": 3}, 2),
        (8, 0, {"resources__workers": 2, "resources__cpus_per_worker": 2}, 2),
        (1, 0, {"resources__cpus_per_worker": 4}, 1),
        (16, 1, {"resources__gpus_per_worker": 0.25}, 4),
        (16, 4, {"resources__workers": 2, "resources__gpus_per_worker": 1}, 2),
        (3, 8, {"resources__gpus_per_worker": 1}, 3),
    ],
)
def test_as_many_cells_run_at_once_as_fit(cores: int, gpus: int, resources: dict[str, Any], count: int) -> None:
    machine, cells = Machine(cores, 10**12, gpus), [cell(**resources)] * 9
    assert machine.cells_at_once(cells, None) == count
    assert machine.cells_at_once(cells, 1) == 1
    assert machine.cells_at_once(cells[:1], None) == 1

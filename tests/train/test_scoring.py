"""Tasks of `evaluation.tasks`: which checkpoints are scored while a run trains, and that training never notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bwlm.errors import UserError
from bwlm.evaluate.tasks import request, stored
from bwlm.evaluate.tasks.request import TaskRequest, requests_of
from bwlm.evaluate.tasks.stored import RunEvaluation
from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.train.meter import TrainingClock
from bwlm.train.run import run_phase
from bwlm.train.scoring import CheckpointScorer
from bwlm.train.session import LocalSession
from tests.evaluate.tasks.test_stored import row, write
from tests.runs import STEPS, NewRun, in_process, losses, weights_digest

pytestmark = pytest.mark.usefixtures("read_anew")


@pytest.fixture
def read_anew() -> None:
    request.read_tasks.cache_clear()


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    return write(tmp_path / "arc", [row(n) for n in range(6)])


@dataclass
class ScoringSession(LocalSession):
    """Session that calls the scorer after each step, as a worker's does."""

    scorer: CheckpointScorer | None = None
    announced: list[tuple[int, bool]] = field(default_factory=list)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        assert self.scorer is not None
        self.scorer.step_over(step, lambda begins: self.announced.append((step, begins)))


def train(folder: ExperimentFolder, stopping: Callable[[], bool] = lambda: False) -> tuple[Status, ScoringSession]:
    with folder.lease():
        scorer = CheckpointScorer(folder, stopping)
        session = ScoringSession(scorer=scorer)
        scorer.resumed()
        end = run_phase(folder, session, in_process)
        if end.state == "finished":
            scorer.finished()
    return end, session


def asking(arc: Path, **settings: Any) -> dict[str, Any]:
    """Settings with a validation every 4 steps and a checkpoint every 2, on all items of `arc`."""
    evaluation = {"every": 4, "tokens": 1024, "tasks": ["arc_easy"], **settings}
    tasks = {"arc_easy": {"path": str(arc)}}
    return {"evaluation": evaluation, "checkpoint": {"every": 2, "keep": 9}, "tasks": tasks}


def results(folder: ExperimentFolder) -> list[str]:
    return sorted(path.name for path in folder.evaluation("base", "backward").glob("arc_easy*.json"))


def test_checkpoints_of_validations_and_the_last_are_scored(new_run: NewRun, arc: Path) -> None:
    folder = new_run("run", **asking(arc, max_examples=3))
    end, session = train(folder)
    assert (end.state, STEPS) == ("finished", 12)
    assert results(folder) == ["arc_easy.n3.json", "arc_easy@4.n3.json", "arc_easy@8.n3.json"]
    begun = [step for step, begins in session.announced if begins]
    assert len(begun) == 2
    assert all(step > validated for step, validated in zip(begun, (4, 8), strict=True))
    assert [begins for _, begins in session.announced] == [True, False] * 2


def test_validations_without_a_checkpoint_are_not_scored(new_run: NewRun, arc: Path) -> None:
    folder = new_run("run", **asking(arc, every=3))
    train(folder)
    assert results(folder) == ["arc_easy.json", "arc_easy@6.json"]


@pytest.mark.parametrize("every", [1, 2])
def test_a_checkpoint_is_scored_before_the_next_save_deletes_it(new_run: NewRun, arc: Path, every: int) -> None:
    folder = new_run("run", **asking(arc) | {"checkpoint": {"every": every, "keep": 1}})
    train(folder)
    assert results(folder) == ["arc_easy.json", "arc_easy@4.json", "arc_easy@8.json"]
    assert len(checkpoint_steps(folder.checkpoints)) == 2


def test_what_a_run_scored_is_what_eval_would_score(
    new_run: NewRun, arc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run("run", **asking(arc))
    train(folder)
    monkeypatch.setattr(stored, "load_model", lambda *_: pytest.fail("scored again"))
    for name in (folder.id, f"{folder.id}@4"):
        scores = RunEvaluation(folder.path.parent, name, (TaskRequest("arc_easy"),)).scores()
        assert {score.n for score in scores if score.status == "scored"} == {6}


def test_a_run_trains_the_same_with_and_without_scores(new_run: NewRun, arc: Path) -> None:
    plain = new_run("plain", checkpoint={"every": 2, "keep": 9}, evaluation={"every": 4, "tokens": 1024})
    scored = new_run("scored", **asking(arc))
    assert plain.config().fingerprint == scored.config().fingerprint
    for folder in (plain, scored):
        train(folder)
    assert losses(plain) == losses(scored)
    assert weights_digest(plain) == weights_digest(scored)


def test_random_states_are_put_back(new_run: NewRun, arc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_run("run", **asking(arc))
    monkeypatch.setattr(RunEvaluation, "scores", lambda *_: torch.rand(100))
    with folder.lease():
        scorer = CheckpointScorer(folder)
        before = torch.get_rng_state()
        scorer.finished()
    assert torch.get_rng_state().equal(before)


def test_time_for_scores_is_no_time_of_training(new_run: NewRun, arc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock moves by scoring alone, so a run whose steps take no time has no seconds of training."""
    clock, own = [0.0], TrainingClock()
    for module in ("meter", "scoring"):
        monkeypatch.setattr(f"bwlm.train.{module}.CLOCK", own)
    monkeypatch.setattr("bwlm.train.meter.time.monotonic", lambda: clock[0])
    original = RunEvaluation.scores

    def slow(self: RunEvaluation, *progress: Any) -> Any:
        clock[0] += 1000.0
        return original(self, *progress)

    monkeypatch.setattr(RunEvaluation, "scores", slow)
    end, _ = train(new_run("run", **asking(arc)))
    assert clock[0] == 3000.0
    assert end.metrics["tokens_per_second"] == 0.0  # 0 seconds


def test_a_task_that_cannot_be_read_any_more_is_a_warning_and_training_goes_on(
    new_run: NewRun, arc: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = new_run("run", **asking(arc))
    arc.unlink()
    end, _ = train(folder)
    assert end.state == "finished"
    warned = [record.getMessage() for record in caplog.records if "not scored" in record.getMessage()]
    assert len(warned) == 3
    assert str(arc) in warned[0]
    assert "bwlm eval run@4 --tasks" in warned[0]


def test_a_model_that_does_not_fit_beside_the_trained_one_is_a_warning_and_training_goes_on(
    new_run: NewRun, arc: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    folder = new_run("run", **asking(arc))
    monkeypatch.setattr(stored, "load_model", load)
    end, _ = train(folder)
    assert end.state == "finished"
    assert "step 4 is not scored (CUDA out of memory)" in caplog.text


def test_a_run_that_is_stopped_while_it_scores_scores_that_checkpoint_when_it_resumes(
    new_run: NewRun, arc: Path
) -> None:
    folder = new_run("run", **asking(arc))
    with folder.lease():
        stopped = CheckpointScorer(folder, lambda: True)
        session = ScoringSession(scorer=stopped)
        session.stopping = lambda: bool(session.announced)  # type: ignore[method-assign]
        assert run_phase(folder, session, in_process).state == "stopped"
    assert not results(folder)
    assert 4 < max(checkpoint_steps(folder.checkpoints)) < 8
    train(folder)
    assert "arc_easy@4.json" in results(folder)


def test_tasks_are_named_and_checked_with_the_settings(new_run: NewRun, arc: Path) -> None:
    experiment = (
        new_run("run", **asking(arc, tasks=["arc_easy", "builtin:arithmetic"], max_examples=5)).config().experiment
    )
    assert requests_of(experiment) == (
        TaskRequest("arc_easy", str(arc), 5), TaskRequest("builtin:arithmetic", None, 5)
    )  # fmt: skip
    with pytest.raises(UserError, match=r"evaluation.tasks: 'arc_eazy' is not a task.*arc_easy"):
        requests_of(new_run("typo", **asking(arc, tasks=["arc_eazy"])).config().experiment)
    with pytest.raises(UserError, match=r"runs programs.*--allow-code-execution"):
        requests_of(new_run("code", **asking(arc, tasks=["humaneval"])).config().experiment)


def test_files_of_a_task_serve_its_groups(new_run: NewRun, arc: Path) -> None:
    settings = asking(arc, tasks=["mmlu:anatomy"]) | {"tasks": {"mmlu": {"path": "here"}}}
    [one] = requests_of(new_run("run", **settings).config().experiment)
    assert one.path == "here"

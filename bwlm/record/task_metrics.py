"""Scores on tasks in MLflow: the accuracies of a run's results as metrics by step, each sent once.

The results below `evaluations/` are the record; `mlflow_scores.json` notes which points the MLflow run has. Points are
noted with a time stamp before they are sent. If the answer was lost they are sent again with the same time stamp, and
MLflow drops those that it has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from bwlm.directions import TEXT_READINGS, own_readings
from bwlm.paths import read_json, write_json
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import Entry
from bwlm.record.metrics import TASKS, task_metric
from bwlm.record.mlflow_view import points
from bwlm.record.task_results import MAIN_FORMS, MAIN_RULES, read_result, task_of
from bwlm.storage.opened import exclusive

NOTES = "mlflow_scores.json"
_LOCK = ".mlflow_scores.lock"
_POINTS_PER_CALL = 1000  # MLflow's own limit

Points = dict[str, float]
"""Values by metric and step: `tasks/arc_easy/native@400`."""


class _Score(NamedTuple):
    task: str
    step: int
    form: str
    rule: str
    reading: str
    value: float
    """NaN where the task has no meaning, or does not fit."""
    items: int


# ---- from results to points ----


def score_points(folder: ExperimentFolder) -> Points:
    """Return the accuracies of a run's results, without controls, and what follows for its directions."""
    experiment = folder.config().experiment
    results = sorted((folder.path / "evaluations" / experiment.phase).glob("*/*.json"))
    scored = [one for path in results for one in _scores(path, path.stat().st_mtime_ns)]
    own, read = own_readings(experiment.direction), {(one.task, one.step, one.reading) for one in scored}
    by_task: dict[tuple[str, int], dict[str, _Score]] = {}
    found: Points = {}
    for one in scored:
        if math.isnan(one.value):
            continue
        main = by_task.setdefault((one.task, one.step), {})
        if one.form in MAIN_FORMS and one.rule in MAIN_RULES:
            main[one.reading] = one
        form = "" if one.form in MAIN_FORMS else f"{one.form}/"
        found[f"{task_metric(one.task, f'{form}{one.rule}_{one.reading}')}@{one.step}"] = one.value
    for (task, step), main in by_task.items():
        if len(own) > 1 and not all((task, step, reading) in read for reading in own):
            continue  # a mean over readings waits for the last of them
        figures = direction_figures(experiment.direction, main)
        found |= {f"{task_metric(task, name)}@{step}": value for name, value in figures.items()}
    return found


@lru_cache(maxsize=4096)
def _scores(path: Path, _written: int) -> list[_Score]:
    """Return the scores of a result; a launch asks again and again, so a file is read once as long as it stays."""
    scores = read_result(path).get("scores", [])
    return [
        _Score(
            task=task_of(path.stem),
            step=one["step"],
            form=one["form"],
            rule=one["rule"],
            reading=one["direction"],
            value=math.nan if one["accuracy"] is None else one["accuracy"],
            items=one["n"],
        )
        for one in scores
        if one["control"] is None
    ]


def direction_figures(direction: str, accuracies: Mapping[str, _Score]) -> dict[str, float]:
    """Return native and cross-direction accuracy, direction gap and bidirectional balance, as far as they are known.

    `accuracies` are those of one model on one task by reading.
    """
    own = own_readings(direction)
    if not set(own) <= set(TEXT_READINGS):
        return {}
    native = [accuracies[reading] for reading in own if reading in accuracies]
    crossed = [accuracies[reading] for reading in TEXT_READINGS if reading in accuracies and reading not in own]
    figures = {name: _mean(of) for name, of in (("native", native), ("crossed", crossed)) if of}
    if len({one.items for one in (*native, *crossed)}) > 1:
        return figures  # of other items
    if native and crossed:
        figures["direction_gap"] = figures["native"] - figures["crossed"]
    if len(native) > 1:
        figures["bidirectional_balance"] = native[0].value - native[1].value
    return figures


def _mean(accuracies: list[_Score]) -> float:
    return sum(one.value for one in accuracies) / len(accuracies)


# ---- from points to MLflow ----


def unsent(folder: ExperimentFolder, run: str | None) -> Points:
    """Return the points that the MLflow run does not have, as far as is noted."""
    return _new(score_points(folder), _noted(folder.path, run))


def send_scores(client: Any, folder: ExperimentFolder, run: str) -> int:
    """Send the points that the MLflow run `run` does not have, and return how many.

    Raises the client's error if the store does not answer; the next call sends what this one could not.
    """
    noted = _noted(folder.path, run)
    if not (noted["pending"] or _new(score_points(folder), noted)):
        return 0
    with exclusive(folder.path / _LOCK):  # a launch and `bwlm eval` may deliver at once
        noted = _noted(folder.path, run)
        if noted["pending"]:
            noted = _send(client, folder.path, noted)
        new = _new(score_points(folder), noted)
        if new:
            _send(client, folder.path, noted | {"pending": {"time": time.time_ns() // 1_000_000, "points": new}})
        return len(new)


def forget_scores(folder: Path, run: Any) -> bool:
    """Forget the points that a run of MLflow lacks although they were sent: a backup of the store was restored.

    Returns whether there are any.
    """
    latest = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    with exclusive(folder / _LOCK):
        noted = _noted(folder, run.info.run_id)
        there = {key: value for key, value in noted["sent"].items() if latest.get(_name(key), -1) >= _step(key)}
        if len(there) < len(noted["sent"]):
            write_json(folder / NOTES, noted | {"sent": there})
        return len(there) < len(noted["sent"])


def is_score(metric: str) -> bool:
    """Return whether a metric of a run is a score on a task."""
    return metric.startswith(TASKS)


def _send(client: Any, folder: Path, noted: dict[str, Any]) -> dict[str, Any]:
    """Send the pending points, and return the notes without them."""
    write_json(folder / NOTES, noted)
    pending = noted["pending"]
    for metrics in _calls(_entries(pending["points"], pending["time"])):
        client.log_batch(noted["run_id"], metrics=metrics)
    after = noted | {"sent": noted["sent"] | pending["points"], "pending": None}
    write_json(folder / NOTES, after)
    return after


def _entries(values: Points, at: int) -> Iterator[Entry]:
    by_step: dict[int, Points] = {}
    for key, value in values.items():
        by_step.setdefault(_step(key), {})[_name(key)] = value
    for step, metrics in sorted(by_step.items()):
        yield Entry(step, at, metrics)


def _calls(entries: Iterable[Entry]) -> Iterator[list[Any]]:
    every = points(list(entries), dict)
    for first in range(0, len(every), _POINTS_PER_CALL):
        yield every[first : first + _POINTS_PER_CALL]


def _new(found: Points, noted: Mapping[str, Any]) -> Points:
    return {key: value for key, value in found.items() if noted["sent"].get(key) != value}


def _noted(folder: Path, run: str | None) -> dict[str, Any]:
    """Return what the MLflow run has; nothing if the notes are on another run, in whose place it is."""
    content = read_json(folder / NOTES) if (folder / NOTES).exists() else {}
    return dict(content) if content.get("run_id", "") == run else {"run_id": run, "sent": {}, "pending": None}


def _name(key: str) -> str:
    return key.rpartition("@")[0]


def _step(key: str) -> int:
    return int(key.rpartition("@")[2])

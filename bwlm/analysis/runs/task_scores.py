"""Table of scores on tasks from run folders, as `bwlm.stats.score_table` takes it: a row for each run and item.

An arm is a direction. Its own reading is what is compared by default: forward models by forward scores, backward models
by backward ones, and a bidirectional model by the mean of both, item by item.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bwlm.analysis.runs.findings import best_rates
from bwlm.analysis.runs.labels import sizes
from bwlm.directions import TEXT_READINGS, own_readings
from bwlm.errors import UserError, nearest
from bwlm.paths import read_json
from bwlm.progress import track
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.task_results import MAIN_FORMS, MAIN_RULES, read_examples, read_result, result_name, task_of

OWN = "own"
READINGS = (OWN, *TEXT_READINGS)
_ITEM = ["item", "group", "form", "rule"]


@dataclass(frozen=True)
class Wanted:
    """Scores to compare. Each further rule or reading makes the family of comparisons larger."""

    tasks: tuple[str, ...] = ()
    """Tasks, or names of results such as `mmlu.n200`; empty: all tasks. Of a task's results the one counts that most
    of the runs have."""
    readings: tuple[str, ...] = (OWN,)
    rules: tuple[str, ...] = MAIN_RULES
    """Empty: all rules."""
    by_group: bool = False
    """True: each group of a task's items is a task of its own."""
    forms: tuple[str, ...] = MAIN_FORMS
    """Empty: all forms."""


def at_best_rates(folders: Sequence[ExperimentFolder]) -> list[ExperimentFolder]:
    """Return the runs at the best learning rate of their direction and size, and all where only one was tried."""
    labels = sizes(list(folders))
    best = {(rate.size, rate.direction): rate.lr for rate in best_rates(list(folders))}
    kept = []
    for folder in folders:
        experiment = folder.config().experiment
        if best.get((labels[folder.id], experiment.direction), experiment.lr) == experiment.lr:
            kept.append(folder)
    return kept


def load_task_scores(folders: Sequence[ExperimentFolder], wanted: Wanted) -> pd.DataFrame:
    """Return the scores of runs. Raises `UserError` if no run has a result that is asked for."""
    names, labels = _names(folders, wanted.tasks), sizes(list(folders))
    found = [
        _scores(folder, name, wanted).assign(size=labels[folder.id])
        for folder in track(folders, "reading scores", "runs")
        for name in names
        if any((_folder(folder, reading) / f"{name}.json").exists() for reading in TEXT_READINGS)
    ]
    return _joined(found, folders)


def load_score_curves(folders: Sequence[ExperimentFolder], wanted: Wanted) -> pd.DataFrame:
    """Return the scores of every scored checkpoint of runs, with the column `step`.

    Raises `UserError` if no checkpoint has a result that is asked for.
    """
    by_run = {folder.id: result_names(folder) for folder in folders}
    names, labels = (
        _chosen(Counter(task_of(name) for of in by_run.values() for name in of), wanted.tasks),
        sizes([*folders]),
    )
    found = [
        _scores(folder, name, wanted).assign(size=labels[folder.id], task=task_of(name), step=_step(folder, name))
        for folder in track(folders, "reading scores", "runs")
        for name in sorted(by_run[folder.id])
        if task_of(name) in names
    ]
    return _joined(found, folders)


def _step(folder: ExperimentFolder, name: str) -> int:
    paths = [_folder(folder, reading) / f"{name}.json" for reading in TEXT_READINGS]
    [step, *_] = [score["step"] for path in paths if path.exists() for score in read_json(path)["scores"]]
    return int(step)


def _joined(found: list[pd.DataFrame], folders: Sequence[ExperimentFolder]) -> pd.DataFrame:
    """Return the rows of all tables. Raises `UserError` if there are none."""
    rows = pd.concat(found) if found else pd.DataFrame()
    if rows.empty:
        raise UserError(
            f"{', '.join(folder.id for folder in folders[:3])}{', ..' if len(folders) > 3 else ''}: no scores of this "
            "kind: make some with bwlm eval .. --tasks .."
        )
    return rows


def _names(folders: Sequence[ExperimentFolder], tasks: tuple[str, ...]) -> list[str]:
    """Return the names of the results to read."""
    return _chosen(Counter(name for folder in folders for name in result_names(folder)), tasks)


def _chosen(counts: Counter[str], tasks: tuple[str, ...]) -> list[str]:
    """Return the named results, or one of each task: of several, the one that most runs have."""
    best: dict[str, str] = {}
    for name in sorted(counts, key=lambda name: (-counts[name], len(name))):  # the shortest name: the whole task
        if "@" not in name:
            best.setdefault(name.partition(".")[0], name)
    known = {**{name: name for name in counts}, **best}
    tasks = tuple(task if task in known else result_name(task) for task in tasks)  # mmlu:law is mmlu-law there
    for task in tasks:
        if task not in known:
            raise UserError(f"--tasks: no run has a result {task!r}{nearest(task, known)}: see bwlm runs show")
    return [known[task] for task in tasks] or sorted(best.values())


def result_names(folder: ExperimentFolder) -> set[str]:
    """Return the names of a run's results on tasks, in any reading."""
    files = [file for reading in TEXT_READINGS for file in _folder(folder, reading).glob("*.json")]
    return {file.stem for file in files if "scores" in read_result(file)}


def load_results(folders: Sequence[ExperimentFolder]) -> pd.DataFrame:
    """Return the saved scores of the results that are compared, a row each: also controls, and what was not scored.

    Columns are those of `TaskScore`, with the result's name as `task`; `direction` is the run's, `reading` the score's.
    `left_out` counts the items of the form that did not fit.
    """
    names, labels, rows = _names(folders, ()), sizes(list(folders)), []
    for folder in folders:
        own = {"run": folder.id, "size": labels[folder.id], "direction": folder.config().experiment.direction}
        for path in (_folder(folder, reading) / f"{name}.json" for name in names for reading in TEXT_READINGS):
            content = read_result(path) if path.exists() else {}
            for score in content.get("scores", []):
                left_out = content["about"].get(score["form"], {}).get("does_not_fit", 0)
                about = {"task": path.stem, "reading": score["direction"], "left_out": left_out}
                rows.append(score | own | about)
    return pd.DataFrame(rows)


def _scores(folder: ExperimentFolder, name: str, wanted: Wanted) -> pd.DataFrame:
    config = folder.config()
    experiment = config.experiment
    by_reading = {reading: _examples(folder, reading, name, wanted) for reading in TEXT_READINGS}
    tables = []
    for reading in wanted.readings:
        own = own_readings(experiment.direction) if reading == OWN else (reading,)
        results = [read_result(_folder(folder, one) / f"{name}.json") for one in own]
        if len(own) > 1 and not all("scores" in result for result in results):
            continue  # a mean over readings needs all of them
        # of what was asked, with the examples before it: equal items may stand behind others
        digest = " ".join(dict.fromkeys(str(result.get("key", {}).get("texts", "")) for result in results))
        both = pd.concat([by_reading[one] for one in own if one in by_reading] or [pd.DataFrame()])
        if not both.empty:
            tables.append(both.groupby(_ITEM, sort=False, as_index=False).mean().assign(reading=reading, digest=digest))
    rows = pd.concat(tables) if tables else pd.DataFrame()
    return rows.assign(
        run=config.id,
        direction=experiment.direction,
        seed=experiment.seed,
        task=f"{name}:" + rows["group"] if wanted.by_group and len(rows) else name,
    )


def _examples(folder: ExperimentFolder, reading: str, name: str, wanted: Wanted) -> pd.DataFrame:
    """Return item, form, rule, correct and chance of every item in one reading."""
    where = _folder(folder, reading)
    path = where / f"{name}.json"
    table = read_examples(where, name) if path.exists() else None
    if table is None or not table.num_rows:  # a reading without a meaning, or a task that did not fit
        return pd.DataFrame(columns=[*_ITEM, "correct", "chance"])
    chances = {score["form"]: score["chance"] for score in read_json(path)["scores"] if score["chance"] is not None}
    rows: pd.DataFrame = table.select([*_ITEM, "control", "correct"]).to_pandas()
    kept = rows[rows["control"].isna()]
    for name, chosen in (("rule", wanted.rules), ("form", wanted.forms)):
        kept = kept[kept[name].isin(chosen)] if chosen else kept
    return kept.drop(columns="control").assign(chance=kept["form"].map(chances))


def _folder(folder: ExperimentFolder, reading: str) -> Path:
    return folder.evaluation(folder.config().experiment.phase, reading)

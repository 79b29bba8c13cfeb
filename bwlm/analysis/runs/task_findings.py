"""Findings from scores on tasks: the comparison of `bwlm analyze scores`, and each score beside its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from bwlm.analysis.runs.task_scores import OWN, Wanted, at_best_rates, load_results, load_task_scores, result_names
from bwlm.directions import TEXT_READINGS, own_readings, rank
from bwlm.errors import UserError
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.task_results import MAIN_FORMS, MAIN_RULES
from bwlm.stats.score_readings import ReadingCost, reading_costs
from bwlm.stats.score_table import checked_scores
from bwlm.stats.scores import Arm, Scores, compare_scores, measure_arms

_COLUMNS = ["task", "form", "status", "reason", "reading", "rule", "run", "left_out"]
CONTROLS = ("shuffled", "no_context", "prior")


@dataclass(frozen=True)
class TaskFindings:
    """Scores of runs on tasks, each direction at its best learning rate."""

    compared: Scores
    """Directions in their own readings by the main rule, judged as one family."""
    arms: list[Arm]
    """Every direction, reading, rule and form, the main rule in the own reading first."""
    costs: list[ReadingCost]
    results: pd.DataFrame
    """Rows of `load_results`."""

    def main_arms(self) -> list[Arm]:
        """Return the arms by the main rule."""
        return [arm for arm in self.arms if is_main(arm)]

    def other_arms(self) -> list[Arm]:
        """Return the arms by other rules or in other forms."""
        return [arm for arm in self.arms if not is_main(arm)]

    def control(self, arm: Arm, name: str) -> float | None:
        """Return the mean accuracy of a control of an arm; None if it has none."""
        readings = own_readings(arm.direction) if arm.setting.reading == OWN else (arm.setting.reading,)
        key = (str(arm.setting.task), str(arm.setting.size), arm.direction, arm.setting.form, arm.setting.rule, name)
        found = [self._controls[(*key, reading)] for reading in readings if (*key, reading) in self._controls]
        return sum(found) / len(found) if found else None

    @cached_property
    def _controls(self) -> dict[tuple[str, ...], float]:
        rows = self.results[self.results["control"].notna() & self.results["accuracy"].notna()]
        keys = ["task", "size", "direction", "form", "rule", "control", "reading"]
        means = rows.astype({"accuracy": float}).groupby(keys, as_index=False)["accuracy"].mean()
        return {tuple(map(str, key)): float(value) for *key, value in means[[*keys, "accuracy"]].to_numpy()}


def is_main(arm: Arm) -> bool:
    """Return whether an arm is by the rule, and in the form, that are compared if none is named."""
    return arm.setting.rule in MAIN_RULES and arm.setting.form in MAIN_FORMS


def find_tasks(folders: Sequence[ExperimentFolder]) -> TaskFindings | None:
    """Return what the scores of runs say; None if no run has scores."""
    if not any(result_names(folder) for folder in folders):
        return None
    chosen = [folder for folder in at_best_rates(folders) if result_names(folder)]
    if not chosen:
        return _nothing("no run at the best learning rate of its direction has scores", pd.DataFrame(columns=_COLUMNS))
    results = load_results(chosen)
    try:
        own = checked_scores(load_task_scores(chosen, Wanted()))
        every = checked_scores(load_task_scores(chosen, Wanted(readings=(OWN, *TEXT_READINGS), rules=(), forms=())))
    except UserError as error:  # every task is without a meaning there
        return _nothing(str(error), results)
    try:
        compared = compare_scores(own)
    except UserError as error:
        compared = Scores([], [], str(error).split("; "))
    arms, _ = measure_arms(every)
    main = every[every["rule"].isin(MAIN_RULES) & every["form"].isin(MAIN_FORMS) & every["reading"].ne(OWN)]
    arms = sorted((arm for arm in arms if _tells_more(arm, arms)), key=_order)
    return TaskFindings(compared, arms, reading_costs(main), results)


def _nothing(reason: str, results: pd.DataFrame) -> TaskFindings:
    return TaskFindings(Scores([], [], [reason]), [], [], results)


def _tells_more(arm: Arm, arms: list[Arm]) -> bool:
    """Return false for the mean over own readings if it is over one reading, whose arm is there too."""
    own = own_readings(arm.direction)
    measured = {one.setting for one in arms if one.direction == arm.direction}
    both = len(own) > 1 and all(arm.setting._replace(reading=reading) in measured for reading in own)
    return both or arm.setting.reading != OWN


def _order(arm: Arm) -> tuple[str, str, bool, str, str, int, tuple[int, str]]:
    """Return a key: by task and size, the main rule first, and of a rule own readings, parts of them, crossed ones."""
    setting, own = arm.setting, own_readings(arm.direction)
    place = 0 if own == (setting.reading,) or setting.reading == OWN else 1 if setting.reading in own else 2
    return setting.task, str(setting.size), not is_main(arm), setting.form, setting.rule, place, rank(arm.direction)

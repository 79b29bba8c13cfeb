"""Findings of a grid: best learning rates, and the gaps between directions at these rates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import pandas as pd

from bwlm.analysis.runs.document_losses import DocumentLosses, document_losses, gap_table
from bwlm.analysis.runs.labels import sizes
from bwlm.analysis.runs.rates import (
    BestRate,
    TriedRate,
    best_learning_rates,
    best_on_test,
    equal_per_direction,
    tried_rates,
)
from bwlm.directions import DIRECTIONS
from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.phases import PHASES
from bwlm.record.catalog.rows import load_cell
from bwlm.record.experiment import ExperimentFolder
from bwlm.stats.gaps import PER_DIRECTION, Gap, gap, is_pair, judge
from bwlm.stats.loss_table import COLUMNS, with_counts


def one_window(folder: ExperimentFolder) -> str:
    """Return why runs like this one cannot be compared if they were validated on one window, and the mend."""
    experiment = folder.config().experiment
    is_short = experiment.evaluation.tokens >= 2 * experiment.model.sequence_length
    mend = "the validation text fills no second one, give more text" if is_short else "raise evaluation.tokens"
    return f"one validation window leaves none to compare on: {mend}"


@dataclass(frozen=True)
class Findings:
    """Gaps, best learning rates and notes of a grid's finished cells."""

    best: list[BestRate]
    gaps: list[Gap]
    without_result: list[str]
    """Cells without a result, with the reason."""
    not_compared: list[str]
    """Pairs that could not be compared, with the reason."""
    excluded: list[str]
    """Learning rates excluded from the choice, with the reason, and directions that are left with none."""
    windows: list[int]
    """Number of windows of the compared half, for each gap."""
    at_edge: list[str]
    """Best learning rates at the edge of the sweep: a better one may lie outside."""
    losses: pd.DataFrame
    """Losses that the gaps were measured on, a row for each run and document: `stats.COLUMNS`."""

    @property
    def skipped(self) -> list[str]:
        """Return lines on the cells and pairs that were left out, with the reason."""
        return [*self.without_result, *self.excluded, *self.not_compared]


def find(folders: list[ExperimentFolder]) -> Findings:
    """Return the best learning rate per direction and size, and the paired gaps between directions at these rates.

    Only phases that learn all of a text are compared. In SFT and RL directions learn to write different parts of a
    conversation: the loss of all of it says little about either.
    """
    folders = [folder for folder in folders if PHASES[folder.config().experiment.phase].compared]
    cells = {folder.id: load_cell(folder) for folder in folders}
    measured = document_losses([folder for folder in folders if cells[folder.id].state == "finished"])
    finished = measured.folders
    skipped = [
        f"{c.id}: {c.state}{f' ({c.reason})' if c.reason else ''}" for c in cells.values() if c.state != "finished"
    ] + measured.left_out
    if not finished:
        return Findings([], [], skipped, [], [], [], [], pd.DataFrame(columns=COLUMNS))
    labels = sizes(folders)
    table, tried, best = _rates(folders, measured, labels)
    losses = best_on_test(table, best)
    test = pd.concat([losses, equal_per_direction(losses, finished, labels)], ignore_index=True)
    can_choose = best or any(rate.qualifies for rate in tried)
    compared, problems = _compare(test, one_window(finished[0])) if can_choose else ([], [])
    problems += _codes(finished)
    windows = [_windows(test, one) for one in compared]
    at_edge = _at_edge(best, tried)
    return Findings(best, compared, skipped, problems, _excluded(tried), windows, at_edge, test[with_counts(test)])


def _codes(folders: list[ExperimentFolder]) -> list[str]:
    """Return sentences on runs of one depth and phase that several versions of the code trained.

    Each version has pairs and verdicts of its own.
    """
    by_phase: dict[tuple[int, str], dict[str, set[int]]] = {}
    for config in (folder.config() for folder in folders):
        experiment = config.experiment
        codes = by_phase.setdefault((experiment.depth, experiment.phase), {})
        codes.setdefault(config.code, set()).add(experiment.seed)
    return [
        f"d{depth} {phase}: trained by {len(codes)} codes, which are judged apart: "
        + "; ".join(f"{code} seeds {', '.join(map(str, sorted(seeds)))}" for code, seeds in codes.items())
        for (depth, phase), codes in sorted(by_phase.items())
        if len(codes) > 1
    ]


def best_rates(folders: list[ExperimentFolder]) -> list[BestRate]:
    """Return the best rates of `find` without comparing directions; sizes have their labels among all runs."""
    labels = sizes(folders)
    folders = [folder for folder in folders if PHASES[folder.config().experiment.phase].compared]
    finished = document_losses([folder for folder in folders if folder.status().state == "finished"])
    return _rates(folders, finished, labels)[2] if finished.folders else []


def _rates(
    folders: list[ExperimentFolder], finished: DocumentLosses, labels: dict[str, str]
) -> tuple[pd.DataFrame, list[TriedRate], list[BestRate]]:
    """Return the losses of every finished run's documents, the rates that were tried, and the best of them."""
    table = gap_table(finished, labels)
    tried = tried_rates(folders, labels, {folder.id for folder in finished.folders})
    return table, tried, best_learning_rates(table, tried)


def _windows(test: pd.DataFrame, measured: Gap) -> int:
    """Return the number of windows of a pair: those of one run, since all its runs were measured on the same text."""
    one = test["size"].eq(measured.size) & test["direction"].eq(measured.a) & test["seed"].eq(measured.seeds[0])
    return int(test.loc[one, "windows"].iloc[0])


def _excluded(tried: list[TriedRate]) -> list[str]:
    rates = [
        f"excluded: {r.direction} {r.size} lr {r.lr:g}: "
        f"{r.cells - r.finished} of {counted(r.cells, 'cell')} gave no result"
        for r in tried
        if not r.qualifies
    ]
    able = {(rate.size, rate.direction) for rate in tried if rate.qualifies}
    unable = sorted({(rate.size, rate.direction) for rate in tried} - able)
    return rates + [f"{size}: {direction} has no best learning rate: none is left" for size, direction in unable]


def _at_edge(best: list[BestRate], tried: list[TriedRate]) -> list[str]:
    """Return a note for each best learning rate at the edge of the sweep: a better rate may lie outside."""
    lines = dict[str, list[str]]()
    for one in best:
        rates = [rate.lr for rate in tried if (rate.size, rate.direction) == (one.size, one.direction)]
        if len(rates) == 1:
            said = f"lr {one.lr:g} is the only one that was tried"
        elif one.lr in (min(rates), max(rates)):
            side, other = ("lowest", "lower") if one.lr == min(rates) else ("highest", "higher")
            said = f"the best lr, {one.lr:g}, is the {side} that was tried, and a {other} one may be better still"
        else:
            continue
        lines.setdefault(f"{one.size}: {said}", []).append(one.direction)
    return [f"{said}: {', '.join(directions)}" for said, directions in lines.items()]


def _compare(test: pd.DataFrame, no_window: str) -> tuple[list[Gap], list[str]]:
    """Return the gaps of all pairs that can be measured, judged as one family, and why others have none.

    `no_window` says why `test` may be empty.
    """
    if test.empty:
        return [], [no_window]
    measured, problems = [], []
    for size, rows in test.groupby("size"):
        present = [name for name in DIRECTIONS if name in set(rows["direction"])]
        if len(present) < 2 and PER_DIRECTION not in str(size):
            problems.append(f"{size}: only {present[0]} has a best learning rate, and a gap needs two directions")
        for a, b in combinations(present, 2):
            if not is_pair(str(size), b):
                continue
            pair = rows[rows["direction"].isin([a, b])]
            try:  # the pair's rows alone: a fault in another pair must not silence this one
                measured.append(replace(gap(pair, a, b, str(size)), choosing_seeds=_fewest_that_chose(pair)))
            except UserError as error:
                problems.append(f"{size}: {error}")
    return judge(measured), problems


def _fewest_that_chose(pair: pd.DataFrame) -> int | None:
    """Return how many seeds chose the rates of a pair, for the direction with fewer; None if none was chosen."""
    fewest = pair["choosing_seeds"].min()
    return None if pd.isna(fewest) else int(fewest)


BEST_HEADER = ["size", "direction", "best lr", "rates tried", "bpb on the tuning half", "seeds"]


def best_columns(rate: BestRate) -> list[str]:
    """Return a best rate's line in the table of learning rates."""
    return [rate.size, rate.direction, f"{rate.lr:g}", str(rate.candidates), f"{rate.bpb:.4f}", str(rate.seeds)]

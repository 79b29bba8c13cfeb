"""Controls of a study: no gap may be found on the null corpus, and a gap must be found on the one-way corpus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bwlm.analysis.commands.gap import GAP_HEADER, gap_columns
from bwlm.analysis.commands.result import markdown_table
from bwlm.analysis.runs.document_losses import document_losses
from bwlm.analysis.runs.findings import Findings, find
from bwlm.analysis.runs.labels import sizes
from bwlm.analysis.runs.losses import load_losses
from bwlm.analysis.runs.rates import BestRate
from bwlm.config import CONTROL_SOURCES, NULL, PRODUCTS
from bwlm.directions import BASELINE, DIRECTIONS, TEXT_READINGS
from bwlm.record.bucket import fetch_text
from bwlm.record.experiment import ExperimentFolder, list_experiments
from bwlm.record.health import readable
from bwlm.stats.columns import Size
from bwlm.stats.gaps import DIFFERENT, Gap
from bwlm.text.controls import null_floor, null_nll_of_rows
from bwlm.text.packing import PackedRows

FARTHEST = 0.1
"""Bits per symbol above the null corpus' entropy up to which a model counts as having learned it. A model that knows
only how frequent symbols are is (H(pi) - h) / ln 2 = 2.9 above."""


@dataclass(frozen=True)
class Control:
    """Pair of directions on a control corpus, and whether it passed."""

    name: str
    gap: Gap
    passed: bool | None
    """True or False as the control passed or failed; None if the study claims no gap to hold it against."""
    why: str


def control_runs(storage: Path) -> dict[tuple[str, str], list[ExperimentFolder]]:
    """Return the runs on a control's corpus, in any state, by corpus and by their grid (empty for none)."""
    runs: dict[tuple[str, str], list[ExperimentFolder]] = {}
    for folder in readable(list_experiments(storage))[0]:
        config = folder.config()
        if config.experiment.data.source in CONTROL_SOURCES:
            runs.setdefault((config.experiment.data.source, config.grid or ""), []).append(folder)
    return dict(sorted(runs.items()))


def judge_control(source: str, gaps: list[Gap], study: float | None, above: Mapping[Size, float]) -> list[Control]:
    """Return a control's pairs, each with whether it passed; `study` is the gap (nats) that null must be able to see.

    Null, forward against backward: passes if the interval over seeds covers zero, half its width is below the study's
    gap, and both models are at most `FARTHEST` above the corpus' known entropy: a gap of zero between models that
    learned nothing says nothing. `above` is by size the distance of the farther model, in bits per symbol. Positive,
    and forward against permuted on any corpus: passes if the verdict is `different` and the second direction is worse.
    """
    controls = []
    for one in gaps:
        if {one.a, one.b} == set(TEXT_READINGS) and source == NULL:
            controls.append(_null(one, study, above.get(one.size, math.inf)))
        elif (one.a, one.b) == TEXT_READINGS or (one.a == BASELINE and DIRECTIONS[one.b].is_control):
            shows_gap = one.verdict == DIFFERENT and one.gap_nats > 0
            name = one.b if DIRECTIONS[one.b].is_control else "positive"
            controls.append(
                Control(name, one, shows_gap, f"{one.verdict}, as it must be" if shows_gap else f"{one.verdict}")
            )
    return controls


def _null(one: Gap, study: float | None, above: float) -> Control:
    if above > FARTHEST:
        far = f"{above:.2f} bits per symbol above the known entropy, more than {FARTHEST}"
        return Control("null", one, False, f"{far}: not learned, so a gap of zero says nothing")
    if one.seed_interval is None:
        return Control("null", one, False, "one seed gives no interval")
    low, high = one.seed_interval
    half = (high - low) / 2
    if not low <= 0 <= high:
        return Control("null", one, False, "a gap was found where there is none")
    if study is not None and half >= abs(study):
        return Control("null", one, False, f"too coarse: half its width, {half:.4f}, is not below the study's gap")
    if study is None:
        return Control("null", one, None, f"covers zero, half its width is {half:.4f}: no study's gap to compare")
    return Control(
        "null", one, True, f"the interval covers zero, half its width {half:.4f} is below the study's {abs(study):.4f}"
    )


def above_floor(folders: list[ExperimentFolder], best: list[BestRate]) -> pd.DataFrame:
    """Return the distance of runs at their best rates on the null corpus from the loss of the true chain.

    A row per run: size, direction, bits (per symbol). If the packed text is gone, the chain's expected loss on segments
    of the same lengths stands in.
    """
    rows, labels = [], sizes(folders)
    wanted = {(rate.size, rate.direction, rate.lr) for rate in best if rate.direction in TEXT_READINGS}
    finished = [folder for folder in folders if folder.status().state == "finished"]
    for folder in document_losses(finished).folders:
        experiment = folder.config().experiment
        size, direction = labels[folder.id], experiment.direction
        if (size, direction, experiment.lr) in wanted:
            losses = load_losses(folder, direction)
            loss = losses["nll"].sum() / losses["tokens"].sum()
            rows.append((size, direction, (loss - _floor(folder, losses)) / math.log(2)))
    return pd.DataFrame(rows, columns=["size", "direction", "bits"])


def _floor(folder: ExperimentFolder, losses: pd.DataFrame) -> float:
    """Return the loss of the true chain on the run's windows, in nats per symbol."""
    corpus = Path(folder.config().corpus)
    fetch_text(corpus)
    if not (corpus / "manifest.json").exists():
        return null_floor(losses["tokens"].to_numpy())
    return null_nll_of_rows(PackedRows(corpus, "validation").take(losses["window"].unique()))


# ---- the report's section ----

_CONTROL = {True: "passed", False: "**failed**", None: "no study"}

_NO_CONTROL = {
    NULL: f"a reversible corpus ({NULL}), on which no gap may be found",
    PRODUCTS: f"a one-way corpus ({PRODUCTS}), on which a gap must be found",
}
_RUN_CONTROLS = "With this storage, `bwlm grid run grids/controls.yaml` runs them; the next report shows them."


def controls_section(folders: list[ExperimentFolder], findings: Findings) -> list[str]:
    """Return the section on controls in the study's storage, held against its smallest gap of forward and backward."""
    runs = control_runs(folders[0].path.parent) if folders else {}
    claimed = [g for g in findings.gaps if (g.a, g.b) == TEXT_READINGS and g.verdict == DIFFERENT]
    is_control = {folder.id for folder in folders} & {folder.id for of in runs.values() for folder in of}
    finest = None if is_control else min((abs(g.gap_nats) for g in claimed), default=None)
    rows, notes = [], []
    for (source, grid), of in runs.items():
        result = find(of)
        floor = above_floor(of, result.best) if source == NULL else pd.DataFrame()
        controls = judge_control(source, result.gaps, finest, _farther(floor))
        rows += [[c.name, grid, *_figures(gap_columns(c.gap)), _CONTROL[c.passed], c.why] for c in controls]
        notes += [f"{source}: no pair was compared"] if not controls else []
        notes += result.skipped + _of_other_code(source, of, folders) + _floor_words(floor)
    lacking = [name for name in CONTROL_SOURCES if name not in {source for source, _ in runs}]
    parts = ["## Controls"]
    parts += [markdown_table(["control", "grid", *_figures(GAP_HEADER), "result", "why"], rows)] if rows else []
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    not_run = " and ".join(_NO_CONTROL[name] for name in lacking)
    return [*parts, f"Not run: {not_run}. {_RUN_CONTROLS}"] if lacking else parts


def _figures(columns: list[str]) -> list[str]:
    """Return those columns of the verdict table that the table of controls has: a control has a result of its own."""
    wanted = ("size", "pair", "seeds", "gap (nats)", "gap (%)", "95 % over seeds")
    return [column for name, column in zip(GAP_HEADER, columns, strict=True) if name in wanted]


def _of_other_code(source: str, of: list[ExperimentFolder], study: list[ExperimentFolder]) -> list[str]:
    ours, theirs = ({folder.config().code for folder in runs} for runs in (study, of))
    return [] if theirs <= ours else [f"{source}: trained with other code than the study"]


def _farther(floor: pd.DataFrame) -> dict[Size, float]:
    """Return the mean over seeds of the direction that is farther from the floor, by size."""
    if floor.empty:
        return {}
    means = floor.groupby(["size", "direction"])["bits"].mean().groupby("size").max()
    return {str(size): float(bits) for size, bits in means.items()}


def _floor_words(floor: pd.DataFrame) -> list[str]:
    if floor.empty:
        return []
    means = floor.groupby(["size", "direction"])["bits"].agg(["mean", "min", "max"])
    floors = [
        f"{size} {direction} {mean:.4f} ({low:.4f} .. {high:.4f})"
        for (size, direction), (mean, low, high) in zip(means.index, means.to_numpy(), strict=True)
    ]
    return [f"above the known entropy of the null corpus, in bits per symbol: {'; '.join(floors)}"]

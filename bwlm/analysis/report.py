"""RESEARCH_REPORT.md: what was asked, what was measured, and how sure one may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bwlm.analysis.charts import gap_chart, learning_curves, save_chart
from bwlm.analysis.stats import Gap, gaps
from bwlm.analysis.tables import (
    BestRate,
    CellRow,
    best_learning_rates,
    best_on_test,
    load_cell,
    load_curves,
    load_gap_table,
    sizes,
)
from bwlm.errors import UserError
from bwlm.paths import write_atomic
from bwlm.record.lineage import ExperimentFolder

REPORT = "RESEARCH_REPORT.md"
_POINTS = 200
"""A curve keeps about this many of its steps in a chart."""


@dataclass(frozen=True)
class Findings:
    """What a grid's finished cells say."""

    best: list[BestRate]
    gaps: list[Gap]
    skipped: list[str]
    """Cells without a result, with the reason."""


def find(folders: list[ExperimentFolder]) -> Findings:
    """Best learning rate per direction and size, and the paired gaps between directions at their best rates."""
    cells = {folder.id: load_cell(folder) for folder in folders}
    finished = [folder for folder in folders if cells[folder.id].state == "finished"]
    skipped = [
        f"{c.id}: {c.state}{f' ({c.reason})' if c.reason else ''}" for c in cells.values() if c.state != "finished"
    ]
    if not finished:
        return Findings([], [], skipped)
    table = load_gap_table(finished)
    best = best_learning_rates(table)
    test = best_on_test(table, best)
    try:
        compared = gaps(test) if test["direction"].nunique() > 1 else []
    except UserError as error:  # cells that failed can leave a pair without a common seed
        return Findings(best, [], [*skipped, f"no comparison: {error}"])
    return Findings(best, compared, skipped)


def markdown_table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([str(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


CELL_HEADER = ["direction", "depth", "lr", "seed", "state", "loss", "bpb", "bpb forward", "bpb backward", "tokens/s"]


def cell_columns(cell: CellRow) -> list[str]:
    """A cell's line in the table of a grid; loss in nats per token, bits per byte in its own and in both readings."""
    shown = [("val_loss", ".4f"), ("val_bpb", ".4f"), ("val_bpb_forward", ".4f"), ("val_bpb_backward", ".4f")]
    figures = [format(cell.metrics[k], style) if k in cell.metrics else "" for k, style in shown]
    speed = f"{cell.metrics['tokens_per_second']:,.0f}" if "tokens_per_second" in cell.metrics else ""
    return [cell.direction, str(cell.depth), f"{cell.lr:g}", str(cell.seed), cell.state, *figures, speed]


BEST_HEADER = ["size", "direction", "best lr", "of", "bpb on the tuning half", "seeds"]


def best_columns(rate: BestRate) -> list[str]:
    return [rate.size, rate.direction, f"{rate.lr:g}", str(rate.candidates), f"{rate.bpb:.4f}", str(rate.seeds)]


GAP_HEADER = [
    "size",
    "pair",
    "seeds",
    "gap (nats)",
    "gap (%)",
    "95 % over seeds",
    "95 % bootstrap",
    "noise floor",
    "verdict",
]


def gap_columns(gap: Gap) -> list[str]:
    def interval(pair: tuple[float, float] | None) -> str:
        return f"{pair[0]:+.4f} .. {pair[1]:+.4f}" if pair else "–"

    return [
        str(gap.size),
        f"{gap.a} → {gap.b}",
        str(len(gap.seeds)),
        f"{gap.gap_nats:+.4f}",
        f"{gap.gap_percent:+.2f}",
        interval(gap.seed_interval),
        interval(gap.bootstrap),
        f"{gap.noise_floor:.4f}" if gap.noise_floor is not None else "–",
        f"**{gap.verdict}**",
    ]


def write_grid_report(folder: Path, name: str, storage: Path, ids: list[str]) -> list[Path]:
    """Writes the report of a grid and its charts into `folder`; returns the files, the report first."""
    folders = [ExperimentFolder(storage, run) for run in ids]
    findings = find(folders)
    charts = save_chart(learning_curves(_curves(folders), f"{name}: learning curves"), folder, "curves")
    if findings.gaps:
        charts += save_chart(gap_chart(_gap_frame(findings.gaps), f"{name}: gaps between directions"), folder, "gaps")
    text = _grid_text(name, folders, findings)
    write_atomic(folder / REPORT, text.encode())
    return [folder / REPORT, *charts]


def write_experiment_report(folder: ExperimentFolder) -> list[Path]:
    """Writes one run's report with its learning curve; returns the files, the report first."""
    cell, config = load_cell(folder), folder.config()
    charts = save_chart(learning_curves(_curves([folder]), f"{folder.id}: learning curve"), folder.path, "curves")
    settings = markdown_table(["setting", "value"], [(k, v) for k, v in sorted(config.identity.items())])
    text = "\n\n".join(
        [
            f"# {folder.id}",
            f"A {cell.direction} model of depth {cell.depth}, {cell.state} at step {cell.step} of {config.steps}."
            + (f" {cell.reason}" if cell.reason else ""),
            markdown_table(CELL_HEADER, [cell_columns(cell)]),
            "Loss is in nats per token, bpb in bits per UTF-8 byte of the validation windows.",
            "![learning curve](curves.svg) ([in the browser](curves.html))",
            f"## Settings\n\nFingerprint `{config.fingerprint}`.\n\n{settings}",
        ]
    )
    write_atomic(folder.path / REPORT, f"{text}\n".encode())
    return [folder.path / REPORT, *charts]


def _grid_text(name: str, folders: list[ExperimentFolder], findings: Findings) -> str:
    cells = [load_cell(folder) for folder in folders]
    parts = [f"# {name}: which way should a language model read?"]
    if findings.gaps:
        lines = [f"- {gap.size}: {gap.a} against {gap.b}: **{gap.verdict}** ({gap.reason})" for gap in findings.gaps]
        parts += ["## Verdict", "\n".join(lines)]
        parts += [markdown_table(GAP_HEADER, [gap_columns(gap) for gap in findings.gaps]), _READING]
        parts += ["![gaps](gaps.svg) ([in the browser](gaps.html))"]
    parts += [
        "## Best learning rate",
        markdown_table(BEST_HEADER, [best_columns(rate) for rate in findings.best]),
        _CHOICE,
    ]
    parts += ["## Learning curves", "![learning curves](curves.svg) ([in the browser](curves.html))"]
    parts += ["Lines are smoothed training losses of single runs, points their validation losses (own reading)."]
    parts += ["## Cells", markdown_table(["id", *CELL_HEADER], [[c.id, *cell_columns(c)] for c in cells])]
    if findings.skipped:
        parts += ["Cells without a result:", "\n".join(f"- {line}" for line in findings.skipped)]
    return "\n\n".join([*parts, _CONTROLS]) + "\n"


_READING = """A gap is the second direction's loss minus the first's on the same text, in nats per token, at each one's
best learning rate, on the test half of the validation windows; a bidirectional model's loss is the mean of its two
readings, at equal total tokens. `different` is said only if the paired t-test over seeds, Holm-adjusted over all pairs
of this report, gives p < 0.05. The noise floor is the same statistic between seeds of one direction."""

_CHOICE = """Chosen for each direction by the mean over seeds on the tuning half (even validation windows); the verdict
is measured on the other half."""

_CONTROLS = """Controls (an exactly reversible corpus, a one-way corpus) were not run with this grid."""


def _curves(folders: list[ExperimentFolder]) -> pd.DataFrame:
    labels = sizes(folders)
    parts = []
    for folder in folders:
        curve = load_curves(folder)
        if curve.empty:
            continue
        if "val_loss" not in curve:
            curve["val_loss"] = math.nan
        stride = max(1, len(curve) // _POINTS)
        kept = curve[(curve.index % stride == 0) | curve["val_loss"].notna() | (curve.index == len(curve) - 1)]
        experiment = folder.config().experiment
        parts.append(
            kept[["tokens", "train_loss_smooth", "val_loss"]].assign(
                run=folder.id, direction=experiment.direction, lr=experiment.lr, size=labels[folder.id]
            )
        )
    columns = ["tokens", "train_loss_smooth", "val_loss", "run", "direction", "lr", "size"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _gap_frame(found: list[Gap]) -> pd.DataFrame:
    rows = []
    for gap in found:
        low, high = gap.seed_interval or (math.nan, math.nan)
        floor = gap.noise_floor or 0.0
        pair = f"{gap.size}: {gap.a} → {gap.b}"
        rows.append((pair, gap.gap_nats, low, high, -floor, floor, gap.verdict))
    return pd.DataFrame(rows, columns=["pair", "gap", "low", "high", "floor_low", "floor", "verdict"])

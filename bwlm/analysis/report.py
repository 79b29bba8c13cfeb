"""RESEARCH_REPORT.md: what was asked, what was measured, and how sure one may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from bwlm.analysis.charts import gap_chart, learning_curves, save_chart
from bwlm.analysis.controls import NULL, above_floor, control_runs, judge_control
from bwlm.analysis.page import to_page
from bwlm.analysis.result import Analysis
from bwlm.analysis.sections import analysis_sections, audit_section, cost_section, data_section, repeat_section
from bwlm.analysis.stats import DIRECTION_ORDER, FEWEST_DOCUMENTS, Gap, counted, gap, judge
from bwlm.analysis.tables import (
    PER_DIRECTION,
    BestRate,
    CellRow,
    TriedRate,
    best_learning_rates,
    best_on_test,
    equal_per_direction,
    load_cell,
    load_curves,
    load_gap_table,
    sizes,
    tried_rates,
)
from bwlm.errors import UserError
from bwlm.paths import write_atomic
from bwlm.record.lineage import ExperimentFolder

REPORT = "RESEARCH_REPORT.md"
PAGE = "RESEARCH_REPORT.html"
_POINTS = 200
"""A curve keeps about this many of its steps in a chart."""


_WINDOWS = 25
"""A curve's training loss is averaged over this share of its steps."""


@dataclass(frozen=True)
class Findings:
    """What a grid's finished cells say."""

    best: list[BestRate]
    gaps: list[Gap]
    without_result: list[str]
    """Cells that have none, with the reason."""
    not_compared: list[str]
    """Pairs that could not be, with the reason."""
    excluded: list[str]
    """Learning rates that could not be chosen, with the reason, and directions that are left with none."""
    windows: list[int]
    """Of the compared half, for each gap."""

    @property
    def skipped(self) -> list[str]:
        return [*self.without_result, *self.excluded, *self.not_compared]


def find(folders: list[ExperimentFolder]) -> Findings:
    """Best learning rate per direction and size, and the paired gaps between directions at their best rates."""
    cells = {folder.id: load_cell(folder) for folder in folders}
    finished = [folder for folder in folders if cells[folder.id].state == "finished"]
    skipped = [
        f"{c.id}: {c.state}{f' ({c.reason})' if c.reason else ''}" for c in cells.values() if c.state != "finished"
    ]
    if not finished:
        return Findings([], [], skipped, [], [], [])
    labels = sizes(folders)
    table = load_gap_table(finished, labels)
    tried = tried_rates(folders, labels, {folder.id for folder in finished})
    best = best_learning_rates(table, tried)
    test = best_on_test(table, best)
    test = pd.concat([test, equal_per_direction(test, finished, labels)], ignore_index=True)
    compared, problems = _compare(test) if best else ([], [])
    windows = [_windows(test, found) for found in compared]
    return Findings(best, compared, skipped, problems, _excluded(tried), windows)


def _windows(test: pd.DataFrame, found: Gap) -> int:
    """Those of one run stand for all of the pair, which were compared because they are of the same text."""
    one = test["size"].eq(found.size) & test["direction"].eq(found.a) & test["seed"].eq(found.seeds[0])
    return int(test.loc[one, "windows"].iloc[0])


def _excluded(tried: list[TriedRate]) -> list[str]:
    rates = [
        f"excluded: {r.direction} {r.size} lr {r.lr:g}: "
        f"{r.cells - r.finished} of {counted(r.cells, 'cell')} did not finish"
        for r in tried
        if not r.qualifies
    ]
    able = {(rate.size, rate.direction) for rate in tried if rate.qualifies}
    unable = sorted({(rate.size, rate.direction) for rate in tried} - able)
    return rates + [f"{size}: {direction} has no best learning rate: none is left" for size, direction in unable]


def _compare(test: pd.DataFrame) -> tuple[list[Gap], list[str]]:
    """The gap of every pair that can be measured, judged as one family, and why there is none of the others."""
    if test.empty:
        return [], ["one validation window leaves none to compare on: raise evaluation.tokens"]
    found, problems = [], []
    for size, rows in test.groupby("size"):
        present = [name for name in DIRECTION_ORDER if name in set(rows["direction"])]
        if len(present) < 2 and PER_DIRECTION not in str(size):
            problems.append(f"{size}: only {present[0]} has a best learning rate, and a gap needs two directions")
        for a, b in combinations(present, 2):
            if PER_DIRECTION in str(size) and b != "bidirectional":
                continue  # they are compared at their own size
            try:  # with the pair's rows alone: what is wrong with another must not silence this one
                found.append(gap(rows[rows["direction"].isin([a, b])], a, b, str(size)))
            except UserError as error:
                problems.append(f"{size}: {error}")
    return judge(found), problems


def markdown_table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([_plain(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


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


def gap_columns(found: Gap) -> list[str]:
    def interval(pair: tuple[float, float] | None) -> str:
        return f"{pair[0]:+.4f} .. {pair[1]:+.4f}" if pair else "–"

    return [
        str(found.size),
        f"{found.a} → {found.b}",
        str(len(found.seeds)),
        f"{found.gap_nats:+.4f}",
        f"{found.gap_percent:+.2f}",
        interval(found.seed_interval),
        interval(found.bootstrap if _resampled(found) else None),
        f"{found.noise_floor:.4f}" if found.noise_floor is not None else "–",
        f"**{found.verdict}**",
    ]


def gap_sentence(found: Gap) -> str:
    """A judged gap in words: `size 4: backward is 0.0210 nats/token (0.70 %) worse than forward, 95 % over ..`."""
    sign = -1 if found.gap_nats < 0 else 1  # the interval is told the same way round as the gap
    parts = [
        f"size {found.size}: {found.b} is {abs(found.gap_nats):.4f} nats/token ({abs(found.gap_percent):.2f} %) "
        f"{'better' if sign < 0 else 'worse'} than {found.a}"
    ]
    if found.seed_interval is not None:
        low, high = sorted(sign * end for end in found.seed_interval)
        parts.append(f"95 % over seeds {low:.4f} .. {high:.4f}")
    parts.append(counted(len(found.seeds), "seed"))
    if found.noise_floor is not None:
        parts.append(f"noise floor {found.noise_floor:.4f}")
    return f"{', '.join(parts)}: {found.verdict} ({found.reason})"


def gap_figures(found: Gap) -> dict[str, Any]:
    """A judged gap for scripts, at full precision; `bootstrap` says little where `documents` is under 10."""
    return {
        "size": found.size,
        "a": found.a,
        "b": found.b,
        "seeds": len(found.seeds),
        "paired_seeds": found.seeds,
        "dropped_seeds": found.dropped_seeds,
        "documents": found.documents,
        "gap_nats": found.gap_nats,
        "gap_bpb": found.gap_bpb,
        "gap_percent": found.gap_percent,
        "per_seed": [float(value) for value in found.per_seed],
        "bootstrap": list(found.bootstrap),
        "seed_interval": list(found.seed_interval) if found.seed_interval else None,
        "noise_floor": found.noise_floor,
        "p": found.p,
        "p_adjusted": found.p_adjusted,
        "verdict": found.verdict,
        "reason": found.reason,
    }


def gap_analysis(found: list[Gap], title: str, notes: list[str]) -> Analysis:
    """Judged gaps as an analysis: a sentence, a line of a table and a bar of a chart each."""
    shown = pd.DataFrame([gap_columns(one) for one in found], columns=GAP_HEADER)
    chart = gap_chart(gap_frame(found), f"{title}: gaps between directions")
    return Analysis("gap", title, [gap_sentence(one) for one in found], _gap_table(found), chart, notes, shown)


def _gap_table(found: list[Gap]) -> pd.DataFrame:
    """The figures of gaps: both ends of an interval in columns of their own, lists left out."""
    rows = []
    for one in found:
        row = gap_figures(one)
        for name in ("bootstrap", "seed_interval"):
            row[f"{name}_low"], row[f"{name}_high"] = row.pop(name) or (None, None)
        rows.append({name: value for name, value in row.items() if not isinstance(value, list | dict)})
    return pd.DataFrame(rows)


def _resampled(found: Gap) -> bool:
    """Whether its bootstrap interval means anything."""
    return found.documents >= FEWEST_DOCUMENTS


def _gap_line(found: Gap, windows: int) -> str:
    few = "" if _resampled(found) else f" ({counted(found.documents, 'document')}: too few to resample)"
    text = _text_words(found, windows)
    return f"- {found.size}: {found.a} against {found.b}: **{found.verdict}** ({found.reason}), on {text}{few}"


def _text_words(found: Gap, windows: int) -> str:
    return f"{counted(found.documents, 'document')} in {counted(windows, 'window')}"


def gap_caption(findings: Findings) -> str:
    """What the verdict table stands on, in a line: the documents and windows of each size."""
    pairs = zip(findings.gaps, findings.windows, strict=True)
    lines = dict.fromkeys(f"{found.size} on {_text_words(found, windows)}" for found, windows in pairs)
    return f"Verdict (on the test half: {', '.join(lines)})"


def write_grid_report(folder: Path, name: str, storage: Path, ids: list[str]) -> list[Path]:
    """Writes the report of a grid and its charts into `folder`; returns the files, the report first."""
    folders = [ExperimentFolder(storage, run) for run in ids]
    findings = find(folders)
    charts = save_chart(learning_curves(_curves(folders), f"{name}: learning curves"), folder, "curves")
    if findings.gaps:
        charts += save_chart(gap_chart(gap_frame(findings.gaps), f"{name}: gaps between directions"), folder, "gaps")
    sections, pictures = _grid_sections(name, folders, findings, folder)
    text = _grid_text(name, folders, findings) + "\n".join(["", *(f"{part}\n" for part in sections)])
    return [*_write(text, folder, f"bwlm: {name}"), *charts, *pictures]


def _grid_sections(
    name: str, folders: list[ExperimentFolder], findings: Findings, home: Path
) -> tuple[list[str], list[Path]]:
    """What follows the verdict; insides are shown of the cells at each direction's best learning rate."""
    chosen = _at_best_rates(folders, findings.best) or folders
    analyses, pictures = analysis_sections(chosen, home, [name] if chosen == folders else [f.id for f in chosen])
    command = f"bwlm grid run {name}.yaml"
    parts = [*_controls_section(folders, findings), *audit_section(folders), *data_section(folders)]
    parts += [*analyses, *cost_section(folders)]
    return [*parts, *repeat_section(folders, command)], pictures


def _controls_section(folders: list[ExperimentFolder], findings: Findings) -> list[str]:
    """Controls in the study's storage, held against its own gap between forward and backward."""
    runs = control_runs(folders[0].path.parent) if folders else {}
    study = [abs(g.gap_nats) for g in findings.gaps if (g.a, g.b) == ("forward", "backward")]
    is_control = any(folder in of for of in runs.values() for folder in folders)
    finest = None if is_control or not study else min(study)
    controls = [c for source, of in runs.items() if of for c in judge_control(source, find(of).gaps, finest)]
    if not controls:
        return ["## Controls", _NO_CONTROLS]
    rows = [[c.name, *gap_columns(c.gap)[:6], "passed" if c.passed else "**failed**", c.why] for c in controls]
    parts = ["## Controls", markdown_table(["control", *GAP_HEADER[:6], "result", "why"], rows)]
    floor = above_floor(runs[NULL])
    if not floor.empty:
        means = floor.groupby("direction")["bits"].agg(["mean", "min", "max"])
        told = [f"{d} {m['mean']:.4f} ({m['min']:.4f} .. {m['max']:.4f})" for d, m in means.iterrows()]
        parts.append(f"Above the known entropy of the null corpus, in bits per symbol: {'; '.join(told)}.")
    return parts


def _at_best_rates(folders: list[ExperimentFolder], best: list[BestRate]) -> list[ExperimentFolder]:
    labels, wanted = sizes(folders), {(rate.size, rate.direction, rate.lr) for rate in best}
    experiments = {folder.id: folder.config().experiment for folder in folders}
    return [f for f in folders if (labels[f.id], experiments[f.id].direction, experiments[f.id].lr) in wanted]


def _write(text: str, folder: Path, title: str) -> list[Path]:
    """The report, and the same as a page of its own."""
    write_atomic(folder / REPORT, text.encode())
    write_atomic(folder / PAGE, to_page(text, folder, title).encode())
    return [folder / REPORT, folder / PAGE]


def write_experiment_report(folder: ExperimentFolder, insides: bool = True) -> list[Path]:
    """Writes one run's report with its learning curve; returns the files, the report first.

    Without `insides` it says by which command they are added: for a grid's many cells they are seldom looked at.
    """
    cell, config = load_cell(folder), folder.config()
    charts = save_chart(learning_curves(_curves([folder]), f"{folder.id}: learning curve"), folder.path, "curves")
    analyses, pictures = (
        analysis_sections([folder], folder.path, [folder.id])
        if insides
        else ([f"## Insides\n\n`bwlm analyze report {folder.id}` adds what its research log says."], [])
    )
    settings = markdown_table(["setting", "value"], [(k, v) for k, v in sorted(config.identity.items())])
    text = "\n\n".join(
        [
            f"# {folder.id}",
            f"A {cell.direction} model of depth {cell.depth}, {cell.state} at step {cell.step} of {config.steps}."
            + (f" {cell.reason}" if cell.reason else ""),
            markdown_table(CELL_HEADER, [cell_columns(cell)]),
            "Loss is in nats per token, bpb in bits per UTF-8 byte of the validation windows.",
            "![learning curve](curves.svg) ([in the browser](curves.html))",
            _lineage(folder),
            *data_section([folder]),
            *analyses,
            *cost_section([folder]),
            f"## Settings\n\nFingerprint `{config.fingerprint}`.\n\n{settings}",
            *repeat_section([folder], _command(folder)),
        ]
    )
    return [*_write(f"{text}\n", folder.path, f"bwlm: {folder.id}"), *charts, *pictures]


def _lineage(folder: ExperimentFolder) -> str:
    config, parent = folder.config(), folder.parent()
    of_grid = f", a cell of the grid {config.grid}" if config.grid else ""
    return f"## Lineage\n\nA {config.experiment.phase} run{of_grid}; parent: {parent or 'none'}."


def _command(folder: ExperimentFolder) -> str:
    """What trains the run again."""
    config = folder.config()
    if config.grid:
        return f"bwlm grid run {config.grid}.yaml"
    experiment = config.experiment
    given = f"--direction {experiment.direction} --depth {experiment.depth} --id {folder.id}"
    return f"bwlm train --phase {experiment.phase} {given}  # and the settings below"


def _grid_text(name: str, folders: list[ExperimentFolder], findings: Findings) -> str:
    cells = [load_cell(folder) for folder in folders]
    parts = [f"# {name}: which way should a language model read?"]
    parts += ["## Verdict"]
    if findings.gaps:
        parts += ["\n".join(map(_gap_line, findings.gaps, findings.windows))]
        parts += [markdown_table(GAP_HEADER, [gap_columns(found) for found in findings.gaps])]
        parts += [f"{gap_caption(findings)}. {_READING}"]
        parts += ["![gaps](gaps.svg) ([in the browser](gaps.html))"]
    if not findings.best:
        reason = "no learning rate finished at every seed" if findings.excluded else "no cell has finished yet"
        parts += [f"None: {reason}."]
    if findings.not_compared:
        parts += ["Not compared:", "\n".join(f"- {line}" for line in findings.not_compared)]
    if findings.best or findings.excluded:
        parts += ["## Best learning rate"]
    if findings.best:
        parts += [markdown_table(BEST_HEADER, [best_columns(rate) for rate in findings.best]), _CHOICE]
    if findings.excluded:
        parts += ["\n".join(f"- {line}" for line in findings.excluded), _EXCLUSION]
    parts += ["## Learning curves", "![learning curves](curves.svg) ([in the browser](curves.html))"]
    parts += ["Lines are smoothed training losses of single runs, points their validation losses (own reading)."]
    parts += ["## Cells", markdown_table(["id", *CELL_HEADER], [[c.id, *cell_columns(c)] for c in cells])]
    if findings.without_result:
        parts += ["Cells without a result:", "\n".join(f"- {line}" for line in findings.without_result)]
    return "\n\n".join(parts) + "\n"


_READING = """A gap is the second direction's loss minus the first's on the same text, in nats per token, at each one's
best learning rate, on the test half of the validation windows; a bidirectional model's loss is the mean of its two
readings, at equal total tokens. `different` is said only if the paired t-test over seeds, Holm-adjusted over all pairs
of this report, gives p < 0.05. The noise floor is the same statistic between seeds of one direction."""

_CHOICE = """Chosen for each direction by the mean over seeds on the tuning half (even validation windows); the verdict
is measured on the other half. The halves are made of windows, not of documents: a long document can have windows in
both, so the two halves are then not independent texts."""

_EXCLUSION = """A learning rate can be chosen only if all its cells finished, at every seed that was planned for it."""

_NO_CONTROLS = """Not run: a reversible corpus, on which no gap may be found, and a one-way corpus, on which one must.
With this storage, `bwlm grid run grids/controls.yaml` runs them; the next report shows them."""


def _curves(folders: list[ExperimentFolder]) -> pd.DataFrame:
    labels = sizes(folders)
    parts = []
    for folder in folders:
        curve = load_curves(folder)
        if curve.empty:
            continue
        if "val_loss" not in curve:
            curve["val_loss"] = math.nan
        window = max(1, len(curve) // _WINDOWS)  # centred: an average of the past would lag behind a falling loss
        curve["train_loss_smooth"] = curve["train_loss"].rolling(window, center=True, min_periods=1).mean()
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


def gap_frame(found: list[Gap]) -> pd.DataFrame:
    """The input of `charts.gap_chart`."""
    rows = []
    for one in found:
        low, high = one.seed_interval or (math.nan, math.nan)
        floor = one.noise_floor or 0.0
        pair = f"{one.size}: {one.a} → {one.b}"
        rows.append((pair, one.gap_nats, low, high, -floor, floor, one.verdict))
    return pd.DataFrame(rows, columns=["pair", "gap", "low", "high", "floor_low", "floor", "verdict"])

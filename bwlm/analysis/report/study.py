"""RESEARCH_REPORT.md: verdict, evidence and cost of a grid; and the report of one run."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bwlm.analysis.charts.losses import gap_chart, group_curves, learning_curves
from bwlm.analysis.charts.style import save_chart
from bwlm.analysis.commands.compare import curves_of_groups, single_curves, without_rl
from bwlm.analysis.commands.gap import GAP_HEADER, gap_caption, gap_columns, gap_frame, gap_line, verdict_line
from bwlm.analysis.commands.result import markdown_table
from bwlm.analysis.report.baseline import baseline_section
from bwlm.analysis.report.controls import controls_section
from bwlm.analysis.report.page import to_page
from bwlm.analysis.report.sections import (
    FOLDED,
    analyses_of,
    analysis_sections,
    audit_section,
    configuration_section,
    cost_section,
    data_section,
    repeat_section,
    settings_section,
)
from bwlm.analysis.report.tasks import tasks_section, tasks_summary
from bwlm.analysis.report.variants import variants_section
from bwlm.analysis.runs.audit import comparable
from bwlm.analysis.runs.findings import BEST_HEADER, Findings, best_columns, find
from bwlm.analysis.runs.labels import sizes
from bwlm.analysis.runs.rates import BestRate
from bwlm.analysis.runs.task_findings import TaskFindings, find_tasks
from bwlm.paths import write_text
from bwlm.phases import PHASES
from bwlm.record.catalog.rows import CELL_HEADER, cell_columns, load_cell
from bwlm.record.catalog.select import shortest_names
from bwlm.record.experiment import ExperimentFolder, list_experiments
from bwlm.record.grids import REPORT, cells_of, earlier_reports, grid_folder
from bwlm.record.health import readable
from bwlm.record.repeat import grid_command, repeat_command
from bwlm.stats.gaps import TOO_FEW_CHOSE, Gap
from bwlm.stats.loss_file import write_losses

_MANY = 60
"""Runs from which a report draws the seeds of a setting as one line, and folds the table of its cells."""
PAGE = "RESEARCH_REPORT.html"
LOSSES = "losses.parquet"
_CELLS = "Cells"


@dataclass(frozen=True)
class GridReport:
    """Report of a grid: its files, the report first, and what it found."""

    files: list[Path]
    findings: Findings
    tasks: TaskFindings | None
    """Scores of its runs on tasks; None if they have none."""
    summary: str
    """Verdict and best learning rates in Markdown, without pictures."""


def write_grid_report(storage: Path, name: str, into: Path | None = None) -> GridReport:
    """Write the report of a grid and its charts into its folder, or `into` another."""
    folder = into or grid_folder(storage, name)
    folders, left_out = readable(ExperimentFolder(storage, run) for run in cells_of(storage, name))
    findings = find(folders)
    findings = replace(findings, without_result=left_out + findings.without_result)
    charts = list[Path]()
    if without_rl(folders) or not folders:
        charts += save_chart(_curves(folders, f"{name}: learning curves"), folder, "curves")
    if findings.gaps:
        charts += save_chart(gap_chart(gap_frame(findings.gaps), f"{name}: gaps between directions"), folder, "gaps")
        charts.append(write_losses(findings.losses, folder / LOSSES))
    tasks = find_tasks(folders)
    sections, pictures = _grid_sections(name, folders, findings, folder, storage)
    scored, score_charts = tasks_section(tasks, folder, name)
    notes = dropped_words(dropped_cells(storage, name)) + ([] if into else _earlier_words(storage, name))
    text = _grid_text(name, folders, findings, notes)
    text += "\n".join(["", *(f"{part}\n" for part in [*scored, *sections])])
    folded = (*FOLDED, *([_CELLS] if len(folders) > _MANY else []))
    files = [*_write(text, folder, storage, f"bwlm: {name}", folded), *charts, *score_charts, *pictures]
    return GridReport(files, findings, tasks, _summary(findings, tasks))


def _curves(folders: list[ExperimentFolder], title: str) -> Any:
    """Return the chart of the learning curves: a line for each run, or for all seeds of a setting if there are many."""
    if len(folders) > _MANY:
        return group_curves(curves_of_groups(folders), title)
    return learning_curves(single_curves(folders), title)


def _summary(findings: Findings, tasks: TaskFindings | None) -> str:
    """Return the verdict and the best learning rates for a reader who has not opened the report."""
    parts = []
    if findings.gaps:
        parts += ["\n".join(f"- {verdict_line(found)}" for found in findings.gaps)]
        parts += [markdown_table(GAP_HEADER, [gap_columns(found) for found in findings.gaps])]
    if findings.best:
        parts += ["Best learning rates", markdown_table(BEST_HEADER, [best_columns(rate) for rate in findings.best])]
    parts += tasks_summary(tasks)
    lines = [*findings.skipped, *findings.at_edge]
    parts += ["\n".join(f"- {line}" for line in lines)] if lines else []
    parts += [f"The whole report is {REPORT}, among the artifacts."]
    return "\n\n".join(parts)


def _grid_sections(
    name: str, folders: list[ExperimentFolder], findings: Findings, home: Path, storage: Path
) -> tuple[list[str], list[Path]]:
    """Return the sections after the verdict; the insides are those of each direction at its best learning rate."""

    def analysed(chosen: list[ExperimentFolder], commands: list[str]) -> tuple[list[str], list[Path]]:
        names = [name] if chosen == folders else shortest_names(storage, [folder.id for folder in chosen])
        return analysis_sections(commands, chosen, home, names)

    phases = {folder.id: PHASES[folder.config().experiment.phase] for folder in folders}
    compared = [folder for folder in folders if phases[folder.id].compared]
    chosen = _at_best_rates(compared, findings.best) or compared or folders
    analyses, pictures = analysed(chosen, analyses_of(chosen))
    if rewarded := [folder for folder in folders if phases[folder.id].has_reward and folder not in chosen]:
        rewards, chart = analysed(rewarded, ["rewards"])
        analyses, pictures = [*rewards, *analyses], [*chart, *pictures]
    command = grid_command(name)
    parts = [
        *variants_section(folders),
        *controls_section(folders, findings),
        *audit_section(compared),
        *data_section(folders),
        *analyses,
        *cost_section(folders),
        *configuration_section(folders),
        *repeat_section(folders, command),
    ]
    return parts, pictures


def _at_best_rates(folders: list[ExperimentFolder], best: list[BestRate]) -> list[ExperimentFolder]:
    labels, wanted = sizes(folders), {(rate.size, rate.direction, rate.lr) for rate in best}
    experiments = {folder.id: folder.config().experiment for folder in folders}
    return [f for f in folders if (labels[f.id], experiments[f.id].direction, experiments[f.id].lr) in wanted]


def _write(text: str, folder: Path, storage: Path, title: str, folded: Collection[str] = FOLDED) -> list[Path]:
    """Write the report as Markdown and as an HTML page; paths in it start at the storage, which may be moved."""
    text = re.sub(rf"(?<![\w.~/-]){re.escape(f'{storage}/')}", "", text)
    write_text(folder / REPORT, text)
    write_text(folder / PAGE, to_page(text, folder, title, folded))
    return [folder / REPORT, folder / PAGE]


def write_experiment_report(folder: ExperimentFolder, insides: bool = True, into: Path | None = None) -> list[Path]:
    """Write one run's report and charts into its folder, or `into` another; return the files, the report first.

    Without `insides` the report leaves out the analyses and the comparison with the baseline, which are seldom looked
    at for a grid's many cells, and names the command that adds them.
    """
    cell, config = load_cell(folder), folder.config()
    home = into or folder.path
    learnt, charts = _learning(folder, home)
    scored, score_charts = tasks_section(find_tasks([folder]), home, folder.id)
    more, pictures = [_WITHOUT_INSIDES.format(run=folder.id)], list[Path]()
    if insides:
        commands = [command for command in analyses_of([folder]) if command not in _SHOWN]
        analyses, pictures = analysis_sections(commands, [folder], home, [folder.id])
        more = [*baseline_section(folder), *analyses]
    text = "\n\n".join(
        [
            f"# {folder.id}",
            f"A {cell.direction} model of depth {cell.depth}, {cell.state} at step {cell.step} of {config.steps}."
            + (f" {cell.reason}" if cell.reason else "")
            + (f" **Damaged**, so that no verdict counts it: {'; '.join(cell.damage)}." if cell.damage else ""),
            markdown_table(CELL_HEADER, [cell_columns(cell)]),
            "Loss is in nats per token, bpb in bits per UTF-8 byte of the validation windows.",
            *learnt,
            *scored,
            _lineage(folder),
            *data_section([folder]),
            *(audit_section(comparable(folder), of=folder) if PHASES[config.experiment.phase].compared else []),
            *more,
            *cost_section([folder]),
            *settings_section(config),
            *repeat_section([folder], repeat_command(folder.config())),
        ]
    )
    return [*_write(f"{text}\n", home, folder.path.parent, f"bwlm: {folder.id}"), *charts, *score_charts, *pictures]


_SHOWN = ("rewards", "compare")
"""Analyses that a run's report has at its top, as the learning curve, or that need several runs."""


def _learning(folder: ExperimentFolder, home: Path) -> tuple[list[str], list[Path]]:
    """Return the learning curve of a run, of its loss or in RL of its reward, and the charts."""
    if not without_rl([folder]):
        return analysis_sections(["rewards"], [folder], home, [folder.id])
    chart = learning_curves(single_curves([folder]), f"{folder.id}: learning curve")
    return ["![learning curve](curves.svg) ([in the browser](curves.html))"], save_chart(chart, home, "curves")


def _lineage(folder: ExperimentFolder) -> str:
    config, link = folder.config(), folder.link()
    of_grid = f", a cell of the grid {config.grid}" if config.grid else ""
    parent = f"{link.parent}, its {'best, ' if link.best else ''}step {link.step}" if link else "none"
    return f"## Lineage\n\nPhase {config.experiment.phase}{of_grid}; parent: {parent}."


def dropped_cells(storage: Path, name: str) -> list[str]:
    """Return the runs of a grid that its last launch did not ask for: a choice of cells after the fact must show."""
    cells = set(cells_of(storage, name))
    return [f.id for f in readable(list_experiments(storage))[0] if f.config().grid == name and f.id not in cells]


def dropped_words(runs: list[str]) -> list[str]:
    """Return a line on dropped runs, if there are any."""
    return [f"Not judged, since the grid's last launch left them out: {', '.join(runs)}."] if runs else []


def _earlier_words(storage: Path, name: str) -> list[str]:
    """Return a line with links to the reports of launches with other cells, if there are any."""
    paths = [path.relative_to(grid_folder(storage, name)) for path in earlier_reports(storage, name)]
    links = ", ".join(f"[{path.parent.name}]({path})" for path in paths)
    return [f"Earlier launches of this grid had other cells; their reports: {links}."] if paths else []


def _grid_text(name: str, folders: list[ExperimentFolder], findings: Findings, notes: list[str]) -> str:
    cells = [load_cell(folder) for folder in folders]
    own_text = bool(cells) and not any(PHASES[cell.phase].compared for cell in cells)
    parts = [f"# {name}" if own_text else f"# {name}: which way should a language model read?", "## Verdict"]
    parts += [_OWN_TEXT] if own_text else []
    if findings.gaps:
        parts += ["\n".join(map(gap_line, findings.gaps))]
        parts += [markdown_table(GAP_HEADER, [gap_columns(gap) for gap in findings.gaps])]
        parts += [f"{gap_caption(findings)}. {_READING}"]
        parts += ["![gaps](gaps.svg) ([in the browser](gaps.html))"]
        parts += [_judged_again(findings.gaps)]
    parts += notes
    if not findings.best and not findings.not_compared and not own_text:
        reason = "no learning rate finished at every seed" if findings.excluded else "no cell has finished yet"
        parts += [f"None: {reason}."]
    if findings.not_compared:
        parts += ["Not compared:", "\n".join(f"- {line}" for line in findings.not_compared)]
    if findings.best or findings.excluded:
        parts += ["## Best learning rate"]
    if findings.best:
        parts += [markdown_table(BEST_HEADER, [best_columns(rate) for rate in findings.best]), _CHOICE]
    if findings.at_edge:
        parts += ["\n".join(f"- {line}" for line in findings.at_edge)]
    if findings.excluded:
        parts += ["\n".join(f"- {line}" for line in findings.excluded), _EXCLUSION]
    if without_rl(folders) or not folders:
        parts += ["## Learning curves", "![learning curves](curves.svg) ([in the browser](curves.html))"]
        parts += [_CURVES_OF_MANY if len(folders) > _MANY else _CURVES]
    parts += [f"## {_CELLS}", markdown_table(["id", *CELL_HEADER], [[c.id, *cell_columns(c)] for c in cells])]
    if findings.without_result:
        parts += ["Cells without a result:", "\n".join(f"- {line}" for line in findings.without_result)]
    return "\n\n".join(parts) + "\n"


def _judged_again(gaps: list[Gap]) -> str:
    line = f"Every document's loss lies beside this report: `bwlm analyze gap --from {LOSSES}` judges the gaps again"
    if any(gap.verdict == TOO_FEW_CHOSE for gap in gaps):
        return f"{line}, but without the choice of rates: the file does not say how many seeds chose one."
    return f"{line}."


_READING = """A gap is the second direction's loss minus the first's on the same text, in nats per token, at each one's
best learning rate, on the test half of the validation windows; a bidirectional model's loss is the mean of its two
readings, at equal total tokens. Above 0 the first direction has the lower loss, below 0 the second. `different` is said
only if the paired t-test over seeds, Holm-adjusted over all pairs of this report, gives p < 0.05. Each interval is of
one pair by itself: it may leave out zero although the verdict, which judges all pairs together, sees no difference. If
fewer than three seeds chose among several rates, the verdict is `too few seeds chose the rate`: with such a choice more
than 5 % of equal pairs would be called different. The noise floor is the same statistic between seeds of one
direction."""


_CURVES = """Lines are smoothed training losses of single runs, points their validation losses (own reading); in SFT
both count only the text that a direction writes."""


_CURVES_OF_MANY = """Lines are smoothed training losses, the mean over the seeds of a direction and learning rate, in a
band from the lowest to the highest seed; points are the mean validation losses (own reading). In SFT both count only
the text that a direction writes."""


_OWN_TEXT = """None between directions: in SFT and RL each learns to write its own part of a conversation. Variants of
one direction are compared below."""


_CHOICE = """Chosen for each direction by the mean over seeds on the tuning half (even validation windows); the verdict
is measured on the other half. The halves are made of windows, not of documents: a long document can have windows in
both, so the two halves are then not independent texts. The runs are the same in both halves too: a run's luck also
influenced the choice of its rate, the more so if few seeds chose."""


_EXCLUSION = """A learning rate can be chosen only if all its cells finished, at every seed that was planned for it."""


_WITHOUT_INSIDES = """## More

`bwlm analyze report {run}` adds the comparison with the forward baseline and what the research log says."""

"""`bwlm analyze`: analyses of runs, each with findings in words, a picture and a table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.cli.analysis_run import (
    Analyse,
    Made,
    check_output,
    default_folder,
    kept_result,
    prepare_pages,
    run_analysis,
    told_or_made,
)
from bwlm.cli.app import App
from bwlm.cli.terminal import (
    Json,
    Storage,
    print_json,
    say,
    show,
    show_sentences,
    show_table,
    whole_option,
)
from bwlm.errors import UserError
from bwlm.paths import readable
from bwlm.phases import PHASES
from bwlm.progress import loading, working
from bwlm.storage.opened import push

if TYPE_CHECKING:
    from bwlm.analysis.runs.task_scores import Wanted
    from bwlm.record.experiment import ExperimentFolder
    from bwlm.stats.gaps import Gap
    from bwlm.stats.scores import Scores

analyze_app = App(help="Analyze runs: print findings, draw a chart, write tables.", no_args_is_help=True)

Runs = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Ids, globs over ids, or names of grids.", show_default=False)
]
Output = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Write the chart (.svg, .png, .html), the first table (.csv) or all tables (.md). Repeatable. "
        "Default: all but .png, in analyses/RUN in the storage folder.",
        show_default=False,
    ),
]


@analyze_app.command()
def gap(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN...]", help="Ids, globs over ids, or names of grids.", show_default=False),
    ] = None,
    losses: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Table of losses (.parquet, .csv): run, direction, seed, size, document, nll, tokens, bytes.",
            show_default=False,
        ),
    ] = None,
    resamples: Annotated[int, whole_option("Number of bootstrap resamples, with --from.", 1)] = 10_000,
    output: Output = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Compare directions: gaps, intervals, noise floor and a verdict for each size and pair.

    With RUN, each direction is compared at its best learning rate. With --from, you give the losses of any models:
    `nll` is the total negative log-likelihood, in nats, of the text tokens of a document or of a part of it. Runs are
    paired by seed. With --from, files are written only if you give --output.

    Example: `bwlm analyze gap --from losses.csv --output gaps.svg`
    """
    from bwlm.record.catalog.select import choose
    from bwlm.storage.opened import open_storage

    if bool(runs) == bool(losses):
        raise UserError("analyze gap: give either runs or --from with a table of losses")
    # first, since libraries take seconds to load
    chosen = choose(open_storage(storage), runs) if runs else None
    name = " ".join(runs) if runs else readable(losses.name) if losses else ""

    def make() -> Made:
        with loading():
            from bwlm.analysis.commands.gap import gap_analysis, gap_figures
            from bwlm.stats.loss_file import gaps_from

            check_output(output)  # before losses are read and resampled
        if chosen is None:
            assert losses is not None
            with working(f"resampling {losses.name}"):
                gaps, notes = gaps_from(losses, resamples)
        else:
            prepare_pages(output, storage)
            with working("reading and resampling losses"):
                gaps, notes = _gaps_of_runs(*chosen)
        analysis = gap_analysis(gaps, name, notes)
        said = {"notes": notes, "findings": analysis.findings, "document": [gap_figures(one) for one in gaps]}
        return Made(said | {"table": gap_rows(gaps)}, analysis)

    result = told_or_made(kept_result("gap", runs or [], output, storage, *chosen) if chosen else None, make)
    for line in result.said["notes"]:
        say(line)
    result.write(output, default_folder(storage, runs) / "gap" if runs else None)
    if as_json:
        return print_json(result.said["document"])
    show_rows(result.said["table"], f"{name}: gaps between directions")
    show("")
    show_sentences(*result.said["findings"])
    return None


def gap_rows(gaps: list[Gap]) -> dict[str, Any]:
    """Return the verdict table, what the sign of a gap says, and where too few documents were compared."""
    from bwlm.analysis.commands.gap import GAP_HEADER, SIGN, few_documents, gap_columns

    return {"header": GAP_HEADER, "rows": [gap_columns(one) for one in gaps], "below": [SIGN, *few_documents(gaps)]}


def show_rows(table: dict[str, Any], title: str) -> None:
    """Print the table of `gap_rows` with the sentences below it."""
    show_table(table["header"], table["rows"], title, names=("size", "pair", "verdict"))
    show_sentences(*table["below"])


def _gaps_of_runs(chosen: list[ExperimentFolder], left_out: list[str]) -> tuple[list[Gap], list[str]]:
    with loading():
        from bwlm.analysis.runs.audit import audit
        from bwlm.analysis.runs.findings import find
    from bwlm.format import counted
    from bwlm.record.catalog.select import begun

    folders, notes = begun(chosen, left_out)
    findings = find(chosen)  # all cells: a rate with a cell that has not begun cannot be the best yet
    compared = [folder for folder in folders if PHASES[folder.config().experiment.phase].compared]
    if others := len(folders) - len(compared):
        notes.append(f"{counted(others, 'run')} of SFT or RL: each direction writes text of its own there")
    notes += [*audit(compared).refused, *findings.skipped, *findings.at_edge]
    if not findings.gaps:
        raise UserError("; ".join(["no pair of directions could be compared", *notes]))
    return findings.gaps, notes


@analyze_app.command()
def scores(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN...]",
            help="Scored runs: ids, globs over ids, or names of grids. ID@all: a curve over the scored checkpoints.",
            show_default=False,
        ),
    ] = None,
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Table of scores (.parquet, .csv): run, direction, seed, task, item, correct. Or lm-eval's samples of "
            "one model: DIRECTION:SEED=PATH, a samples_*.jsonl or a folder of these. Repeatable.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Results of runs to compare, such as arc_easy,mmlu.n200. Default: all.", show_default=False),
    ] = None,
    readings: Annotated[
        str | None,
        typer.Option(
            help="Readings of runs: own, forward, backward. Default: own, each direction's own; with ID@all forward "
            "and backward.",
            show_default=False,
        ),
    ] = None,
    rules: Annotated[
        str, typer.Option(help="Rules of runs: conditional, joint, normalised, answer_first, exact, pass@1.")
    ] = "conditional,exact,pass@1",
    by_group: Annotated[
        bool, typer.Option("--by-group", help="Compare each group of a task by itself, such as MMLU's subjects.")
    ] = False,
    output: Output = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Compare accuracies on tasks: intervals over seeds and items, a verdict for each task and pair of arms.

    An arm is a direction, or any label of models that differ in their seeds alone. Arms are paired by seed and item.
    Runs are those that `bwlm eval --tasks` has scored, each direction at its best learning rate. Every further rule and
    reading makes the family of comparisons larger. With --from, files are written only if you give --output.

    With ID@all each task's accuracy is drawn over the checkpoints that `bwlm eval ID@all --tasks` has scored.

    Example: `bwlm analyze scores demo --tasks arc_easy`

    Example: `bwlm analyze scores demo@all --output curve.svg`

    Example: `bwlm analyze scores --from scores.csv --output scores.svg`

    Example: `bwlm analyze scores --from a:0=out/a-0 --from a:1=out/a-1 --from b:0=out/b-0 --from b:1=out/b-1`
    """
    with loading():
        from bwlm.analysis.commands.scores import score_analysis, score_figures, score_sentences, without_shared
        from bwlm.analysis.runs.task_scores import Wanted
        from bwlm.stats.score_file import scores_from
    from bwlm.format import counted

    check_output(output)
    if bool(runs) == bool(sources):
        raise UserError("analyze scores: give either runs or --from with scores")
    options = (_list(rules), by_group)
    if any("@" in run for run in runs or []):
        wanted = Wanted(_list(tasks or ""), _list(readings or "forward,backward"), *options)
        return run_analysis(lambda: _score_curves(wanted), _without_all(runs or []), output, storage, as_json)
    if sources:
        name, default = readable(Path(sources[0]).name) if len(sources) == 1 else counted(len(sources), "file"), None
        with working(f"comparing the scores of {name}"):
            found = scores_from(sources)
    else:
        name, default = " ".join(runs or []), default_folder(storage, runs or []) / "scores"
        wanted = Wanted(_list(tasks or ""), _list(readings or "own"), *options)
        found = _scores_of_runs(runs or [], storage, wanted)
    analysis = score_analysis(found, name)
    for line in analysis.notes:
        say(line)
    Made({}, analysis).write(output, default)
    if as_json:
        return print_json(score_figures(found))
    short, shared = without_shared(found)
    show_scores(short, f"{name} ({shared})" if shared else name)
    show("")
    show_sentences(*score_sentences(short))
    return None


def _list(names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def _score_curves(wanted: Wanted) -> Analyse:
    from bwlm.analysis.commands.score_curves import score_curves

    return partial(score_curves, wanted=wanted)


def _without_all(runs: list[str]) -> list[str]:
    """Return the runs of `ID@all`. Raises `UserError` if one is named otherwise: a curve has all checkpoints."""
    for run in runs:
        if not run.endswith("@all"):
            raise UserError(
                f"analyze scores: {run}: a curve is over all checkpoints: write {run.partition('@')[0]}@all"
            )
    return [run.removesuffix("@all") for run in runs]


def _scores_of_runs(runs: list[str], storage: str | None, wanted: Wanted) -> Scores:
    from bwlm.analysis.runs.task_scores import at_best_rates, load_task_scores
    from bwlm.record.catalog.select import choose
    from bwlm.stats.score_table import checked_scores
    from bwlm.stats.scores import compare_scores
    from bwlm.storage.opened import open_storage

    chosen, left_out = choose(open_storage(storage), runs)
    for line in left_out:
        say(line)
    return compare_scores(checked_scores(load_task_scores(at_best_rates(chosen), wanted)))


def show_scores(found: Scores, title: str) -> None:
    """Print the tables of accuracies and differences, and what their figures say."""
    from bwlm.analysis.commands.scores import (
        ARM_HEADER,
        ARM_NAMES,
        PAIR_HEADER,
        PAIR_NAMES,
        SIGN,
        arm_columns,
        pair_columns,
    )

    show_table(ARM_HEADER, [arm_columns(arm) for arm in found.arms], f"{title}: accuracies", names=ARM_NAMES)
    if found.differences:
        show("")
        rows = [pair_columns(one) for one in found.differences]
        show_table(PAIR_HEADER, rows, "Differences", names=PAIR_NAMES)
        show_sentences(SIGN)


@analyze_app.command()
def compare(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Compare learning curves over steps, tokens, FLOPs and time, and the tokens each direction needs to reach a loss.

    Example: `bwlm analyze compare demo --output curves.svg`
    """

    def load() -> Analyse:
        from bwlm.analysis.commands.compare import compare

        return compare

    run_analysis(load, runs, output, storage, as_json, rates=True, kept_as="compare")


@analyze_app.command()
def transfer(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Show the loss of each model in the direction it was not trained in; for bidirectional models, in both directions.

    Example: `bwlm analyze transfer demo`
    """

    def load() -> Analyse:
        from bwlm.analysis.commands.transfer import transfer

        return transfer

    run_analysis(load, runs, output, storage, as_json)


@analyze_app.command()
def positions(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Show loss and accuracy by distance to the start and end of the segment, token frequency and document length.

    Example: `bwlm analyze positions 'demo_*_d1_lr4_s*'`
    """

    def load() -> Analyse:
        from bwlm.analysis.commands.positions import positions

        return positions

    run_analysis(load, runs, output, storage, as_json)


@analyze_app.command()
def gradients(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Show statistics of the gradients of all parameters, by layer and training step.

    Example: `bwlm analyze gradients mine`
    """

    def load() -> Analyse:
        from bwlm.analysis.commands.layers import over_time

        return partial(over_time, "gradients")

    run_analysis(load, runs, output, storage, as_json)


@analyze_app.command()
def activations(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Show statistics of the activations of the model, by layer and training step.

    Example: `bwlm analyze activations mine`
    """

    def load() -> Analyse:
        from bwlm.analysis.commands.layers import over_time

        return partial(over_time, "activations")

    run_analysis(load, runs, output, storage, as_json)


@analyze_app.command()
def representations(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Compare hidden states layer by layer (linear CKA) across directions and seeds; describe attention heads.

    Example: `bwlm analyze representations demo`
    """

    def load() -> Analyse:
        from bwlm.analysis.commands.representations import representations

        return representations

    run_analysis(load, runs, output, storage, as_json)


@analyze_app.command()
def scaling(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Fit a scaling law for each direction, predict the loss of the largest size from the others, show the gap by size.

    A law needs three sizes or more, such as `depth: [2, 4, 8]`.

    Example: `bwlm analyze scaling 'study_*'`
    """

    def load() -> Analyse:
        from bwlm.analysis.commands.scaling import scaling

        return scaling

    run_analysis(load, runs, output, storage, as_json, rates=True, kept_as="scaling")


@analyze_app.command()
def rewards(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Show the mean reward by RL step: of the samples, and of greedy answers to validation problems.

    Example: `bwlm analyze rewards arithmetic_rl`
    """

    def load() -> Analyse:
        from bwlm.analysis.commands.rewards import rewards

        return rewards

    run_analysis(load, runs, output, storage, as_json)


@analyze_app.command()
def report(
    names: Runs,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File for one report, .md or .html; its charts and losses go beside it, to report_files/ for "
            "report.md. Default: RESEARCH_REPORT.md and .html in the folder of the grid or run.",
            show_default=False,
        ),
    ] = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Write RESEARCH_REPORT.md and .html for a grid, or for each run that you name.

    Example: `bwlm analyze report demo`

    Example: `bwlm analyze report demo --output demo.html`
    """
    from bwlm.record.catalog.select import choose
    from bwlm.record.grids import grid_names
    from bwlm.storage.opened import open_storage

    root = open_storage(storage)
    chosen = {name: choose(root, [name]) for name in names}  # first, since libraries take seconds to load
    with loading():
        from bwlm.analysis.report.output import ENDINGS, write_report
        from bwlm.analysis.report.study import write_experiment_report

        check_output([output] if output else None, ENDINGS)
    makers: list[Callable[[Path | None], list[Path]]] = []
    for name, (folders, left_out) in chosen.items():
        for line in left_out:
            say(line)
        if name in grid_names(root):
            makers.append(partial(_grid_files, root, name))
        else:
            makers += [partial(write_experiment_report, folder, True) for folder in folders]
    if output and len(makers) > 1:
        raise UserError(f"--output: one file for {len(makers)} reports: name one grid or run")
    with working(f"writing the report of {', '.join(names)}"):
        try:
            files = write_report(output, makers[0]) if output else [file for make in makers for file in make(None)]
        except OSError as error:
            reason = f"{error.filename}: cannot be written ({error.strerror})"
            raise UserError(f"{reason}: choose another file with --output") from None
        for folder in {file.parent for file in files}:
            push(folder)
    if as_json:
        print_json({"files": [str(file) for file in files]})
    else:
        show(*(str(file) for file in files if file.suffix in (".md", ".html")))


def _grid_files(root: Path, name: str, into: Path | None) -> list[Path]:
    from bwlm.analysis.report.study import write_grid_report

    return write_grid_report(root, name, into).files

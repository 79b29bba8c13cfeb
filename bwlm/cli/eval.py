"""`bwlm eval`: a trained model measured in each direction of reading, on texts and on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.cli.scores import HEADLINES, show_items, show_scores
from bwlm.cli.terminal import Json, Set, Storage, print_json, say, show_sentences, show_table, whole_option
from bwlm.directions import READINGS
from bwlm.errors import UserError, nearest
from bwlm.progress import loading, working

if TYPE_CHECKING:
    from bwlm.evaluate.tasks.results import TaskScore
    from bwlm.evaluate.tasks.stored import RunEvaluation


def evaluate(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="ID[@STEP]..",
            help="Finished runs: ids, globs over ids, or names of grids. ID@400 or ID@best: another checkpoint than "
            "the last; ID@all: every checkpoint that was kept.",
            show_default=False,
        ),
    ],
    directions: Annotated[
        str | None,
        typer.Option(
            help="Directions in which the model reads, also one that it was not trained in. "
            "Default: forward, backward, and permuted for a permuted model.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks to score instead of texts, such as arc_easy,mmlu; mmlu:anatomy is one group of a task.",
            show_default=False,
        ),
    ] = None,
    max_examples: Annotated[
        int | None, whole_option("Score this many items of each task, the same ones for every run.", 1)
    ] = None,
    shots: Annotated[int | None, whole_option("Solved examples before each item. Default: the task's own.", 0)] = None,
    samples: Annotated[
        int, whole_option("Outputs for each item of a generated task; one is the likeliest, more are drawn.", 1)
    ] = 1,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run programs that the model writes (docs/security.md).")
    ] = False,
    shown: Annotated[
        int,
        whole_option("Print this many items of each task as the model reads them, with all scores.", 0, param="--show"),
    ] = 0,
    set_: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Measure runs on texts in bits per byte, or with --tasks on tasks, in both directions.

    Without --tasks the texts are the documents of the run's base, and conversations: those of the run's
    `data.mixture`, or of the built-in tasks. With --tasks each choice is scored by every rule (docs/evaluation.md),
    and controls stand beside it. Results are saved in the run's folder, in `evaluations/`, and not made twice.

    Example: `bwlm eval mine --directions forward,backward`

    Example: `bwlm eval mine@best --tasks arc_easy,mmlu --max-examples 200 --set tasks.arc_easy.path=arc/`
    """
    from bwlm.evaluate.tasks.request import TaskRequest
    from bwlm.record.experiment import find_checkpoint
    from bwlm.storage.opened import open_storage

    if set_ and tasks is None:
        raise UserError(f"--set {set_[0]}: sets the files of a task: name it with --tasks")
    readings, root = _readings(directions), open_storage(storage)
    checkpoints = _checkpoints(root, runs)
    for checkpoint in checkpoints:
        find_checkpoint(root, checkpoint)
    if tasks is None:
        return _evaluate_texts(root, checkpoints, readings, as_json)
    options = (max_examples, shots, samples, allow_code_execution)
    requests = [TaskRequest(name, path, *options) for name, path in _named(tasks, _paths(set_ or []))]
    with loading():  # torch takes seconds: mistakes are reported first
        from bwlm.evaluate.tasks.results import centred_means
        from bwlm.evaluate.tasks.stored import RunEvaluation

    evaluations = [RunEvaluation(root, checkpoint, tuple(requests), readings) for checkpoint in checkpoints]
    scores = _evaluate_tasks(evaluations)
    _deliver(root, evaluations)
    if as_json:
        return print_json([asdict(score) for score in scores])
    show_scores(scores)
    show_sentences(*(mean.words for mean in centred_means(scores)))
    for evaluation in evaluations:
        show_sentences(*(metrics.words for metrics in evaluation.direction_metrics() if metrics.rule in HEADLINES))
    if shown:
        show_items([item for evaluation in evaluations for item in evaluation.shown(shown)])
    return None


def _checkpoints(root: Path, names: Sequence[str]) -> list[str]:
    """Return the checkpoints that are named, each once. Raises `UserError` for a name without a run."""
    from bwlm.record.catalog.select import choose
    from bwlm.record.checkpoint import checkpoint_steps

    checkpoints: list[str] = []
    for name in names:
        run, at, which = name.partition("@")
        folders, left_out = choose(root, [run])
        for line in left_out:
            say(line)
        for folder in folders:
            steps = [str(step) for step in checkpoint_steps(folder.checkpoints)] if which == "all" else [which]
            checkpoints += [f"{folder.id}{at}{step}" for step in steps]
    return list(dict.fromkeys(checkpoints))


def _named(names: str, paths: dict[str, str]) -> list[tuple[str, str | None]]:
    """Return the tasks of `--tasks`, each with its path. Raises `UserError` for a task or path that nobody knows."""
    from tasks import find_evaluated

    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise UserError("--tasks: names no task: write for instance --tasks arc_easy,mmlu")
    named = [(name, find_evaluated(name)[0].name) for name in chosen]
    for name in paths.keys() - {task for _, task in named}:
        raise UserError(f"--set tasks.{name}.path: {name} is not among --tasks {names}")
    return [(name, paths.get(task)) for name, task in named]


def _paths(settings: list[str]) -> dict[str, str]:
    """Return the path of each task that is set. Raises `UserError` for any other setting."""
    from bwlm.paths import local_path
    from bwlm.settings_file import parse_setting

    paths = {}
    for setting in settings:
        field, value = parse_setting(setting)
        section, _, rest = field.partition(".")
        name, _, last = rest.rpartition(".")
        if (section, last) != ("tasks", "path") or not isinstance(value, str):
            raise UserError(f"--set {field}: only the files of a task can be set here: tasks.arc_easy.path=FOLDER")
        here = local_path(value)
        paths[name] = value if here is None else str(here.absolute())  # workers have another working folder
    return paths


def _readings(names: str | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in READINGS:
            raise UserError(f"--directions: {name!r} is not one of {', '.join(READINGS)}{nearest(name, READINGS)}")
    return chosen


def _evaluate_tasks(evaluations: Sequence[RunEvaluation]) -> list[TaskScore]:
    """Return the scores; where several runs are left to score, Ray workers share them."""
    if sum(evaluation.texts() > 0 for evaluation in evaluations) > 1:
        with loading():
            from bwlm.grid.evaluation import evaluate_on_workers

        return evaluate_on_workers(evaluations)
    from bwlm.evaluate.tasks.stored import evaluate_here

    return [score for evaluation in evaluations for score in evaluate_here(evaluation)]


def _deliver(root: Path, evaluations: Sequence[RunEvaluation]) -> None:
    """Send the scores to MLflow, and say why if some could not be sent."""
    from bwlm.record.bucket import push_runs
    from bwlm.record.score_delivery import deliver_scores

    folders = {evaluation.folder.id: evaluation.folder for evaluation in evaluations}
    with working("sending scores to MLflow"):
        sentences = deliver_scores(root, list(folders.values()))
        push_runs(folder.path for folder in folders.values())
    for sentence in sentences:
        say(sentence)


# ---- texts ----


def _evaluate_texts(root: Path, checkpoints: Sequence[str], readings: tuple[str, ...] | None, as_json: bool) -> None:
    with loading():
        from bwlm.evaluate.texts import evaluate_run

    everything = []
    for checkpoint in checkpoints:
        with working(f"evaluating {checkpoint}"):
            rows = [asdict(row) for row in evaluate_run(root, checkpoint, readings, say)]
        everything += rows
        if not as_json:
            _show_texts(rows)
    if as_json:
        print_json(everything)


def _show_texts(rows: list[dict[str, Any]]) -> None:
    header = ["task", "direction", "native", "bpb", "loss", "tokens"]
    shown = [
        [r["task"], r["direction"], "yes" if r["native"] else "", f"{r['bpb']:.4f}", f"{r['loss']:.4f}",
         f"{r['tokens']:,}"]
        for r in rows
    ]  # fmt: skip
    show_table(header, shown, f"{rows[0]['id']}, step {rows[0]['step']:,}", names=("task", "direction"))

"""`bwlm train`: one experiment, or a chain of phases."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from bwlm.cli.eval import evaluate
from bwlm.cli.launch import launch, show_places
from bwlm.cli.terminal import (
    AcceptCode,
    Json,
    Set,
    Storage,
    number_option,
    print_json,
    show_sentences,
    show_table,
    whole_option,
)
from bwlm.directions import DIRECTIONS
from bwlm.errors import UserError
from bwlm.phases import FIRST, PHASES

if TYPE_CHECKING:
    from bwlm.config import EvaluationSettings, Experiment

EVALUATE = "eval"
"""Last phase of a chain, which trains nothing."""


def train(
    direction: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(DIRECTIONS)}. A later phase takes its parent's.", show_default=False),
    ] = None,
    depth: Annotated[
        int | None,
        whole_option("Layers; the width is 64 x depth. A later phase takes its parent's.", show_default=False),
    ] = None,
    phase: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(PHASES)}; or several: base,mid,sft. With {EVALUATE} as the last one the runs are then "
            f"evaluated, as by `bwlm eval`; alone, {EVALUATE} evaluates --parent."
        ),
    ] = FIRST,
    parent: Annotated[
        str | None,
        typer.Option(
            metavar="ID[@STEP]",
            help="Finished run that a later phase begins from. ID@400 or ID@best: another checkpoint than its last.",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[
        float | None, number_option("Multiplier of the learning rates of all parameter groups. Default: 1.")
    ] = None,
    seed: Annotated[
        int | None,
        whole_option("Seed for initial weights and row order. Default: 0; with --parent, the parent's seed."),
    ] = None,
    id_: Annotated[
        str | None,
        typer.Option(
            "--id",
            help="Id of the run. Default: PHASE_DATE_DIRECTION_dDEPTH. Several phases get ID-base, ID-mid and so on.",
            show_default=False,
        ),
    ] = None,
    set_: Set = None,
    storage: Storage = None,
    accept_code: AcceptCode = False,
    as_json: Json = False,
) -> None:
    """Train one model, or several phases one after another. Uses the same training code as `bwlm grid run`.

    Run the same command again to resume. The default id contains today's date: to resume on another day, pass the id
    with --id.

    Example: `bwlm train --direction backward --depth 4 --set budget.steps=200 --set budget.batch_tokens=16384`

    Example: `bwlm train --phase sft --parent ID --set optim.init_lr_frac=0.05`
    """
    from bwlm.plan.load import plan_experiment
    from bwlm.storage.opened import open_storage

    phases = [name.strip() for name in phase.split(",")]
    if evaluates := phases[-1] == EVALUATE:
        phase = ",".join(phases[:-1])
    if not phase:
        if parent is None:
            raise UserError("--parent: missing: name the run to evaluate")
        flags = {"direction": direction, "depth": depth, "lr": lr, "seed": seed, "id": id_}
        if unused := [f"--{name}" for name, value in flags.items() if value is not None]:
            raise UserError(f"{unused[0]}: a setting of training, and nothing is trained here")
        return _evaluate([parent], *_evaluation(set_ or []), storage, as_json)
    flags = {"phase": phase, "parent": parent, "direction": direction, "depth": depth, "lr": lr, "seed": seed}
    flags_set = {name: value for name, value in flags.items() if value is not None}
    plan, root = plan_experiment(flags_set, set_ or [], id_, storage), open_storage(storage)
    result = launch(plan, root, accept_code)
    if as_json and not evaluates:
        cells = [cell.to_json() for cell in result.cells]
        print_json(cells if len(plan.cells) > 1 else cells[0])
    elif not as_json:
        from bwlm.record.catalog.rows import AXES, CELL_HEADER, cell_columns

        rows = [[cell.id, *cell_columns(cell)] for cell in result.cells]
        show_table(["id", *CELL_HEADER], rows, plan.name, names=("id", *AXES), least=("loss",))
        show_sentences(*[cell.reason for cell in result.cells if cell.reason])
        show_places(result)
    if not result.complete:
        raise typer.Exit(1)
    if evaluates:
        experiment = plan.cells[-1].experiment
        _evaluate([cell.id for cell in result.cells], experiment.evaluation, _files(experiment), storage, as_json)
    return None


def _files(experiment: Experiment) -> list[str]:
    """Return the files of the tasks that score a run, as `--set` takes them: a run that had finished knows none."""
    from tasks import find_evaluated

    names = {find_evaluated(name)[0].name for name in experiment.evaluation.tasks}
    paths = {name: own.path for name, own in experiment.tasks.items() if name in names and own.path}
    return [f"tasks.{name}.path={json.dumps(path, ensure_ascii=False)}" for name, path in paths.items()]


def _evaluation(settings: list[str]) -> tuple[EvaluationSettings, list[str]]:
    """Return the tasks that `--set` names for a run that is only evaluated, and its other settings: files of tasks.

    Raises `UserError` for a setting that evaluates nothing.
    """
    from bwlm.config import EvaluationSettings, Recipe
    from bwlm.settings_file import Document, override, parse_setting, validate, with_whole_numbers

    own = [setting for setting in settings if parse_setting(setting)[0].startswith("evaluation.")]
    document = with_whole_numbers(override(Document("--set", {}, {}), own), Recipe)
    content = document.content.get("evaluation", {})
    if unused := sorted(content.keys() - {"tasks", "max_examples"}):
        raise UserError(f"--set evaluation.{unused[0]}: a setting of training, and nothing is trained here")
    return validate(EvaluationSettings, content, document), [one for one in settings if one not in own]


def _evaluate(
    runs: list[str], settings: EvaluationSettings, files: list[str], storage: str | None, as_json: bool
) -> None:
    """Evaluate runs on the tasks of their settings, or on texts where these name no task."""
    names = ",".join(settings.tasks) or None
    return evaluate(runs, tasks=names, max_examples=settings.max_examples, set_=files, storage=storage, as_json=as_json)

"""`bwlm eval`: what a trained model makes of texts, in both directions."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.cli.terminal import Json, Storage, busy, print_json, say, show, table
from bwlm.errors import UserError, nearest

if TYPE_CHECKING:
    from bwlm.record.lineage import RunConfig


def evaluate(
    id_: Annotated[str, typer.Argument(metavar="ID", help="A finished run of any phase.", show_default=False)],
    directions: Annotated[
        str, typer.Option(help="In which the texts are read, also by a model that was trained in the other.")
    ] = "forward,backward",
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Bits per byte on the documents of its base and on conversations, in both directions.

    Conversations are those of the run's own mixture, or the built-in ones. Every document's loss is kept in the run's
    folder, below `evaluations/`.

    Example: `bwlm eval mine --directions forward,backward`
    """
    from bwlm.paths import storage_root

    readings = _readings(directions)
    rows = evaluate_run(storage_root(storage), id_, readings)
    if as_json:
        return print_json(rows)
    header = ["task", "direction", "native", "bpb", "loss", "tokens"]
    show(
        table(
            header,
            [
                [r["task"], r["direction"], "yes" if r["native"] else "", f"{r['bpb']:.4f}", f"{r['loss']:.4f}",
                 f"{r['tokens']:,}"]
                for r in rows
            ],
            id_,
        )
    )  # fmt: skip
    return None


def _readings(names: str) -> tuple[str, ...]:
    known = ("forward", "backward")
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in known:
            raise UserError(f"--directions: {name!r} is not one of {', '.join(known)}{nearest(name, known)}")
    return chosen


def _text_is_gone(root: Path, config: RunConfig) -> UserError:
    from bwlm.analysis.report import repeat_command

    place = shlex.quote(str(root))
    command = f"{repeat_command(config, place)} --storage {place}"
    return UserError(
        f"{config.corpus}: the text that {config.id} was trained on is gone: this makes it again and trains nothing: "
        f"{command}"
    )


def evaluate_run(root: Path, run: str, readings: tuple[str, ...]) -> list[dict[str, Any]]:
    """Raises `UserError` if there is no such run, or it has no checkpoint."""
    from bwlm.evaluate.load import load_model
    from bwlm.evaluate.texts import evaluate_texts
    from bwlm.grid.phases import BUILTIN_MIXTURE
    from bwlm.grid.texts import sources_of
    from bwlm.record.lineage import ExperimentFolder, open_finished
    from bwlm.text.mixture import prepare_mixture
    from bwlm.text.prepare import find_packed

    folder = open_finished(root, run)
    loaded = load_model(root, run)
    link, config = folder.link(), loaded.config
    base = ExperimentFolder(root, link.chain[0]).config() if link else config
    recipe = config.experiment
    if not recipe.data.mixture:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"mixture": BUILTIN_MIXTURE})})
    documents = find_packed(root, Path(base.corpus), base.identity["data"])
    if documents is None:
        raise _text_is_gone(root, base)
    conversations = None
    if config.experiment.phase in ("sft", "rl"):  # what they read is what is asked for here: whole conversations
        conversations = find_packed(root, Path(config.corpus), config.identity["data"])
    if conversations is None:
        conversations = prepare_mixture(
            sources_of(recipe),
            Path(config.tokenizer),
            recipe.model.sequence_length,
            True,
            root,
            lambda items, work: [work(item) for item in items],
            say,
        ).folder
    corpora = {"documents": str(documents), "conversations": str(conversations)}
    with busy(f"evaluating {run}"):
        return [asdict(row) for row in evaluate_texts(loaded, corpora, readings, folder)]

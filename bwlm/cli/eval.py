"""`bwlm eval`: bits per byte of a trained model, in each direction of reading."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from bwlm.cli.terminal import Json, Storage, print_json, say, show_table
from bwlm.directions import READINGS
from bwlm.errors import UserError, nearest
from bwlm.progress import loading, working


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="ID[@STEP]",
            help="A finished run of any phase; ID@400 or ID@best: another checkpoint than its last.",
            show_default=False,
        ),
    ],
    directions: Annotated[
        str | None,
        typer.Option(
            help="Directions in which the model reads the texts, also one that it was not trained in. "
            "Default: forward, backward, and permuted for a permuted model.",
            show_default=False,
        ),
    ] = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Measure bits per byte of a run on documents and on conversations, in both directions.

    The conversations come from the run's `data.mixture`, or from the built-in tasks if it has none. The loss of each
    document is saved in the run's folder, in `evaluations/`.

    Example: `bwlm eval mine --directions forward,backward`

    Example: `bwlm eval mine@best`
    """
    from bwlm.paths import storage_root

    readings, root = _readings(directions), storage_root(storage)
    with loading():  # torch takes seconds: mistakes are reported first
        from bwlm.evaluate.texts import evaluate_run

    with working(f"evaluating {checkpoint}"):
        rows = [asdict(row) for row in evaluate_run(root, checkpoint, readings, say)]
    if as_json:
        return print_json(rows)
    header = ["task", "direction", "native", "bpb", "loss", "tokens"]
    shown = [
        [r["task"], r["direction"], "yes" if r["native"] else "", f"{r['bpb']:.4f}", f"{r['loss']:.4f}",
         f"{r['tokens']:,}"]
        for r in rows
    ]  # fmt: skip
    show_table(header, shown, f"{rows[0]['id']}, step {rows[0]['step']:,}", names=("task", "direction"))
    return None


def _readings(names: str | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in READINGS:
            raise UserError(f"--directions: {name!r} is not one of {', '.join(READINGS)}{nearest(name, READINGS)}")
    return chosen

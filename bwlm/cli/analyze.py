"""`bwlm analyze`: what runs say, each with findings in words, a picture and a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bwlm.cli.terminal import Json, Storage, print_json, say, show

if TYPE_CHECKING:
    from bwlm.analysis.result import Analysis
    from bwlm.record.lineage import ExperimentFolder

analyze_app = typer.Typer(help="What runs say: findings in words, a picture and a table.", no_args_is_help=True)

Runs = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Ids, globs over ids, or names of grids.", show_default=False)
]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="FILE.html, .svg, .png, .csv or .md; without a suffix html, svg, csv and md. "
        "Default: analyses/ in the storage.",
        show_default=False,
    ),
]


@analyze_app.command()
def compare(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Learning curves over steps, tokens, FLOPs and time; tokens that a direction needs to reach a loss.

    Example: `bwlm analyze compare demo --output curves.svg`
    """
    from bwlm.analysis.curves import compare

    _run(compare, runs, output, storage, as_json)


@analyze_app.command()
def transfer(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """What a model makes of the direction that it did not learn; the balance of bidirectional models.

    Example: `bwlm analyze transfer demo`
    """
    from bwlm.analysis.transfer import transfer

    _run(transfer, runs, output, storage, as_json)


@analyze_app.command()
def positions(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Loss and accuracy by position from each end, by frequency of a token, by length of its document.

    Example: `bwlm analyze positions 'demo_*_d1_lr4_s*'`
    """
    from bwlm.analysis.positions import positions

    _run(positions, runs, output, storage, as_json)


@analyze_app.command()
def gradients(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Statistics of every parameter's gradient, by layer over time.

    Example: `bwlm analyze gradients mine`
    """
    from bwlm.analysis.insides import over_time

    _run(lambda folders: over_time("gradients", folders), runs, output, storage, as_json)


@analyze_app.command()
def activations(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """Statistics of what is inside the model, by layer over time.

    Example: `bwlm analyze activations mine`
    """
    from bwlm.analysis.insides import over_time

    _run(lambda folders: over_time("activations", folders), runs, output, storage, as_json)


@analyze_app.command()
def representations(runs: Runs, output: Output = None, storage: Storage = None, as_json: Json = False) -> None:
    """How alike the states of models are, layer by layer (linear CKA), across directions and seeds; attention heads.

    Example: `bwlm analyze representations demo`
    """
    from bwlm.analysis.insides import representations

    _run(representations, runs, output, storage, as_json)


@analyze_app.command()
def report(names: Runs, storage: Storage = None, as_json: Json = False) -> None:
    """Write RESEARCH_REPORT.md and .html: of a grid, or of single experiments.

    Example: `bwlm analyze report demo`
    """
    from bwlm.analysis.report import write_experiment_report, write_grid_report
    from bwlm.analysis.select import choose
    from bwlm.paths import storage_root

    root = storage_root(storage)
    files = []
    for name in names:
        folders = choose(root, [name])
        home = root / "grids" / name
        if (home / "grid.json").exists():
            files += write_grid_report(home, name, root, [folder.id for folder in folders])
        else:
            files += [file for folder in folders for file in write_experiment_report(folder)]
    if as_json:
        print_json({"files": [str(file) for file in files]})
    else:
        show(*(str(file) for file in files if file.suffix in (".md", ".html")))


def _run(
    analyse: Callable[[list[ExperimentFolder]], Analysis],
    runs: list[str],
    output: Path | None,
    storage: str | None,
    as_json: bool,
) -> None:
    from bwlm.analysis.select import begun, choose
    from bwlm.paths import storage_root

    root = storage_root(storage)
    folders, notes = begun(choose(root, runs))
    found = analyse(folders)
    notes += found.notes
    files = found.write(output or root / "analyses" / found.name)
    if as_json:
        records = found.table.astype(object).where(found.table.notna(), None).to_dict("records")
        print_json(
            {"findings": found.findings, "notes": notes, "table": records, "files": [str(path) for path in files]}
        )
        return
    for line in found.findings:
        show(line)
    for note in notes:
        say(f"note: {note}")
    for path in files:
        show(str(path))

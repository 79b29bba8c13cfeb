"""`bwlm analyze`: what losses say of the directions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bwlm.cli.terminal import Json, print_json, say, show, table
from bwlm.errors import UserError

if TYPE_CHECKING:
    from bwlm.analysis.stats import Gap

analyze_app = typer.Typer(help="What losses say of the directions.", no_args_is_help=True)

Output = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Also write it: the chart to .svg, .png or .html, the table to .csv or .md. Repeatable.",
        show_default=False,
    ),
]


@analyze_app.command("gap")
def analyze_gap(
    losses: Annotated[
        Path,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Anyone's losses, .parquet or .csv: run, direction, seed, size, document, nll, tokens, bytes.",
            show_default=False,
        ),
    ],
    resamples: Annotated[int, typer.Option(min=1, help="Tables that the bootstrap draws.")] = 10_000,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Compare directions on a table of losses: gaps, intervals, noise floor and a verdict for each size and pair.

    nll is in nats, summed over the text tokens of a document (or a window of one); runs are paired by seed.

    Example: `bwlm analyze gap --from losses.csv --output gaps.svg`
    """
    from bwlm.analysis.losses import gaps_from
    from bwlm.analysis.report import GAP_HEADER, gap_columns, gap_figures, gap_sentence

    for path in output or []:
        _check_output(path)  # reading and resampling take longer than this mistake
    found, not_compared = gaps_from(losses, resamples)
    for path in output or []:
        _write(path, found, losses.name)
    for line in not_compared:
        say(line)
    if as_json:
        return print_json([gap_figures(one) for one in found])
    show(table(GAP_HEADER, [gap_columns(one) for one in found], f"{losses.name}: gaps between directions"))
    for one in found:
        print(gap_sentence(one))
    return None


_SUFFIXES = (".svg", ".png", ".html", ".csv", ".md")


def _check_output(path: Path) -> None:
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"--output: {path} ends in none of {' '.join(_SUFFIXES)}: the ending says what to write")
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"--output: {path}: there is no folder {path.parent}: make it, or choose another")


def _write(path: Path, found: list[Gap], name: str) -> None:
    from bwlm.analysis.charts import gap_chart, write_chart
    from bwlm.analysis.report import gap_csv, gap_frame, gap_markdown
    from bwlm.paths import write_atomic

    texts = {".csv": gap_csv, ".md": gap_markdown}
    suffix = path.suffix.lower()
    try:
        if suffix in texts:
            write_atomic(path, texts[suffix](found).encode())
        else:
            write_chart(gap_chart(gap_frame(found), f"{name}: gaps between directions"), path)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error.strerror}): choose another place") from None
    say(f"written: {path}")

"""Result of an analysis: findings in words, tables and a picture; and its files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bwlm.analysis.charts.style import write_chart
from bwlm.format import short_number
from bwlm.paths import write_text

PICTURES = (".svg", ".png", ".html")
TABLES = (".csv", ".md")
OVER_SEEDS = "95 % over seeds"
_ALL = (".html", ".svg", ".csv", ".md")


@dataclass(frozen=True)
class Analysis:
    """Result of an analysis: findings, tables, a chart and notes."""

    name: str
    title: str
    findings: list[str]
    """Sentences that tell the main figures."""
    table: pd.DataFrame
    chart: Any
    """Altair's chart."""
    notes: list[str] = field(default_factory=list)
    """Runs and figures that were left out, each with the reason."""
    shown: pd.DataFrame | None = None
    """Table as people read it, if it is not `table`."""
    bounds: str = "lowest .. highest"
    """Meaning of two columns `x_low` and `x_high`, which people see as one."""
    more: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Further tables by name, none of them empty."""

    def write(self, path: Path) -> None:
        """Write the picture, the table (.csv), or the words and all tables (.md), as the ending says."""
        if path.suffix.lower() in PICTURES:
            write_chart(self.chart, path)
        else:
            write_text(path, self._text(path.suffix.lower()))

    def write_all(self, path: Path) -> list[Path]:
        """Write picture and tables as .html, .svg, .csv and .md, and further tables as .csv; return the files."""
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [path.with_name(f"{path.name}{suffix}") for suffix in _ALL]
        for file in files:
            self.write(file)
        for name, table in self.more.items():
            files.append(path.with_name(f"{path.name}-{name.replace(' ', '-')}.csv"))
            write_text(files[-1], table.to_csv(index=False))
        return files

    def _text(self, suffix: str) -> str:
        if suffix == ".csv":
            return self.table.to_csv(index=False)
        parts = [
            f"# {self.title}",
            "\n".join(f"- {line}" for line in self.findings),
            *self.tables(),
            "\n".join(f"- {line}" for line in self.notes),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def tables(self, longest: int | None = None) -> list[str]:
        """Return every table as Markdown, further ones under their names, but none of more than `longest` rows."""
        named = [("", self.table if self.shown is None else self.shown), *self.more.items()]
        return [
            (f"{name.capitalize()}:\n\n" if name else "") + frame_to_markdown(table, self.bounds)
            for name, table in named
            if longest is None or len(table) <= longest
        ]


def markdown_table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table in GitHub's Markdown, with columns of figures aligned on the right."""
    cells = [[_plain(value) for value in row] for row in rows]
    columns = zip(*cells, strict=True) if cells else [()] * len(header)
    marks = ["---:" if of and all(map(_FIGURE.fullmatch, of)) else "---" for of in columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, marks, *cells])


def _plain(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


_FIGURE = re.compile(r"–|[+-]?[\d.,]+(e[+-]?\d+)?[kMGTPE%]?( (\.\.|±) [+-]?[\d.,]+[kMGTPE%]?)?")
"""Cell of a column of figures: a number, an interval, or none."""
_HEADINGS = {
    "averaged": "loss averaged over",
    "cka": "CKA",
    "first_share": "share of the first token",
    "flops": "FLOPs",
    "group": "size",
    "nats": "nats per token",
    "ratio": "ratio of tokens",
}
"""Headings of columns whose names say too little."""
_SHORTENED = 1e6
"""Number from which on people see three digits and a suffix: 12.3G and not 12,299,325,306."""


def frame_to_markdown(table: pd.DataFrame, bounds: str = "lowest .. highest") -> str:
    """Return a table in GitHub's Markdown, as people read it, without its empty columns.

    Whole numbers have commas, or a suffix from a million on; others have four decimals, or four digits if they are
    small. Columns `x_low` and `x_high` become one, named after `bounds`.
    """
    columns: dict[str, list[str]] = {}
    for name in map(str, table.columns):
        high = name.removesuffix("low") + "high"
        if name.endswith("low") and high in table:
            ends = zip(_cells(table[name]), _cells(table[high]), strict=True)
            of = name.removesuffix("low").rstrip("_")
            columns[f"{_heading(of)}, {bounds}" if of else bounds] = [f"{a} .. {b}" if a else "" for a, b in ends]
        elif not (name.endswith("high") and name.removesuffix("high") + "low" in table):
            columns[_heading(name)] = _cells(table[name])
    filled = {heading: cells for heading, cells in columns.items() if any(cells) or not cells}
    return markdown_table(list(filled), ([cell or "–" for cell in row] for row in zip(*filled.values(), strict=True)))


def _heading(name: str) -> str:
    return _HEADINGS.get(name, name.replace("_", " "))


def _cells(column: pd.Series[Any]) -> list[str]:
    """Return a column as people read it; a missing value is empty."""
    if pd.api.types.is_bool_dtype(column):
        return ["yes" if value else "no" for value in column]
    if not pd.api.types.is_numeric_dtype(column):
        return ["" if _missing(value) else str(value) for value in column]
    whole = bool((column.dropna() % 1 == 0).all())
    return ["" if _missing(value) else _number(value, whole) for value in column]


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and pd.isna(value))


def _number(value: float, whole: bool) -> str:
    if abs(value) >= _SHORTENED:
        return short_number(value)
    if whole:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}"

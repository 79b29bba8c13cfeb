"""Result of an analysis: findings in words, tables and a picture; and its files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bwlm.analysis.charts.style import write_chart
from bwlm.paths import write_text

PICTURES = (".svg", ".png", ".html")
TABLES = (".csv", ".md")
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
            (f"{name.capitalize()}:\n\n" if name else "") + frame_to_markdown(table)
            for name, table in named
            if longest is None or len(table) <= longest
        ]


def markdown_table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table in GitHub's Markdown."""
    lines = [header, ["---"] * len(header), *([_plain(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def frame_to_markdown(table: pd.DataFrame) -> str:
    """Return a table in GitHub's Markdown: whole floats with commas, others to four decimals or four digits."""
    whole = [name for name in table.columns if _is_whole(table[name])]
    shown = table.astype(dict.fromkeys(whole, object))
    for name in whole:
        shown[name] = [None if _missing(value) else f"{value:,.0f}" for value in table[name]]
    rows = [["" if _missing(v) else _short(v) for v in row] for row in shown.itertuples(index=False)]
    return markdown_table(list(map(str, table.columns)), rows)


def _is_whole(column: pd.Series[Any]) -> bool:
    """Return whether a column's floats are all integers: tokens, FLOPs, learning rates such as 2."""
    known = column.dropna()
    return pd.api.types.is_float_dtype(column) and len(known) > 0 and bool((known % 1 == 0).all())


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and pd.isna(value))


def _short(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e-3
        else (f"{value:.4f}" if isinstance(value, float) else str(value))
    )

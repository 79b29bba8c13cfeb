"""What every analysis gives: findings in words, a table, a picture; and how they are written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bwlm.analysis.charts import save_picture
from bwlm.errors import UserError
from bwlm.paths import write_atomic

_TABLES = (".csv", ".md")
_PICTURES = (".html", ".svg", ".png")


@dataclass(frozen=True)
class Analysis:
    name: str
    title: str
    findings: list[str]
    """Sentences made from numbers."""
    table: pd.DataFrame
    chart: Any
    """Of altair."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    def write(self, target: Path) -> list[Path]:
        """Picture and table: `target` with each suffix, or, where it has one, that file alone. Returns the files.

        Raises `UserError` for a suffix that is none of csv, md, html, svg, png.
        """
        if target.suffix and target.suffix not in (*_TABLES, *_PICTURES):
            known = ", ".join(suffix[1:] for suffix in (*_TABLES, *_PICTURES))
            raise UserError(f"--output: {target.name}: not a known kind of file; take one of {known}, or none for all")
        suffixes = [target.suffix] if target.suffix else [".html", ".svg", ".csv", ".md"]
        target.parent.mkdir(parents=True, exist_ok=True)
        files = [target.with_suffix(suffix) if target.suffix else Path(f"{target}{suffix}") for suffix in suffixes]
        for path in files:
            if path.suffix in _PICTURES:
                save_picture(self.chart, path)
            else:
                write_atomic(path, self._text(path.suffix).encode())
        return files

    def _text(self, suffix: str) -> str:
        if suffix == ".csv":
            return self.table.to_csv(index=False)
        parts = [f"# {self.title}", "\n".join(f"- {line}" for line in self.findings), frame_to_markdown(self.table)]
        return "\n\n".join(part for part in [*parts, "\n".join(f"- {line}" for line in self.notes)] if part) + "\n"


def frame_to_markdown(table: pd.DataFrame) -> str:
    """A table of GitHub's Markdown, numbers at four digits behind the point."""
    rows = [["" if _missing(v) else _short(v) for v in row] for row in table.itertuples(index=False)]
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and pd.isna(value))


def _short(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e-3
        else (f"{value:.4f}" if isinstance(value, float) else str(value))
    )

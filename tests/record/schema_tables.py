"""The tables of docs/research-log.md, from the schema: `python -m tests.record.schema_tables` writes them anew."""

from __future__ import annotations

from pathlib import Path

from bwlm.record.researchlog_schema import GROUPS, Column

PAGE = Path(__file__).parents[2] / "docs" / "research-log.md"
MARK = "<!-- from bwlm/record/researchlog_schema.py, by `python -m tests.record.schema_tables` -->\n"
HEADER = "| dataset | type | axes | unit | holds |\n| --- | --- | --- | --- | --- |\n"


def tables() -> str:
    return "".join(
        f"\n### `/{name}`\n\n{group.description}\n\n{HEADER}"
        + "".join(_line(column, known, f"step {known.axes}") for column, known in group.columns.items())
        + "".join(_line(column, known, known.axes) for column, known in group.fixed.items())
        for name, group in GROUPS.items()
    )


def _line(name: str, column: Column, axes: str) -> str:
    return f"| `{name}` | {column.dtype} | {axes.strip()} | {column.unit} | {column.description} |\n"


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + tables())

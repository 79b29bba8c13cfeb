"""The list of files in docs/architecture.md, from their docstrings: `python -m tests.file_list` writes it anew."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
MARK = "<!-- from the first lines of the modules, by `python -m tests.file_list` -->\n"
_ROOMS = (
    "", "plan", "text", "model", "train", "storage", "record", "record/catalog", "trained", "evaluate",
    "evaluate/tasks", "chat", "stats", "analysis", "analysis/runs", "analysis/commands", "analysis/charts",
    "analysis/report", "cluster", "grid", "cli",
)  # fmt: skip


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def wrapped(line: str, indent: str = "") -> str:
    return "\n".join(textwrap.wrap(line, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def file_list() -> str:
    """A heading for each room with its first line, and below it a line for each of its files."""
    parts = []
    for folder in [ROOT / "bwlm" / room for room in _ROOMS] + [ROOT / "tasks", ROOT / "jobs"]:
        files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        init = folder / "__init__.py"
        head = f"**`{folder.relative_to(ROOT)}/`** {first_line(init) if init.exists() else ''}".rstrip()
        lines = [f"- `{path.name}` {first_line(path)}" for path in files]
        parts.append("\n".join([wrapped(head), "", *(wrapped(line, "  ") for line in lines), ""]))
    return "\n" + "\n".join(parts)


def main() -> None:
    before, mark, _ = PAGE.read_text().partition(MARK)
    assert mark, f"{PAGE} has no mark"
    PAGE.write_text(before + MARK + file_list())


if __name__ == "__main__":
    main()

"""The table of docs/grids.md, from the settings themselves: `python -m tests.plan.settings_table` writes it anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bwlm.plan.spec import Grid

PAGE = Path(__file__).parents[2] / "docs" / "grids.md"
MARK = "<!-- from bwlm/config.py and bwlm/plan/spec.py, by `python -m tests.plan.settings_table` -->\n"
ABOVE = ("name", "axes", "also", "direction", "depth", "lr", "seed")
"""Fields that the page explains before the table."""


def table() -> str:
    return "\n| field | default | means |\n| --- | --- | --- |\n" + "".join(_lines(Grid))


def _lines(settings: type[BaseModel], section: str = "") -> Iterator[str]:
    for name, field in settings.model_fields.items():
        if section or name not in ABOVE:
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from _lines(field.annotation, f"{name}.")
            else:
                yield f"| `{section}{name}` | {_default(field)} | {field.description} |\n"


def _default(field: FieldInfo) -> str:
    value = None if "default:" in str(field.description) or field.default_factory else field.default
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + table())

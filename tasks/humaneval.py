"""HumanEval: Python functions to write from their docstrings, tested by running them (Chen et al. 2021, arXiv
2107.03374).

A base model continues the prompt, an unfinished function, until a line begins that is not part of it. A model that
was trained on conversations is asked for the function; of its answer the first block of code counts, or all of the
text if it has none. What stands before the function in the prompt, imports and other functions, is there in any case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bwlm.errors import UserError
from tasks.files import DataSet
from tasks.items import GeneratedItem, row_digest, with_unique_ids
from tasks.rows import Row
from tasks.task import exchange

_COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
_DATA = DataSet("tasks.humaneval.path", "hf://datasets/openai/openai_humaneval", _COLUMNS, subset="openai_humaneval")
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class Tests(NamedTuple):
    """Reference of an item: the function and the program that tests it."""

    entry_point: str
    test: str


@dataclass(frozen=True)
class HumanEval:
    """Task `humaneval`."""

    name: str = "humaneval"
    shots: int = 0
    new_tokens: int = 512
    stops: tuple[str, ...] = (
        "\nclass",
        "\ndef",
        "\n#",
        "\nif",
        "\nprint",
        "\n@",
        "\nassert",
        "\nimport",
        "\nfrom",
        "\n```",
    )

    def test_source(self, path: str | None = None) -> str:
        return _DATA.test_source(path)

    def generated_items(self, shots: int, path: str | None = None) -> Sequence[GeneratedItem]:
        """Return the items. Raises `UserError` if examples are asked for: the data set has none besides its items."""
        if shots:
            raise UserError(f"--shots {shots}: humaneval has no examples besides its items: leave it out, or give 0")
        return with_unique_ids(map(_item, _DATA.test_rows(path)))

    def program(self, output: str, item: GeneratedItem) -> str:
        """Return the program: what stands before the function, the function, its tests.

        An output is the whole function if it defines it, else it continues the prompt.
        """
        tests: Tests = item.reference
        code = code_of(output)
        if _definition(tests.entry_point).search(code):
            code = before_function(item.prompt, tests.entry_point) + code
        else:
            code = item.prompt + code
        return f"{code}\n\n{tests.test}\n\ncheck({tests.entry_point})\n"


def _item(row: Row) -> GeneratedItem:
    task_id, prompt, solution, test, entry_point = (row.text(column) for column in _COLUMNS)
    if not _definition(entry_point).search(prompt):
        raise UserError(f"{row.place}: entry_point: {entry_point!r} is not defined in prompt")
    question = f"Complete this Python function, and answer with all of it:\n\n```python\n{prompt.strip()}\n```"
    answer = f"```python\n{prompt}{solution.rstrip()}\n```"
    return GeneratedItem(
        id=row_digest(task_id, prompt, test, entry_point),
        place=row.place,
        prompt=prompt,
        conversation=exchange(question, answer),
        reference=Tests(entry_point, test),
    )


def code_of(output: str) -> str:
    """Return the first block of code in an output, or all of it if it has none. The block need not be closed."""
    found = _BLOCK.search(output)
    return found[1] if found else output


def before_function(prompt: str, entry_point: str) -> str:
    """Return what stands before the last definition of a function, such as imports and functions that it calls."""
    *_, last = _definition(entry_point).finditer(prompt)
    return prompt[: last.start()]


def _definition(name: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)

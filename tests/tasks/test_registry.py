"""The tasks by name, and that they need none of the rooms that train."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from bwlm.errors import UserError
from tasks import TASKS, Verifiable, find_task
from tasks.task import exchange, given, truth

PACKAGE = Path(__file__).parents[2] / "tasks"
NAMES = {
    *("builtin:docs_qa", "builtin:arithmetic", "builtin:spelling"),
    *("gsm8k", "arc_easy", "arc_challenge", "mmlu", "smoltalk"),
}
MAY_IMPORT = (
    "bwlm.errors",
    "bwlm.format",
    "bwlm.paths",
    "bwlm.text.corpus",
    "bwlm.text.json_lines",
    "bwlm.text.listing",
    "bwlm.text.pydocs",
    "bwlm.text.reversal",
    "bwlm.text.splits",
)
SOURCES = "sources"
"""Module of mixtures, the only one in `tasks` that is no task: it knows settings and phases."""


def test_every_task_is_found_by_its_name() -> None:
    assert set(TASKS) == NAMES
    for name in NAMES:
        assert find_task(name).name == name


def test_a_misspelt_task_is_told_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"^tasks: 'arc_esy' is not a task \(did you mean 'arc_easy'\?\): name one of builtin"
    ):
        find_task("arc_esy")
    with pytest.raises(UserError, match=r"'builtin:arithmetics' .*\(did you mean 'builtin:arithmetic'\?\)"):
        find_task("builtin:arithmetics")


def test_which_tasks_can_be_verified() -> None:
    verifiable = {name for name, task in TASKS.items() if isinstance(task, Verifiable)}
    assert verifiable == {"builtin:arithmetic", "builtin:spelling", "gsm8k"}


def test_keys_of_generated_tasks_differ() -> None:
    keys = [TASKS[name].key(None) for name in NAMES if name.startswith("builtin:")]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 16 for key in keys)


def test_truth_and_what_is_given_are_the_last_of_their_role() -> None:
    conversation = [*exchange("a", "b"), {"role": "user", "content": "c"}]
    assert truth(conversation, "answer") == given(conversation, "question") == "b"
    assert truth(conversation, "question") == given(conversation, "answer") == "c"
    with pytest.raises(ValueError, match="without a message of the assistant has no answer"):
        truth(conversation[:1], "answer")


@pytest.mark.parametrize(
    "path", sorted(set(PACKAGE.glob("*.py")) - {PACKAGE / f"{SOURCES}.py"}), ids=lambda path: path.stem
)
def test_tasks_import_only_what_reads_text(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] != "bwlm" or name in MAY_IMPORT, f"{path.name} imports {name}"


def test_an_import_pulls_in_no_heavy_library() -> None:
    code = (
        "import sys, tasks; heavy = ('torch', 'ray', 'mlflow', 'pandas', 'altair', 'tiktoken', 'h5py')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"

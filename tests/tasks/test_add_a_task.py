"""docs/add-a-task.md keeps its word: the task of the page is scored as it stands."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import tasks
from bwlm.evaluate.tasks import request
from tests.runs import NewFamily
from tests.shell import Shell
from tests.shell import shell as shell

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-task.md").read_text()


@pytest.fixture(autouse=True)
def _read_anew() -> Iterator[None]:
    request.read_tasks.cache_clear()
    yield
    request.read_tasks.cache_clear()


def test_the_task_of_the_page_is_scored(
    new_family: NewFamily, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(name, rows)] = re.findall(r"^```json (\S+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / name).write_text(rows)
    module = types.ModuleType("tasks.capitals")
    exec(compile(code, "capitals.py", "exec"), vars(module))
    task = module.CAPITALS
    assert isinstance(task, tasks.EvaluatedTask)
    monkeypatch.setattr(tasks, "EVALUATED", {**tasks.EVALUATED, task.name: task})
    folder = new_family("forward")
    [command] = re.findall(r"^    bwlm (eval .*)$", PAGE, flags=re.MULTILINE)
    words = command.replace("eval mine", f"eval {folder.id}").replace(name, str(tmp_path / name)).split()
    found = shell.json(*words, "--storage", str(folder.path.parent))
    scored = [score for score in found if score["status"] == "scored"]
    assert {score["n"] for score in scored} == {3}
    assert {score["task"] for score in scored} == {"capitals"}
    conversations = list(task.conversations("train", str(tmp_path / name)))
    conversations += task.conversations("validation", str(tmp_path / name))
    assert conversations[0][0]["content"].startswith("Multiple Choice question: What is the capital of")

"""Results of a run on tasks, as files: scores as JSON, and every example as parquet.

    evaluations/<phase>/<reading>/<task>.json and .parquet

A result of another checkpoint than the last has its step in the name, and one that was made with other than the
task's own settings these settings: `arc_easy@400.json`, `mmlu.n200.shots0.json`. So a trial on a few examples never
replaces the whole result. `key` in the JSON names everything that the scores follow from: the same evaluation is not
made twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.errors import UserError
from bwlm.paths import Check, read_json, unchecked, write_atomic, write_json

HARNESS_VERSION = 1
"""Version of the scores, raised whenever an unchanged model would get other scores for the same items."""
MAIN_RULES = ("conditional", "exact", "pass@1")
"""Rules that are compared if none is named; `exact` and `pass@1` are those of tasks without choices."""
MAIN_FORMS = ("cloze", "generated")
"""Forms that are compared if none is named."""


@dataclass(frozen=True)
class TaskResult:
    """Scores of one checkpoint on one task in one reading."""

    key: Mapping[str, Any]
    """Everything that the scores follow from: weights, items, settings, version."""
    scores: Sequence[Mapping[str, Any]]
    """A score for each form, control and rule."""
    about: Mapping[str, Any]
    """Figures of the items alone: source, digest, chance and baselines, how many were cut."""


def result_name(task: str, step: int | None = None, settings: Mapping[str, int | None] | None = None) -> str:
    """Return the name of a result's files, without an ending; a colon in a task's name becomes `-`."""
    named = [f"{name}{value}" for name, value in (settings or {}).items() if value is not None]
    at = "" if step is None else f"@{step}"
    return ".".join([task.replace(":", "-").replace("/", "-") + at, *named])


def task_of(name: str) -> str:
    """Return the task and settings of a result's name, without its step: `mmlu.n200` for `mmlu@400.n200`."""
    return re.sub(r"@\d+", "", name)


def results_digest(folder: Path) -> str:
    """Return a digest of what all results below a run's `evaluations/<phase>` follow from; empty without results."""
    keys = {
        f"{path.parent.name}/{path.stem}": content["key"]
        for path in sorted(folder.glob("*/*.json"))
        if "scores" in (content := read_result(path))
    }
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest() if keys else ""


def read_result(path: Path) -> dict[str, Any]:
    """Return the content of a result; empty if it is damaged."""
    try:
        return dict(read_json(path))
    except UserError:
        return {}


def find_result(folder: Path, name: str, key: Mapping[str, Any]) -> TaskResult | None:
    """Return the result in a folder if it has this key and its examples are there; None if it has to be made."""
    path = folder / f"{name}.json"
    if not path.exists() or not path.with_suffix(".parquet").exists():
        return None
    content = read_result(path)
    if content.get("key") != dict(key):  # also where it is damaged: made again
        return None
    return TaskResult(content["key"], content["scores"], content["about"])


def write_result(
    folder: Path, name: str, result: TaskResult, examples: Mapping[str, Sequence[Any]], check: Check = unchecked
) -> None:
    """Write the examples, a column for each name, and then the scores: a reader that finds the JSON finds both."""
    folder.mkdir(parents=True, exist_ok=True)
    content = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(examples)), content, compression="zstd")
    (folder / f"{name}.json").unlink(missing_ok=True)  # else a kill in between would leave old scores with new examples
    write_atomic(folder / f"{name}.parquet", content.getvalue().to_pybytes(), check)
    write_json(folder / f"{name}.json", vars(result), check)


def read_examples(folder: Path, name: str) -> pa.Table:
    """Return the examples of a result."""
    return pq.read_table(folder / f"{name}.parquet")

"""`core`: the tasks of the CORE score (DCLM, arXiv 2406.11794), from a folder that holds nanochat's evaluation bundle.

    core.yaml             icl_tasks: label, dataset_uri, num_fewshot, icl_task_type, continuation_delimiter
    eval_data/..          rows of each task, as JSON lines
    eval_meta_data.csv    `Eval Task`, `Random baseline` in percent

Texts, order of the rows and examples of each row are nanochat's (nanochat/core_eval.py, scripts/base_eval.py): rows are
shuffled with seed 1337, and row n draws its examples from all others with seed 1234 + n. White space between a question
and its answer, be it the delimiter's or the question's own, belongs to the answer.

The baselines are the bundle's own, and not always chance: `boolq` has 62 %, `commonsense_qa` 20 % with four choices. So
chance from the rows stands beside the centred score, (accuracy - baseline) / (1 - baseline).
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from bwlm.errors import UserError, first_line, nearest
from bwlm.format import json_kind
from bwlm.paths import local_path
from tasks.items import CentredTask, ChoiceItem, ContinuationItem, Example, Form, row_digest, with_unique_ids
from tasks.rows import Row, read_lines

_FIELD = "tasks.core.path"
_ORDER_SEED, _EXAMPLES_SEED = 1337, 1234
_DELIMITER = " "

Item = TypeVar("Item", ChoiceItem, ContinuationItem)


@dataclass(frozen=True)
class CoreTask:
    """Task of the bundle, by its entry in core.yaml and its baseline; one of the kinds below."""

    label: str
    folder: str
    uri: str
    """File of its rows, below eval_data."""
    shots: int
    delimiter: str
    """Text between question and answer."""
    baseline: float
    """Accuracy that counts as zero, from 0 to 1."""

    @property
    def name(self) -> str:
        """Name as users write it."""
        return f"core:{self.label}"

    def centred(self, accuracy: float) -> float:
        """Return the accuracy as a share of the way from the baseline to 1."""
        return (accuracy - self.baseline) / (1 - self.baseline)

    def test_source(self, path: str | None = None) -> str:
        return str(_folder(path or self.folder) / "eval_data" / self.uri)

    def _rows(self, path: str | None) -> list[Row]:
        """Return the rows in the order in which they are numbered. Raises `UserError` if there is none."""
        source = self.test_source(path)
        rows = list(read_lines(source))
        if not rows:
            raise UserError(f"{source}: no rows: copy the bundle again")
        random.Random(_ORDER_SEED).shuffle(rows)
        return rows

    def _joined(self, question: str, answer: str) -> tuple[str, str]:
        """Return the two parts of a text. White space between them is in the second."""
        before = question + self.delimiter
        stem = before.rstrip()
        return stem, before[len(stem) :] + answer


@dataclass(frozen=True)
class CoreChoices(CoreTask):
    """Task of the type `multiple_choice`: rows of query, choices and gold."""

    forms: tuple[Form, ...] = ("cloze",)

    def choice_items(self, form: Form, shots: int, path: str | None = None) -> Sequence[ChoiceItem]:
        items = with_unique_ids(map(self._item, self._rows(path)))
        return _with_drawn_shots(items, shots, lambda item: Example(item.stems[item.answer], item.choices[item.answer]))

    def _item(self, row: Row) -> ChoiceItem:
        query, choices = row.text("query"), row.texts("choices")
        return self._choose(row, [self._joined(query, choice) for choice in choices], (query, choices))

    def _choose(self, row: Row, texts: Sequence[tuple[str, str]], content: Any) -> ChoiceItem:
        gold = row.integer("gold")
        if len(texts) < 2 or not 0 <= gold < len(texts):
            raise UserError(f"{row.place}: gold: must be the index of one of two or more choices (found {gold})")
        stems, choices = zip(*texts, strict=True)
        return ChoiceItem(row_digest(content, gold), row.place, stems, choices, gold, frame=self.delimiter.strip())


@dataclass(frozen=True)
class CoreSchema(CoreChoices):
    """Task of the type `schema`: rows of context_options, one continuation of all, and gold."""

    def _item(self, row: Row) -> ChoiceItem:
        contexts, continuation = row.texts("context_options"), row.text("continuation")
        return self._choose(
            row, [self._joined(context, continuation) for context in contexts], (contexts, continuation)
        )


@dataclass(frozen=True)
class CoreContinuation(CoreTask):
    """Task of the type `language_modeling`: rows of context and continuation."""

    def continuation_items(self, shots: int, path: str | None = None) -> Sequence[ContinuationItem]:
        items = with_unique_ids(map(self._item, self._rows(path)))
        return _with_drawn_shots(items, shots, lambda item: Example(item.context, item.continuation))

    def _item(self, row: Row) -> ContinuationItem:
        context, continuation = row.text("context"), row.text("continuation")
        if not continuation.strip():
            raise UserError(f"{row.place}: continuation: must not be empty: copy the bundle again")
        return ContinuationItem(
            row_digest(context, continuation), row.place, *self._joined(context.strip(), continuation)
        )


@dataclass(frozen=True)
class Core:
    """Suite `core`. Its score is the mean of its tasks' centred accuracies."""

    name: str = "core"

    def tasks(self, path: str | None = None) -> Sequence[CentredTask]:
        """Return the tasks of a bundle, in its order. Raises `UserError` with file, entry, field and fix."""
        folder = _folder(path)
        baselines = _baselines(folder / "eval_meta_data.csv")
        return [_task(entry, str(folder), baselines) for entry in _entries(folder / "core.yaml")]


_KINDS: Mapping[str, type[CoreTask]] = {
    "multiple_choice": CoreChoices,
    "schema": CoreSchema,
    "language_modeling": CoreContinuation,
}


def _task(entry: Row, folder: str, baselines: Mapping[str, float]) -> CentredTask:
    label, kind = entry.text("label"), entry.text("icl_task_type")
    where = f"{entry.place}: {label}"
    if kind not in _KINDS:
        raise UserError(f"{where}: icl_task_type: {kind!r} is not one of {', '.join(_KINDS)}{nearest(kind, _KINDS)}")
    if label not in baselines:
        raise UserError(f"{folder}/eval_meta_data.csv: no row with the Eval Task {label}: copy the bundle again")
    shots = entry.get("num_fewshot")
    if not isinstance(shots, list) or not shots or not isinstance(shots[0], int) or shots[0] < 0:
        raise UserError(
            f"{where}: num_fewshot: must be a list of counts from 0 (found {shots!r}): copy the bundle again"
        )
    delimiter = entry.text("continuation_delimiter") if "continuation_delimiter" in entry.values else _DELIMITER
    return _KINDS[kind](label, folder, entry.text("dataset_uri"), shots[0], delimiter, baselines[label])


def _folder(path: str | None) -> Path:
    """Return the folder of the bundle. Raises `UserError` if none is given, or if it is not on this machine."""
    if path is None:
        raise UserError(f"{_FIELD}: give the folder of the evaluation bundle, which holds core.yaml and eval_data")
    folder = local_path(path)
    if folder is None or not (folder / "core.yaml").is_file():
        raise UserError(f"{_FIELD}: {path} holds no core.yaml: give the local folder of the evaluation bundle")
    return folder


def _entries(file: Path) -> list[Row]:
    """Return the entries of core.yaml, with their places."""
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}): copy the bundle again") from None
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"{file}: icl_tasks: must be a list of tasks (found {json_kind(entries)}): copy the bundle again"
        )
    return [Row(f"{file}: icl_tasks[{number}]", entry) for number, entry in enumerate(entries)]


def _baselines(file: Path) -> dict[str, float]:
    """Return the baseline of each task, from 0 to 1."""
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
        found = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        told = f"no column {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{file}: Random baseline: cannot be read ({told}): copy the bundle again") from None
    if wrong := [task for task, baseline in found.items() if not 0 <= baseline < 1]:
        raise UserError(f"{file}: {wrong[0]}: Random baseline: must be from 0 to less than 100 percent")
    return found


def _with_drawn_shots(items: Sequence[Item], shots: int, solve: Callable[[Item], Example]) -> list[Item]:
    """Return the items, each with its own examples among the others."""
    drawn = []
    for number, item in enumerate(items):
        others = [other for other in range(len(items)) if other != number]
        chosen = random.Random(_EXAMPLES_SEED + number).sample(others, min(shots, len(others)))
        drawn.append(replace(item, shots=tuple(solve(items[other]) for other in chosen)))
    return drawn

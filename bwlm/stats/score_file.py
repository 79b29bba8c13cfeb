"""Scores from files: a parquet or CSV table, or the samples that lm-eval writes with `--log_samples`.

A source is what `--from` takes: the path of a table, or `DIRECTION:SEED=PATH` for lm-eval's samples of one model, which
name neither. PATH is a `samples_TASK_DATE.jsonl`, or a folder of these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pandas as pd

from bwlm.errors import UserError, first_line
from bwlm.format import json_kind
from bwlm.stats.score_table import COLUMNS, NAMES, OPTIONAL, checked_scores
from bwlm.stats.scores import Scores, compare_scores
from bwlm.stats.table_file import Columns, read_table

_COLUMNS: Final = Columns("scores", COLUMNS, OPTIONAL, NAMES)
_LABELLED: Final = re.compile(r"(?P<direction>[^:=/]+):(?P<seed>\d+)=(?P<path>.+)")
_SAMPLES: Final = re.compile(r"samples_(?P<task>.+)_\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?\.jsonl")
_ACCURACY: Final = re.compile(r"acc|accuracy|acc_\w+|\w+_acc|exact_match|pass(@|_at_)\d+")
"""Metrics of lm-eval that score an item in 0..1, the higher the better. Others, such as `brier_score`, are left out."""


class Source(NamedTuple):
    """File of scores; `direction` and `seed` label the samples of lm-eval."""

    path: Path
    direction: str = ""
    seed: int | None = None


def scores_from(sources: Sequence[str]) -> Scores:
    """Return the judged scores of all sources together. Raises `UserError`, which names the file or run at fault."""
    rows = read_scores(sources)
    try:
        return compare_scores(rows)
    except UserError as error:
        at = f"{sources[0]}: " if len(sources) == 1 else ""
        raise UserError(f"{at}{error}") from None


def read_scores(sources: Sequence[str]) -> pd.DataFrame:
    """Return the checked rows of all sources. Raises `UserError`, which names the file, for the first fault."""
    return pd.concat([_rows(_source(text)) for text in sources], ignore_index=True)


def _source(text: str) -> Source:
    found = _LABELLED.fullmatch(text)
    source = Source(Path(found["path"]), found["direction"], int(found["seed"])) if found else Source(Path(text))
    path = source.path
    if not path.exists():
        raise UserError(f"{text}: no such file: give a table, or DIRECTION:SEED=PATH for lm-eval's samples")
    are_samples = path.is_dir() or path.suffix.lower() == ".jsonl"
    if are_samples and not found:
        raise UserError(f"{text}: lm-eval's samples name no direction and no seed: write --from DIRECTION:SEED={text}")
    if found and not are_samples:
        raise UserError(f"{text}: a table names its own directions and seeds: write --from {path}")
    return source


def _rows(source: Source) -> pd.DataFrame:
    rows = read_table(source.path, _COLUMNS) if source.seed is None else _read_samples(source)
    try:
        return checked_scores(rows)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None


def _read_samples(source: Source) -> pd.DataFrame:
    """Return lm-eval's samples of one model as a table: a metric is a rule, and `doc_id` an item."""
    parts = [_read_task(path, task) for task, path in _sample_files(source.path).items()]
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(run=str(source.path), direction=source.direction, seed=source.seed)


def _sample_files(path: Path) -> dict[str, Path]:
    """Return the files of samples by task; lm-eval writes them to a folder of the model below its `--output_path`."""
    files: dict[str, Path] = {}
    for file in sorted(path.rglob("samples_*.jsonl")) if path.is_dir() else [path]:
        if not (name := _SAMPLES.fullmatch(file.name)):
            raise UserError(f"{file}: no samples of lm-eval: their names are samples_TASK_DATE.jsonl")
        if other := files.get(name["task"]):
            raise UserError(f"{path}: {other.name} and {file.name} are of one task: keep one, or name one file")
        files[name["task"]] = file
    if not files:
        raise UserError(f"{path}: no samples_TASK_DATE.jsonl in this folder: run lm-eval with --log_samples")
    return files


def _read_task(path: Path, task: str) -> pd.DataFrame:
    rows = [row | {"task": task} for number, sample in _samples(path) for row in _scores(sample, f"{path}:{number}")]
    if not rows:
        raise UserError(f"{path}: no accuracy in it: needs a metric such as acc or exact_match for each sample")
    return pd.DataFrame(rows)


def _samples(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the samples of a file with the numbers of their lines."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                sample = json.loads(line)
                if not isinstance(sample, dict):
                    raise UserError(f"{path}:{number}: holds {json_kind(sample)}, a sample is an object")
                yield number, sample
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON lines ({first_line(error)}): log the samples again") from None


def _scores(sample: dict[str, Any], place: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each accuracy of a sample."""
    lacking = [name for name in ("doc_id", "doc_hash", "target_hash", "filter", "metrics") if name not in sample]
    if lacking:
        raise UserError(f"{place}: has no {lacking[0]}: not a sample as lm-eval 0.4.13 logs it")
    for metric in sample["metrics"]:
        if _ACCURACY.fullmatch(metric) and not isinstance(sample.get(metric), list | dict | str):
            yield {
                "item": str(sample["doc_id"]),
                "rule": metric if sample["filter"] == "none" else f"{metric}, {sample['filter']}",
                "correct": sample.get(metric),
                "digest": f"{sample['doc_hash']}/{sample['target_hash']}",
            }

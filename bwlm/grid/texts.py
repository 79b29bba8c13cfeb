"""What the cells of a plan read: documents, or mixtures of conversations; prepared before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import tasks
from bwlm.config import Experiment, Recipe
from bwlm.errors import UserError, nearest
from bwlm.grid.cells import text_key
from bwlm.grid.spec import Cell, Plan
from bwlm.paths import local_path
from bwlm.record.lineage import ExperimentFolder
from bwlm.text.conversation import check_conversation
from bwlm.text.corpus import NoSource
from bwlm.text.mixture import ConversationSource, prepare_mixture
from bwlm.text.packing import Manifest
from bwlm.text.prepare import Prepared, find_packed, prepare
from bwlm.text.stream import pack_corpus, with_ray
from bwlm.text.tokenizer import Tokenizer

_FILE_PARTS = 8
"""In which the conversations of files are packed beside each other."""


def prepare_texts(plan: Plan, storage: Path, show: Callable[[str], None]) -> dict[str, Prepared]:
    """The text of every cell, by id; cells that read the same share it. Raises `UserError` for every fault of it.

    The tokenizer of a phase after base is its parent's.
    """
    prepared: dict[str, Prepared] = {}
    known: dict[str, Prepared] = {}
    for cell in plan.cells:  # parents stand before their children
        tokenizer = _parents_tokenizer(cell, prepared, storage)
        key = f"{text_key(cell.experiment)} {tokenizer}"
        if key not in known:
            try:
                known[key] = _prepare(cell.experiment, tokenizer, storage, show)
            except NoSource as error:
                known[key] = _packed_before(plan, cell, storage, error)
                show(f"{error}; goes on with the text that was packed before")
        prepared[cell.id] = known[key]
    return prepared


def _packed_before(plan: Plan, cell: Cell, storage: Path, error: NoSource) -> Prepared:
    """The text of a cell whose source is gone, as a run that reads the same has packed it; else raises the error."""
    for other in plan.cells:
        folder = ExperimentFolder(storage, other.id)
        if text_key(other.experiment) == text_key(cell.experiment) and folder.exists():
            config = folder.config()
            if (packed := find_packed(storage, Path(config.corpus), config.identity["data"])) is not None:
                tokenizer = Path(config.tokenizer)
                loaded = Tokenizer.load(tokenizer, config.identity["tokenizer"])
                return Prepared(packed, Manifest.read(packed), loaded, tokenizer)
    raise error


def _parents_tokenizer(cell: Cell, prepared: dict[str, Prepared], storage: Path) -> Path | None:
    parent = cell.experiment.parent
    if parent is None:
        return None
    if parent in prepared:
        return prepared[parent].tokenizer_folder
    config = ExperimentFolder(storage, parent).config()
    Tokenizer.load(Path(config.tokenizer), config.identity["tokenizer"])  # told here, before anything is packed with it
    return Path(config.tokenizer)


def _prepare(experiment: Experiment, tokenizer: Path | None, storage: Path, show: Callable[[str], None]) -> Prepared:
    if tokenizer is None:
        return prepare(experiment, storage, pack_corpus, show)
    width, whole = experiment.model.sequence_length, experiment.phase != "mid"
    return prepare_mixture(sources_of(experiment), tokenizer, width, whole, storage, with_ray, show)


def sources_of(recipe: Recipe) -> list[ConversationSource]:
    """The sources of a mixture, in its order. Raises `UserError` for one that is no task and no file."""
    return [_source(name, weight, recipe) for name, weight in recipe.data.mixture.items()]


def check_sources(experiment: Experiment) -> None:
    """Raises `UserError` for the name of a task or of a mixture's part that there is none of."""
    for name in experiment.tasks:
        if name not in tasks.TASKS:
            raise UserError(f"tasks.{name}: no such task{nearest(name, tasks.TASKS)}")
    for name in experiment.data.mixture:
        task = find_source(name)
        if experiment.phase == "rl" and not isinstance(task, tasks.Verifiable):
            known = ", ".join(name for name, task in tasks.TASKS.items() if isinstance(task, tasks.Verifiable))
            raise UserError(f"data.mixture: {name}: nothing says what an answer of it is worth: rl takes {known}")


def find_source(name: str) -> tasks.Task:
    """A task by its name, or the conversations of a file by its path. Raises `UserError` with the nearest name."""
    if name in tasks.TASKS or not _is_path(name):
        try:
            return tasks.find_task(name)
        except UserError as error:
            raise UserError(f"data.mixture: {str(error).removeprefix('tasks: ')}, or give a path") from None
    return tasks.FileTask(name)


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".parquet", ".jsonl", ".jsonl.gz")) or Path(name).exists()


def _source(name: str, weight: float, recipe: Recipe) -> ConversationSource:
    task = find_source(name)
    setting = recipe.tasks.get(name)
    path = _for_workers(setting.path if setting else name if isinstance(task, tasks.FileTask) else None)
    parts = 1 if name.startswith("builtin:") else _FILE_PARTS
    notes = task.notes(path) if isinstance(task, tasks.FromFiles) else ()
    return ConversationSource(name, weight, task.key(path), partial(_read, task, path), parts, notes)


def _for_workers(address: str | None) -> str | None:
    """The address of files as a worker finds it, whose working folder is another one."""
    folder = local_path(address) if address is not None else None
    return address if folder is None else str(folder.absolute())


def _read(task: tasks.Task, path: str | None, split: tasks.Split) -> Iterator[tasks.Conversation]:
    if not isinstance(task, tasks.FileTask):
        yield from task.conversations(split, path)
        return
    for place, messages in task.placed(split, path):
        check_conversation(messages, place)  # here, where the row is known
        yield messages

"""Sources of a mixture: tasks by their names, and files of conversations by their paths."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import permutations
from pathlib import Path

import tasks
from bwlm.config import Experiment, Recipe
from bwlm.errors import UserError, nearest
from bwlm.paths import local_path
from bwlm.phases import PHASES
from bwlm.text.conversation import check_conversation
from bwlm.text.mixture import ConversationSource
from bwlm.text.splits import NamedSplits, without_copies

_FILE_PARTS = 8
"""Number of parts of a file source that are packed in parallel."""


def sources_of(recipe: Recipe) -> list[ConversationSource]:
    """Return the sources of a mixture, in its order.

    Raises `UserError` for a source that is no task and no file, and for a training file that another source holds
    out.
    """
    mixture = recipe.data.mixture
    places = {name: _place(name, recipe) for name in mixture}
    splits = {name: task.splits(path) for name, (task, path) in places.items() if isinstance(task, tasks.FromFiles)}
    for one, other in permutations(splits, 2):
        _refuse_held_out(one, splits[one], other, splits[other])
    return [
        _source(name, weight, *places[name], splits[name].notes if name in splits else ())
        for name, weight in mixture.items()
    ]


def _refuse_held_out(one: str, trained: NamedSplits, other: str, held: NamedSplits) -> None:
    kept, _ = without_copies(trained.train, [*held.validation, *held.test])
    if dropped := [file.uri for file in trained.train if file not in kept]:
        raise UserError(
            f"data.mixture: {one}: {dropped[0]} is held out by {other}, perhaps under another name: "
            "train on other files, or leave one of the two sources out"
        )


def check_sources(experiment: Experiment) -> None:
    """Raise `UserError` for an unknown task in `tasks` or the mixture, and in rl for a source without a reward."""
    for name in experiment.tasks:
        if name not in tasks.TASKS:
            raise UserError(f"tasks.{name}: no such task{nearest(name, tasks.TASKS)}")
    for name in experiment.data.mixture:
        task = find_source(name)
        if PHASES[experiment.phase].has_reward and not isinstance(task, tasks.Verifiable):
            known = ", ".join(name for name, task in tasks.TASKS.items() if isinstance(task, tasks.Verifiable))
            raise UserError(f"data.mixture: {name}: gives no reward for an answer, which rl needs: choose from {known}")


def find_source(name: str) -> tasks.Task:
    """Return a task by its name, or a file's conversations by its path. Raises `UserError` with the nearest name."""
    if name in tasks.TASKS or not _is_path(name):
        try:
            return tasks.find_task(name)
        except UserError as error:
            raise UserError(f"data.mixture: {str(error).removeprefix('tasks: ')}, or give a path") from None
    return tasks.FileTask(name)


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".parquet", ".jsonl", ".jsonl.gz")) or Path(name).exists()


def _place(name: str, recipe: Recipe) -> tuple[tasks.Task, str | None]:
    """Return a source's task, and the path of its files if one is given."""
    task, setting = find_source(name), recipe.tasks.get(name)
    return task, _for_workers(setting.path if setting else name if isinstance(task, tasks.FileTask) else None)


def _source(name: str, weight: float, task: tasks.Task, path: str | None, notes: tuple[str, ...]) -> ConversationSource:
    parts = 1 if name.startswith("builtin:") else _FILE_PARTS
    return ConversationSource(name, weight, task.key(path), partial(_read, task, path), parts, notes)


def _for_workers(address: str | None) -> str | None:
    """Return the address of files with a local path made absolute, because a worker has another working folder."""
    folder = local_path(address) if address is not None else None
    return address if folder is None else str(folder.absolute())


def _read(task: tasks.Task, path: str | None, split: tasks.SplitName) -> Iterator[tasks.RawConversation]:
    if not isinstance(task, tasks.FileTask):
        yield from task.conversations(split, path)
        return
    for place, messages in task.placed(split, path):
        check_conversation(messages, place)  # checked here, where the row is known
        yield messages

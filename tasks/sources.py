"""Sources of a mixture: tasks by their names, and files of conversations by their paths."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import permutations
from pathlib import Path

import tasks
from bwlm.config import Experiment, Recipe
from bwlm.errors import Unusable, UserError, nearest
from bwlm.paths import local_path
from bwlm.phases import PHASES
from bwlm.text.conversation import check_conversation
from bwlm.text.mixture import ConversationSource
from bwlm.text.prepare import ShowProgress
from bwlm.text.splits import NamedSplits, without_copies
from tasks.faults import find_faults
from tasks.files import ENDINGS
from tasks.messages import column_of, parse_messages
from tasks.rows import Row
from tasks.task import recipe_key

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
        _source(name, weight, *places[name], recipe.data.skip_invalid, splits[name].notes if name in splits else ())
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
    with_files = tasks.TASKS.keys() | tasks.EVALUATED.keys()
    for name in experiment.tasks:
        if name not in with_files:
            raise UserError(f"tasks.{name}: no such task{nearest(name, with_files)}")
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
    return "/" in name or name.endswith(ENDINGS) or Path(name).exists()


def _place(name: str, recipe: Recipe) -> tuple[tasks.Task, str | None]:
    """Return a source's task, and the path of its files if one is given."""
    task, setting = find_source(name), recipe.tasks.get(name)
    return task, _for_workers(setting.path if setting else name if isinstance(task, tasks.FileTask) else None)


def _source(
    name: str, weight: float, task: tasks.Task, path: str | None, skip: bool, notes: tuple[str, ...]
) -> ConversationSource:
    parts, key = 1 if name.startswith("builtin:") else _FILE_PARTS, task.key(path)
    if not isinstance(task, tasks.FileTask):
        return ConversationSource(name, weight, key, partial(task.conversations, path=path), parts, notes)
    key = recipe_key(key, "skip_invalid") if skip else key
    read, check = partial(_read, task, path, skip), partial(_check, task, path, skip)
    return ConversationSource(name, weight, key, read, parts, notes, check)


def _for_workers(address: str | None) -> str | None:
    """Return the address of files with a local path made absolute, because a worker has another working folder."""
    folder = local_path(address) if address is not None else None
    return address if folder is None else str(folder.absolute())


def _read(
    task: tasks.FileTask, path: str | None, skip: bool, split: tasks.SplitName
) -> Iterator[tasks.RawConversation]:
    for row in task.rows(split, path):
        try:
            conversation = _conversation(row)
        except Unusable:
            if not skip:
                raise
        else:
            yield conversation


def _conversation(row: Row) -> tasks.RawConversation:
    messages = parse_messages(row)
    check_conversation(messages, f"{row.place}: {column_of(row.values)}")  # checked here, where the row is known
    return messages


def _check(task: tasks.FileTask, path: str | None, skip: bool, progress: ShowProgress) -> None:
    """Tell through `progress` what `skip` leaves out; else raise `UserError` with all faults of all files."""
    progress(f"checking the conversations of {task.name}")
    faults = find_faults(task.name, task.all_rows(path), _conversation)
    if faults.counts and not skip:
        raise UserError(faults.refusal())
    if faults.counts:
        progress(faults.note())

"""Requests to evaluate on a task by its name, and the items of the task, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from bwlm.errors import UserError, nearest
from tasks import find_evaluated
from tasks.items import ChoiceItem, ChoiceTask, EvaluatedTask, Form, Item, row_digest, rows_digest
from tasks.task import RawConversation, draw


@dataclass(frozen=True)
class TaskRequest:
    """Request to evaluate on a task."""

    name: str
    """Name of a task, or `task:group`."""
    path: str | None = None
    """Local files or address instead of the task's own."""
    max_examples: int | None = None
    shots: int | None = None
    """Solved examples before each item; None: the task's own number."""

    @property
    def settings(self) -> dict[str, int | None]:
        """Settings that are not the task's own, by the names that files of results carry."""
        return {"n": self.max_examples, "shots": self.shots}

    def with_path(self, path: str | None) -> TaskRequest:
        """Return the request with other files."""
        return replace(self, path=path)


@dataclass(frozen=True)
class LoadedTask:
    """Items of a task, read and checked."""

    request: TaskRequest
    task: EvaluatedTask
    source: str
    items: dict[Form, Sequence[ChoiceItem]]
    """Items by form: the same ones in each form."""

    @classmethod
    def read(cls, request: TaskRequest) -> LoadedTask:
        """Read the test split. Raises `UserError` for an unknown task or group, and for files that cannot be read."""
        task, group = find_evaluated(request.name)
        assert isinstance(task, ChoiceTask)
        shots = task.shots if request.shots is None else request.shots
        items = {form: task.choice_items(form, shots, request.path) for form in task.forms}
        chosen = {
            form: sample(of_group(every, group, request.name), request.max_examples) for form, every in items.items()
        }
        return cls(request, task, task.test_source(request.path), chosen)

    @cached_property
    def digest(self) -> str:
        """Digest of the items."""
        return rows_digest(next(iter(self.items.values())))

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that scores follow from besides the model: items, examples, forms."""
        texts = [[asdict(item) | {"place": ""} for item in items] for items in self.items.values()]
        return {"task": self.request.name, "rows": self.digest, "texts": row_digest(texts)}

    @property
    def conversations(self) -> list[RawConversation | None]:
        """Items in the form in which the task is learned."""
        return [item.conversation for item in next(iter(self.items.values()))]


def of_group(items: Sequence[Item], group: str, name: str) -> Sequence[Item]:
    """Return the items of a group, or all where no group is named. Raises `UserError` for a group without items."""
    if not group:
        return items
    known = sorted({item.group for item in items})
    if group not in known:
        raise UserError(f"--tasks: {name}: no group {group!r}{nearest(group, known)}: name one of {', '.join(known)}")
    return [item for item in items if item.group == group]


def sample(items: Sequence[Item], count: int | None) -> Sequence[Item]:
    """Return `count` items, the same ones in whatever order the items come, or all."""
    if count is None or count >= len(items):
        return items
    drawn = {item.id for item in sorted(items, key=lambda item: (draw(item.id), item.id))[:count]}
    return [item for item in items if item.id in drawn]

"""Requests to evaluate on a task by its name, and the items of the task, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

from bwlm.config import Experiment
from bwlm.errors import UserError, nearest
from tasks import find_evaluated
from tasks.items import (
    AnyItem,
    ChoiceTask,
    ContinuationTask,
    EvaluatedTask,
    ExecutedTask,
    Form,
    GeneratedTask,
    Item,
    row_digest,
    rows_digest,
)
from tasks.task import RawConversation, draw

Items = Sequence[AnyItem]


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
    samples: int = 1
    """Outputs for each item of a generated task; one is greedy."""
    allow_code_execution: bool = False
    """True if programs that the model writes may run, in a sandbox."""

    @property
    def settings(self) -> dict[str, int | None]:
        """Settings that are not the task's own, by the names that files of results carry."""
        samples = None if self.samples == 1 else self.samples
        return {"n": self.max_examples, "shots": self.shots, "samples": samples}

    def with_path(self, path: str | None) -> TaskRequest:
        """Return the request with other files."""
        return replace(self, path=path)


@dataclass(frozen=True)
class LoadedTask:
    """Items of a task, read and checked."""

    request: TaskRequest
    task: EvaluatedTask
    source: str
    items: dict[Form, Items]
    """Items by form: the same ones in each form."""

    @classmethod
    def read(cls, request: TaskRequest) -> list[LoadedTask]:
        """Read the test split of a task, or of each task of a suite.

        Raises `UserError` for an unknown task or group, and for files that cannot be read.
        """
        task, group = find_evaluated(request.name)
        if isinstance(task, EvaluatedTask):
            return [cls._read(request, task, group)]
        members = [one for one in task.tasks(request.path) if not group or one.name == request.name]
        if not members:
            known = [one.name for one in task.tasks(request.path)]
            raise UserError(f"--tasks: {request.name!r} is not a task of {task.name}{nearest(request.name, known)}")
        return [cls._read(replace(request, name=one.name), one, "") for one in members]

    @classmethod
    def _read(cls, request: TaskRequest, task: EvaluatedTask, group: str) -> LoadedTask:
        shots = task.shots if request.shots is None else request.shots
        items = _read_items(task, shots, request.path)
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
        key = {"task": self.request.name, "rows": self.digest, "texts": row_digest(texts)}
        return key | {"samples": self.request.samples} if isinstance(self.task, GeneratedTask) else key

    @property
    def conversations(self) -> list[RawConversation | None]:
        """Items in the form in which the task is learned."""
        return [getattr(item, "conversation", None) for item in next(iter(self.items.values()))]


@cache
def read_tasks(request: TaskRequest) -> list[LoadedTask]:
    """Return a task, or the tasks of a suite, with their items, which a process reads once for all its runs."""
    return LoadedTask.read(request)


def requests_of(experiment: Experiment) -> tuple[TaskRequest, ...]:
    """Return the tasks that score a run's checkpoints: its `evaluation.tasks`.

    Raises `UserError` for an unknown task, and for a task that runs programs, which a person has to allow each time.
    """
    where, settings = "evaluation.tasks", experiment.evaluation
    requests = []
    for name in dict.fromkeys(settings.tasks):
        task, _ = find_evaluated(name, where)
        if isinstance(task, ExecutedTask):
            raise UserError(
                f"{where}: {name} runs programs that a model writes, which a grid never does: "
                f"bwlm eval RUN --tasks {name} --allow-code-execution"
            )
        requests.append(TaskRequest(name, path_of(experiment, name), settings.max_examples))
    return tuple(requests)


def path_of(experiment: Experiment, name: str) -> str | None:
    """Return the files of a task, or of the task of a group, that a run's settings name; None if they name none."""
    own = experiment.tasks.get(name) or experiment.tasks.get(find_evaluated(name)[0].name)
    return own.path if own else None


def _read_items(task: EvaluatedTask, shots: int, path: str | None) -> dict[Form, Items]:
    if isinstance(task, ChoiceTask):
        return {form: task.choice_items(form, shots, path) for form in task.forms}
    if isinstance(task, ContinuationTask):
        return {"cloze": task.continuation_items(shots, path)}
    assert isinstance(task, GeneratedTask), f"{task.name} has no items"
    return {"generated": task.generated_items(shots, path)}


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

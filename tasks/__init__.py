"""Tasks: data sets as conversations for mid-training and SFT, and verifiable rewards for RL.

    docs_qa.py     builtin:docs_qa      what functions and classes of the installed libraries do
    arithmetic.py  builtin:arithmetic   sums, differences and products (verifiable)
    spelling.py    builtin:spelling     words letter by letter (verifiable)
    gsm8k.py       gsm8k                word problems of grade school (verifiable)
    arc.py         arc_easy, arc_challenge     multiple choice: school science
    mmlu.py        mmlu                 multiple choice: 57 subjects
    core.py        core                 tasks of the CORE score, from a bundle (evaluation alone)
    reversal.py    builtin:reversal     names of facts "A is B", asked in both orders (evaluation alone)
    humaneval.py   humaneval            functions to write (evaluation alone)
    messages.py    smoltalk, FileTask   conversations that files already hold
    task.py  items.py                   protocols: of a task that is learned, of a task that is evaluated
    choices.py  verifiable.py           text of multiple choice; verifiable tasks as evaluated ones
    rows.py  files.py  faults.py        rows of JSON; files of a data set and their split; faults counted by kind

Built-in tasks need no file and no network; the others are read from the hub or from a path.
"""

from __future__ import annotations

from collections.abc import Mapping

from bwlm.errors import UserError, nearest
from tasks.arc import ARC_CHALLENGE, ARC_EASY
from tasks.arithmetic import Arithmetic
from tasks.core import Core
from tasks.docs_qa import DocsQA
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.items import EvaluatedTask, Suite
from tasks.messages import SMOLTALK, FileTask
from tasks.mmlu import MMLU
from tasks.reversal import Reversal
from tasks.spelling import Spelling
from tasks.task import FromFiles, RawConversation, RawMessage, SplitName, Task, Verifiable, Writes
from tasks.verifiable import ANSWERED

__all__ = [
    "EVALUATED",
    "SUITES",
    "TASKS",
    "EvaluatedTask",
    "FileTask",
    "FromFiles",
    "RawConversation",
    "RawMessage",
    "SplitName",
    "Suite",
    "Task",
    "Verifiable",
    "Writes",
    "find_evaluated",
    "find_task",
]

_ALL: tuple[Task, ...] = (DocsQA(), Arithmetic(), Spelling(), GSM8K(), ARC_EASY, ARC_CHALLENGE, MMLU, SMOLTALK)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def find_task(name: str) -> Task:
    """Return the task of this name. Raises `UserError` with the nearest name if there is none."""
    if name not in TASKS:
        raise UserError(f"tasks: {name!r} is not a task{nearest(name, TASKS)}: name one of {', '.join(TASKS)}")
    return TASKS[name]


_WITH_TEST_SPLIT: tuple[object, ...] = (*_ALL, *ANSWERED, HumanEval(), Reversal())
EVALUATED: Mapping[str, EvaluatedTask] = {
    task.name: task for task in _WITH_TEST_SPLIT if isinstance(task, EvaluatedTask)
}
"""Tasks with a test split."""


SUITES: Mapping[str, Suite] = {suite.name: suite for suite in (Core(),)}
"""Sets of tasks that are evaluated together."""


def find_evaluated(name: str, where: str = "--tasks") -> tuple[EvaluatedTask | Suite, str]:
    """Return the task or suite of a name, and the group that is asked for, or an empty text.

    `mmlu:anatomy` asks for a group of a task, `core:boolq` for a task of a suite. Raises `UserError` with `where` the
    name stands and the nearest name if there is no such task.
    """
    known: dict[str, EvaluatedTask | Suite] = {**EVALUATED, **SUITES}
    if name in known:
        return known[name], ""
    task, _, group = name.rpartition(":")
    if task in known:
        return known[task], group
    raise UserError(
        f"{where}: {name!r} is not a task with a test split{nearest(name, known)}: name some of {', '.join(known)}"
    )

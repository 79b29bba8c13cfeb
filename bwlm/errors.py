"""What users get told.

`UserError` is for what a person can mend: it prints as one line and exits with 2. `RunError` is for a run that failed
on its way: it exits with 1. Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BwlmError(Exception):
    """Base of every error that bwlm raises on purpose."""

    exit_code = 1


class UserError(BwlmError):
    """A mistake in the input: names the file or command, the field and the fix."""

    exit_code = 2


class RunError(BwlmError):
    """A run that began and could not end well."""


class TrainingDiverged(RunError):
    """The loss stopped being finite: names the step and the rows."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(BwlmError):
    """A run's process was asked to end: its steps are saved, and go on from there when it is launched again."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint like ` (did you mean 'seed'?)`, or nothing where no known name is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""

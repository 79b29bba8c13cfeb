"""Errors that bwlm raises on purpose, each with its exit code.

`UserError` is for a fault that a person can mend: it prints as one line and exits with 2; only the faults of a whole
file of conversations take a line each. `RunError` is for a run that failed on its way: it exits with 1. Any other
exception that escapes is a defect of bwlm and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BwlmError(Exception):
    """Base of every error that bwlm raises on purpose."""

    exit_code = 1


class UserError(BwlmError):
    """Mistake in the input; the message names the file or command, the field and the fix."""

    exit_code = 2


class Unusable(UserError):
    """Conversation that cannot be learned from; `kind` names its fault, so that faults can be counted."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class RunError(BwlmError):
    """Failure of a run that had begun."""


class TrainingDiverged(RunError):
    """Loss that is not finite any more; the message names the step and the rows."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(BwlmError):
    """Request to end that reached a run's process. Its steps are saved; launched again, the run resumes from them."""


class Paused(BwlmError):
    """Launch that stopped on request, or at a limit, before its cells were done; the same command resumes it.

    Its exit code is EX_TEMPFAIL of sysexits.h: it has failed for now, and a later try goes on.
    """

    exit_code = 75


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, short enough to be quoted in one of ours."""
    return (str(error) or type(error).__name__).split("\n")[0].strip().rstrip(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint like ` (did you mean 'seed'?)`, or an empty text if no known name is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""

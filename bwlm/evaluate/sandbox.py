"""Sandbox: runs programs that a model wrote, behind limits, and leaves no process of them.

A program runs with an empty environment in a folder of its own that is removed after it. Its CPU time, memory,
processes and files are limited, and its output is cut while it is read. Where the system allows, it has namespaces of
its own: no network, no other processes, and no files but Python's. `find_isolation` tells what holds here, as measured.
docs/security.md says what the sandbox does not protect from.

Only callers that the user has allowed to may run programs: the permission is theirs to check.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from bwlm.errors import RunError, UserError
from bwlm.evaluate import sandbox_supervisor
from bwlm.evaluate.sandbox_supervisor import Job, Report

log = logging.getLogger(__name__)

Outcome = Literal["passed", "failed", "timeout"]
PAGE = "docs/security.md"
_LITTLE = 0.5
"""Share of the CPU time below which a program that took too long may have waited for a busy machine."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program, all its processes together."""

    cpu_seconds: int = 10
    wall_seconds: float = 60.0
    """Longest time, which only a program that waits should reach."""
    memory_bytes: int = 2**30
    file_bytes: int = 2**24
    """Largest file; also of all files together."""
    processes: int = 16
    open_files: int = 64
    output_bytes: int = 4096
    """Bytes of the output that are kept: its end."""


LIMITS = Limits()
_PROBE_LIMITS = Limits(output_bytes=2**20)


@dataclass(frozen=True)
class ProgramRun:
    """Outcome of a program."""

    outcome: Outcome
    """`passed` if the program ran to its last line; `timeout` says nothing about the program being wrong."""
    detail: str
    """Reason why it did not pass, in a few words."""
    output: str
    """End of what it printed."""
    cpu_seconds: float
    wall_seconds: float


@dataclass(frozen=True)
class Isolation:
    """Protection that this machine gives to programs, besides the limits."""

    namespaces: bool
    """True if programs get namespaces of their own."""
    own_files: bool
    """True if programs see no files but Python's and their own."""
    no_network: bool
    """True if a program was seen to reach no network device."""
    no_home: bool
    """True if a program was seen to be unable to list the user's home folder."""

    @property
    def is_whole(self) -> bool:
        """True if every protection holds."""
        return all(vars(self).values())

    def __str__(self) -> str:
        """Return a line for people."""
        held = {
            "processes of its own": self.namespaces,
            "files of its own": self.own_files,
            "no network": self.no_network,
            "home folder hidden": self.no_home,
        }
        missing = [name for name, holds in held.items() if not holds]
        return f"sandbox without: {', '.join(missing)} ({PAGE})" if missing else "sandbox with all its protections"


# ---- running ----


def run_programs(
    programs: Sequence[str],
    limits: Limits = LIMITS,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda programs: None,
) -> list[ProgramRun]:
    """Return the outcome of each program; `workers` run at once, by default as many as there are CPU cores.

    A program that took too long and used little CPU time runs once more, alone, so that a busy machine does not count
    against it. Raises `UserError` where programs cannot be run safely.
    """
    isolation, runs = find_isolation(), list[ProgramRun]()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for run in pool.map(lambda program: run_program(program, limits, isolation), programs):
            runs.append(run)
            progress(1)
    return [
        run_program(program, limits, isolation) if _may_have_waited(run, limits) else run
        for program, run in zip(programs, runs, strict=True)
    ]


def _may_have_waited(run: ProgramRun, limits: Limits) -> bool:
    return run.outcome == "timeout" and run.cpu_seconds < _LITTLE * limits.cpu_seconds


def run_program(program: str, limits: Limits, isolation: Isolation) -> ProgramRun:
    """Return the outcome of a program."""
    report = _supervised(program, limits, isolation.namespaces, isolation.own_files)
    outcome, detail = _judge(report, limits)
    return ProgramRun(outcome, detail, report.output, report.cpu_seconds, report.wall_seconds)


def _judge(report: Report, limits: Limits) -> tuple[Outcome, str]:
    if report.stopped_by == "CPU time":
        return "timeout", f"over {limits.cpu_seconds} s of CPU time"
    if report.stopped_by == "time":
        return "timeout", f"over {limits.wall_seconds:g} s"
    if report.stopped_by:
        return "failed", f"too much: {report.stopped_by}"
    if report.reached_end:
        return "passed", ""
    if report.exit_code > 128:
        return "failed", f"ended by {_signal_name(report.exit_code - 128)}"
    if report.exit_code == 0:
        return "failed", "exits before its last line"
    return "failed", (report.output.strip().splitlines() or ["no error shown"])[-1][:200]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"exit code {128 + number}"


def _supervised(program: str, limits: Limits, namespaces: bool, own_files: bool) -> Report:
    with tempfile.TemporaryDirectory(prefix="bwlm-", ignore_cleanup_errors=True) as folder:
        job = Job(program, _python(), _prefix(), folder, **asdict(limits), namespaces=namespaces, own_files=own_files)
        supervisor = subprocess.Popen(
            [_python(), "-I", "-S", sandbox_supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={},
            start_new_session=True,
        )
        with supervisor:
            assert supervisor.stdin is not None
            assert supervisor.stdout is not None
            supervisor.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            supervisor.stdin.flush()  # and stays open: the supervisor ends the program when it closes
            told = supervisor.stdout.read().decode(errors="replace")
    try:
        return Report(**json.loads(told.rstrip().rpartition("\n")[2]))
    except (ValueError, TypeError):
        raise RunError(f"the sandbox failed: {told.strip()[-500:] or 'no report'}") from None


def _python() -> str:
    """Return Python itself, not a virtual environment's link to it, since the program sees only Python's folder."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def _prefix() -> str:
    return str(Path(sys.base_prefix).resolve())


# ---- what the machine allows ----

_PROBE = """
import ctypes, decimal, json, math, os, random, socket  # among them what tests import
try:
    names = os.listdir({home!r})
except OSError:
    names = []
print(json.dumps([[name for _, name in socket.if_nameindex()], names]))
"""


@cache
def find_isolation() -> Isolation:
    """Return what holds on this machine, found out by a program that tries it; a warning says what does not.

    Raises `UserError` where not even an unprivileged program can be run.
    """
    faults = []
    for namespaces, own_files in ((True, True), (True, False), (False, False)):
        try:
            isolation = _measured(namespaces, own_files)
        except RunError as error:
            faults.append(str(error))
            continue
        if not isolation.is_whole:
            log.warning("%s", isolation)
        return isolation
    raise UserError(f"--allow-code-execution: programs cannot be run safely here ({faults[-1]}): see {PAGE}")


def _measured(namespaces: bool, own_files: bool) -> Isolation:
    home = Path("~").expanduser().resolve()
    report = _supervised(_PROBE.format(home=str(home)), _PROBE_LIMITS, namespaces, own_files)
    if not report.reached_end:
        raise RunError(report.output.strip().rpartition("\n")[2] or report.stopped_by or "no error shown")
    devices, names = json.loads(report.output)
    prefix = Path(_prefix())
    shown = prefix.relative_to(home).parts[:1] if prefix.is_relative_to(home) else ()  # Python's own folder in it
    return Isolation(namespaces, own_files, no_network=set(devices) <= {"lo"}, no_home=set(names) <= set(shown))


if __name__ == "__main__":
    print(find_isolation())

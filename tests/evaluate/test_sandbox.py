"""The sandbox: what it says about programs, and that whatever a program tries stays inside and ends with it."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest

from bwlm.errors import RunError, UserError
from bwlm.evaluate import sandbox, sandbox_supervisor
from bwlm.evaluate.sandbox import Isolation, Limits, ProgramRun, find_isolation, run_program, run_programs

LIMITS = Limits(cpu_seconds=1, wall_seconds=20, memory_bytes=2**28, file_bytes=2**20, processes=8)
Run = Callable[..., ProgramRun]

_OF_THE_SYSTEM = Path("/usr/bin/python3")


def _readable_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of root without namespaces runs as another user, and needs a Python that all users can read."""
    if os.geteuid() != 0:
        return
    shown = subprocess.run(
        [_OF_THE_SYSTEM, "-c", "import sys; print(sys.version_info >= (3, 11), sys.base_prefix)"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    if shown[:1] != ["True"]:
        pytest.skip(f"needs {_OF_THE_SYSTEM} 3.11")
    monkeypatch.setattr(sandbox, "_python", lambda: str(_OF_THE_SYSTEM.resolve()))
    monkeypatch.setattr(sandbox, "_prefix", lambda: shown[1])


_KINDS = {"all": (True, True), "own_namespaces": (True, False), "limits_alone": (False, False)}


@pytest.fixture(params=[name if name == "all" else pytest.param(name, marks=pytest.mark.faults) for name in _KINDS])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Isolation:
    """Each kind of protection that this machine allows."""
    wanted = _KINDS[request.param]
    if not wanted[1]:
        _readable_by_all(monkeypatch)
    try:
        return sandbox._measured(*wanted)
    except RunError as error:
        pytest.skip(f"not on this machine: {error}")


@pytest.fixture
def run(isolation: Isolation) -> Run:
    """Run a program, given with any indent."""

    def start(program: str, **limits: float) -> ProgramRun:
        return run_program(textwrap.dedent(program), replace(LIMITS, **limits), isolation)

    return start


@pytest.fixture
def marker() -> Iterator[str]:
    """A word for a command line; afterwards no process on this machine may have it in its own."""
    word = uuid.uuid4().hex
    yield word
    assert not commands_with(word)


def commands_with(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in command:
            found.append(command)
    return found


# ---- outcomes ----


@pytest.mark.parametrize(
    ("program", "outcome", "detail"),
    [
        ("assert 1 + 1 == 2", "passed", ""),
        ("assert 1 + 1 == 3, 'no'", "failed", "AssertionError: no"),
        ("def f(:", "failed", "SyntaxError: invalid syntax"),
        ("", "passed", ""),
        ("import sys; sys.exit()", "failed", "exits before its last line"),
        ("import os; os._exit(0)", "failed", "exits before its last line"),
        ("raise SystemExit(3)", "failed", "no error shown"),
        ("import os; os.abort()", "failed", "ended by SIGABRT"),
        ("input()", "failed", "EOFError: EOF when reading a line"),
        ("x = '\\udc80 naïve 東京 \\0'", "passed", ""),
        ("f = lambda n: f(n + 1)\nf(0)", "failed", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_a_program_passes_only_at_its_last_line(program: str, outcome: str, detail: str) -> None:
    ran = run_program(program, LIMITS, find_isolation())
    assert (ran.outcome, ran.detail) == (outcome, detail)


def test_text_that_is_no_python_fails() -> None:
    [ran] = run_programs(["a\0b\nc"], LIMITS)
    assert ran.outcome == "failed"


def test_the_standard_library_is_there_and_nothing_else(run: Run) -> None:
    assert run("import collections, dataclasses, hashlib, heapq, math, random, re, typing").outcome == "passed"
    assert "No module named 'torch'" in run("import torch").detail
    assert "No module named 'bwlm'" in run("import bwlm").detail


def test_a_class_knows_its_module(run: Run) -> None:
    """dataclasses look up the module of a class whose annotations are texts."""
    program = """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class A:
            x: int
        assert A(1) == A(1)
    """
    assert run(program).detail == ""


def test_the_same_program_prints_the_same(run: Run) -> None:
    program = "print(hash('a'), list({'a', 'b', 'c', 'd', 'e'}))"
    assert run(program).output == run(program).output != ""


def test_the_environment_is_empty_and_the_folder_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    ran = run(
        """
        import json, os
        open("mine", "w").write("x")
        print(json.dumps([sorted(os.environ), os.getcwd(), os.listdir("."), os.environ["HOME"]]))
        """
    )
    names, folder, files, home = json.loads(ran.output)
    assert set(names) - {"LC_CTYPE"} == {"HOME", "PYTHONHASHSEED", "TMPDIR"}
    assert files == ["mine"]
    assert home == folder
    assert not Path(folder, "mine").exists()


def test_as_root_a_program_is_another_user(run: Run) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    program = """
        import os
        assert 0 not in (os.getuid(), os.geteuid(), os.getgid()) and not os.getgroups()
    """
    assert run(program).detail == ""


# ---- what must stay inside ----


@pytest.mark.faults
def test_a_fork_bomb_ends(run: Run, marker: str) -> None:
    program = f"""
        import os
        marker = "{marker}"
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """
    ran = run(program)
    assert ran.outcome != "passed"
    assert ran.wall_seconds < LIMITS.wall_seconds


def test_no_more_processes_run_than_allowed(run: Run) -> None:
    program = """
        import os, signal
        children = []
        try:
            while len(children) < 100:
                child = os.fork()
                if child == 0:
                    signal.pause()
                children.append(child)
        except OSError:
            assert len(children) < 8
            raise
    """
    ran = run(program)
    assert ran.outcome == "failed"
    assert ran.detail == "too much: processes" or "Resource temporarily unavailable" in ran.detail


def test_an_orphan_in_a_session_of_its_own_ends_with_its_program(run: Run, marker: str) -> None:
    program = f"""
        import subprocess, sys
        sleep = "import time; print(1, flush=True); time.sleep(600)"
        inner = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {{sleep!r}}, '{marker}'], "
        inner += "start_new_session=True)"
        outer = subprocess.Popen([sys.executable, "-S", "-c", inner], start_new_session=True, stdout=subprocess.PIPE)
        assert outer.wait() == 0  # the sleeper has no parent any more
        assert outer.stdout.read(1) == b"1"
    """
    ran = run(program)
    assert (ran.outcome, ran.detail) == ("passed", "")
    assert not commands_with(marker)


def test_a_thread_that_goes_on_does_not_hold_a_program(run: Run) -> None:
    program = "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()"
    assert run(program).outcome == "passed"


@pytest.mark.faults
def test_an_endless_print_is_cut(run: Run) -> None:
    ran = run("while True: print('x' * 1000)")
    assert (ran.outcome, ran.detail) == ("timeout", "over 1 s of CPU time")
    assert len(ran.output) <= LIMITS.output_bytes


def test_the_end_of_the_output_is_kept(run: Run) -> None:
    ran = run("print('x' * 100_000); print('last')")
    assert ran.outcome == "passed"
    assert len(ran.output) == LIMITS.output_bytes
    assert ran.output.endswith("x\nlast\n")


def test_a_socket_reaches_nobody(run: Run, isolation: Isolation) -> None:
    if not isolation.no_network:
        pytest.skip("this protection does not hold, and says so")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)")
    assert ran.outcome == "failed"
    assert "OSError" in ran.detail or "Error" in ran.detail


def test_the_home_folder_is_not_read(run: Run, isolation: Isolation) -> None:
    if not isolation.no_home:
        pytest.skip("this protection does not hold, and says so")
    home = Path("~").expanduser()
    files = [path for path in home.iterdir() if path.is_file()][:2]
    if not files:
        pytest.skip("needs a file in the home folder")
    for file in files:
        assert run(f"open({str(file)!r})").outcome == "failed"


def test_files_of_others_are_not_there(run: Run, isolation: Isolation, tmp_path: Path) -> None:
    if not isolation.own_files:
        pytest.skip("this protection does not hold, and says so")
    secret = tmp_path / "secret"
    secret.write_text("x")
    tmp_path.chmod(0o755)
    for path in (secret, Path(__file__), Path("/etc/passwd")):
        assert "No such file" in run(f"open({str(path)!r})").detail
    for folder in ("/", "/usr", sys.base_prefix, "/usr/lib"):
        assert run(f"open({folder!r} + '/mine', 'w')").outcome == "failed"


def test_a_folder_that_all_may_write_to_is_read_only_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An ordinary user's Python may lie in a folder of that user, and a program is that user."""
    isolation = find_isolation()
    if not isolation.own_files:
        pytest.skip("this protection does not hold, and says so")
    if not _OF_THE_SYSTEM.exists():
        pytest.skip(f"needs {_OF_THE_SYSTEM}")
    tmp_path.chmod(0o777)
    monkeypatch.setattr(sandbox, "_python", lambda: str(_OF_THE_SYSTEM.resolve()))
    monkeypatch.setattr(sandbox, "_prefix", lambda: str(tmp_path))
    ran = run_program(f"import os; os.listdir({str(tmp_path)!r}); open('{tmp_path}/mine', 'w')", LIMITS, isolation)
    assert "Read-only file system" in ran.detail
    assert not list(tmp_path.iterdir())


def test_memory_hunger_ends(run: Run) -> None:
    ran = run("x = [bytearray(2**24) for _ in range(1000)]")
    assert (ran.outcome, ran.detail) in [("failed", "MemoryError"), ("failed", "too much: memory")]


@pytest.mark.faults
def test_memory_of_all_processes_counts(run: Run) -> None:
    program = """
        import os
        for _ in range(3):
            if os.fork() == 0:
                break
        x = b"x" * 2**27
        import time
        time.sleep(600)
    """
    ran = run(program)
    assert (ran.outcome, ran.detail) == ("failed", "too much: memory")


@pytest.mark.faults
def test_cpu_time_of_all_processes_counts(run: Run) -> None:
    ran = run("import os\nos.fork(); os.fork()\nwhile True: pass", cpu_seconds=2)
    assert (ran.outcome, ran.detail) == ("timeout", "over 2 s of CPU time")
    assert ran.cpu_seconds < 4


@pytest.mark.faults
def test_sigterm_can_be_ignored_and_changes_nothing(run: Run) -> None:
    program = """
        import signal
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    """
    assert run(program).detail == "over 1 s of CPU time"


def test_a_sleeper_ends(run: Run) -> None:
    program = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    """
    ran = run(program, wall_seconds=0.5)
    assert (ran.outcome, ran.detail) == ("timeout", "over 0.5 s")
    assert ran.wall_seconds < 30


def test_a_huge_file_is_not_written(run: Run) -> None:
    program = """
        with open("huge", "wb") as file:
            for _ in range(64):
                file.write(bytes(2**20))
    """
    ran = run(program)
    assert ran.outcome == "failed"
    assert "OSError" in ran.detail or ran.detail in ("ended by SIGXFSZ", "too much: files")


def test_many_files_count_together(run: Run) -> None:
    program = """
        import time
        for n in range(64):
            with open(f"{n}", "wb") as file:
                file.write(bytes(2**19))
        time.sleep(600)
    """
    ran = run(program)
    assert ran.outcome == "failed"
    assert "OSError" in ran.detail or ran.detail == "too much: files"


def test_files_are_closed_at_a_limit(run: Run) -> None:
    assert "Too many open files" in run("x = [open('/dev/null') for _ in range(1000)]").detail


@pytest.mark.faults
def test_a_program_ends_when_the_evaluation_dies(isolation: Isolation, marker: str, tmp_path: Path) -> None:
    """The killed process had no time to end what it ran."""
    program = tmp_path / "program"  # a file, so that the marker stands in the program's command line alone
    sleep = f"[sys.executable, '-S', '-c', 'import time; time.sleep(600)', '{marker}']"
    program.write_text(f"import subprocess, sys; subprocess.run({sleep})")
    code = (
        "import sys\nfrom bwlm.evaluate import sandbox\n"
        f"sandbox._python, sandbox._prefix = (lambda: {sandbox._python()!r}), (lambda: {sandbox._prefix()!r})\n"
        f"program, kind = open({str(program)!r}).read(), ({isolation.namespaces}, {isolation.own_files})\n"
        "sandbox._supervised(program, sandbox.LIMITS, *kind)"
    )
    evaluation = subprocess.Popen([sys.executable, "-c", code])
    while not commands_with(marker):
        assert evaluation.poll() is None
    evaluation.kill()
    evaluation.wait()
    while commands_with(marker):  # ends as soon as the supervisor sees that its parent is gone
        os.sched_yield()


@pytest.mark.parametrize(
    ("processes", "cpu_seconds", "memory", "seconds", "told"),
    [
        (8, 0.9, 2**28, 19, ""),
        (9, 0.9, 2**28, 19, "processes"),
        (8, 1.0, 2**28, 19, "CPU time"),
        (8, 0.9, 2**28 + 1, 19, "memory"),
        (8, 0.9, 2**28, 20, "time"),
    ],
)
def test_each_limit_is_watched(
    processes: int, cpu_seconds: float, memory: int, seconds: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own limits come first in most cases, but not on every machine."""
    use = sandbox_supervisor._Use(processes, cpu_seconds, memory)
    monkeypatch.setattr(sandbox_supervisor, "_use_below", lambda pid, helpers: use)
    job = sandbox_supervisor.Job("", "", "", "", **asdict(LIMITS), namespaces=True, own_files=True)
    reading, writing = os.pipe()
    try:
        watch = sandbox_supervisor._Watch(job, os.getpid(), reading, time.monotonic() - seconds)
        assert watch._limit() == told
        os.close(watch._ended)
    finally:
        os.close(reading)
        os.close(writing)


def test_all_processes_below_are_counted() -> None:
    """A child and its own child, which burn no CPU time; a helper does not count."""
    inner = "import sys; print(1, flush=True); sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {inner!r}])"
    command = [sys.executable, "-S", "-c", outer]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"1"
        below = sandbox_supervisor._below(child.pid)
        assert len(below) == 1
        assert {child.pid, *below} <= set(sandbox_supervisor._below(os.getpid()))
        use = sandbox_supervisor._use_below(child.pid, 0)
        assert (use.processes, sandbox_supervisor._use_below(child.pid, 1).processes) == (1, 0)
        assert use.memory_bytes > 2**20
        assert child.stdin is not None
        child.stdin.close()


# ---- many programs ----


def test_outcomes_come_in_the_order_of_the_programs() -> None:
    counted: list[int] = []
    runs = run_programs([f"assert {n} % 3" for n in range(9)], LIMITS, workers=4, progress=counted.append)
    assert [run.outcome for run in runs] == ["failed", "passed", "passed"] * 3
    assert sum(counted) == 9


def test_a_program_that_waited_runs_once_more_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not count against it; one that used its CPU time has had its chance."""
    started: list[str] = []
    waited = ProgramRun("timeout", "over 20 s", "", 0.1, 20.0)
    worked = ProgramRun("timeout", "over 1 s of CPU time", "", 1.0, 2.0)
    passed = ProgramRun("passed", "", "", 0.1, 0.2)

    def ran(program: str, limits: Limits, isolation: Isolation) -> ProgramRun:
        started.append(program)
        return {"fine": passed, "slow": worked, "idle": waited}.get(
            program, waited if started.count(program) == 1 else passed
        )

    monkeypatch.setattr(sandbox, "run_program", ran)
    runs = run_programs(["fine", "busy", "slow", "idle"], LIMITS, workers=1)
    assert [run.outcome for run in runs] == ["passed", "passed", "timeout", "timeout"]
    assert started == ["fine", "busy", "slow", "idle", "busy", "idle"]


def test_a_machine_that_allows_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Isolation:
        raise RunError("no Python")

    monkeypatch.setattr(sandbox, "_measured", fails)
    find_isolation.cache_clear()
    try:
        with pytest.raises(UserError, match=r"--allow-code-execution: .*\(no Python\): see docs/security\.md"):
            find_isolation()
    finally:
        find_isolation.cache_clear()


def test_what_is_said_to_hold_was_measured(isolation: Isolation) -> None:
    devices = {name for _, name in socket.if_nameindex()}
    assert isolation.no_network == (isolation.namespaces or devices <= {"lo"})


def test_what_does_not_hold_is_said() -> None:
    assert str(Isolation(True, True, True, True)) == "sandbox with all its protections"
    weak = str(Isolation(True, False, False, True))
    assert weak == "sandbox without: files of its own, no network (docs/security.md)"


def test_a_warning_says_what_does_not_hold(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sandbox, "_measured", lambda *wanted: Isolation(*wanted, True, False))
    find_isolation.cache_clear()
    try:
        find_isolation()
        find_isolation()
    finally:
        find_isolation.cache_clear()
    assert caplog.messages == ["sandbox without: home folder hidden (docs/security.md)"]


def test_the_page_on_security_tells_how_to_see_it() -> None:
    command = "python -m bwlm.evaluate.sandbox"
    root = Path(__file__).parents[2]
    assert f"    {command}\n" in (root / "docs" / "security.md").read_text()
    done = subprocess.run([sys.executable, *command.split()[1:]], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == f"{find_isolation()}\n"


@pytest.mark.parametrize("module", [sandbox, sandbox_supervisor])
def test_it_imports_the_standard_library_and_our_errors_alone(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    ours = {"bwlm.errors", "bwlm.evaluate", "bwlm.evaluate.sandbox_supervisor"} if module is sandbox else set[str]()
    assert others <= ours

"""Supervisor of one program of a model: a script that starts it behind limits and leaves no process of it.

    parent --job--> supervisor > [entrance > init of the namespaces >] program
           <-report--

The parent writes a `Job` as a line of JSON to stdin, and keeps stdin open: when it closes, as it does if the parent
dies, the program is ended. The report is the last line of stdout, written when every process is gone. The supervisor
imports nothing outside the standard library and runs with `python -I -S`.

Each limit of `resource` holds for one process. The supervisor adds up what all processes of the program use.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

_NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000
"""Flags of `unshare` for mounts, IPC, processes and network."""
_USERS = 0x10000000
_PRIVATE, _BIND, _RECURSIVE, _DETACH = 1 << 18, 4096, 16384, 2
_NO_SUID, _NO_DEVICES = 2, 4
_MOUNT_SETATTR, _READ_ONLY, _WHOLE_TREE, _HERE = 442, 1 | 2, 0x8000, -100
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES, _ADOPT_ORPHANS = 1, 38, 36

_LIBRARIES = ("/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_OLD, _WORK = "/old", "/program"
_STATUS = 3
"""File descriptor to which a program that reached its end writes its token."""
_OWN_USERS = 61184, 4000
"""First id, and number, of the user ids that programs get where root starts them; no account has them."""
_POLL_SECONDS = 0.02
_MOST_FILES = 4096
_TOKEN_BYTES = 16

_RUNNER = """
import os, sys, types
token, program = sys.stdin.buffer.read().split(b"\\n", 1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.set_inheritable(3, False)
module = sys.modules["program"] = types.ModuleType("program")
exec(compile(program, "program", "exec"), module.__dict__)
os.write(3, token)
sys.stdout.flush()
os._exit(0)  # threads that go on do not hold it
"""
"""First code of the program's process. `sys.exit()` in the program does not reach its last line."""


@dataclass(frozen=True)
class Job:
    """Program and how it is run."""

    program: str
    python: str
    prefix: str
    """Folder of the standard library."""
    folder: str
    """Working folder, where the program does not see a folder of its own."""
    cpu_seconds: int
    wall_seconds: float
    memory_bytes: int
    file_bytes: int
    processes: int
    open_files: int
    output_bytes: int
    namespaces: bool
    own_files: bool
    """True to show the program nothing but Python, its libraries and an empty folder."""


@dataclass(frozen=True)
class Report:
    """Outcome of a program, after all its processes are gone."""

    reached_end: bool
    exit_code: int
    """Exit code of the first process; 128 + N for a signal N."""
    stopped_by: str
    """Limit at which the supervisor ended the program, or an empty text."""
    cpu_seconds: float
    wall_seconds: float
    output: str
    """End of what the program printed."""


# ---- the supervisor ----


@dataclass
class _Use:
    """Processes of the program, and what they use together."""

    processes: int
    cpu_seconds: float
    memory_bytes: int


def supervise(job: Job) -> Report:
    """Run the program of a job and return its report."""
    began, token = time.monotonic(), os.urandom(_TOKEN_BYTES).hex()
    _prctl(_ADOPT_ORPHANS, 1)
    source, output, status = _file_of(f"{token}\n{job.program}"), os.pipe(), os.pipe()
    first = os.fork()
    if first == 0:
        _in_child(lambda: _enter(job, source, output[1], status[1]))
    for fd in (source, output[1], status[1]):
        os.close(fd)
    watch = _Watch(job, first, output[0], began)
    try:
        stopped_by = watch.until_end()
    finally:
        exit_code, cpu_seconds = _end_all(first)
    watch.read()
    return Report(
        reached_end=not stopped_by and _read(status[0]) == token.encode(),
        exit_code=exit_code,
        stopped_by=stopped_by,
        cpu_seconds=max(cpu_seconds, watch.cpu_seconds),
        wall_seconds=time.monotonic() - began,
        output=watch.output.decode(errors="replace"),
    )


def _file_of(text: str) -> int:
    """Return the descriptor of a file in memory that holds a text."""
    file = os.memfd_create("program")
    with open(file, "wb", closefd=False) as opened:
        opened.write(text.encode(errors="surrogatepass"))
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _read(pipe: int) -> bytes | None:
    """Return what a pipe holds, at most 64 KiB; empty at its end, None if there is nothing now."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 2**16)
    except BlockingIOError:
        return None


class _Watch:
    """Watches a running program: reads its output, of which it keeps the end, and compares its use with the limits."""

    def __init__(self, job: Job, first: int, output: int, began: float) -> None:
        self.job, self.first, self.began = job, first, began
        self.output, self.cpu_seconds = b"", 0.0
        self._output = output
        self._ended = os.pidfd_open(first)

    def until_end(self) -> str:
        """Return when the program has ended, or must end, with the limit that it reached or an empty text."""
        waited = [0, self._output, self._ended]
        while True:
            ready, _, _ = select.select(waited, [], [], _POLL_SECONDS)
            if self._output in ready and not self.read():
                waited.remove(self._output)
            if self._ended in ready:
                return ""
            if 0 in ready:
                return "the evaluation ended"
            if reached := self._limit():
                return reached

    def read(self) -> bool:
        """Read what the program has printed since, at most as much as a pipe holds; return false at its end."""
        for _ in range(16):
            part = _read(self._output)
            if part is None:
                return True
            if not part:
                return False
            self.output = (self.output + part)[-self.job.output_bytes :]
        return True

    def _limit(self) -> str:
        use, job = _use_below(os.getpid(), _helpers(self.job)), self.job
        self.cpu_seconds = max(self.cpu_seconds, use.cpu_seconds)
        if use.cpu_seconds >= job.cpu_seconds:
            return "CPU time"
        if time.monotonic() - self.began >= job.wall_seconds:
            return "time"
        if use.memory_bytes > job.memory_bytes:
            return "memory"
        if use.processes > job.processes:
            return "processes"
        if not job.own_files and _size_above(job.folder, job.file_bytes):
            return "files"
        return ""


def _helpers(job: Job) -> int:
    """Return the number of processes between the supervisor and the program."""
    return 2 if job.namespaces else 0


def _end_all(first: int) -> tuple[int, float]:
    """Kill and reap every process below this one; return the first one's exit code, and the CPU time of all.

    Orphans become children of this process, so none is left when it has no child.
    """
    exit_code, cpu_seconds = 0, 0.0
    while True:
        for pid in _below(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, status, used = os.wait4(-1, 0)
        except ChildProcessError:
            return exit_code, cpu_seconds
        cpu_seconds += used.ru_utime + used.ru_stime
        if pid == first:
            exit_code = _as_shell(status)


def _as_shell(status: int) -> int:
    """Return the exit code of a status as a shell gives it: 128 + N for a signal N."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _below(pid: int) -> list[int]:
    """Return the processes that descend from a process."""
    found, pending = [], [pid]
    while pending:
        parent = pending.pop()
        try:
            tasks = Path(f"/proc/{parent}/task").iterdir()
            children = [int(n) for task in tasks for n in (task / "children").read_text("ascii").split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += children
        pending += children
    return found


def _use_below(pid: int, helpers: int) -> _Use:
    use = _Use(-helpers, 0.0, 0)
    for process in _below(pid):
        try:
            times = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[11:15]
            pages = int(Path(f"/proc/{process}/statm").read_bytes().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        use.processes += 1
        use.cpu_seconds += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        use.memory_bytes += pages * resource.getpagesize()
    return use


def _size_above(folder: str, most: int) -> bool:
    """Return whether the files of a folder are larger together."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(f"{parent}/{name}").st_blocks * 512
            except OSError:
                continue
            if size > most:
                return True
    return False


# ---- from the supervisor to the program, each function in a process of its own ----


def _in_child(body: Callable[[], object]) -> None:
    """Run the rest of a forked process, which must never return into its parent's code."""
    try:
        body()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)


def _enter(job: Job, source: int, output: int, status: int) -> None:
    """Become the program, or enter namespaces and wait there for it."""
    _own_descriptors(source, output, status)
    _prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    _first_for_the_oom_killer()
    user = _own_user()
    if not job.namespaces:
        if user is not None:
            os.chown(job.folder, user, user)
        _start(job, job.folder, user)
    _unshare(user)
    init = os.fork()  # the first process of a namespace of processes: the kernel ends all others with it
    if init == 0:
        _in_child(lambda: _init(job, user))
    os.closerange(0, _STATUS + 1)
    os._exit(_exit_code(init))


def _init(job: Job, user: int | None) -> None:
    _prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if job.own_files:
        _show_only_python(job, (os.getuid(), os.getgid()) if user is None else (user, user))
    elif user is not None:
        os.chown(job.folder, user, user)
    program = os.fork()
    if program == 0:
        _in_child(lambda: _start(job, _WORK if job.own_files else job.folder, user))
    os.closerange(0, _STATUS + 1)
    os._exit(_exit_code(program))


def _exit_code(wanted: int) -> int:
    """Reap children until one ends; return its exit code."""
    while True:
        pid, status = os.wait()
        if pid == wanted:
            return _as_shell(status)


def _start(job: Job, folder: str, user: int | None) -> None:
    """Become the program."""
    os.setsid()
    os.chdir(folder)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # a change of user has cleared it
    _prctl(_NO_NEW_PRIVILEGES, 1)
    _limit_resources(job, user)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    environment = {"HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"}
    os.execve(job.python, [job.python, "-s", "-P", "-S", "-c", _RUNNER], environment)


def _limit_resources(job: Job, user: int | None) -> None:
    processes = job.processes
    if user is None and not job.namespaces:  # the limit counts all processes of the user
        processes += _threads_of(os.getuid())
    limits = {
        resource.RLIMIT_CPU: job.cpu_seconds + 1,  # the supervisor comes first, and knows why it ended the program
        resource.RLIMIT_AS: job.memory_bytes,
        resource.RLIMIT_FSIZE: job.file_bytes,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: job.open_files,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        allowed = resource.getrlimit(kind)[1]
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(kind, (most, most))


def _threads_of(user: int) -> int:
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == user:
                count += sum(1 for _ in (process / "task").iterdir())
    return count


def _first_for_the_oom_killer() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _own_user() -> int | None:
    """Return the user id that a program of root gets; None where an ordinary user starts it, as that user."""
    first, count = _OWN_USERS
    return first + os.getpid() % count if os.geteuid() == 0 else None


def _own_descriptors(source: int, output: int, status: int) -> None:
    """Make the pipes the descriptors 0 to 3, and close all others."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (source, output, output, status)]
    for place, fd in enumerate(high):
        os.dup2(fd, place)
    os.closerange(_STATUS + 1, os.sysconf("SC_OPEN_MAX"))


# ---- namespaces ----


def _unshare(user: int | None) -> None:
    """Enter new namespaces. Root needs none of users, and so can show files that only root can reach."""
    if user is not None:
        return _check(_LIBC.unshare(_NAMESPACES), "unshare")
    user_id, group_id = os.getuid(), os.getgid()
    _check(_LIBC.unshare(_NAMESPACES | _USERS), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user_id} {user_id} 1")
    Path("/proc/self/gid_map").write_text(f"{group_id} {group_id} 1")
    return None


def _show_only_python(job: Job, owner: tuple[int, int]) -> None:
    """Make a root of Python, its libraries and an empty folder, all but the folder read-only; hide everything else."""
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NO_SUID, "size=1m,mode=755")
    os.chdir("/tmp")
    Path("old").mkdir()
    _check(_LIBC.pivot_root(b".", b"old"), "pivot_root")
    os.chdir("/")
    for path in (*_LIBRARIES, job.prefix, *_DEVICES):
        _show(path)
    _check(_LIBC.umount2(_OLD.encode(), _DETACH), "umount")
    Path(_OLD).rmdir()
    Path(_WORK).mkdir()
    _make_read_only("/", 0)
    size = f"size={job.file_bytes},nr_inodes={_MOST_FILES}"
    _mount("tmpfs", _WORK, "tmpfs", _NO_SUID | _NO_DEVICES, f"{size},mode=700,uid={owner[0]},gid={owner[1]}")


def _show(path: str) -> None:
    """Show a file, folder or link of the old root at its own place."""
    old = Path(_OLD + path)
    if Path(path).exists() or not os.path.lexists(old):
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if old.is_symlink():
        Path(path).symlink_to(old.readlink())
        return
    if old.is_dir():
        Path(path).mkdir()
    else:
        Path(path).touch()
    _mount(str(old), path, None, _BIND | _RECURSIVE)
    _make_read_only(path, _WHOLE_TREE)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def _make_read_only(path: str, depth: int) -> None:
    wanted = _MountAttributes(set=_READ_ONLY)
    size = ctypes.sizeof(wanted)
    _check(_LIBC.syscall(_MOUNT_SETATTR, _HERE, path.encode(), depth, ctypes.byref(wanted), size), f"mount {path}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_LIBC.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


# ---- calls of the system that Python does not have ----

_LIBC = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


def _prctl(option: int, value: int) -> None:
    _check(_LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0), "prctl")


if __name__ == "__main__":
    print(json.dumps(asdict(supervise(Job(**json.loads(sys.stdin.buffer.readline()))))))

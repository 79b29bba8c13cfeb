"""`bwlm doctor`: this machine, and a cluster of two nodes, as a job and from a node; and what it says of faults."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bwlm.cluster import doctor
from bwlm.plan.doctor import checked
from tests.cluster.heads import BIN, Head, documented, ray_job, second_node
from tests.shell import Shell

NAMES = ["nodes", "versions", "storage", "clocks", "all-reduce (gloo)", "MLflow"]


def from_a_node(head: Head, storage: Path, **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status and the checks by name of the command of docs/cluster.md."""
    [line] = documented("RAY_ADDRESS=auto bwlm doctor --cluster")
    words = [str(storage) if word == "/shared/runs" else word for word in shlex.split(line)[1:]]
    env = head.environment | {"RAY_ADDRESS": head.gcs} | environment
    done = subprocess.run([BIN / words[0], *words[1:], "--json"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(done.stdout)
    assert document["is_ok"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in document["checks"]}


@pytest.mark.faults
def test_two_nodes_in_order_and_one_fault_after_another(head: Head, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    with second_node(head, tmp_path / "node.log"):
        code, checks = from_a_node(head, storage)
        assert list(checks) == NAMES
        assert code == 0, checks
        assert checks["nodes"]["found"].startswith("2 nodes")
        assert checks["all-reduce (gloo)"]["found"].startswith("2 nodes in ")
        assert list(storage.iterdir()) == []

        away = from_a_node(head, storage, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
        assert [name for name, check in away[1].items() if not check["is_ok"]] == ["MLflow"]
        assert "does not answer (Connection refused)" in away[1]["MLflow"]["found"]

        read_only = from_a_node(head, Path("/proc/runs"))
        assert [name for name, check in read_only[1].items() if not check["is_ok"]] == ["storage"]
        assert "mount the same folder" in read_only[1]["storage"]["fix"]

    # a node that has another torch: what its packages say of themselves
    other = tmp_path / "other" / "torch-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.1\n")
    with second_node(head, tmp_path / "other.log", PYTHONPATH=str(other.parent)):
        code, checks = from_a_node(head, storage)
        assert code == 1
        assert [name for name, check in checks.items() if not check["is_ok"]] == ["versions"]
        assert "torch differs" in checks["versions"]["found"]
        assert "0.1 on " in checks["versions"]["found"]
        assert "requirements.lock" in checks["versions"]["fix"]


@pytest.mark.faults
def test_a_job_says_line_by_line_what_is_in_order(head: Head, tmp_path: Path) -> None:
    done = ray_job(head, "submit", "--", "bwlm", "doctor", "--cluster", "--storage", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stdout[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "failed "))]
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines] == NAMES
    assert "Traceback" not in done.stdout


def nodes_with(offsets: list[float], monkeypatch: pytest.MonkeyPatch) -> doctor.Nodes:
    nodes = object.__new__(doctor.Nodes)
    nodes.names, nodes._probes = ["a", "b"], [0, 1]
    monkeypatch.setattr(doctor, "_clock_offset", lambda probe: offsets[probe])
    return nodes


def test_clocks_that_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nodes_with([0.0, 0.4], monkeypatch)._same_time() == "at most 0.40 s apart"
    with pytest.raises(RuntimeError, match=r"1\.5 s apart: b is ahead of a"):
        nodes_with([-0.7, 0.8], monkeypatch)._same_time()


def test_a_clock_is_read_by_the_quickest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked at 0, 10, .. s; each answer takes longer than the one before, and only the first is right: 5 s ahead."""
    times = iter(time for look in range(5) for time in (10.0 * look, *[10.0 * look + 2.0 * look + 1.0] * 2))
    answers = iter([5.5, 99.0, 99.0, 99.0, 99.0])

    class Now:
        def remote(self) -> None: ...

    class Probe:
        now = Now()

    monkeypatch.setattr(doctor.time, "time", lambda: next(times))
    monkeypatch.setattr(doctor.ray, "get", lambda asked, timeout: next(answers))
    assert doctor._clock_offset(Probe()) == 5.0


def test_a_check_tells_the_first_line_of_whatever_goes_wrong() -> None:
    def broken() -> str:
        raise KeyError("x\ny")

    assert checked("c", broken, "mend it") == ("c", False, "'x\\ny'", "mend it")
    assert checked("c", lambda: "fine", "mend it") == ("c", True, "fine", "")


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The answer of the compiler's check, '' if it works; the check itself is tested in tests/model/test_compute.py."""
    answer = [""]
    monkeypatch.setattr("bwlm.plan.doctor.why_not_compile", lambda device: answer[0])
    return answer


def test_this_machine(shell: Shell, quick_compiler: list[str]) -> None:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    answer = shell("doctor")
    assert answer.code == 0, answer.out
    assert [line.split(":")[0].split(maxsplit=1) for line in answer.out.splitlines()] == [
        ["ok", name] for name in ("packages", "storage", "MLflow", "processors", "compiler")
    ]
    assert "mlflow.db is made by the first launch" in answer.out
    assert not shell.storage.exists()


def test_faults_of_this_machine(shell: Shell, quick_compiler: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quick_compiler[0] = "no compiler here"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    answer = shell("doctor", "--storage", "/proc/runs", "--json")
    assert answer.code == 1
    checks = {check["name"]: check for check in json.loads(answer.out)["checks"]}
    assert [name for name, check in checks.items() if not check["is_ok"]] == ["storage", "MLflow", "compiler"]
    assert "not writable" in checks["storage"]["found"]
    assert checks["compiler"]["found"] == "no compiler here"


def test_without_a_cluster_there_is_nothing_to_check(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    answer = shell("doctor", "--cluster")
    assert (answer.code, answer.out) == (2, "")
    assert "RAY_ADDRESS is not set" in answer.err

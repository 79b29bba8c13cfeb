"""`ray job submit` against a real head node: logs a person can read, an exit status a script can trust."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from bwlm.record.checkpoint import checkpoint_steps
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import last_entry
from tests.cluster.heads import BIN, ROOT, Head, documented, free_ports, node_of, ray_job, submit
from tests.runs import NewFamily


def status_of(url: str, token: str = "") -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_submitted_grid_runs_and_reports(head: Head, corpus: Path, tmp_path: Path) -> None:
    source = f"data.source={corpus}"
    small = ["--set", source, "--set", "tokenizer.vocab_size=400", "--set", "axes.direction=[forward, backward]"]
    done = submit(head, tmp_path / "storage", "grids/tiny.yaml", *small)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"storage: {tmp_path / 'storage'}" in done.stdout
    assert "2/2 tiny_" in done.stdout
    assert "too few seeds to tell" in done.stdout
    assert "Traceback" not in done.stdout
    assert (tmp_path / "storage" / "grids" / "tiny" / "RESEARCH_REPORT.md").exists()

    wrong = submit(head, tmp_path / "storage", "grids/tiny.yaml", "--set", "model.sequence_lenght=3")
    assert wrong.returncode != 0
    assert "did you mean 'sequence_length'?" in wrong.stdout
    assert "Traceback" not in wrong.stdout


def test_a_grid_that_was_run_here_is_finished_as_a_job(head: Head, corpus: Path, tmp_path: Path) -> None:
    sets = [f"data.source={corpus}", "tokenizer.vocab_size=400", "axes.direction=[forward]", "budget.steps=4"]
    options = [word for one in sets for word in ("--set", one)]
    alone = {name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}
    run = [BIN / "bwlm", "grid", "run", "grids/tiny.yaml", *options, "--storage", str(tmp_path / "storage")]
    launched = subprocess.run(run, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=400)
    assert launched.returncode == 0, launched.stdout[-3000:] + launched.stderr[-3000:]
    done = submit(head, tmp_path / "storage", "grids/tiny.yaml", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"storage: {tmp_path / 'storage'}" in done.stdout
    assert "1/1" not in done.stdout  # nothing was left to train


def test_the_readme_says_what_the_page_does() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in documented("export RAY_AUTH_MODE=token", "ray job submit"):
        assert command in readme


def test_the_dashboard_asks_for_the_token(head: Head) -> None:
    token = (Path(head.environment["HOME"]) / ".ray" / "auth_token").read_text()
    assert status_of(f"{head.dashboard}/api/jobs/") == 401
    assert status_of(f"{head.dashboard}/api/jobs/", "x" * 64) == 403
    assert status_of(f"{head.dashboard}/api/jobs/", token) == 200


def test_a_second_node_joins_with_the_token(head: Head, tmp_path: Path) -> None:
    start = shlex.split(documented("ray start --address")[0].replace("HEAD:6379", head.gcs))

    def nodes() -> int:
        words = [BIN / "ray", "status", "--address", head.gcs]
        done = subprocess.run(words, env=head.environment, capture_output=True, text=True, timeout=60)
        return len(re.findall(r"^ 1 node_", done.stdout, re.MULTILINE))

    [metrics] = free_ports(1)
    command = [*start, "--block", "--disable-usage-stats", "--num-cpus=1", f"--metrics-export-port={metrics}"]
    assert nodes() == 1
    with node_of(command, head.environment, tmp_path / "node.log", lambda: nodes() == 2):
        pass


@pytest.mark.parametrize("mode", ["token", None])
def test_a_cluster_that_refuses_is_told_in_one_line(head: Head, corpus: Path, tmp_path: Path, mode: str | None) -> None:
    environment = head.environment | {"HOME": str(tmp_path), "RAY_ADDRESS": head.gcs}
    del environment["RAY_AUTH_MODE"]
    command = [BIN / "bwlm", "grid", "run", ROOT / "grids/tiny.yaml", "--set", f"data.source={corpus}"]
    done = subprocess.run(
        [*command, "--storage", tmp_path / "runs"],
        env=environment | ({"RAY_AUTH_MODE": mode} if mode else {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    told = done.stderr.splitlines()[-1]  # after what is said of the text, which is prepared first
    assert told.startswith(f"bwlm: RAY_ADDRESS: {head.gcs}: ")
    assert "export RAY_AUTH_MODE=token" in told


def test_a_stopped_job_saves_its_cells(head: Head, corpus: Path, tmp_path: Path) -> None:
    settings = [f"data.source={corpus}", "tokenizer.vocab_size=400", "axes.direction=[forward]", "budget.steps=100000"]
    options = ("--no-wait", "--submission-id", "stopped")
    arguments = [word for setting in [*settings, "checkpoint.every=0"] for word in ("--set", setting)]
    submitted = submit(head, tmp_path / "storage", "grids/tiny.yaml", *arguments, options=options)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    folder = ExperimentFolder(tmp_path / "storage", "tiny_forward_d1_lr1_s0")
    deadline = time.monotonic() + 400
    while (entry := last_entry(folder.path)) is None or entry.step < 5:
        assert time.monotonic() < deadline, ray_job(head, "logs", "stopped").stdout[-3000:]
        time.sleep(0.1)
    ray_job(head, "stop", "stopped")
    assert "bwlm: stopped by SIGTERM; run the same command to resume" in ray_job(head, "logs", "stopped").stdout
    status = folder.status()
    assert (status.state, status.reason) == ("stopped", "")
    assert checkpoint_steps(folder.checkpoints) == [status.step]


class ServeJob:
    """A server as a job."""

    def __init__(self, head: Head, run: ExperimentFolder) -> None:
        self.url = f"http://127.0.0.1:{head.port}"
        self.head, self.run = head, run

    def submit(self, id: str) -> None:
        """The submit of docs/serve.md with another run, storage and port."""
        words = shlex.split(documented("ray job submit", page="serve.md")[0])
        assert words[:3] == ["ray", "job", "submit"]
        end = words.index("jobs/serve.py") + 1
        arguments = [self.run.id, "--storage", str(self.run.path.parent), "--port", str(self.head.port)]
        done = ray_job(self.head, "submit", "--submission-id", id, *words[3:end], *arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    def log(self, id: str) -> str:
        return ray_job(self.head, "logs", id).stdout

    def has_failed(self, id: str) -> bool:
        return f"Job '{id}' failed" in ray_job(self.head, "status", id).stdout

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v1/models").status_code == 200
        except httpx.TransportError:
            return False

    def wait_for(self, holds: Callable[[], bool], id: str) -> None:
        deadline = time.monotonic() + 200
        while not holds():
            assert time.monotonic() < deadline, self.log(id)
            time.sleep(0.2)


def test_a_submitted_server_answers_until_it_is_stopped(head: Head, trained_base: NewFamily) -> None:
    job = ServeJob(head, trained_base("backward"))
    job.submit("server")
    job.wait_for(job.answers, "server")
    asked = {"model": "backward:backward", "prompt": "river", "max_tokens": 8}
    assert httpx.post(f"{job.url}/v1/completions", json=asked).json()["usage"]["completion_tokens"] == 8

    job.submit("second")
    job.wait_for(lambda: job.has_failed("second"), "second")
    assert "bwlm: Ray Serve runs on this cluster already: end it (`serve shutdown`)" in job.log("second")
    assert job.answers()

    ray_job(head, "stop", "server")
    assert f"serving backward on {job.url}" in job.log("server")
    assert not re.search("Traceback|failed", job.log("server"))
    assert not job.answers()


def test_a_server_whose_job_was_killed_serves_on_until_it_is_shut_down(head: Head, trained_base: NewFamily) -> None:
    job = ServeJob(head, trained_base("backward"))
    job.submit("killed")  # where one was stopped before: nothing of it is left
    job.wait_for(job.answers, "killed")
    [driver] = [one for one in psutil.process_iter() if one.cmdline()[1:3] == ["jobs/serve.py", "backward"]]
    driver.kill()
    job.wait_for(lambda: job.has_failed("killed"), "killed")
    assert job.answers()
    [shutdown] = documented("serve shutdown", page="serve.md")
    environment = head.environment | {"RAY_DASHBOARD_ADDRESS": head.dashboard}
    done = subprocess.run([BIN / "serve", *shlex.split(shutdown)[1:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    job.wait_for(lambda: not job.answers(), "killed")

"""`ray job submit` against a real head node: logs a person can read, an exit status a script can trust."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
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
from bwlm.record.journal import last_entry, read_journal
from tests.cluster.heads import BIN, ROOT, Head, documented, ray_job, second_node, submit
from tests.runs import NewFamily

TRAIN = "jobs/train.py"


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
    def nodes() -> int:
        words = [BIN / "ray", "status", "--address", head.gcs]
        done = subprocess.run(words, env=head.environment, capture_output=True, text=True, timeout=60)
        return len(re.findall(r"^ 1 node_", done.stdout, re.MULTILINE))

    assert nodes() == 1
    with second_node(head, tmp_path / "node.log"):
        deadline = time.monotonic() + 60  # the head's report comes some seconds later
        while nodes() < 2:
            assert time.monotonic() < deadline, (tmp_path / "node.log").read_text()


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


def tiny(corpus: Path, *settings: str) -> list[str]:
    """Arguments for the grid tests/tiny.yaml, or a part of it, on the tests' corpus."""
    sets = [f"data.source={corpus}", "tokenizer.vocab_size=400", *settings]
    return ["grids/tiny.yaml", *(word for one in sets for word in ("--set", one))]


def wait_for_step(head: Head, folder: ExperimentFolder, step: int, id: str) -> None:
    deadline = time.monotonic() + 400
    while (entry := last_entry(folder.path)) is None or entry.step < step:
        assert time.monotonic() < deadline, ray_job(head, "logs", id).stdout[-3000:]
        time.sleep(0.1)


def test_a_stopped_job_saves_its_cells_and_the_same_submit_goes_on(head: Head, corpus: Path, tmp_path: Path) -> None:
    settings = ("axes.direction=[forward]", "budget.steps=1000", "checkpoint.every=0")
    submitted = submit(
        head, tmp_path / "storage", *tiny(corpus, *settings), options=("--no-wait", "--submission-id", "stopped")
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    folder = ExperimentFolder(tmp_path / "storage", "tiny_forward_d1_lr1_s0")
    wait_for_step(head, folder, 5, "stopped")
    ray_job(head, "stop", "stopped")
    assert "Job 'stopped' was stopped" in ray_job(head, "status", "stopped").stdout
    assert "bwlm: stopped by SIGTERM; run the same command to resume" in ray_job(head, "logs", "stopped").stdout
    status = folder.status()
    assert (status.state, status.reason) == ("stopped", "")
    assert checkpoint_steps(folder.checkpoints) == [status.step]
    assert 5 <= status.step < 1000

    went_on = submit(head, tmp_path / "storage", *tiny(corpus, *settings))
    assert went_on.returncode == 0, went_on.stdout[-3000:]
    assert f"resumes from step {status.step}" in ray_job(head, "logs", "stopped").stdout
    assert folder.status().state == "finished"
    assert [entry.step for entry in read_journal(folder.path)] == list(range(1, 1001)), "no step was lost or doubled"


def test_a_run_is_trained_evaluated_and_reported_by_jobs(head: Head, corpus: Path, tmp_path: Path) -> None:
    sets = [f"data.source={corpus}", "tokenizer.vocab_size=400", "model.sequence_length=64", "budget.steps=4"]
    sets += ["budget.batch_tokens=512", "evaluation.tokens=1024", "resources.cpus_per_worker=1"]
    words = [word for one in sets for word in ("--set", one)]
    storage = tmp_path / "storage"
    trained = submit(head, storage, "--id", "mine", "--direction", "backward", "--depth", "1", *words, script=TRAIN)
    assert trained.returncode == 0, trained.stdout[-3000:]
    assert ExperimentFolder(storage, "mine").status().state == "finished"

    evaluated = submit(head, storage, "mine", script="jobs/evaluate.py")
    assert evaluated.returncode == 0, evaluated.stdout[-3000:]
    assert "forward" in evaluated.stdout

    (storage / "mine" / "RESEARCH_REPORT.md").unlink()
    reported = submit(head, storage, "mine", script="jobs/report.py")
    assert reported.returncode == 0, reported.stdout[-3000:]
    assert (storage / "mine" / "RESEARCH_REPORT.md").exists()

    for script in ("jobs/evaluate.py", "jobs/report.py"):
        wrong = submit(head, storage, "mien", script=script)
        assert wrong.returncode == 1
        assert "bwlm: " in wrong.stdout
        assert "mine" in wrong.stdout
        assert "Traceback" not in wrong.stdout


def test_each_entry_point_is_plain_python_too() -> None:
    for script, words in ((TRAIN, "train"), ("jobs/evaluate.py", "eval"), ("jobs/report.py", "analyze report")):
        help = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert f"Usage: {Path(script).name} {words}" in help.stdout


@pytest.mark.slow
def test_cells_of_several_workers_are_found_by_their_ids(head: Head, corpus: Path, tmp_path: Path) -> None:
    """Ray's state names the actor that drives a cell, and its run; each worker's log has a line of it."""
    settings = ("axes.direction=[forward]", "budget.steps=2000", "resources.workers=2", "checkpoint.every=0")
    options = ("--no-wait", "--submission-id", "workers")
    cell = "tiny_forward_d1_lr1_s0"

    def logs_of_the_cell() -> int:
        logs = Path(head.environment["HOME"]).glob("session_2*/logs/worker-*.out")
        return sum(f"trains {cell}" in log.read_text() for log in logs)

    before = logs_of_the_cell()  # other tests of this cluster train a cell of the same name
    submitted = submit(head, tmp_path / "storage", *tiny(corpus, *settings), options=options)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for_step(head, ExperimentFolder(tmp_path / "storage", cell), 5, "workers")
    words = ["list", "actors", "--detail", "--format=json", "--limit=1000", "--filter", "class_name=ImplicitFunc"]
    words += ["--filter", "state=ALIVE", f"--address={head.dashboard}"]
    listed = subprocess.run([BIN / "ray", *words], env=head.environment, capture_output=True, text=True, check=True)
    assert [actor["repr_name"] for actor in json.loads(listed.stdout)] == [cell]
    token = (Path(head.environment["HOME"]) / ".ray" / "auth_token").read_text()
    bearer = {"Authorization": f"Bearer {token}"}
    runs = httpx.get(f"{head.dashboard}/api/train/v2/runs/v1", headers=bearer, timeout=60).json()
    assert cell in {run["name"] for run in runs["train_runs"]}
    assert logs_of_the_cell() == before + 2
    ray_job(head, "stop", "workers")


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
    written = httpx.post(f"{job.url}/v1/completions", json=asked, timeout=60).json()["usage"]["completion_tokens"]
    assert 1 <= written <= 8, "it may end the text before"

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

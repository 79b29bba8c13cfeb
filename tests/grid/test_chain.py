"""Chains and families with real Ray, Tune and MLflow: nested below their base, resumed, and refused without traces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bwlm.grid import hardware
from bwlm.paths import read_json
from bwlm.record.experiment import ExperimentFolder, Status
from tests.grids import GridFile, runs
from tests.runs import exchanges
from tests.shell import Answer, Shell
from tests.shell import shell as shell

pytestmark = pytest.mark.usefixtures("ray_cluster")

SETTINGS = {
    "tokenizer.vocab_size": 400, "model.sequence_length": 64, "model.head_dim": 32, "budget.steps": 4,
    "budget.batch_tokens": 512, "evaluation.every": 0, "evaluation.tokens": 1024, "checkpoint.every": 0,
    "rl.samples": 4, "rl.new_tokens": 6, "rl.validation": 5,
}  # fmt: skip
VARIANTS = ("sft_init_lr_frac0.02", "sft_init_lr_frac0.2")
BASE = ("--direction", "backward", "--depth", "1")
Train = Callable[..., Answer]


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """A file of conversations."""
    from tests.conftest import english

    path = tmp_path / "talks.jsonl"
    lines = [json.dumps({"messages": messages}) for messages in exchanges(english, 0, 80)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def train(shell: Shell, corpus: Path, talks: Path) -> Train:
    """`bwlm train` with tiny settings, on the tests' corpus and conversations."""

    def run(phase: str, name: str, *more: str, **settings: Any) -> Answer:
        of_the_parent = () if phase.startswith("base") else ("tokenizer", "model")
        known = {field: value for field, value in SETTINGS.items() if field.partition(".")[0] not in of_the_parent}
        known |= {} if of_the_parent else {"data.source": corpus}
        given = known | {name.replace("__", "."): value for name, value in settings.items()}
        if phase not in ("base", "rl"):
            given.setdefault("data.mixture", json.dumps({str(talks): 1.0, "builtin:arithmetic": 0.2}))
        if "rl" in phase:
            field = "phases.rl.data.mixture" if "," in phase else "data.mixture"
            given.setdefault(field, '{"builtin:arithmetic": 1.0}')
        sets = [word for field, value in given.items() for word in ("--set", f"{field}={value}")]
        return shell("train", "--phase", phase, "--id", name, *(BASE if phase.startswith("base") else ()), *sets, *more)

    return run


def left_in(storage: Path) -> set[str]:
    """What a refusal left besides the cache: MLflow's files count, half-made folders too."""
    return {path.name for path in storage.iterdir()} - {"cache"} if storage.exists() else set()


def parents_in_mlflow(storage: Path) -> dict[str, str | None]:
    """The id of the run above each run, or the name of the grid."""
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("bwlm").experiment_id])
    names = {run.info.run_id: run.data.tags.get("bwlm.experiment_id", run.info.run_name) for run in found}
    assert len(set(names.values())) == len(names)
    return {names[run.info.run_id]: names.get(run.data.tags.get("mlflow.parentRunId", "")) for run in found}


@pytest.mark.parametrize(
    "phases", ["base,sft", pytest.param("base,mid,sft,rl", marks=pytest.mark.slow)], ids=["short", "whole"]
)
def test_a_chain_runs_to_its_end_and_is_nested_below_its_base(shell: Shell, train: Train, phases: str) -> None:
    """Each link remembers its parent, keeps its own config, and finds the checkpoint that its parent saved."""
    answer = train(phases, "talk", "--json")
    assert answer.code == 0, answer.err
    ids = [f"talk-{phase}" for phase in phases.split(",")]
    for number, run in enumerate(ids, start=1):
        assert f"{number}/{len(ids)} {run}: finished" in answer.err
    parents = dict(zip(ids, [None, *ids[:-1]], strict=True))
    shown = json.loads(answer.out)
    assert [(run["id"], run["phase"], run["parent"]) for run in shown] == [
        (run, run.removeprefix("talk-"), parents[run]) for run in ids
    ]
    assert {(run["state"], run["step"], run["direction"]) for run in shown} == {("finished", 4, "backward")}
    assert all("val_bpb" in run["metrics"] for run in shown)
    assert ("val_reward" in shown[-1]["metrics"]) == phases.endswith("rl")
    assert sorted(runs(shell.storage), key=lambda run: ids.index(run["id"])) == shown
    check_mlflow(shell.storage, parents)
    check_links(shell.storage, ids)

    # again: nothing is trained; with other settings it is refused before anything is
    before = {run: (shell.storage / run / "metrics.jsonl").stat().st_mtime_ns for run in ids}
    again = train(phases, "talk", "--json")
    assert (again.code, json.loads(again.out)) == (0, shown)
    evaluated = train(f"{phases},eval", "talk", "--json")
    assert evaluated.code == 0, evaluated.err
    assert [row["id"] for row in json.loads(evaluated.out) if row["task"] == "documents"] == [
        run for run in ids for _ in ("forward", "backward")
    ]
    other = train(phases, "talk", phases__sft__seed=3)
    assert (other.code, other.out) == (2, "")
    assert other.err.startswith("bwlm: talk: exists with other settings (seed: 0 -> 3): ")
    assert before == {run: (shell.storage / run / "metrics.jsonl").stat().st_mtime_ns for run in ids}


def check_mlflow(storage: Path, parents: dict[str, str | None]) -> None:
    """All phases below their base, with who begins from whom as a tag."""
    base, *children = parents
    assert parents_in_mlflow(storage) == {base: None} | dict.fromkeys(children, base)
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    for run in client.search_runs([client.get_experiment_by_name("bwlm").experiment_id]):
        name = run.info.run_name
        assert run.info.status == "FINISHED"
        assert run.data.tags["bwlm.experiment_id"] == name
        assert run.data.tags.get("bwlm.parent_experiment", "") == (parents[name] or "")
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 4
        attached = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert ("step_000004.json" in attached) == name.endswith("-rl")  # what it wrote, to be read


def check_links(storage: Path, ids: list[str]) -> None:
    for run in ids:
        folder = ExperimentFolder(storage, run)
        link, phase = folder.link(), folder.config().experiment.phase
        assert (folder.path / f"{phase}.h5").exists()
        assert (folder.path / "RESEARCH_REPORT.md").read_text().startswith(f"# {run}\n")
        assert (link is None) == (phase == "base")
        if link is not None:
            meta = read_json(storage / link.parent / "checkpoints" / link.checkpoint / "meta.json")
            assert meta["sha256"]["model.safetensors"] == link.sha256
            assert link.chain == ids[: ids.index(run)]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([{"messages": []}], "line 81: messages: empty"),
        ([[{"role": "user", "content": "a"}] * 2], "line 81: messages[1].role: user again"),
        ([[{"role": "usr", "content": "a"}]], "messages[0].role: 'usr' is not one of system, user, assistant (did you"),
        ([{"messages": "hi"}], "line 81: messages: a text that is not the JSON of a list of messages ("),
        (
            [{"mesages": []}],
            "line 81: no field 'messages' or 'conversations' or 'conversation' (did you mean 'mesages'?)",
        ),
        ([{"messages": [{"role": "user", "content": 5}]}], "line 81: messages[0]: content: must be a string"),
        ([5], "line 81: must be an object or a list of messages (found 5)"),
        (["{"], "line 81: must be an object or a list of messages (found a string)"),
    ],
    ids=str,
)
def test_a_malformed_conversation_is_told_and_nothing_is_half_made(
    shell: Shell, train: Train, talks: Path, lines: list[Any], told: str
) -> None:
    with talks.open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    answer = train("base,mid", "talk")
    assert (answer.code, answer.out) == (2, "")
    assert (
        f"bwlm: data.mixture: {talks.name}: {len(lines)} of {80 + len(lines)} conversations cannot be used:"
        in answer.err
    )
    [fault] = [line for line in answer.err.splitlines() if told in line]
    assert talks.name in fault
    assert answer.err.splitlines()[-1].startswith("repair the file, or set data.skip_invalid=true")
    assert "Traceback" not in answer.err
    assert left_in(shell.storage) == set()
    assert not list(shell.storage.rglob("*.tmp"))


def test_a_file_that_is_not_there_is_told_before_the_base_is_trained(shell: Shell, train: Train) -> None:
    answer = train("base,mid", "talk", data__mixture='{"nowhere.jsonl": 1.0}')
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.splitlines()[-1].startswith("bwlm: ")
    assert "nowhere.jsonl" in answer.err.splitlines()[-1]
    assert left_in(shell.storage) == set()


def test_children_wait_for_a_parent_that_has_not_finished(shell: Shell, train: Train) -> None:
    """They are named, and nothing is made of them; the report is of what there is. Once it has, branches begin.

    Who was stopped early has no children: nothing is missing, and that is no failure.
    """
    assert train("base", "talk-base").code == 0
    finished = ExperimentFolder(shell.storage, "talk-base").status()
    ExperimentFolder(shell.storage, "talk-base").write_status(Status("stopped", "by the scheduler at step 2", 2))
    before = left_in(shell.storage)
    answer = train("base,sft,rl", "talk")
    assert answer.code == 0
    assert "talk-sft is not trained: its parent talk-base is stopped\n" in answer.err
    assert "talk-rl is not trained: its parent talk-sft is waiting\n" in answer.err
    assert "report  runs/talk-base/RESEARCH_REPORT.md\n" in answer.out
    assert (shell.storage / "talk-base" / "RESEARCH_REPORT.md").exists()
    assert left_in(shell.storage) == before

    ExperimentFolder(shell.storage, "talk-base").write_status(finished)
    branch = train("sft", "hot", "--parent", "talk-base", optim__init_lr_frac=0.5)
    assert branch.code == 0, branch.err
    assert parents_in_mlflow(shell.storage) == {"talk-base": None, "hot": "talk-base"}
    assert ExperimentFolder(shell.storage, "hot").config().experiment.direction == "backward"
    assert "hot" in shell("runs", "tree", "talk-base").out


def test_what_cannot_be_computed_leaves_no_folder(shell: Shell, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_why_not_compile", lambda device: "no compiler")
    answer = train("base,sft", "talk", compute__compile="true")
    assert (answer.code, answer.out) == (2, "")
    assert "compute.compile: true, but torch.compile fails here (no compiler)" in answer.err.splitlines()[-1]
    assert not list(shell.storage.glob("talk*"))


def test_a_grid_of_phases_runs_generation_by_generation(shell: Shell, grid_file: GridFile, talks: Path) -> None:
    """Below the grid its bases, and below those all that descends from them."""
    path = grid_file(
        axes={"direction": ["bidirectional"], "depth": [1], "lr": [1.0], "seed": [0]},
        budget={"steps": 3, "batch_tokens": 512},
        evaluation={"every": 0, "tokens": 1024},
        checkpoint={"every": 0},
        phases={"sft": {"data": {"mixture": {str(talks): 1.0}}, "axes": {"optim.init_lr_frac": [0.02, 0.2]}}},
    )
    answer = shell("grid", "run", str(path), "--json")
    assert answer.code == 0, answer.err
    base, *children = (f"g_bidirectional_d1_lr1_s0-{name}" for name in ("base", *VARIANTS))
    cells = json.loads(answer.out)["cells"]
    assert [cell["id"] for cell in cells] == [base, *children]
    assert {(cell["state"], cell["step"]) for cell in cells} == {("finished", 3)}
    assert parents_in_mlflow(shell.storage) == {"g": None, base: "g"} | dict.fromkeys(children, base)
    assert shell.json("grid", "status", str(path))["cells"] == cells
    rates = [ExperimentFolder(shell.storage, child).config().experiment.optim.init_lr_frac for child in children]
    assert rates == [0.02, 0.2]

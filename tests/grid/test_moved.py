"""A storage that is moved to another place, without the source of its text, goes on there as before."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bwlm.paths import read_json, write_json
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.journal import read_journal
from tests.families import rewrite_config
from tests.grids import GridFile
from tests.shell import Shell
from tests.shell import shell as shell

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.faults]

FORWARD, BACKWARD = "g_forward_d1_lr1_s0", "g_backward_d1_lr1_s0"
SFT = ("--set", "budget.steps=2", "--set", 'data.mixture={"builtin:arithmetic": 1.0}')


def naming(storage: Path) -> list[str]:
    """Files of a storage that hold its own path, as text or in binary; MLflow's database keeps absolute paths."""
    files = [path for path in storage.rglob("*") if path.is_file() and not path.name.startswith("mlflow.db")]
    assert len(files) > 40
    return [str(path.relative_to(storage)) for path in files if str(storage).encode() in path.read_bytes()]


def cut_back(folder: ExperimentFolder, step: int) -> None:
    """Leaves a finished run as if it had been killed between its last checkpoint, of `step`, and its end."""
    shutil.rmtree(folder.checkpoints / f"step_{folder.config().steps:06d}")
    write_json(folder.path / "status.json", {})
    assert (folder.checkpoints / f"step_{step:06d}").exists()


def test_a_moved_storage_lists_evaluates_exports_branches_and_resumes(
    shell: Shell, grid_file: GridFile, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, old, new = shell.folder / "source", shell.storage, shell.folder / "elsewhere" / "runs"
    shutil.copytree(corpus, source)
    grid = str(grid_file(data={"source": str(source)}))

    def bwlm(*words: str) -> str:
        answer = shell(*words, "--storage", str(new))
        assert answer.code == 0, answer.err
        return answer.out

    assert shell("grid", "run", grid).code == 0
    assert shell("train", "--phase", "sft", "--parent", FORWARD, "--id", "talk", *SFT).code == 0
    assert shell("analyze", "positions", "g").code == 0
    assert naming(old) == []
    before = json.loads(shell("eval", "talk", "--json").out)
    losses = [entry.metrics["train_loss"] for entry in read_journal(old / BACKWARD)]

    cut_back(ExperimentFolder(old, BACKWARD), 8)
    new.parent.mkdir()
    old.rename(new)
    source.rename(shell.folder / "put away")  # its files are not on the other machine
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._artifact_repos_cache", OrderedDict())  # nor this

    assert len(json.loads(bwlm("runs", "list", "--json"))) == 3
    assert "talk" in bwlm("runs", "tree")
    assert json.loads(bwlm("eval", "talk", "--json")) == before
    bwlm("export", "talk", str(shell.folder / "hf"))
    assert "note: the text that was packed before is used" in shell("grid", "run", grid, "--storage", str(new)).err
    assert ExperimentFolder(new, BACKWARD).status().state == "finished"
    assert [entry.metrics["train_loss"] for entry in read_journal(new / BACKWARD)] == losses
    bwlm("train", "--phase", "sft", "--parent", BACKWARD, "--id", "more", *SFT)
    assert naming(new) == []
    assert not old.exists(), "something was written to where the storage was"
    client = MlflowClient(f"sqlite:///{new / 'mlflow.db'}")
    for run in client.search_runs([client.get_experiment_by_name("bwlm").experiment_id]):
        assert client.list_artifacts(run.info.run_id), run.info.run_name

    # without its cache: models are whole, and text that is gone is told with the command that makes it again
    shutil.rmtree(new / "cache")
    bwlm("export", BACKWARD, str(shell.folder / "hf2"))
    gone = shell("eval", FORWARD, "--storage", str(new))
    assert gone.code == 2
    assert len(gone.err.strip().splitlines()) == 1
    assert str(Path(ExperimentFolder(new, FORWARD).config().corpus).relative_to(shell.folder)) in gone.err
    told = re.search(r"bwlm (grid run .*)", gone.err)
    assert told
    answer = shell(*shlex.split(told[1]))
    assert answer.code == 2, "its source is gone too"
    assert "data.source: source does not exist" in answer.err
    (shell.folder / "put away").rename(source)
    assert shell(*shlex.split(told[1])).code == 0
    assert json.loads(bwlm("eval", "talk", "--json")) == before


def test_a_run_of_an_earlier_version_is_found_where_its_storage_is_now(
    shell: Shell, grid_file: GridFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It named absolute paths, and had no tokenizer of its own."""
    grid, old, new = str(grid_file(axes={"direction": ["forward"], "depth": [1]})), shell.storage, shell.folder / "new"
    assert shell("grid", "run", grid).code == 0
    folder = ExperimentFolder(old, FORWARD)
    shutil.rmtree(folder.path / "tokenizer")
    (tokenizer,) = (old / "cache" / "tokenizers").iterdir()
    content = read_json(folder.path / "config.json")
    told = {"corpus": str(old / content["corpus"]), "tokenizer": str(tokenizer)}
    rewrite_config(folder, **told)
    before = shell.json("eval", FORWARD)
    old.rename(new)
    assert shell.json("eval", FORWARD, "--storage", str(new)) == before
    monkeypatch.setattr("bwlm.cluster.session.open_cluster", None)
    again = shell("grid", "run", grid, "--storage", str(new))
    assert again.code == 0
    assert "g: already finished" in again.err, "and Ray is not started"
    assert (new / FORWARD / "tokenizer" / "ranks.tiktoken").exists(), "a launch gives it its own"
    client = MlflowClient(f"sqlite:///{new / 'mlflow.db'}")
    assert client.get_experiment_by_name("bwlm").artifact_location == (new / "mlartifacts").as_uri()

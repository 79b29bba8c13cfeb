"""Whose weights a run begins with: refused in words wherever they are not those that were meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bwlm.errors import UserError
from bwlm.paths import read_json, write_json
from bwlm.record.checkpoint import load_weights, step_folder, weights_digest
from bwlm.record.experiment import ExperimentFolder, Status, parents_in
from bwlm.record.lineage import LINK
from bwlm.record.parent import inherited_weights, link_to
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.runs import STEPS, NewChild, NewFamily, NewRun, in_process


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as told:
        action()
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.fixture
def base(new_family: NewFamily) -> ExperimentFolder:
    return new_family("forward")


@pytest.fixture
def storage(base: ExperimentFolder) -> Path:
    return base.path.parent


def weights_of(folder: ExperimentFolder) -> Path:
    return step_folder(folder.checkpoints, STEPS) / "model.safetensors"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def train_again(folder: ExperimentFolder, new_run: NewRun, **settings: Any) -> None:
    """As if somebody had deleted a run and trained another one of that id."""
    shutil.rmtree(folder.path)
    new_run(folder.id, lr=4.0, **settings)
    assert run_phase(folder, LocalSession(), in_process).state == "finished"


# ---- when a child is made ----


def test_a_link_holds_the_last_checkpoint_and_the_hash_of_its_weights(base: ExperimentFolder, storage: Path) -> None:
    link = link_to(storage, "forward", "mid", "m")
    assert (link.parent, link.phase, link.checkpoint, link.step, link.chain) == (
        "forward", "base", "step_000012", STEPS, ["forward"]
    )  # fmt: skip
    assert link.sha256 == read_json(step_folder(base.checkpoints, STEPS) / "meta.json")["sha256"]["model.safetensors"]


def test_an_unknown_parent_is_refused_with_the_nearest(storage: Path) -> None:
    """A chain must not go on from a name that nobody trained."""
    line = refused(lambda: link_to(storage, "forwrd", "mid", "m"))
    assert line.startswith(f"forwrd: no such experiment in {storage} (did you mean 'forward'?)")
    assert "is not a valid id" in refused(lambda: link_to(storage, "../forward", "mid", "m"))


@pytest.mark.parametrize(
    "status", [Status(), Status("stopped", "", 4), Status("failed", "diverged", 4), Status("stopped", "by ASHA", 8)]
)
def test_an_unfinished_parent_is_refused(base: ExperimentFolder, storage: Path, status: Status) -> None:
    base.write_status(status)
    line = refused(lambda: link_to(storage, "forward", "mid", "m"))
    state = "stopped" if status.state == "waiting" else status.state  # its journal says that it had begun
    assert line == f"parent: forward is {state}, not finished: finish it first, or choose another parent"


@pytest.mark.parametrize(("phase", "begins"), [("rl", "sft"), ("base", "nothing")])
def test_an_order_that_is_none_is_refused(storage: Path, phase: str, begins: str) -> None:
    line = refused(lambda: link_to(storage, "forward", phase, "x"))
    assert line == f"parent: forward is of phase base, but {phase} begins from {begins}: change the parent or the phase"


def test_no_phase_goes_back(base: ExperimentFolder, storage: Path, new_child: NewChild) -> None:
    sft = new_child(base, "sft", "s")
    assert run_phase(sft, LocalSession(), in_process).state == "finished"
    for phase in ("sft", "mid"):
        assert f"s is of phase sft, but {phase} begins from" in refused(lambda p=phase: link_to(storage, "s", p, "x"))
    assert link_to(storage, "s", "rl", "x").chain == ["forward", "s"]


def test_a_checkpoint_that_is_gone_is_refused(base: ExperimentFolder, storage: Path) -> None:
    """SFT must not look where mid-training never saved: what it begins with is found before it is made."""
    shutil.rmtree(step_folder(base.checkpoints, STEPS))
    line = refused(lambda: link_to(storage, "forward", "mid", "m"))
    assert line == (
        f"parent: forward: its last checkpoint, of step 12, is not in {base.checkpoints}: "
        "put it back, or choose another parent"
    )


@pytest.mark.parametrize("file", ["model.safetensors", "meta.json"])
def test_one_flipped_bit_is_named_and_refused(base: ExperimentFolder, storage: Path, file: str) -> None:
    flip_a_bit(weights_of(base).with_name(file))
    line = refused(lambda: link_to(storage, "forward", "mid", "m"))
    assert line.startswith(f"parent: {weights_of(base).with_name(file)}: ")
    assert line.endswith(": train forward again, or choose another parent")


def test_no_run_begins_from_its_own_descendant(base: ExperimentFolder, storage: Path, new_child: NewChild) -> None:
    """A chain must not become its own parent, also where somebody has deleted its beginning."""
    sft = new_child(base, "sft", "s")
    assert run_phase(sft, LocalSession(), in_process).state == "finished"
    shutil.rmtree(base.path)
    line = refused(lambda: link_to(storage, "s", "rl", "forward"))
    assert line == ("forward: would begin from its own descendant (forward > s): choose another id or another parent")
    assert refused(lambda: link_to(storage, "s", "rl", "s")).startswith("s: would begin from its own descendant")


@pytest.mark.parametrize("content", ["[]", "null", "5", "{}", '{"parent": "x"}', "{", '{"parent": 5}', '"forward"'])
def test_a_parent_whose_own_link_is_nonsense_is_refused(
    base: ExperimentFolder, storage: Path, new_child: NewChild, content: str
) -> None:
    mid = new_child(base, "mid", "m")
    mid.write_status(Status("finished", "", STEPS))
    (mid.path / LINK).write_text(content)
    assert refused(lambda: link_to(storage, "m", "sft", "s")).startswith(f"{mid.path / LINK}: not ")


@pytest.mark.parametrize(("name", "step", "best"), [("forward@8", 8, False), ("forward@best", 12, True)])
def test_a_link_holds_the_checkpoint_that_was_named_and_whether_as_the_best(
    base: ExperimentFolder, storage: Path, name: str, step: int, best: bool
) -> None:
    link = link_to(storage, name, "mid", "m")
    assert (link.parent, link.step, link.best, link.chain) == ("forward", step, best, ["forward"])
    assert link.checkpoint == f"step_{step:06d}"
    assert link.sha256 == weights_digest(base.checkpoints, step)


def test_a_step_that_was_not_kept_is_refused_with_those_that_were(storage: Path) -> None:
    line = refused(lambda: link_to(storage, "forward@5", "mid", "m"))
    assert line == "forward: no checkpoint of step 5: choose from 4, 8, 12"


def test_a_damaged_best_is_named(base: ExperimentFolder, storage: Path) -> None:
    flip_a_bit(weights_of(base))
    assert f"{weights_of(base)}: damaged" in refused(lambda: link_to(storage, "forward@best", "mid", "m"))


# ---- when it begins ----


@pytest.mark.parametrize(("at", "said"), [("8", "step 8"), ("best", "best"), ("12", None)])
def test_a_child_of_a_named_checkpoint_begins_with_its_weights_and_is_another_run(
    base: ExperimentFolder, new_child: NewChild, at: str, said: str | None
) -> None:
    child, usual = new_child(base, "mid", "named", at=at), new_child(base, "mid", "usual")
    config, link = child.config(), child.link()
    assert link is not None
    wanted = load_weights(base.checkpoints, link.step)[0]
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in begin(child).items())
    assert config.identity.get("parent_checkpoint") == said
    assert (config.fingerprint == usual.config().fingerprint) == (said is None)
    assert child.damage() == []
    assert parents_in(base.path.parent)["named"] == "forward"


@pytest.fixture
def child(base: ExperimentFolder, new_child: NewChild) -> ExperimentFolder:
    return new_child(base, "mid", "m")


def begin(child: ExperimentFolder) -> dict[str, torch.Tensor]:
    return inherited_weights(child, child.config())


def test_the_weights_are_the_parents(base: ExperimentFolder, child: ExperimentFolder) -> None:
    given, wanted = begin(child), load_weights(base.checkpoints, STEPS)[0]
    assert given.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in given.items())


NEWEST = "checkpoints/step_000012"


@pytest.mark.parametrize("gone", ["", "checkpoints", NEWEST, f"{NEWEST}/meta.json", f"{NEWEST}/model.safetensors"])
def test_weights_that_are_gone_are_told(base: ExperimentFolder, child: ExperimentFolder, gone: str) -> None:
    path = base.path / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    assert refused(lambda: begin(child)).startswith("m: its parent's checkpoint is gone or damaged: ")


@pytest.mark.parametrize("file", ["model.safetensors", "meta.json"])
def test_one_bit_flipped_since_is_named_and_refused(base: ExperimentFolder, child: ExperimentFolder, file: str) -> None:
    flip_a_bit(weights_of(base).with_name(file))
    line = refused(lambda: begin(child))
    assert line.startswith(f"m: its parent's checkpoint is gone or damaged: {weights_of(base).with_name(file)}: ")
    assert run_phase(child, LocalSession(), in_process).reason == line


def test_a_parent_that_was_trained_again_is_refused(
    base: ExperimentFolder, child: ExperimentFolder, new_run: NewRun
) -> None:
    """Runs that overwrite each other must not hand their weights to each other's children."""
    train_again(base, new_run, seed=1)
    line = refused(lambda: begin(child))
    assert line.startswith(f"{step_folder(base.checkpoints, STEPS)}: not the checkpoint that m was to begin from ")
    assert "model.safetensors has another SHA-256" in line


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"direction": "backward"}, "direction is 'backward', and 'forward' is needed"),
        ({"depth": 2}, "depth is 2, and 1 is needed"),
    ],
)
def test_a_parent_that_is_another_model_by_now_is_refused_with_the_fields(
    base: ExperimentFolder, child: ExperimentFolder, new_run: NewRun, settings: dict[str, Any], told: str
) -> None:
    train_again(base, new_run, **settings)
    assert told in refused(lambda: begin(child))


def with_settings(child: ExperimentFolder, **update: Any) -> Any:
    config = child.config()
    return replace(config, experiment=config.experiment.model_copy(update=update))


def test_another_direction_than_the_parents_needs_to_be_meant(child: ExperimentFolder) -> None:
    changed = with_settings(child, direction="bidirectional")
    line = refused(lambda: inherited_weights(child, changed))
    assert "direction is 'forward', and 'bidirectional' is needed" in line
    meant = with_settings(child, direction="bidirectional", differs=["direction"])
    assert inherited_weights(child, meant).keys() == begin(child).keys()


def test_a_run_past_base_without_a_parent_is_told(child: ExperimentFolder) -> None:
    write_json(child.path / LINK, dict.fromkeys(("parent", "phase", "checkpoint", "step", "sha256")) | {"chain": []})
    assert refused(lambda: begin(child)) == "m: has no parent, but mid begins from one: train it again"


@pytest.mark.parametrize(
    "changed",
    [{"parent": "../../etc"}, {"parent": ""}, {"parent": ["forward"]}, {"step": "12"}, {"sha256": None}, {"more": 1}],
    ids=str,
)
def test_a_link_that_is_nonsense_is_told_and_never_followed(child: ExperimentFolder, changed: dict[str, Any]) -> None:
    write_json(child.path / LINK, read_json(child.path / LINK) | changed)
    assert str(child.path / LINK) in refused(lambda: begin(child))
    status = run_phase(child, LocalSession(), in_process)
    assert (status.state, str(child.path / LINK) in status.reason) == ("failed", True)


@pytest.mark.parametrize(
    "changed", [{"step": 8}, {"step": 99}, {"parent": "m"}, {"phase": "mid"}, {"sha256": "0" * 64}]
)
def test_a_link_to_something_else_is_refused(child: ExperimentFolder, changed: dict[str, Any]) -> None:
    write_json(child.path / LINK, read_json(child.path / LINK) | changed)
    refused(lambda: begin(child))


def test_the_record_of_a_child_names_its_parent_for_others(child: ExperimentFolder) -> None:
    content = json.loads((child.path / LINK).read_text())
    assert content.keys() == {"parent", "phase", "checkpoint", "step", "sha256", "chain", "best"}
    assert child.config().experiment.parent == content["parent"] == "forward"

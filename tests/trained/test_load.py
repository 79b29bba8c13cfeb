"""Loading by id: the weights that were saved, the newest that are whole, and never with another tokenizer."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bwlm.errors import UserError
from bwlm.model.gpt import GPT
from bwlm.record.checkpoint import KeepPolicy, load_checkpoint, step_folder, write_checkpoint
from bwlm.record.experiment import ExperimentFolder
from bwlm.text.tokenizer import Tokenizer, train_tokenizer
from bwlm.train.packed_phase import turn_layout
from bwlm.trained import load
from bwlm.trained.load import load_model
from tests.runs import NewRun
from tests.trained.conftest import STEPS

DOCS = Path(__file__).parents[2] / "docs"
EARLY = STEPS // 2


@pytest.fixture
def copied(storage: Path, tmp_path: Path) -> ExperimentFolder:
    """The forward run in a storage of its own, to be damaged."""
    folder = ExperimentFolder(tmp_path, "forward")
    shutil.copytree(storage / "forward", folder.path)
    return folder


def flip_a_bit(folder: ExperimentFolder, step: int, name: str) -> Path:
    path = step_folder(folder.checkpoints, step) / name
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    return path


def test_the_newest_checkpoint_comes_with_tokenizer_config_and_meta(storage: Path) -> None:
    loaded = load_model(storage, "backward")
    saved = load_checkpoint(ExperimentFolder(storage, "backward").checkpoints, STEPS)
    assert loaded.step == STEPS
    state = loaded.model.state_dict()
    assert state.keys() == saved.model.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.model.items())
    assert not loaded.model.training
    assert loaded.config.id == "backward"
    assert loaded.meta["direction"] == "backward"
    assert loaded.meta["tokenizer"] == loaded.tokenizer.digest


def test_a_step_can_be_chosen(storage: Path) -> None:
    early, late = (load_model(storage, f"forward@{step}") for step in (EARLY, STEPS))
    assert (early.step, late.step) == (early.meta["step"], late.meta["step"]) == (EARLY, STEPS)
    assert not torch.equal(early.model.lm_head.weight, late.model.lm_head.weight)


def test_what_it_computes_in_can_be_chosen(storage: Path) -> None:
    loaded = load_model(storage, "forward", compute_dtype=torch.bfloat16)
    assert loaded.model.compute_dtype == torch.bfloat16
    assert loaded.model.embedding.weight.dtype == torch.float32
    assert load_model(storage, "forward", device="meta").model.lm_head.weight.device.type == "meta"


def test_an_unknown_step_names_those_that_exist(storage: Path) -> None:
    with pytest.raises(UserError, match=rf"^forward: no checkpoint of step 5: choose from {EARLY}, {STEPS}$"):
        load_model(storage, "forward@5")


def test_an_unknown_id_names_the_nearest(storage: Path) -> None:
    with pytest.raises(UserError, match=r"^bakward: no such experiment in .*did you mean 'backward'"):
        load_model(storage, "bakward")


def test_an_id_is_one_path_segment(storage: Path) -> None:
    with pytest.raises(UserError, match="not a valid id"):
        load_model(storage / "forward", "../backward")


def test_a_run_without_a_checkpoint_is_refused(new_run: NewRun, tmp_path: Path) -> None:
    new_run("young")
    for name in ("young", "young@5"):
        with pytest.raises(UserError, match=r"^young: no checkpoint in .*checkpoints yet"):
            load_model(tmp_path, name)


# ---- the tokenizer ----


def never(*_: object) -> None:
    raise AssertionError("weights were loaded")


def test_another_tokenizer_is_refused_before_weights_are_loaded(
    copied: ExperimentFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size: the model would run, and say other words."""
    right = Tokenizer.load(Path(copied.config().tokenizer))
    wrong = train_tokenizer(iter(["the quick brown fox jumps over the lazy dog " * 3] * 9 + WORDS), right.vocab_size)
    assert wrong.vocab_size == right.vocab_size
    wrong.save(Path(copied.config().tokenizer))
    monkeypatch.setattr(load, "load_weights", never)
    with pytest.raises(UserError, match="not the tokenizer that forward was trained with") as told:
        load_model(copied.path.parent, "forward")
    assert str(copied.config().tokenizer) in str(told.value)
    assert wrong.digest in str(told.value)
    assert right.digest in str(told.value)
    assert "\n" not in str(told.value)


WORDS = [" ".join(f"{a}{b}{c}" for a in "bcdfgh" for b in "aeiou" for c in "lmnrst")] * 3


def test_a_vocabulary_that_is_not_the_checkpoints_is_refused(
    copied: ExperimentFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = load_checkpoint(copied.checkpoints, STEPS)
    saved.meta["vocab_size"] += 1
    write_checkpoint(copied.checkpoints, saved, KeepPolicy(1))
    monkeypatch.setattr(load, "load_weights", never)
    size = saved.meta["vocab_size"]
    with pytest.raises(UserError, match=rf"not the tokenizer that forward .*\({size - 1} instead of {size}\)"):
        load_model(copied.path.parent, "forward")


def test_training_refuses_another_tokenizer_than_the_runs(copied: ExperimentFolder) -> None:
    """It would go on, and lay conversations out with other ids."""
    train_tokenizer(iter(WORDS), 300).save(copied.path / "tokenizer")
    with pytest.raises(UserError, match=r"forward/tokenizer/tokenizer.json: not the tokenizer of the run"):
        turn_layout(copied.config(), supervised=True)


def test_a_missing_tokenizer_is_named(copied: ExperimentFolder) -> None:
    shutil.rmtree(copied.config().tokenizer)
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load_model(copied.path.parent, "forward")


# ---- damage ----


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_it(
    copied: ExperimentFolder, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = flip_a_bit(copied, STEPS, name)
    with caplog.at_level(logging.WARNING):
        assert load_model(copied.path.parent, "forward").step == EARLY
    assert str(path) in caplog.text
    assert f"step {EARLY} instead" in caplog.text


def test_a_step_that_was_asked_for_has_no_substitute(copied: ExperimentFolder) -> None:
    path = flip_a_bit(copied, STEPS, "model.safetensors")
    with pytest.raises(UserError, match=re.escape(f"{path}: damaged")):
        load_model(copied.path.parent, f"forward@{STEPS}")


def test_where_all_are_damaged_the_newest_is_named(copied: ExperimentFolder, caplog: pytest.LogCaptureFixture) -> None:
    paths = [flip_a_bit(copied, step, "model.safetensors") for step in (EARLY, STEPS)]
    with pytest.raises(UserError, match=re.escape(f"{paths[1]}: damaged")):
        load_model(copied.path.parent, "forward")
    assert caplog.text == "", "the error says it all"


def test_the_optimizer_is_not_read(copied: ExperimentFolder) -> None:
    flip_a_bit(copied, STEPS, "optimizer.safetensors")
    assert load_model(copied.path.parent, "forward").step == STEPS
    (step_folder(copied.checkpoints, STEPS) / "optimizer.safetensors").unlink()
    assert isinstance(load_model(copied.path.parent, "forward").model, GPT)


# ---- the docs ----


@pytest.fixture
def run_page(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Run the Python of a page, one block after the other, beside the runs that it names; return its variables."""
    for direction in ("forward", "backward"):
        shutil.copytree(storage / direction, tmp_path / "runs" / f"tiny_{direction}_d1_lr1_s0")
    monkeypatch.chdir(tmp_path)

    def run(page: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for block in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL):
            exec(compile(block, page, "exec"), names)
        return names

    return run


def test_the_code_of_models_runs(
    run_page: Callable[[str], dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page("models.md")
    assert "and so it came to an end." in capsys.readouterr().out
    assert (tmp_path / "runs" / "tiny-hf" / "config.json").exists()


def test_the_code_of_the_python_page_runs(
    run_page: Callable[[str], dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [questions] = re.findall(r"^```json questions.jsonl\n(.*?)^```", (DOCS / "evaluation.md").read_text(), re.M | re.S)
    (tmp_path / "questions.jsonl").write_text(questions)
    names = run_page("python.md")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["forward", "backward"]
    assert all(line.endswith("chance 0.389") for line in lines[-2:])  # (1/3 + 1/2 + 1/3) / 3
    del lines[-2:]
    assert lines[0] == f"backward ('backward',) step {STEPS} of {STEPS}"
    assert lines[-3:-2] == ["[1 2 3] [3.  1.5 1. ]"]
    assert [line.split()[0] for line in lines[-2:]] == ["forward", "backward"]
    by_reading = {line.split()[0]: float(line.split()[1]) for line in lines[-2:]}
    assert by_reading["backward"] < by_reading["forward"]  # it was trained backward
    assert (names["inputs"].shape, names["segments"].shape) == ((4, 64), (4, 64))


@pytest.mark.parametrize("other", ["direction", "depth"])
def test_a_checkpoint_of_another_model_is_refused(storage: Path, copied: ExperimentFolder, other: str) -> None:
    """Of the same tokenizer: it would load, and read the other way."""
    shutil.rmtree(copied.checkpoints)
    shutil.copytree(storage / "backward" / "checkpoints", copied.checkpoints)
    with pytest.raises(UserError, match=rf"step_0000{STEPS}: another model's checkpoint .*{other} is"):
        load_model(copied.path.parent, copied.id)

"""Chains of phases and `phases:` of grid files: what they make, what is inherited, and what is refused in one line."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from bwlm.config import Experiment
from bwlm.errors import UserError
from bwlm.grid.announce import over_words
from bwlm.grid.cells import find_cells, waiting_cells
from bwlm.grid.launch import _is_over, run_plan
from bwlm.phases import BUILTIN_MIXTURE
from bwlm.plan.inherit import inherit, with_defaults
from bwlm.plan.load import load_grid, plan_experiment
from bwlm.plan.spec import Plan, generations
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.repeat import train_command
from bwlm.settings_file import Document
from tasks.sources import check_sources
from tests.families import rewrite_config
from tests.runs import NewFamily
from tests.shell import Shell, check_mistake
from tests.shell import shell as shell

TINY = {
    "direction": "backward", "depth": 1, "model.sequence_length": 64, "model.head_dim": 32,
    "tokenizer.vocab_size": 400, "budget.steps": 5, "budget.batch_tokens": 512, "rl.samples": 4, "rl.new_tokens": 8,
}  # fmt: skip


def chain(phase: str, *settings: str, name: str | None = "x", storage: Path | None = None, **flags: Any) -> Plan:
    """As `bwlm train --phase .. --id NAME` plans it; a chain that begins with base is tiny unless told otherwise."""
    tiny = TINY if phase.startswith("base") else {}
    given = {"phase": phase} | {field: value for field, value in tiny.items() if "." not in field} | flags
    dotted = [f"{field}={value}" for field, value in tiny.items() if "." in field]
    return plan_experiment(given, [*dotted, *settings], name, str(storage) if storage else None)


def experiments(plan: Plan) -> dict[str, Experiment]:
    return {cell.id: cell.experiment for cell in plan.cells}


def refusal(plan: Any) -> str:
    with pytest.raises(UserError) as told:
        plan()
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400
    return str(told.value)


# ---- chains ----


def test_the_defaults_of_a_phase_are_copied() -> None:
    """So that no run changes those of the next."""
    mixture = with_defaults({}, "sft")["data"]["mixture"]
    assert mixture == BUILTIN_MIXTURE
    mixture["gsm8k"] = 1.0
    assert with_defaults({}, "sft")["data"]["mixture"] == BUILTIN_MIXTURE != mixture


def test_a_chain_makes_an_experiment_of_each_phase_none_its_own_parent() -> None:
    """One id for all of them would overwrite the config of the one before, and make it its own parent."""
    plan = chain("base,mid,sft,rl", name="talk")
    assert [cell.id for cell in plan.cells] == ["talk-base", "talk-mid", "talk-sft", "talk-rl"]
    assert [cell.experiment.phase for cell in plan.cells] == ["base", "mid", "sft", "rl"]
    assert [cell.experiment.parent for cell in plan.cells] == [None, "talk-base", "talk-mid", "talk-sft"]
    assert [len(generation) for generation in generations(plan.cells)] == [1, 1, 1, 1]
    assert not plan.is_grid


def test_a_phase_alone_keeps_its_id_and_a_chain_without_one_says_what_it_is() -> None:
    """Two directions on one day have ids of their own."""
    assert [cell.id for cell in chain("base", name="x").cells] == ["x"]
    today = f"{date.today():%Y%m%d}"
    plans = [chain("base,sft", name=None, direction=direction) for direction in ("forward", "backward")]
    assert [[cell.id for cell in plan.cells] for plan in plans] == [
        [f"base_{today}_{direction}_d1-{phase}" for phase in ("base", "sft")] for direction in ("forward", "backward")
    ]


def test_mid_can_be_skipped() -> None:
    assert [cell.experiment.parent for cell in chain("base,sft,rl").cells] == [None, "x-base", "x-sft"]


@pytest.mark.parametrize("direction", ["forward", "backward", "bidirectional"])
def test_what_is_said_of_the_base_comes_down_the_chain(direction: str) -> None:
    plan = chain(
        "base,mid,sft,rl", "data.reversal=turns", "evaluation.every=3",
        direction=direction, seed=7, lr=2.0,
    )  # fmt: skip
    base, *children = experiments(plan).values()
    for child in children:
        for field in ("direction", "depth", "tokenizer", "seed", "lr", "evaluation"):
            assert getattr(child, field) == getattr(base, field), field
        assert child.data.reversal == "turns"
        assert child.budget.batch_tokens == 512
        assert child.model == base.model
    assert {cell.steps for cell in plan.cells} == {5}


@pytest.mark.parametrize("masked", [True, False])
def test_mid_keeps_what_its_parent_lets_attention_see_and_conversations_are_always_alone(masked: bool) -> None:
    said = [] if masked else ["model.document_mask=false"]
    found = [one.model.document_mask for one in experiments(chain("base,mid,sft,rl", *said)).values()]
    assert found == [masked, masked, True, True]


@pytest.mark.parametrize("phase", ["mid", "sft"])
def test_a_child_of_a_run_made_before_masks_were_the_default(new_family: NewFamily, tmp_path: Path, phase: str) -> None:
    parent = new_family("forward")
    config = parent.config()
    unmasked = config.experiment.model_dump()
    unmasked["model"]["document_mask"] = False
    rewrite_config(parent, experiment=unmasked, identity=config.identity | {"model.document_mask": False})
    wanted = {"phase": phase, "parent": "forward"}
    [child] = experiments(plan_experiment(wanted, [], "x", str(tmp_path))).values()
    assert child.model.document_mask == (phase == "sft")


@pytest.mark.parametrize("phase", ["sft", "rl"])
def test_conversations_that_see_each_other_are_refused(phase: str) -> None:
    told = refusal(lambda: chain("base,sft,rl", f"phases.{phase}.model.document_mask=false"))
    assert "document_mask" in told
    assert "leave it out" in told


def test_a_child_is_repeated_with_what_is_its_own_and_not_its_parents_or_its_phases() -> None:
    """Values that are an experiment's defaults, but not those of its phase or of its parent."""
    settings = ["model.document_mask=false", "phases.mid.model.document_mask=true", "phases.sft.optim.init_lr_frac=1"]
    _, mid, sft = experiments(chain("base,mid,sft", *settings)).values()
    assert "model.document_mask=true" in shlex.split(train_command("m", mid))
    assert "optim.init_lr_frac=1.0" in shlex.split(train_command("s", sft))


def test_every_phase_begins_with_defaults_of_its_own() -> None:
    plan = plan_experiment({"phase": "base,mid,sft,rl", "direction": "forward", "depth": 2}, [], "x")
    base, mid, sft, rl = experiments(plan).values()
    assert [one.optim.init_lr_frac for one in (base, mid, sft, rl)] == [1, 1, 0.02, 0.05]
    assert [one.budget.tokens_per_parameter for one in (base, mid, sft, rl)] == [20, 1, 0.5, None]
    assert rl.budget.steps == 100
    assert [one.data.mixture for one in (base, mid, sft, rl)] == [
        {}, BUILTIN_MIXTURE, BUILTIN_MIXTURE, {"builtin:arithmetic": 1.0}
    ]  # fmt: skip
    assert {one.data.reversal for one in (base, mid, sft, rl)} == {"whole"}


def test_settings_are_of_all_phases_and_those_of_a_block_of_one() -> None:
    plan = chain(
        "base,mid,sft", "optim.init_lr_frac=0.5", "phases.sft.optim.init_lr_frac=0.1", "phases.sft.seed=3",
        "phases.mid.budget.tokens=5120", "data.mixture={gsm8k: 1.0}", "phases.sft.data.mixture={mmlu: 2.0}",
    )  # fmt: skip
    base, mid, sft = plan.cells
    assert [cell.experiment.optim.init_lr_frac for cell in plan.cells] == [0.5, 0.5, 0.1]
    assert [cell.experiment.seed for cell in plan.cells] == [0, 0, 3]
    assert [cell.steps for cell in plan.cells] == [5, 10, 5]
    assert [cell.experiment.data.mixture for cell in (base, mid, sft)] == [{}, {"gsm8k": 1.0}, {"mmlu": 2.0}]


def test_an_axis_of_a_phase_can_be_set(new_family: NewFamily) -> None:
    plan = chain("base,sft,rl", "phases.sft.axes.optim.init_lr_frac=[0.02,0.1]")
    assert [(cell.id, cell.experiment.parent) for cell in plan.cells] == [
        ("x-base", None),
        ("x-sft_init_lr_frac0.02", "x-base"),
        ("x-rl_init_lr_frac0.02", "x-sft_init_lr_frac0.02"),
        ("x-sft_init_lr_frac0.1", "x-base"),
        ("x-rl_init_lr_frac0.1", "x-sft_init_lr_frac0.1"),
    ]


def test_a_child_may_spell_its_parents_tokenizer_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (tmp_path / "linked").symlink_to(folder)
    parent = Experiment.model_validate({"direction": "forward", "depth": 1, "tokenizer": {"path": str(folder)}})
    for path in (f"{tmp_path}/linked", f"file://{folder}", f"{folder}/../tokenizer", str(folder)):
        content = {"phase": "mid", "tokenizer": {"path": path}}
        assert inherit(content, "base", parent, Document("g.yaml", content, {}))["tokenizer"]["path"] == path
    content = {"phase": "mid", "tokenizer": {"path": str(tmp_path)}}
    with pytest.raises(UserError, match=r"tokenizer\.path: .*, but the parent base has .*: leave it out"):
        inherit(content, "base", parent, Document("g.yaml", content, {}))


def test_a_child_takes_direction_and_model_from_a_parent_that_is_there(new_family: NewFamily, tmp_path: Path) -> None:
    new_family("bidirectional")
    [cell] = chain("sft", parent="bidirectional", storage=tmp_path, name="s").cells
    one = cell.experiment
    assert (one.direction, one.depth, one.seed, one.budget.batch_tokens) == ("bidirectional", 1, 0, 512)
    assert (one.tokenizer.vocab_size, one.model.sequence_length, one.model.head_dim) == (400, 64, 32)
    assert (cell.id, one.parent) == ("s", "bidirectional")
    assert one.lr == 1.0


def test_another_direction_or_reversal_can_be_meant(new_family: NewFamily, tmp_path: Path) -> None:
    new_family("forward")
    given = ["differs=[direction]", "data.reversal=turns"]
    [mid, sft] = chain("mid,sft", *given, parent="forward", direction="bidirectional", storage=tmp_path).cells
    assert (mid.experiment.direction, mid.experiment.differs) == ("bidirectional", ["direction"])
    assert (sft.experiment.direction, sft.experiment.data.reversal) == ("bidirectional", "turns")
    with_turned = ["phases.sft.data.reversal=whole", "phases.sft.differs=[reversal]", "data.reversal=turns"]
    reversals = [cell.experiment.data.reversal for cell in chain("base,mid,sft", *with_turned).cells]
    assert reversals == ["turns", "turns", "whole"]


def test_a_run_past_base_is_repeated_by_its_command(new_family: NewFamily, tmp_path: Path) -> None:
    """With its parent, what was changed on purpose, its tasks and mixture."""
    new_family("forward")
    settings = [
        "differs=[direction]", 'data.mixture={"builtin:arithmetic": 2.0, "gsm8k": 0.5, "a b/c.jsonl": 1}',
        "tasks.gsm8k.path=/a/gsm8k", "optim.init_lr_frac=0.25", "budget.steps=7", "data.reversal=turns",
    ]  # fmt: skip
    [cell] = chain("sft", *settings, parent="forward", direction="bidirectional", storage=tmp_path, name="s").cells
    words = shlex.split(train_command("s", cell.experiment))
    given = [word for at, word in enumerate(words) if words[at - 1] == "--set"]
    flags = {word.removeprefix("--"): words[at + 1] for at, word in enumerate(words) if word.startswith("--")}
    flags |= {name: read(flags[name]) for name, read in (("depth", int), ("lr", float), ("seed", int))}
    own = {name: value for name, value in flags.items() if name not in ("id", "set")}
    [again] = plan_experiment(own, given, "s", str(tmp_path)).cells
    assert again.experiment.model_dump(exclude={"resources"}) == cell.experiment.model_dump(exclude={"resources"})
    assert flags["parent"] == "forward"


NOT_MEANT = "leave it out, or set differs=["


@pytest.mark.parametrize(
    ("phase", "settings", "told"),
    [
        ("base,slt", [], "--phase: 'slt' is not one of base, mid, sft, rl (did you mean 'sft'?)"),
        ("", [], "--phase: '' is not one of base, mid, sft, rl"),
        ("base,", [], "--phase: '' is not one of"),
        ("base,rl", [], "--phase: rl cannot follow base: it begins from sft"),
        ("base,sft,mid", [], "--phase: mid cannot follow sft: it begins from base"),
        ("base,mid,mid", [], "--phase: mid cannot follow mid: it begins from base"),
        ("base,base", [], "--phase: base cannot follow base: it begins from nothing"),
        ("base,mid", ["phase=sft", "parent=x"], "mid cannot follow sft: it begins from base"),
        ("base,sft", ["phases.rl.seed=1"], "--set phases.rl: not a phase of this command's --phase: add it there"),
        ("base", ["phases.sft.seed=1"], "--set phases.sft: not a phase of this command's --phase: add it there"),
        ("base,sft", ["phases.stf.seed=1"], "--set phases.stf: not a phase of this command's --phase"),
        ("base,sft", ["phases=5"], "--set phases: must hold settings by phase"),
        ("base,sft", ["phases.sft=5"], "--set phases.sft: must hold settings"),
        ("base,sft", ["phases.sft.phase=rl"], "--set phases.sft.phase: set by the order of the phases"),
        ("base,sft", ["phases.sft.parent=x"], "--set phases.sft.parent: set by the order of the phases"),
        ("base,sft", ["phases.sft.axes.parent=[x]"], "phases.sft.axes.parent: set by the order of the phases"),
        ("base,sft", ["phases.sft.axes=5"], "phases.sft.axes: must hold lists of values"),
        ("base,sft", ["phases.sft.axes.seed=5"], "phases.sft.axes.seed: phases.sft.axes: must hold lists of values"),
        ("base,sft", ["phases.sft.axes.seed=[]"], "phases.sft.axes.seed: needs a list of values"),
        ("base,sft", ["phases.sft.axes.seed=[1,1]"], "phases.sft.axes.seed: 1 appears twice: keep one"),
        ("base,sft", ["phases.sft.axes.sed=[1]"], "cells can differ in (did you mean 'seed'?)"),
        ("base,sft", ["phases.sft.seed=1", "phases.sft.axes.seed=[2]"], "--set phases.sft.seed: a fixed value here"),
        ("base,sft", ["phases.sft.depth=2"], "depth: 2, but the parent x-base has 1: leave it out"),
        ("base,sft", ["phases.sft.model.head_dim=64"], "model.head_dim: 64, but the parent x-base has 32:"),
        ("base,sft", ["phases.sft.tokenizer.vocab_size=300"], "300, but the parent x-base has 400: leave it out"),
        ("base,sft", ["phases.sft.direction=forward"], "forward, but the parent x-base has backward: " + NOT_MEANT),
        ("base,mid,sft", ["phases.sft.data.reversal=turns"], "turns, but the parent x-mid has whole: " + NOT_MEANT),
        ("base,sft", ["differs=5"], "--set differs: must be a list, such as [1, 2] (found 5)"),
        ("base,sft", ["differs=[depth]"], "--set differs: differs.0: 'depth' is not one of 'direction' or 'reversal'"),
        ("base,sft", ["differs=direction"], "--set differs: must be a list, such as [1, 2] (found 'direction')"),
        ("base,sft", ["phases.sft.optim.lr=2"], "optim.lr: unknown field"),
        ("base,sft", ["phases.sft.modle.x=2"], "modle: unknown field (did you mean 'model'?)"),
        ("base,sft", ["data.mixture={}"], "--set data.mixture: empty: name tasks or files of conversations"),
        ("base,sft", ["data.mixture=null"], "--set data.mixture: must be fields (name: value) (found None)"),
        ("base,sft", ["data.mixture={gsm8k: 0}"], "data.mixture.gsm8k: input should be greater than 0 (found 0)"),
        ("base,sft", ["data.mixture={gsm8k: much}"], "data.mixture.gsm8k: must be a number, such as 0.5"),
        ("base", ["data.mixture={gsm8k: 1}"], "--set data.mixture: a base run reads the documents of data.source"),
        ("base", ["parent=y"], "--set parent: a base run has none: choose another phase, or leave the parent out"),
        ("base,sft", ["direction=permuted"], "--set direction: permuted is a control for documents"),
        ("base,sft", ["budget=5"], "budget"),
        ("base,sft", ["data=5"], "data"),
        ("base,sft,rl", ["rl.samples=3"], "rl: samples: must be even, for halves in two readings (found 3)"),
        ("base,sft,rl", ["rl={samples: 16}"], "512 tokens are too few for 1 x rl.samples=16 of rl.new_tokens=64"),
        ("base,sft,rl", ["rl={samples: 2, new_tokens: 250}", "resources.workers=2"], "too few for 2 x rl.samples=2 of"),
        ("base,sft,rl", ["rl.samples=2", "direction=bidirectional"], "rl.samples: a bidirectional model writes half"),
        ("base,sft,rl", ["rl.prompts=3", "resources.workers=2"], "rl.prompts: 3 prompts a step cannot be shared by 2"),
    ],
)  # fmt: skip
def test_a_chain_that_cannot_be_is_told_in_one_line(phase: str, settings: list[str], told: str) -> None:
    assert told in refusal(lambda: chain(phase, *settings))


@pytest.mark.parametrize(
    ("phase", "flags", "told"),
    [
        ("sft", {}, "parent: missing: name the run that sft begins from"),
        ("sft", {"parent": "backwrd"}, "--parent: backwrd: no such experiment in "),
        ("sft", {"parent": "backwrd"}, "(did you mean 'backward'?); see: bwlm runs list"),
        ("rl", {"parent": "backward"}, "parent: backward is of phase base, but rl begins from sft"),
        ("base", {"parent": "backward", "direction": "forward", "depth": 1}, "--parent: a base run has none"),
        ("sft", {"parent": "backward", "direction": "forward"}, "--direction: forward, but the parent backward has"),
        ("sft", {"parent": "backward", "direction": "forward", "differs": 5}, "--direction: forward, but the parent"),
        ("sft", {"parent": "backward", "differs": None}, "--differs: must be a list, such as [1, 2] (found None)"),
        ("sft", {"parent": "backward", "budget": 5}, "budget.tokens_per_parameter: 'budget' is a value and holds no"),
        ("sft", {"parent": "backward", "depth": 2}, "--depth: 2, but the parent backward has 1: leave it out"),
        ("sft", {"parent": "backward@7"}, "--parent: backward: no checkpoint of step 7: choose from 4, 8, 12"),
        ("sft", {"parent": "backward@last"}, "--parent: backward@last: after @ comes a step or best, as in backward@4"),
        ("sft", {"parent": "../backward"}, "'../backward' is not a valid id"),
        ("sft", {"parent": "unfinished"}, "parent: unfinished is stopped, not finished: finish it first"),
    ],
)  # fmt: skip
def test_a_parent_that_cannot_be_is_told_in_one_line(
    new_family: NewFamily, tmp_path: Path, phase: str, flags: dict[str, Any], told: str
) -> None:
    """An unknown parent is never accepted."""
    folder = new_family("backward")
    shutil.copytree(folder.path, tmp_path / "unfinished")
    ExperimentFolder(tmp_path, "unfinished").write_status(replace(folder.status(), state="waiting"))
    assert told in refusal(lambda: plan_experiment({"phase": phase} | flags, [], "x", str(tmp_path)))


# ---- what they read ----


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["data.mixture={gsm8: 1.0}"], "data.mixture: 'gsm8' is not a task (did you mean 'gsm8k'?): name one of "),
        (['data.mixture={"builtin:spellin": 1.0}'], "(did you mean 'builtin:spelling'?)"),
        (["tasks.gsm8.path=x"], "tasks.gsm8: no such task (did you mean 'gsm8k'?)"),
        (["phases.rl.data.mixture={smoltalk: 1.0}"], "smoltalk: gives no reward for an answer, which rl needs: choose"),
        (["phases.rl.data.mixture={talks.jsonl: 1.0}"], "talks.jsonl: gives no reward for an answer"),
        (['phases.rl.data.mixture={"builtin:docs_qa": 1.0}'], "from builtin:arithmetic, builtin:spelling, gsm8k"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_is_told_before_anything_is_made(
    tmp_path: Path, settings: list[str], told: str
) -> None:
    """Of any phase of the chain, before its base is trained."""
    plan = chain("base,sft,rl", *settings)
    assert told in refusal(lambda: [check_sources(cell.experiment) for cell in plan.cells])
    storage = tmp_path / "storage"
    assert told in refusal(lambda: run_plan(plan, storage, lambda _: None))
    assert not storage.exists()


def test_a_child_of_its_own_name_is_refused(new_family: NewFamily, tmp_path: Path) -> None:
    """An id that exists keeps its config: nothing is overwritten."""
    folder = new_family("backward")
    before = (folder.path / "config.json").read_bytes()
    plan = chain("sft", parent="backward", storage=tmp_path, name="backward")
    assert "backward: exists with other settings (" in refusal(lambda: run_plan(plan, tmp_path, lambda _: None))
    assert (folder.path / "config.json").read_bytes() == before


# ---- grids ----

GRID = """\
name: g
axes: {direction: [forward, backward], depth: [1], lr: [1.0], seed: [0]}
model: {sequence_length: 64, head_dim: 32}
tokenizer: {vocab_size: 400}
budget: {steps: 5, batch_tokens: 512}
"""
FAMILY = """\
phases:
  mid: {budget: {steps: 3}}
  sft:
    optim.init_lr_frac: 0.1
    axes: {lr: [0.5, 2.0]}
  rl:
    rl: {samples: 4, new_tokens: 8}
    axes: {seed: [1, 2]}
"""


def grid(folder: Path, text: str, *settings: str) -> Plan:
    (folder / "g.yaml").write_text(text)
    return load_grid(folder / "g.yaml", list(settings), str(folder))


def told_of(folder: Path, text: str, *settings: str) -> str:
    return refusal(lambda: grid(folder, text, *settings)).replace(str(folder / "g.yaml"), "g.yaml")


def test_every_cell_of_a_grid_has_its_descendants(tmp_path: Path) -> None:
    """Ids say the phase and what was chosen on the way; those of two directions differ."""
    plan = grid(tmp_path, GRID + FAMILY)
    one_direction = [
        "base", "mid", "sft_lr0.5", "rl_lr0.5_seed1", "rl_lr0.5_seed2", "sft_lr2.0", "rl_lr2.0_seed1", "rl_lr2.0_seed2"
    ]  # fmt: skip
    assert [cell.id for cell in plan.cells] == [
        f"g_{direction}_d1_lr1_s0-{ending}" for direction in ("forward", "backward") for ending in one_direction
    ]
    found = experiments(plan)
    assert len(found) == 16
    for run, one in found.items():
        stem = run.partition("-")[0]
        above = {"base": None, "mid": f"{stem}-base", "sft": f"{stem}-mid"}
        wanted = above[one.phase] if one.phase in above else run.replace("-rl", "-sft").rpartition("_seed")[0]
        assert one.parent == wanted
        assert one.direction == run.split("_")[1]
    deepest = found["g_backward_d1_lr1_s0-rl_lr2.0_seed2"]
    assert (deepest.seed, deepest.lr, deepest.optim.init_lr_frac) == (2, 1.0, 0.05)
    assert found["g_backward_d1_lr1_s0-sft_lr2.0"].lr == 2.0
    assert found["g_backward_d1_lr1_s0-sft_lr2.0"].optim.init_lr_frac == 0.1


def test_phases_follow_each_other_in_the_order_of_training_however_the_file_lists_them(tmp_path: Path) -> None:
    one = grid(tmp_path, f"{GRID}phases: {{sft: {{}}, mid: {{}}}}\n")
    other = grid(tmp_path, f"{GRID}phases: {{mid: {{}}, sft: {{}}}}\n")
    assert [cell.id for cell in one.cells] == [cell.id for cell in other.cells]


def test_the_tasks_of_a_phase_are_one_value(tmp_path: Path) -> None:
    """They replace those of the file, as a mixture does."""
    tasks = "tasks: {gsm8k: {path: /a}, mmlu: {path: /b}}\n"
    plan = grid(tmp_path, f"{GRID}{tasks}phases: {{mid: {{tasks: {{gsm8k: {{path: /c}}}}}}, sft: {{}}}}\n")
    paths = {
        cell.experiment.phase: {name: at.path for name, at in cell.experiment.tasks.items()} for cell in plan.cells
    }
    assert (paths["mid"], paths["sft"]) == ({"gsm8k": "/c"}, {"gsm8k": "/a", "mmlu": "/b"})


def test_parents_stand_before_their_children_and_generations_go_by_them(tmp_path: Path) -> None:
    plan = grid(tmp_path, GRID + FAMILY)
    seen: set[str] = set()
    for cell in plan.cells:
        assert cell.experiment.parent is None or cell.experiment.parent in seen
        seen.add(cell.id)
    by_phase = [{cell.experiment.phase for cell in generation} for generation in generations(plan.cells)]
    assert by_phase == [{"base"}, {"mid"}, {"sft"}, {"rl"}]
    assert sum(map(len, generations(plan.cells))) == len(plan.cells)


def test_who_descends_from_a_run_that_was_stopped_early_does_not_wait(tmp_path: Path) -> None:
    """Who descends from one that failed does, and from one that was interrupted: another launch goes on with it."""
    plan = grid(tmp_path, GRID + FAMILY)
    below = len(plan.cells) // 2 - 1

    def waiting(status: Status) -> int:
        planned = find_cells(plan, tmp_path / "runs")
        folder = ExperimentFolder(tmp_path, planned[0].cell.id)
        folder.path.mkdir(exist_ok=True)
        (folder.path / "config.json").touch()
        return waiting_cells([replace(planned[0], folder=folder, status=status), *planned[1:]])

    others = len(plan.cells) // 2
    assert waiting(Status("stopped", "by the scheduler at step 3", 3)) == others
    assert waiting(Status("stopped", "", 3)) == others + below
    assert waiting(Status("failed", "oh", 3)) == others + below


def test_a_grid_with_nothing_left_counts_finished_cells_and_names_the_others(tmp_path: Path) -> None:
    """The scheduler stopped the forward base, so its mid run, two SFT runs and four RL runs never begin."""
    plan = grid(tmp_path, GRID + FAMILY)
    done = [replace(one, status=Status("finished")) for one in find_cells(plan, tmp_path / "runs")]
    anew = "To train all anew, take another name in its file; to train one anew, delete it first: bwlm runs delete g_"
    assert over_words(plan, done).startswith(f"g: already finished, 16 cells. {anew}")

    stopped = Status("stopped", "by the scheduler at step 3", 3)
    ended = [
        replace(one, status=Status() if one.cell.parent else stopped) if "forward" in one.cell.id else one
        for one in done
    ]
    assert _is_over(ended)
    assert over_words(plan, ended).startswith(
        "g: nothing left to train, 8 cells finished; stopped early by the scheduler: g_forward_d1_lr1_s0-base; not "
        f"trained, since an ancestor was stopped early: g_forward_d1_lr1_s0-mid and 6 more. {anew}"
    )


def test_cells_of_phases_count_for_the_cap(tmp_path: Path) -> None:
    text = GRID + FAMILY
    assert len(grid(tmp_path, text, "launch.max_cells=16").cells) == 16
    assert "16 cells, more than launch.max_cells=15" in told_of(tmp_path, text, "launch.max_cells=15")
    axis = list(range(3000))
    many = [f"phases.{phase}.axes.seed={axis}" for phase in ("mid", "rl")]
    assert "more than launch.max_cells=1000" in told_of(tmp_path, text, *many)


def test_the_text_of_a_plan_makes_it_again(tmp_path: Path) -> None:
    plan = grid(tmp_path, GRID + FAMILY, "phases.sft.axes.optim.weight_decay=[0.0,0.1]", "phases.mid.seed=4")
    assert len(plan.cells) == 2 * (2 + 2 * 2 * 3)
    assert plan.grid_text is not None
    assert grid(tmp_path, plan.grid_text) == plan


def test_parents_can_be_an_axis(new_family: NewFamily, tmp_path: Path) -> None:
    """A sweep of SFT from parents of several directions."""
    for direction in ("forward", "backward"):
        new_family(direction)
    text = "name: s\nphase: sft\naxes: {parent: [forward, backward], optim.init_lr_frac: [0.02, 0.1]}\n"
    plan = grid(tmp_path, text + "budget: {steps: 2}\n")
    assert [(cell.id, cell.experiment.parent, cell.experiment.direction) for cell in plan.cells] == [
        (f"s_{parent}_d1_lr1_s0_parent{parent}_init_lr_frac{rate}", parent, parent)
        for parent in ("forward", "backward")
        for rate in (0.02, 0.1)
    ]
    assert len(generations(plan.cells)) == 1
    fixed = text.replace("parent: [forward, backward], ", "") + "parent: forward\nbudget: {steps: 2}\n"
    assert grid(tmp_path, fixed).cells[0].id == "s_forward_d1_lr1_s0_init_lr_frac0.02"


def test_checkpoints_of_a_parent_can_be_an_axis(new_family: NewFamily, tmp_path: Path) -> None:
    """Does SFT need all of the base? The children are cells of their own."""
    new_family("forward")
    (tmp_path / "g.yaml").write_text("name: s\nphase: sft\naxes: {parent: [forward, forward@4, forward@best]}\n")
    plan = load_grid(tmp_path / "g.yaml", [], str(tmp_path))
    assert [(cell.id, cell.experiment.parent, cell.parent) for cell in plan.cells] == [
        (f"s_forward_d1_lr1_s0_parent{name.replace('@', '-')}", name, "forward")
        for name in ("forward", "forward@4", "forward@best")
    ]
    words = shlex.split(train_command("x", plan.cells[1].experiment))
    assert words[words.index("--parent") + 1] == "forward@4"


def test_phases_can_follow_a_parent_that_is_there(new_family: NewFamily, tmp_path: Path) -> None:
    new_family("backward")
    text = "name: s\nphase: mid\nparent: backward\naxes: {lr: [0.5]}\nbudget: {steps: 2}\nphases: {sft: }\n"
    plan = grid(tmp_path, text)
    assert [(cell.id, cell.experiment.parent) for cell in plan.cells] == [
        ("s_backward_d1_lr0.5_s0-mid", "backward"),
        ("s_backward_d1_lr0.5_s0-sft", "s_backward_d1_lr0.5_s0-mid"),
    ]


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        ("phases: {slt: {}}", "g.yaml:6: phases.slt: not one of mid, sft, rl (did you mean 'sft'?)"),
        ("phases: {base: {}}", "g.yaml:6: phases.base: not one of mid, sft, rl"),
        ("phases: {mid: {}, rl: {}}", "g.yaml:6: phases: rl cannot follow mid: it begins from sft"),
        ("phases: {rl: {}}", "g.yaml:6: phases: rl cannot follow base: it begins from sft"),
        ("phases: 5", "g.yaml:6: phases: must be fields (name: value) (found 5)"),
        ("phases: [sft]", "g.yaml:6: phases: must be fields (name: value)"),
        ("phases: {sft: 5}", "g.yaml:6: phases.sft: must be fields (name: value) (found 5)"),
        ("phases: {sft: {axes: {}, parent: x}}", "phases.sft.parent: set by the order of the phases"),
        ("phases: {sft: {phase: rl}}", "g.yaml:6: phases.sft.phase: set by the order of the phases"),
        ("phases:\n  sft:\n    axes: {parent: [x]}", "g.yaml:8: phases.sft.axes.parent: set by the order of the"),
        ("phases: {sft: {axes: 5}}", "g.yaml:6: phases.sft.axes: must hold lists of values, field: [1, 2]"),
        ("phases: {sft: {axes: {lr: 5}}}", "g.yaml:6: phases.sft.axes: must hold lists of values, field: [1, 2]"),
        ("phases: {sft: {axes: {lr: []}}}", "g.yaml:6: phases.sft.axes.lr: needs a list of values"),
        ("phases: {sft: {axes: {lr: [1, 1.0]}}}", "g.yaml:6: phases.sft.axes.lr: 1.0 appears twice: keep one"),
        ("phases:\n  sft:\n    axes: {rl: [1]}", "g.yaml:8: phases.sft.axes.rl: not a setting that cells can"),
        ("phases:\n  sft:\n    axes: {launch.retries: [1]}", "g.yaml:8: phases.sft.axes.launch.retries: not a setting"),
        ("phases:\n  sft:\n    lr: 2\n    axes: {lr: [1]}", "g.yaml:8: phases.sft.lr: a fixed value here and an axis"),
        ("phases:\n  sft:\n    depth: 2", "g.yaml:8: depth: 2, but the parent g_forward_d1_lr1_s0-base has 1:"),
        ("phases:\n  sft:\n    axes: {depth: [1, 2]}", "g.yaml:8: depth: 2, but the parent g_forward_d1_lr1_s0-base"),
        ("phases:\n  sft: {direction: backward}", "g.yaml:7: direction: backward, but the parent g_forward_d1_"),
        ("phases:\n  sft:\n    launch: {retries: 1}", "launch: unknown field"),
        ("phases:\n  sft:\n    optim.kid: adamw", "g.yaml:8: optim.kid: unknown field (did you mean 'kind'?)"),
        ("phases: {sft: {data: {mixture: {}}}}", "data.mixture: empty: name tasks or files of conversations"),
        ("phases: {sft: {}, rl: {}}", "512 tokens are too few for 1 x rl.samples=16 of rl.new_tokens=64: take"),
        ("phase: sft", "parent: missing: name the run that sft begins from"),
        ("phase: sfft", "g.yaml:6: phase: 'sfft' is not one of 'base', 'mid', 'sft' or 'rl' (did you mean 'sft'?)"),
        ("phase: sft\nparent: nobody", "parent: nobody: no such experiment in "),
        ("phase: sft\nphases: {mid: {}}", "g.yaml:7: phases: mid cannot follow sft: it begins from base"),
        ("parent: nobody", "g.yaml:6: parent: a base run has none"),
        ("data: {mixture: {gsm8k: 1.0}}", "g.yaml:6: data.mixture: a base run reads the documents of"),
        ("differs: direction", "g.yaml:6: differs: must be a list, such as [1, 2] (found 'direction')"),
    ],
)  # fmt: skip
def test_phases_that_cannot_be_are_told_in_one_line(tmp_path: Path, phases: str, told: str) -> None:
    assert told in told_of(tmp_path, GRID + phases + "\n")


def test_permuted_has_no_conversations(tmp_path: Path) -> None:
    text = GRID.replace("[forward, backward]", "[forward, permuted]")
    assert len(grid(tmp_path, text).cells) == 2
    assert "permuted is a control for documents" in told_of(tmp_path, text + "phases: {sft: {}}\n")


def test_a_mixture_at_the_top_is_that_of_the_phases(tmp_path: Path) -> None:
    plan = grid(tmp_path, GRID + "data: {mixture: {gsm8k: 1.0}}\nphases: {mid: {}, sft: {data.mixture: {mmlu: 2.0}}}\n")
    base, mid, sft = plan.cells[:3]
    assert [cell.experiment.data.mixture for cell in (base, mid, sft)] == [{}, {"gsm8k": 1.0}, {"mmlu": 2.0}]


def test_curricula_continue_a_direction_as_another(tmp_path: Path) -> None:
    text = GRID.replace("[forward, backward]", "[forward]") + (
        "phases:\n  mid:\n    differs: [direction]\n    axes: {direction: [forward, bidirectional]}\n  sft: {}\n"
    )
    found = experiments(grid(tmp_path, text))
    assert [(run.partition("-")[2], one.direction) for run, one in found.items()] == [
        ("base", "forward"),
        ("mid_directionforward", "forward"), ("sft_directionforward", "forward"),
        ("mid_directionbidirectional", "bidirectional"), ("sft_directionbidirectional", "bidirectional"),
    ]  # fmt: skip


# ---- the commands ----


SMALL = ("--direction", "forward", "--depth", "1")


def cells_of(shell: Shell, *arguments: str) -> list[dict[str, Any]]:
    return list(shell.json("grid", *arguments)["cells"])


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        ("{sft: {data: {mixture: {gsm9k: 1}}}}", "(did you mean 'gsm8k'?)"),
        (
            "{sft: {}, rl: {rl: {samples: 2, new_tokens: 4}, data: {mixture: {'builtin:docs_qa': 1}}}}",
            "data.mixture: builtin:docs_qa: gives no reward for an answer",
        ),
    ],
)
def test_a_plan_refuses_what_the_run_would(shell: Shell, phases: str, told: str) -> None:
    (shell.folder / "g.yaml").write_text(f"{GRID}phases: {phases}\n")
    check_mistake(shell("grid", "plan", "g.yaml"), told)


def test_grid_plan_and_status_show_every_phase(shell: Shell) -> None:
    path = shell.file(GRID + FAMILY)
    planned = cells_of(shell, "plan", path)
    assert len(planned) == 16
    assert {cell["state"] for cell in planned} == {"waiting"}
    assert all(cell["params"] > 0 and cell["flops"] > 0 and not cell["reason"] for cell in planned)
    assert [cell["steps"] for cell in planned[:3]] == [5, 3, 5]
    assert cells_of(shell, "status", path) == planned
    answer = shell("grid", "plan", path)
    assert answer.code == 0
    assert "g: 16 cells" in answer.out
    assert not shell.storage.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--phase", "sft", "--parent", "nobody"], "nobody: no such experiment"),
        (["--phase", "base,sft,mid"], "mid cannot follow sft"),
        (["--phase", "sft"], "parent: missing: name the run that sft begins from"),
        (["--phase", "base,sft", *SMALL, "--set", "data.mixture={nope: 1}"], "'nope' is not a task"),
        (["--phase", "base,sft", *SMALL, "--set", "data.mixture={}"], "data.mixture: empty"),
        (["--phase", "base,sft", *SMALL, "--set", "budget=5"], "budget"),
    ],
)  # fmt: skip
def test_the_command_line_tells_mistakes_in_one_line_and_makes_nothing(
    shell: Shell, arguments: list[str], told: str
) -> None:
    check_mistake(shell("train", "--id", "t", *arguments), told)
    assert not shell.storage.exists()


def test_a_failed_parent_is_named_by_the_command(shell: Shell, new_family: NewFamily, tmp_path: Path) -> None:
    new_family("forward").write_status(Status("failed", "diverged", 3))
    answer = shell("train", "--phase", "sft", "--parent", "forward", "--id", "s", "--storage", str(tmp_path))
    check_mistake(answer, "parent: forward is failed, not finished: finish it first, or choose another parent")
    assert not (tmp_path / "s").exists()

"""Grid files: what they expand to, what that costs, and what a person gets told when one is wrong."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.config import CONTROL_SOURCES, MERGE_FREE_VOCABULARY, Experiment
from bwlm.errors import UserError
from bwlm.format import WHOLE_NUMBERS
from bwlm.model import compute
from bwlm.plan import machine
from bwlm.plan.load import load_grid
from bwlm.plan.machine import available_cores
from bwlm.plan.resolve import resolve_steps
from bwlm.plan.spec import Grid, Plan, asha_group
from tests.plan.settings_table import MARK, PAGE, table

GRIDS = sorted((Path(__file__).parents[2] / "grids").glob("*.yaml"))

BARS = """\
name: bars
axes:
  direction: [forward, backward]
  depth: [1, 2]
  lr: [0.5, 1.0]
  seed: [0]
model: {sequence_length: 64}
budget: {steps: 5, batch_tokens: 256}
"""


@pytest.fixture
def grid_file(tmp_path: Path) -> Path:
    path = tmp_path / "g.yaml"
    path.write_text(BARS)
    return path


def plan_of(path: Path, text: str, *changes: str) -> Plan:
    path.write_text(text)
    return load_grid(path, list(changes))


def refusal(path: Path, text: str, *changes: str) -> str:
    with pytest.raises(UserError) as caught:
        plan_of(path, text, *changes)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "g.yaml")


def ids(plan: Plan) -> list[str]:
    return [cell.id for cell in plan.cells]


# ---- expansion ----


def test_axes_are_a_product_in_the_order_of_the_file(grid_file: Path) -> None:
    plan = load_grid(grid_file, [])
    assert ids(plan) == [
        f"bars_{direction}_d{depth}_lr{lr}_s0"
        for direction, depth, lr in product(["forward", "backward"], [1, 2], ["0.5", "1"])
    ]
    first = plan.cells[0].experiment
    assert (first.direction, first.depth, first.lr, first.seed) == ("forward", 1, 0.5, 0)
    assert first.model.sequence_length == 64
    assert first.budget.steps == 5


def test_also_adds_cells_after_the_product(grid_file: Path) -> None:
    more = (
        "also:\n- {direction: [backward], depth: [1], lr: [1.0], seed: [1, 2]}\n- {direction: [permuted], depth: [3]}\n"
    )
    assert ids(plan_of(grid_file, BARS + more))[8:] == [
        "bars_backward_d1_lr1_s1",
        "bars_backward_d1_lr1_s2",
        "bars_permuted_d3_lr1_s0",
    ]


def test_an_axis_left_out_takes_its_default_and_a_fixed_one_its_value(grid_file: Path) -> None:
    text = (
        "name: g\ndirection: backward\nseed: 7\naxes: {depth: [1]}\nmodel: {sequence_length: 64}\nbudget: {steps: 1}\n"
    )
    assert ids(plan_of(grid_file, text)) == ["g_backward_d1_lr1_s7"]


def test_extra_axes_are_in_the_id(grid_file: Path) -> None:
    text = BARS.replace("  seed: [0]", "  optim.kind: [muon, adamw]\n  optim.weight_decay: [0.0, 1e-05]")
    plan = plan_of(grid_file, text)
    assert len(plan.cells) == 32
    assert ids(plan)[:3] == [
        "bars_forward_d1_lr0.5_s0_kindmuon_weight_decay0.0",
        "bars_forward_d1_lr0.5_s0_kindmuon_weight_decay1e-05",
        "bars_forward_d1_lr0.5_s0_kindadamw_weight_decay0.0",
    ]
    assert plan.cells[3].experiment.optim.kind == "adamw"
    assert plan.cells[3].experiment.optim.weight_decay == 1e-05


def test_rates_that_are_close_have_ids_of_their_own(grid_file: Path) -> None:
    text = BARS.replace("[0.5, 1.0]", "[0.1, 0.10000001, 6e-4, 100]")
    assert [name.split("_")[3] for name in ids(plan_of(grid_file, text))[:4]] == [
        "lr0.1", "lr0.10000001", "lr0.0006", "lr100"
    ]  # fmt: skip


def test_an_axis_of_paths_makes_safe_ids(grid_file: Path) -> None:
    text = BARS.replace("  seed: [0]", "  data.source: [../x/a.parquet, 's3://b/c']")
    assert ids(plan_of(grid_file, text))[:2] == [
        "bars_forward_d1_lr0.5_s0_source..-x-a.parquet",
        "bars_forward_d1_lr0.5_s0_sources3-b-c",
    ]


def test_two_sources_of_one_id_are_both_named(grid_file: Path) -> None:
    """Ids hold letters, digits and a few signs, so different paths can become one id."""
    text = BARS.replace("  seed: [0]", "  data.source: [texts/a b, texts/a-b]")
    assert refusal(grid_file, text) == (
        "g.yaml:2: axes: data.source: 'texts/a b' and 'texts/a-b' would both be cell "
        "bars_forward_d1_lr0.5_s0_sourcetexts-a-b: rename one of them, or put it into a grid of its own"
    )


@pytest.mark.parametrize(("one", "two"), [("1e2", "2_00"), ("'100'", "2.0E+2"), ("100.0", "'2_0_0'")])
def test_a_whole_number_in_any_form_makes_the_same_cells(grid_file: Path, one: str, two: str) -> None:
    plain = BARS.replace("  seed: [0]", "  evaluation.tokens: [100, 200]")
    assert plan_of(grid_file, plain.replace("100, 200", f"{one}, {two}")).cells == plan_of(grid_file, plain).cells
    phases = "phases: {mid: {axes: {checkpoint.every: [%s, %s]}, evaluation.every: %s}}\nalso: [{depth: [%s]}]\n"
    plain, other = (
        "direction: forward\n" + BARS.replace("  direction: [forward, backward]\n", "") + phases % four
        for four in (("100", "200", "100", "200"), (one, two, one, two))
    )
    assert plan_of(grid_file, other).cells == plan_of(grid_file, plain).cells
    assert "axes.evaluation.tokens: 100 appears twice" in refusal(
        grid_file, BARS.replace("  seed: [0]", f"  evaluation.tokens: [100, {one}]")
    )


def test_resources_can_be_an_axis_and_each_cell_is_checked_against_its_own(grid_file: Path) -> None:
    text = BARS.replace("seed: [0]", "resources.workers: [1, 2]")
    assert [cell.experiment.resources.workers for cell in plan_of(grid_file, text).cells[:2]] == [1, 2]
    assert "shared by resources.workers=3: take a multiple of 192" in refusal(grid_file, text.replace("2]\nm", "3]\nm"))


def test_a_horizon_can_be_an_axis(grid_file: Path) -> None:
    text = BARS.replace("  seed: [0]", "  budget.steps: [5, 10]").replace("{steps: 5, ", "{")
    plan = plan_of(grid_file, text)
    assert [cell.steps for cell in plan.cells[:2]] == [5, 10]
    assert ids(plan)[1] == "bars_forward_d1_lr0.5_s0_steps10"


_AXES = {
    "direction": st.sampled_from(["forward", "backward", "bidirectional", "permuted"]),
    "depth": st.integers(1, 256),
    "lr": st.floats(1e-6, 1000),
    "seed": st.integers(0, 2**31 - 1),
    "evaluation.every": st.integers(0, 100),
    "optim.weight_decay": st.floats(0, 1),
    "model.document_mask": st.booleans(),
}


_CELL_AXES = st.fixed_dictionaries({n: st.lists(v, min_size=1, max_size=2, unique=True) for n, v in _AXES.items()})


@settings(max_examples=25, deadline=None)
@given(axes=_CELL_AXES)
def test_ids_are_unique_and_cells_are_the_product(
    axes: dict[str, list[object]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("grid") / "g.yaml"
    plan = plan_of(path, json.dumps({"name": "g", "axes": axes, "budget": {"steps": 1}}))
    assert len(set(ids(plan))) == len(plan.cells)
    found = [tuple(attrgetter(name)(cell.experiment) for name in axes) for cell in plan.cells]
    assert found == list(product(*axes.values()))


# ---- what it costs ----

# depth 1: width 64, one head of 64; vocabulary 300. A block has 4 x 64^2 of attention and 8 x 64^2 of MLP: 49152
# parameters; embedding and head 300 x 64 = 19200 each. FLOPs a token: 6 x (49152 + 19200) + 12 x 1 x 64 x 64 = 459264.
TINY = {"direction": "forward", "depth": 1, "tokenizer": {"vocab_size": 300}, "model": {"sequence_length": 64}}


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 10_000}, 39),  # 10000 / 256 = 39.06
        ({"tokens": 9_900}, 39),  # 38.67
        ({"tokens": 1}, 1),  # never none
        ({"flops": 1e9}, 9),  # 1e9 / 459264 = 2177.4 tokens, / 256 = 8.51
        ({"flops": 9.5e8}, 8),  # 8.08
        ({"tokens_per_parameter": 20.0}, 5340),  # 20 x (49152 + 19200) = 1367040 tokens, / 256 = 5340 exactly
        ({"tokens_per_parameter": 0.1}, 27),  # 6835.2 / 256 = 26.7
    ],
)
def test_horizons_by_hand(budget: dict[str, float], steps: int) -> None:
    experiment = Experiment.model_validate(TINY | {"budget": {"batch_tokens": 256, **budget}})
    assert resolve_steps(experiment) == steps


def test_a_cells_cost_by_hand(grid_file: Path) -> None:
    cell = plan_of(grid_file, BARS + "tokenizer: {vocab_size: 300}\n").cells[0]
    assert cell.parameters == 49152 + 2 * 19200
    assert cell.tokens == 5 * 256
    assert cell.flops == 5 * 256 * 459264


# ---- --set ----


def test_settings_override_axes_fixed_fields_and_horizon(grid_file: Path) -> None:
    changes = ["axes.seed=[0,1]", "axes.depth=[3]", "model.sequence_length=32", "budget.tokens=2560"]
    plan = load_grid(grid_file, changes)
    assert len(plan.cells) == 8
    assert {cell.experiment.seed for cell in plan.cells} == {0, 1}
    assert {cell.experiment.depth for cell in plan.cells} == {3}
    assert plan.cells[0].experiment.model.sequence_length == 32
    assert plan.cells[0].steps == 10


def test_files_of_tasks_are_found_from_any_working_folder(grid_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(grid_file.parent)
    files = ("tasks.gsm8k.path=near", "tasks.mmlu.path=/far", "tasks.arc_easy.path=s3://bucket/arc", "tasks.core={}")
    [cell, *_] = load_grid(grid_file, list(files)).cells
    paths = {name: task.path for name, task in cell.experiment.tasks.items()}
    near = str(grid_file.parent / "near")
    assert paths == {"gsm8k": near, "mmlu": "/far", "arc_easy": "s3://bucket/arc", "core": None}


def test_whole_axes_can_be_set(grid_file: Path) -> None:
    assert ids(load_grid(grid_file, ["axes={direction: [forward], depth: [1]}"])) == ["bars_forward_d1_lr1_s0"]
    assert len(load_grid(grid_file, ["also=[{direction: [forward], depth: [9]}]"]).cells) == 9
    assert len(load_grid(grid_file, ["axes.model.document_mask=[true,false]"]).cells) == 16


def test_the_plan_keeps_the_text_that_makes_it_again(grid_file: Path) -> None:
    assert load_grid(grid_file, []).grid_text == BARS
    changed = load_grid(grid_file, ["axes.seed=[0,1]", "budget.flops=1e12", "name=010x"])
    assert changed.grid_text is not None
    assert plan_of(grid_file, changed.grid_text) == changed


# ---- what a person gets told ----

NO_AXIS = "not a setting that cells can differ in"
ONE_CELL = "name: g\naxes: {direction: [forward], depth: [1]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: g\naxes: {depth: [1]}", "g.yaml:1: nmae: unknown field (did you mean 'name'?)"),
        ("name: g\naxis: {depth: [1]}", "g.yaml:2: axis: unknown field (did you mean 'axes'?)"),
        (ONE_CELL + "learning_rate: 0.1", "g.yaml:3: learning_rate: unknown field (did you mean 'lr'?)"),
        (ONE_CELL + "seq_len: 64", "g.yaml:3: seq_len: unknown field (did you mean 'model.sequence_length'?)"),
        (ONE_CELL + "layers: 4", "g.yaml:3: layers: unknown field (did you mean 'depth'?)"),
        (
            ONE_CELL + "modle: {head_dim: 32}\nbugdet: {steps: 3}",
            "g.yaml:3: modle: unknown field (did you mean 'model'?); "
            "g.yaml:4: bugdet: unknown field (did you mean 'budget'?)",
        ),
        ("name: g\naxes: {lr: '1,5'}", "g.yaml:2: axes.lr: must be a list, such as [1, 2] (found '1,5')"),
        (ONE_CELL + "modle: {head_dim: 32}", "g.yaml:3: modle: unknown field (did you mean 'model'?)"),
        (ONE_CELL + "model:\n  head_dmi: 32", "g.yaml:4: model.head_dmi: unknown field (did you mean 'head_dim'?)"),
        (ONE_CELL + "launch: {retry: 3}", "g.yaml:3: launch.retry: unknown field (did you mean 'retries'?)"),
        (BARS.replace("seed: [0]", "sed: [1]"), f"g.yaml:6: axes.sed: {NO_AXIS} (did you mean 'seed'?)"),
        (BARS.replace("seed: [0]", "optim.knd: [muon]"), "g.yaml:6: optim.knd: unknown field (did you mean 'kind'?)"),
        (BARS.replace("seed: [0]", "launch.retries: [1, 2]"), f"axes.launch.retries: {NO_AXIS}"),
        (BARS.replace("seed: [0]", "optim: [{}]"), f"axes.optim: {NO_AXIS}"),
        ("name: g\nname: h\naxes: {depth: [1]}", "g.yaml:2: name: appears twice (first on line 1): keep one"),
        (BARS.replace("[0.5, 1.0]", "[nan]"), "g.yaml:5: lr: must be a number, such as 0.5 (found 'nan')"),
        (BARS.replace("[0.5, 1.0]", "[.nan]"), "g.yaml:5: lr: input should be a finite number (found nan)"),
        (BARS.replace("[0.5, 1.0]", "[1.0, .inf]"), "g.yaml:5: lr: input should be a finite number (found inf)"),
        (BARS.replace("[0.5, 1.0]", "[0]"), "g.yaml:5: lr: input should be greater than 0 (found 0"),
        (BARS.replace("[1, 2]", "[true]"), f"g.yaml:4: depth: must be {WHOLE_NUMBERS} (found True)"),
        (BARS.replace("[1, 2]", "[1.5]"), f"g.yaml:4: depth: must be {WHOLE_NUMBERS} (found 1.5)"),
        (BARS.replace("[0]", "[-1]"), "g.yaml:6: seed: input should be greater than or equal to 0 (found -1)"),
        (BARS.replace("backward]", "backwards]"), "'bidirectional' or 'permuted' (did you mean 'backward'?)"),
        (BARS.replace("[0]", "[]"), "g.yaml:6: axes.seed: needs a list of values, for instance [1, 2]"),
        (BARS.replace("[0]", ""), "g.yaml:6: axes.seed: must be a list, such as [1, 2] (found None)"),
        (BARS.replace("[0]", "0"), "g.yaml:6: axes.seed: must be a list, such as [1, 2] (found 0)"),
        (BARS.replace("[0.5, 1.0]", "[1, 0.5, 1.0]"), "g.yaml:5: axes.lr: 1.0 appears twice: keep one"),
        (BARS.replace("bars", "../x"), "g.yaml:1: name: '../x' is not a valid id"),
        (BARS.replace("bars", ".."), "g.yaml:1: name: '..' is reserved"),
        (BARS.replace("bars", "a/b"), "g.yaml:1: name: 'a/b' is not a valid id"),
        (BARS.replace("bars", "''"), "g.yaml:1: name: '' is not a valid id"),
        (BARS.replace("bars", "a" * 120), "is longer than 128 characters: give the grid a shorter name"),
        (BARS.replace("bars", "5"), "g.yaml:1: name: must be a word or a text (found 5)"),
        (BARS.replace("256}", "250}"), "g.yaml:8: budget.batch_tokens: 250 is not a multiple of"),
        (BARS + "resources: {workers: 3}", "shared by resources.workers=3: take a multiple of 192"),
        (BARS.replace("{steps: 5,", "{steps: 5, tokens: 9,"), "tokens_per_parameter (found steps and tokens)"),
        (BARS.replace("64}", "64, kv_heads: 3}"), "g.yaml:7: model: heads 1 is not a multiple of kv_heads 3"),
        (BARS + "seed: 3", "g.yaml:9: seed: a fixed value here and an axis in axes: keep one (--set axes.seed=[..])"),
        (BARS.replace("seed:", "model.sequence_length:"), "g.yaml:7: model.sequence_length: a fixed value here and"),
        (BARS + "also: [{direction: [forward], depth: [1]}]", "g.yaml:9: also.0: cell bars_forward_d1_lr1_s0 appears"),
        (BARS + "also: [{seed: [1]}]", "g.yaml:9: direction: missing: add it"),
        (BARS + "also: [{}]", "g.yaml:9: also.0: needs at least one axis"),
        (BARS + "also: 5", "g.yaml:9: also: must be a list, such as [1, 2] (found 5)"),
        (BARS + "also: {seed: [1]}", "g.yaml:9: also: must be a list, such as [1, 2]"),
        (BARS + "also: [5]", "g.yaml:9: also.0: must be fields (name: value) (found 5)"),
        ("name: g\naxes: {}", "g.yaml:2: axes: needs at least one axis, for instance direction: [forward, backward]"),
        ("name: g\naxes: [forward]", "g.yaml:2: axes: must be fields (name: value)"),
        ("name: g", "g.yaml: axes: missing: add it"),
        ("", "g.yaml: name: missing: add it"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_told_in_one_line(grid_file: Path, text: str, message: str) -> None:
    assert message in refusal(grid_file, text)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("modle.head_dim=3", "--set modle.head_dim: modle: unknown field (did you mean 'model'?)"),
        ("model.hed_dim=3", "--set model.hed_dim: unknown field (did you mean 'head_dim'?)"),
        ("axes.sed=[1]", "--set axes.sed: " + NO_AXIS + " (did you mean 'seed'?)"),
        ("axes.lr=[nan]", "--set axes.lr: lr: must be a number, such as 0.5 (found 'nan')"),
        ("axes.seed=3", "--set axes.seed: must be a list, such as [1, 2] (found 3)"),
        ("axes.seed=[3,3]", "--set axes.seed: 3 appears twice: keep one"),
        ("seed=3", "--set seed: a fixed value here and an axis in axes: keep one (--set axes.seed=[..])"),
        ("budget.steps=0", "--set budget.steps: input should be greater than or equal to 1 (found 0)"),
        ("budget.batch_tokens=100", "--set budget.batch_tokens: 100 is not a multiple of model.sequence_length=64"),
        ("name=../x", "--set name: '../x' is not a valid id"),
        ("seed", "--set seed: write it as field=value"),
        ("launch.max_cells=7", "g.yaml:2: axes: 8 cells, more than launch.max_cells=7"),
        ("launch.max_cells=1000000000", "--set launch.max_cells: input should be less than or equal to 100000"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(grid_file: Path, setting: str, message: str) -> None:
    assert refusal(grid_file, BARS, setting).startswith(message)


def test_a_product_of_billions_is_refused_without_building_it(grid_file: Path) -> None:
    axis = list(range(2000))
    text = BARS.replace("[0]", f"{axis}\n  evaluation.every: {axis}\n  checkpoint.keep: {axis[1:]}")
    assert f"axes: {8 * 2000 * 2000 * 1999} cells, more than launch.max_cells=1000" in refusal(grid_file, text)


def test_a_cell_over_the_cap_that_also_adds_is_counted(grid_file: Path) -> None:
    text = BARS + "also: [{direction: [forward], depth: [7, 8]}]\nlaunch: {max_cells: 9}"
    assert "10 cells, more than launch.max_cells=9" in refusal(grid_file, text)
    assert len(plan_of(grid_file, text.replace("max_cells: 9", "max_cells: 10")).cells) == 10


# ---- the grids that come with bwlm ----


@pytest.mark.parametrize("path", [path for path in GRIDS if path.stem != "sft_lr"], ids=lambda path: path.name)
def test_every_shipped_grid_plans(path: Path) -> None:
    plan = load_grid(path, [])
    assert plan.name == path.stem
    assert plan.cells
    assert all(cell.steps >= 1 and cell.flops > 0 for cell in plan.cells)


def test_the_demo_compares_what_it_promises() -> None:
    cells = [cell.experiment for cell in load_grid(GRIDS[0].with_name("demo.yaml"), []).cells]
    assert {"forward", "backward", "bidirectional"} <= {e.direction for e in cells}
    assert len({e.depth for e in cells}) >= 2
    assert len({e.lr for e in cells}) >= 3, "the best of two is at an edge"
    seeds = Counter((e.direction, e.depth, e.lr) for e in cells)
    rates = {e.lr for e in cells}
    directions = {e.direction for e in cells}
    assert any(all(seeds[d, depth, lr] >= 3 for d in directions for lr in rates) for depth in {e.depth for e in cells})


def test_the_controls_pair_their_directions_by_seed() -> None:
    cells = [cell.experiment for cell in load_grid(GRIDS[0].with_name("controls.yaml"), []).cells]
    seeds = {(e.data.source, e.direction): set() for e in cells}
    for cell in cells:
        assert cell.tokenizer.vocab_size == MERGE_FREE_VOCABULARY
        seeds[cell.data.source, cell.direction].add(cell.seed)
    asked = [(source, direction) for source in CONTROL_SOURCES for direction in ("forward", "backward")]
    assert seeds == {key: {0, 1, 2, 3, 4} for key in [*asked, ("builtin:null", "permuted")]}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("scheduler: {kind: asha}\nevaluation: {every: 0}\n", "set evaluation.every"),
        ("scheduler: {kind: asha}\n", "choose the learning rate with one seed"),
    ],
)
def test_asha_where_it_would_do_nothing_or_harm(tmp_path: Path, extra: str, message: str) -> None:
    path = tmp_path / "g.yaml"
    seeds = "[0]" if "every" in extra else "[0, 1]"
    path.write_text(
        f"name: g\naxes: {{direction: [forward], depth: [1], seed: {seeds}}}\nbudget: {{steps: 2}}\n{extra}"
    )
    with pytest.raises(UserError, match=message):
        load_grid(path, [])


def test_rivals_under_asha_differ_in_the_learning_rate_alone(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(
        "name: g\naxes: {direction: [forward, backward], depth: [1, 2], lr: [1.0, 2.0]}\nbudget: {steps: 2}\n"
    )
    groups = Counter(asha_group(cell.experiment) for cell in load_grid(path, []).cells)
    assert list(groups.values()) == [2] * 4


@pytest.mark.parametrize(
    ("cores", "cells", "workers", "threads"),
    [(8, 1, 1, 8), (8, 2, 1, 4), (8, 3, 1, 2), (8, 9, 1, 1), (8, 1, 2, 4), (2, 1, 4, 1), (1, 1, 1, 1)],
)
def test_cells_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, cells: int, workers: int, threads: int
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "available_cores", lambda: cores)
    path = tmp_path / "g.yaml"
    axes = f"{{direction: [forward], depth: [1], seed: {list(range(cells))}}}"
    path.write_text(f"name: g\naxes: {axes}\nbudget: {{steps: 1}}\nresources: {{workers: {workers}}}\n")
    assert {cell.experiment.resources.cpus_per_worker for cell in load_grid(path, []).cells} == {threads}
    (given,) = {c.experiment.resources.cpus_per_worker for c in load_grid(path, ["resources.cpus_per_worker=3"]).cells}
    assert given == 3
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert load_grid(path, []).cells[0].experiment.resources.cpus_per_worker == 1


def test_depth_sets_the_batch_unless_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text("name: g\naxes: {direction: [forward], depth: [4, 12]}\nbudget: {steps: 1}\n")
    small, large = (cell.experiment.budget.batch_tokens for cell in load_grid(path, []).cells)
    assert (small, large) == (2**17, 2**19)
    whole_rows = ["model.sequence_length=1000", "resources.workers=3", "axes.depth=[4]"]
    assert load_grid(path, whole_rows).cells[0].experiment.budget.batch_tokens == 132_000
    assert {c.experiment.budget.batch_tokens for c in load_grid(path, ["budget.batch_tokens=4096"]).cells} == {4096}


@pytest.mark.parametrize(("gpus", "workers", "each"), [(0, 1, 0), (1, 1, 1), (8, 1, 1), (1, 2, 0), (2, 2, 1)])
def test_a_machines_gpus_are_used_unless_told_otherwise(
    grid_file: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, workers: int, each: int
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "installed_gpus", lambda: gpus)

    def asked(*settings: str) -> set[float]:
        cells = load_grid(grid_file, [f"resources.workers={workers}", *settings]).cells
        return {cell.experiment.resources.gpus_per_worker for cell in cells}

    assert asked() == {each}
    assert asked("resources.gpus_per_worker=0") == {0}
    assert asked("resources.gpus_per_worker=1") == {1}
    if workers == 1:
        assert asked("resources.gpus_per_worker=0.25") == {0.25}
    else:
        with pytest.raises(UserError, match=r"resources: gpus_per_worker: several workers need a GPU each.*0\.25"):
            asked("resources.gpus_per_worker=0.25")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert asked() == {0}  # what a cluster has is not known here


def test_gpus_that_torch_cannot_use_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(compute, "count_gpus", lambda: 8)
    monkeypatch.setattr(compute, "can_use_gpus", lambda: True)
    assert machine.available_gpus() == 8
    monkeypatch.setattr(compute, "can_use_gpus", lambda: False)
    with pytest.raises(UserError, match=r"8 GPUs that torch cannot use: update the driver, .*gpus_per_worker=0"):
        machine.available_gpus()
    monkeypatch.setattr(compute, "count_gpus", lambda: 0)
    assert machine.available_gpus() == 0


def test_a_grid_is_read_on_a_machine_whose_gpus_torch_cannot_use(
    grid_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look at it and to stop it; a launch there is refused."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "installed_gpus", lambda: 1)
    monkeypatch.setattr(compute, "can_use_gpus", lambda: False)
    plan = load_grid(grid_file, [])
    with pytest.raises(UserError, match="1 GPUs that torch cannot use"):
        machine.machine_of(plan.cells)
    assert machine.machine_of(load_grid(grid_file, ["resources.gpus_per_worker=0"]).cells) is not None


def test_a_warmup_that_does_not_fit_is_refused(grid_file: Path) -> None:
    """Of 5 steps, round(0.65 x 5) are the way down."""
    assert load_grid(grid_file, ["optim.warmup_steps=2"]).cells
    with pytest.raises(
        UserError, match=r"optim\.warmup_steps: 3 steps and 3 of warmdown .* do not fit into a run of 5 steps"
    ):
        load_grid(grid_file, ["optim.warmup_steps=3"])


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("150000 50000\n", 3), ("1000 100000", 1), ("99900000 100000", None), ("max 100000", None), ("", None)],
)
def test_a_containers_quota_counts(tmp_path: Path, quota: str, cores: int | None) -> None:
    """As control groups of version 2 write it: microseconds of all cores together in a period, or `max`."""
    file = tmp_path / "cpu.max"
    own = available_cores(file)  # there is none
    file.write_text(quota)
    assert available_cores(file) == min(cores or own, own)


def test_the_docs_have_every_field() -> None:
    assert PAGE.read_text().partition(MARK)[2] == table(), "run python -m tests.plan.settings_table"


def test_the_schema_has_no_default_that_nobody_gets() -> None:
    """They depend on the depth and on the machine."""
    defined = Grid.model_json_schema()["$defs"]
    resources = defined["ResourceSettings"]["properties"]
    resolved = [defined["BudgetSettings"]["properties"]["batch_tokens"]]
    resolved += [resources[name] for name in ("cpus_per_worker", "gpus_per_worker")]
    assert all("default" not in field and "default:" in field["description"] for field in resolved)
    assert resources["workers"]["default"] == 1

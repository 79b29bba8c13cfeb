"""Conditions on runs, and their order."""

from __future__ import annotations

import pytest

from bwlm.errors import UserError
from bwlm.record.catalog.filters import choose_cells
from bwlm.record.catalog.rows import CellRow


def run(name: str, phase: str = "base", parent: str | None = None, lr: float = 1.0, **metrics: float) -> CellRow:
    state = "finished" if metrics else "waiting"
    return CellRow(name, phase, "backward", 2, lr, 0, parent, state, "", 20 if metrics else 0, metrics)


RUNS = [
    run("talk-sft", "sft", "talk-mid", val_bpb=2.0, val_loss_written=3.0),
    run("talk-mid", "mid", "talk-base", val_bpb=2.25),
    run("talk-base", val_bpb=2.5, val_bpb_forward=3.0),
    run("late", lr=0.5),
    run("talk-rl", "rl", "talk-sft", val_reward=0.75),
]


def ids(*where: str, sort: str | None = None) -> list[str]:
    return [cell.id for cell in choose_cells(RUNS, where, sort)]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ([], ["late", "talk-base", "talk-mid", "talk-rl", "talk-sft"]),
        (["phase=sft"], ["talk-sft"]),
        (["phase!=base"], ["talk-mid", "talk-rl", "talk-sft"]),
        (["id=talk-*"], ["talk-base", "talk-mid", "talk-rl", "talk-sft"]),
        (["id!=talk-*"], ["late"]),
        (["id=talk-[ms]*"], ["talk-mid", "talk-sft"]),
        (["parent=talk-mid"], ["talk-sft"]),
        (["parent=*"], ["talk-mid", "talk-rl", "talk-sft"]),
        (["parent="], ["late", "talk-base"]),
        (["parent!="], ["talk-mid", "talk-rl", "talk-sft"]),
        (["state=waiting"], ["late"]),
        (["direction=back*"], ["late", "talk-base", "talk-mid", "talk-rl", "talk-sft"]),
        (["depth=2", "lr<1"], ["late"]),
        (["step>=20"], ["talk-base", "talk-mid", "talk-rl", "talk-sft"]),
        (["step != 20"], ["late"]),
        (["val_bpb<2.5"], ["talk-mid", "talk-sft"]),
        (["val_bpb<=2.5"], ["talk-base", "talk-mid", "talk-sft"]),
        (["val_bpb>2.2", "val_bpb < 2.4"], ["talk-mid"]),
        (["val_bpb=2.25"], ["talk-mid"]),
        (["val_bpb==2.25"], ["talk-mid"]),
        (["val_bpb!=2.25"], ["talk-base", "talk-sft"]),
        (["val_loss_written<9"], ["talk-sft"]),
        (["val_bpb<1e-3"], []),
        (["val_bpb>-inf"], ["talk-base", "talk-mid", "talk-sft"]),
    ],
    ids=str,
)  # fmt: skip
def test_runs_of_which_all_conditions_hold(where: list[str], found: list[str]) -> None:
    assert ids(*where) == found


@pytest.mark.parametrize(
    ("sort", "found"),
    [
        ("id", ["late", "talk-base", "talk-mid", "talk-rl", "talk-sft"]),
        ("-id", ["talk-sft", "talk-rl", "talk-mid", "talk-base", "late"]),
        ("val_bpb", ["talk-sft", "talk-mid", "talk-base", "late", "talk-rl"]),
        ("-val_bpb", ["talk-base", "talk-mid", "talk-sft", "late", "talk-rl"]),
        ("phase", ["late", "talk-base", "talk-mid", "talk-sft", "talk-rl"]),
        ("-phase", ["talk-rl", "talk-sft", "talk-mid", "late", "talk-base"]),
        ("lr", ["late", "talk-base", "talk-mid", "talk-rl", "talk-sft"]),
        ("-step", ["talk-base", "talk-mid", "talk-rl", "talk-sft", "late"]),
        ("parent", ["talk-mid", "talk-sft", "talk-rl", "late", "talk-base"]),
    ],
)
def test_the_order(sort: str, found: list[str]) -> None:
    assert ids(sort=sort) == found


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("val_bbp<2", "--where val_bbp: unknown field (did you mean 'val_bpb'?): use one of id, "),
        ("val_loss_writen<2", "(did you mean 'val_loss_written'?)"),
        ("reason=x", "--where reason: unknown field"),
        ("val_bpb", "--where val_bpb: write it as FIELD=VALUE, or with != < > <= >="),
        ("<2", "--where <2: write it as"),
        ("", "--where : write it as"),
        ("val_bpb<", "--where val_bpb<: nothing is not a number"),
        ("depth=two", "--where depth=two: 'two' is not a number"),
        ("val_bpb<nan", "'nan' is not a number"),
        ("phase=stf", "--where phase=stf: no such phase (did you mean 'sft'?): use one of base, mid, sft, rl"),
        ("state=", "no such state: use one of waiting, running, finished, stopped, failed"),
        ("direction!=bakward", "(did you mean 'backward'?)"),
        ("id<talk", "--where id<talk: id holds words, not numbers: compare it with = or !="),
    ],
)
def test_a_condition_that_means_nothing_is_told(where: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        ids(where)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_order_that_means_nothing_is_told() -> None:
    with pytest.raises(UserError, match=r"--sort val_bbp: unknown field \(did you mean 'val_bpb'\?\)"):
        ids(sort="-val_bbp")


def test_usual_metrics_are_known_where_no_run_has_them() -> None:
    assert choose_cells([run("late")], ["val_reward>0.5"], "tokens_per_second") == []
    assert choose_cells([], ["val_bpb<2.5"], "val_bpb_forward") == []

"""How alike states are, of really trained runs and of what is known."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from bwlm.analysis.commands.representations import States, pair_name, ranked_heads, representations
from bwlm.analysis.runs.research_logs import opened
from bwlm.errors import UserError
from bwlm.record.catalog.select import choose
from bwlm.record.experiment import ExperimentFolder, list_experiments
from bwlm.stats.cka import linear_cka
from bwlm.text.prepare import Prepared
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.analysis.storage import without_hash_of_log
from tests.runs import in_process, make_run

LOG = {"representations": 64}


@pytest.mark.filterwarnings("error")
def test_cka_of_what_is_known() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8))
    turned = x @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3 * turned + 5) == pytest.approx(1)
    assert math.isnan(linear_cka(x, np.full_like(x, np.inf)))  # of a run that diverged; no warning besides
    assert [math.isnan(linear_cka(x[:few], x[:few])) for few in range(1, 5)] == [True, True, True, False]
    unrelated = [linear_cka(rng.normal(size=(50, 64)), rng.normal(size=(50, 64))) for _ in range(40)]
    assert abs(np.mean(unrelated)) < 0.02
    wide = rng.normal(size=(4000, 8))  # half of the features shared, all of one variance: 4 / 8
    assert linear_cka(wide, np.column_stack([wide[:, :4], rng.normal(size=(4000, 4))])) == pytest.approx(0.5, abs=0.03)


def test_representations_pair_directions_and_seeds(folders: list[ExperimentFolder]) -> None:
    table = representations(folders).table
    pairs = table.groupby("pair", sort=False)["pairs"].first().to_dict()
    assert list(pairs.items()) == [
        ("seeds of forward", 1),
        ("seeds of backward", 1),
        ("forward and backward", 4),
        ("forward and bidirectional (forward)", 2),
        ("forward and bidirectional (backward)", 2),
        ("backward and bidirectional (forward)", 2),
        ("backward and bidirectional (backward)", 2),
        ("both readings of one bidirectional model", 1),
    ]
    assert set(table["group"]) == {"d2"}
    assert set(table["layer"]) == {"embedding", "0", "1"}
    assert table["cka"].between(-0.2, 1.001).all()
    with pytest.raises(UserError, match="needs two runs of one size"):
        representations([folder for folder in folders if folder.id == "f_s0"])


def test_states_are_compared_at_one_size_and_learning_rate(prepared: Prepared, trained: Path, tmp_path: Path) -> None:
    """A mean over pairs of several sizes or rates would be of nothing."""
    storage = tmp_path / "copy"
    shutil.copytree(trained, storage)
    for name, settings in {
        "f_lr2": {"lr": 2.0},
        "b_lr2": {"lr": 2.0},
        "f_d1": {"depth": 1},
        "b_d1": {"depth": 1},
    }.items():
        direction = {"f": "forward", "b": "backward"}[name[0]]
        run = make_run(prepared, storage, name, **{"depth": 2, "direction": direction, "research_log": LOG, **settings})
        assert run_phase(run, LocalSession(), in_process).state == "finished"
    chosen = choose(storage, ["f_*", "b_*"])[0]
    first = representations(chosen).table.query("layer == 'embedding'")
    assert list(first[["group", "pair", "pairs"]].itertuples(index=False, name=None)) == [
        ("d1", "forward and backward", 1),
        ("d2, lr 1", "seeds of forward", 1),
        ("d2, lr 1", "seeds of backward", 1),
        ("d2, lr 1", "forward and backward", 4),
        ("d2, lr 2", "forward and backward", 1),
    ]
    apart = [folder for folder in chosen if folder.id in ("f_s0", "f_s1", "b_lr2")]  # each at its own rate
    assert set(representations(apart).table["pair"]) == {"seeds of forward", "forward and backward"}


def test_only_what_differs_in_the_seed_is_a_pair_of_seeds() -> None:
    def of(run: str, direction: str = "forward", seed: int = 0, reading: str = "forward") -> States:
        return States(run, "d1", direction, reading, seed, 12, np.zeros(0, np.int64), [])

    assert pair_name(of("a"), of("b", seed=1)) == "seeds of forward"
    assert pair_name(of("a"), of("b")) is None
    assert pair_name(of("a"), of("b", "backward", reading="backward")) == "forward and backward"
    readings = [of("x", "bidirectional", reading=reading) for reading in ("forward", "backward")]
    assert pair_name(*readings) == "both readings of one bidirectional model"
    assert pair_name(readings[0], of("y", "bidirectional", seed=1)) == "seeds of bidirectional (forward)"


def test_heads_are_ranked_by_how_far_they_look(trained: Path, tmp_path: Path) -> None:
    storage = tmp_path / "copy"
    shutil.copytree(trained, storage)
    values = {  # [reading, layer, head]
        "distance": [[[5.0, 1.0, 9.0, 3.0], [2.0, 4.0, 6.0, 8.0]]],
        "entropy": [[[0.5, 0.1, 0.9, 0.3], [0.2, 0.4, 0.6, 0.8]]],
        "first_share": [[[0.05, 0.01, 0.09, 0.03], [0.02, 0.04, 0.06, 0.08]]],
    }
    without_hash_of_log(storage / "f_s0")
    with h5py.File(storage / "f_s0" / "base.h5", "r+") as file:
        for name, of in values.items():
            file[f"attention/{name}"][-1] = of
    chosen, _ = choose(storage, ["f_*"], damaged=True)  # the log was edited just now
    with opened(chosen[0]) as run:
        heads = ranked_heads(run)
    assert heads["distance"].tolist() == [1, 3, 5, 9, 2, 4, 6, 8]
    assert heads["layer"].tolist() == [0] * 4 + [1] * 4
    assert heads["head"].tolist() == [0, 1, 2, 3] * 2
    assert heads["entropy"].tolist() == pytest.approx((heads["distance"] / 10).tolist())  # each goes with its head
    assert heads["first_share"].tolist() == pytest.approx((heads["distance"] / 100).tolist())
    with opened(chosen[1]) as run:
        other = ranked_heads(run)
    table = representations(chosen).more["heads"]
    assert table["distance"].tolist() == pytest.approx(((heads["distance"] + other["distance"]) / 2).tolist())
    assert table["farthest"].tolist() == pytest.approx(np.maximum(heads["distance"], other["distance"]).tolist())
    assert (table["series"] == "forward").all()
    assert (table["runs"] == 2).all()


def test_states_are_compared_where_attention_was_not_logged(trained: Path, tmp_path: Path) -> None:
    storage = tmp_path / "copy"
    shutil.copytree(trained, storage)
    for run in ("b_s0", "b_s1", "f_s0", "f_s1", "x_s0"):
        without_hash_of_log(storage / run)
        with h5py.File(storage / run / "base.h5", "r+") as file:
            del file["attention/entropy"]
    found = representations(list_experiments(storage))
    assert set(found.table["pair"]) >= {"seeds of forward", "forward and backward"}
    assert found.more == {}
    assert any("holds no attention/entropy" in note for note in found.notes)
    assert len(found.chart.to_dict()["hconcat"]) == 2

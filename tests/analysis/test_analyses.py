"""Analyses of runs that were really trained, and of figures worked out by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest

from bwlm.analysis.audit import audit
from bwlm.analysis.cka import linear_cka
from bwlm.analysis.curves import at_best_rates, compare, differences, efficiency
from bwlm.analysis.insides import over_time
from bwlm.analysis.logs import opened
from bwlm.analysis.positions import KINDS, document_lengths, positions
from bwlm.analysis.report import write_experiment_report
from bwlm.analysis.representations import States, pair_name, ranked_heads, representations
from bwlm.analysis.result import Analysis
from bwlm.analysis.select import begun, choose, shortest_names
from bwlm.analysis.tables import load_losses
from bwlm.analysis.transfer import transfer
from bwlm.cli import main
from bwlm.errors import UserError
from bwlm.record.lineage import ExperimentFolder, write_cells
from bwlm.text.corpus import read_texts
from bwlm.text.prepare import Prepared
from bwlm.train.base import run_base
from bwlm.train.session import AloneSession
from tests.analysis.storage import make_cell
from tests.runs import in_process, make_run

Ids = ["b_s0", "b_s1", "f_s0", "f_s1", "x_s0"]
LOG = {"scalars": 1, "tokens": 4, "gradients": 4, "activations": 4, "representations": 64}
ALL: dict[str, Callable[[list[ExperimentFolder]], Analysis]] = {
    "compare": compare,
    "transfer": transfer,
    "positions": positions,
    "gradients": lambda folders: over_time("gradients", folders),
    "activations": lambda folders: over_time("activations", folders),
    "representations": representations,
}


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with five finished runs; read only."""
    storage = tmp_path_factory.mktemp("trained")
    directions = {"f": "forward", "b": "backward", "x": "bidirectional"}
    for name in Ids:
        settings: dict[str, Any] = {"direction": directions[name[0]], "seed": int(name[-1]), "research_log": LOG}
        run = make_run(prepared, storage, name, depth=2, **settings)
        assert run_base(run, AloneSession(), in_process).state == "finished"
    write_cells(storage, "g", Ids[:4])
    return storage


@pytest.fixture(scope="module")
def folders(trained: Path) -> list[ExperimentFolder]:
    return choose(trained, ["*"])[0]


def test_runs_are_named_by_id_glob_or_grid(trained: Path) -> None:
    def ids(*names: str) -> list[str]:
        return [folder.id for folder in choose(trained, list(names))[0]]

    assert ids("*") == Ids
    assert ids("g") == Ids[:4]
    assert ids("x_s0", "f_*", "f_s1") == ["x_s0", "f_s0", "f_s1"]
    with pytest.raises(UserError, match=r"^f_s3: no such experiment or grid in .*did you mean 'f_s1'"):
        ids("f_s3")
    with pytest.raises(UserError, match=r"^z\*: no experiment in .* matches; see: bwlm runs list"):
        ids("f_s0", "z*")


def test_what_cannot_be_read_is_named_and_the_rest_is_chosen(tmp_path: Path) -> None:
    kept, damaged, lost = (make_cell(tmp_path, "forward", seed) for seed in range(3))
    write_cells(tmp_path, "g", [kept.id, damaged.id, lost.id, "never_made"])
    (damaged.path / "config.json").write_text("[]")
    (lost.path / "config.json").unlink()
    found, left_out = choose(tmp_path, ["g"])
    assert [folder.id for folder in found] == [kept.id]
    assert [line.partition(":")[0] for line in left_out] == [
        f"{run} is left out" for run in (damaged.id, lost.id, "never_made")
    ]
    assert "config.json: not the config of an experiment" in left_out[0]
    with pytest.raises(UserError, match=rf"^{damaged.id} is left out: .*not the config of an experiment"):
        choose(tmp_path, [damaged.id])
    (tmp_path / "grids" / "g" / "grid.json").write_text("[]")
    with pytest.raises(UserError, match=r"grid.json: not a grid's list of cells; run the grid's command again"):
        choose(tmp_path, ["g"])


def test_seeds_are_named_by_a_glob_that_matches_no_other_run(tmp_path: Path) -> None:
    runs = [make_cell(tmp_path, d, seed).id for d in ("forward", "backward") for seed in (0, 1, 10)]
    assert shortest_names(tmp_path, runs) == ["g_forward_d1_lr1_s*", "g_backward_d1_lr1_s*"]
    assert shortest_names(tmp_path, runs[1:]) == [*runs[1:3], "g_backward_d1_lr1_s*"]
    middle = make_cell(tmp_path, "forward", 0, loud=1).id
    assert shortest_names(tmp_path, [middle]) == ["g_forward_d1_lr1_s*_loud1"]


@pytest.mark.parametrize("name", ALL)
def test_each_writes_a_picture_and_a_table(folders: list[ExperimentFolder], tmp_path: Path, name: str) -> None:
    found = ALL[name](folders)
    assert found.notes == []
    assert found.findings
    assert not any("nan" in line for line in found.findings)
    files = found.write_all(tmp_path / "deeper" / name)
    assert [path.suffix for path in files] == [".html", ".svg", ".csv", ".md", *[".csv"] * len(found.more)]
    assert all(path.stat().st_size > 200 for path in files[:4])
    assert "http" not in files[1].read_text().replace("http://www.w3.org", "")
    again = pd.read_csv(files[2])
    assert list(again.columns) == list(found.table.columns)
    assert len(again) == len(found.table)
    text = files[3].read_text()
    for file, (title, table) in zip(files[4:], found.more.items(), strict=True):
        assert file.stem == f"{name}-{title.replace(' ', '-')}"
        assert pd.read_csv(file).shape == table.shape
        assert f"\n{title.capitalize()}:\n\n| {' | '.join(table.columns)} |\n" in text
    found.write(tmp_path / "only.png")
    assert (tmp_path / "only.png").read_bytes().startswith(b"\x89PNG")


def curve(direction: str, seed: int, losses: list[float]) -> pd.DataFrame:
    steps = np.arange(1, len(losses) + 1)
    return pd.DataFrame(
        {
            "run": f"{direction}{seed}", "size": "d1", "direction": direction, "lr": 1.0, "seed": seed,
            "step": steps, "tokens": 100 * steps, "flops": 1e6 * steps, "seconds": 1.0 * steps, "averaged": 100.0,
            "loss": losses,
        }
    )  # fmt: skip


def test_tokens_to_reach_a_loss_by_hand() -> None:
    """The lowest loss that all reach is 1. Backward takes twice the steps with one seed and the same with the other:
    sqrt(2) in the geometric mean."""
    curves = [
        curve("forward", 0, [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        curve("forward", 1, [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        curve("backward", 0, [4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.5, 1.0]),
        curve("backward", 1, [4.0, 3.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5]),
    ]
    table = efficiency(pd.concat(curves, ignore_index=True))
    between = [[4.0, 3.0, 2.0, 1.0], [4.0, 2.5, 2.25, 1.0]]  # to come down to 2: after 3 steps, and 3.2
    later = efficiency(
        pd.concat([curve(name, 0, losses) for name, losses in zip(("forward", "backward"), between, strict=True)])
    )
    assert later.query("loss == 2.0")["tokens"].tolist() == pytest.approx([300, 320])
    assert sorted(set(table["loss"])) == [1.0, 2.0, 3.0]
    last = table[table["loss"] == 1.0].set_index("direction")
    assert last.loc["forward", "tokens"] == 400
    assert last.loc["backward", "tokens"] == 600
    assert last.loc["backward", "flops"] == 6e6
    assert last.loc["backward", "ratio"] == pytest.approx(math.sqrt(2))
    assert last.loc["backward", "ratio_low"] < 1 < last.loc["backward", "ratio_high"]
    assert last.loc["forward", "ratio"] == 1.0
    more = pd.concat([*curves, curve("backward", 2, [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0])], ignore_index=True)
    with_unpaired = efficiency(more).query("loss == 1.0").set_index("direction")
    assert with_unpaired.loc["backward", ["seeds", "tokens"]].tolist() == [
        2,
        600,
    ]


def test_how_far_directions_are_apart_along_the_training_by_hand() -> None:
    """Over the seeds and steps that both have: 1.0, 0.5 and 0.0 apart with the three seeds, so mean 0.5 and
    t_{0.975, 2} 0.5 / sqrt 3 on either side."""
    forward = [curve("forward", seed, [4.0, 3.0, 2.0, 1.0]) for seed in range(5)]
    backward = [curve("backward", seed, [4.0 + 0.5 * (2 - seed)] * 3) for seed in range(3)]
    found = differences(pd.concat([*forward, *backward], ignore_index=True))
    assert found[["size", "direction", "against"]].drop_duplicates().to_numpy().tolist() == [
        ["d1", "backward", "forward"]
    ]
    assert found["tokens"].tolist() == [100, 200, 300]
    assert found["difference"].tolist() == pytest.approx([0.5, 1.5, 2.5])
    assert set(found["seeds"]) == {3}
    assert (found["high"] - found["difference"]).tolist() == pytest.approx([4.302653 * 0.5 / math.sqrt(3)] * 3)
    two = differences(pd.concat([*forward[:2], *backward[:2]], ignore_index=True))
    assert two["low"].isna().all()  # as with a verdict, two seeds say nothing of their spread
    assert two["difference"].tolist() == pytest.approx([0.75, 1.75, 2.75])
    assert differences(pd.concat(forward, ignore_index=True)).empty
    apart = [curve("forward", 0, [4.0, 3.0]), curve("backward", 1, [4.0, 3.0])]  # no seed is shared
    assert differences(pd.concat(apart, ignore_index=True)).empty


def test_a_direction_alone_is_told_what_it_needs_and_how_finely(folders: list[ExperimentFolder]) -> None:
    [alone] = compare([folder for folder in folders if folder.id == "f_s0"]).findings
    assert re.fullmatch(
        r"d2: forward needs [\d,]+ tokens and [\d.e+]+ FLOPs to reach [\d.]+ nats per token "
        r"\(training loss, averaged over 512 tokens\): 1 seed",
        alone,
    )


def test_transfer_is_the_losses_of_both_readings(folders: list[ExperimentFolder], trained: Path) -> None:
    table = transfer(folders).table.set_index(["direction", "reading"])
    losses = [load_losses(ExperimentFolder(trained, run), "backward") for run in ("f_s0", "f_s1")]
    crossed = np.mean([one["nll"].sum() / one["tokens"].sum() for one in losses])
    assert table.loc[("forward", "backward"), "loss"] == pytest.approx(crossed)
    found = transfer(folders).findings
    [misled] = [line for line in found if "behind the wrong marker" in line and "reads forward text" in line]
    wrong, right = (
        load_losses(ExperimentFolder(trained, "x_s0"), name) for name in ("forward_marked_backward", "forward")
    )
    apart = (wrong["nll"].sum() - right["nll"].sum()) / right["tokens"].sum()
    assert misled.startswith("d2, lr 1: behind the wrong marker a bidirectional model reads forward text at ")
    assert abs(apart) > 1e-6  # else the marker would not have been another one
    assert misled.endswith(f" {apart:+.4f} nats per token (one seed)")
    more = transfer(folders).more
    price = more["other reading"].set_index("direction")
    native = np.mean([load_losses(ExperimentFolder(trained, run), "forward")["nll"].sum() for run in ("f_s0", "f_s1")])
    assert price.loc["forward", "nats"] == pytest.approx(crossed - native / right["tokens"].sum())
    assert price["reading"].to_dict() == {"forward": "backward", "backward": "forward", "bidirectional": "backward"}
    assert price["seeds"].to_dict() == {"forward": 2, "backward": 2, "bidirectional": 1}
    marker = more["wrong marker"].set_index("reading")
    assert marker.loc["forward", "nats"] == pytest.approx(apart)
    assert set(transfer([folder for folder in folders if folder.id != "x_s0"]).more) == {"other reading"}
    native = table["native"]
    assert native.to_dict() == {
        ("backward", "backward"): True, ("backward", "forward"): False, ("bidirectional", "backward"): True,
        ("bidirectional", "forward"): True, ("forward", "backward"): False, ("forward", "forward"): True,
    }  # fmt: skip


def test_places_share_out_every_token(folders: list[ExperimentFolder], trained: Path) -> None:
    table = positions(folders).table
    losses = load_losses(ExperimentFolder(trained, "x_s0"), "forward")
    for _, group in table.groupby(["direction", "kind"]):
        assert group["tokens"].sum() == losses["tokens"].sum()
        assert group["accuracy"].between(0, 1).all()
    mean = load_losses(ExperimentFolder(trained, "x_s0"), "backward")["nll"].sum() + losses["nll"].sum()
    part = table[(table["direction"] == "bidirectional") & (table["kind"] == KINDS[0])]
    assert (part["loss"] * part["tokens"]).sum() == pytest.approx(mean / 2, rel=1e-5)
    # documents lie where the length of their whole text says, however little of it was evaluated
    lengths = document_lengths(ExperimentFolder(trained, "x_s0").config().corpus)
    assert lengths is not None
    of_document = losses.groupby(2.0 ** np.floor(np.log2(lengths[losses["document"]])))["tokens"].sum()
    part = table[(table["direction"] == "bidirectional") & (table["kind"] == KINDS[3])]
    assert part.set_index("bin")["tokens"].to_dict() == of_document.to_dict()
    for figure in ("loss", "accuracy"):
        assert (table[f"{figure}_low"] <= table[figure]).all()
        assert (table[f"{figure}_high"] >= table[figure]).all()
    spread = (table["loss_low"] < table["loss_high"]).groupby(table["direction"]).all()
    assert spread.to_dict() == {"backward": True, "bidirectional": False, "forward": True}  # one bidirectional seed
    # what a reading begins with costs it most
    first = table[table["bin"] == 1].set_index(["direction", "kind"])["loss"]
    assert first["forward", KINDS[0]] > first["forward", KINDS[1]]


def test_a_documents_length_is_that_of_its_whole_text(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bwlm.analysis.positions._AT_ONCE", 7)
    texts = [text for part in read_texts(prepared.corpus.validation[0].uri, "text") for text in part]
    expected = [len(prepared.tokenizer.encode(text or "")) for text in texts]
    lengths = document_lengths(str(prepared.folder))
    assert lengths is not None
    assert list(lengths) == expected[: len(lengths)]
    assert not any(expected[len(lengths) :])
    assert document_lengths(str(tmp_path)) is None


def test_layers_over_time(folders: list[ExperimentFolder]) -> None:
    gradients = over_time("gradients", folders).table
    assert sorted(set(gradients["step"])) == [4, 8, 12]
    assert set(gradients["layer"]) == {-1, 0, 1, 2}
    assert set(gradients["what"]) == {
        "embedding", "lm_head", "attention.query", "attention.key", "attention.value", "attention.output",
        "mlp.up", "mlp.down",
    }  # fmt: skip
    activations = over_time("activations", folders).table
    assert set(activations["what"]) == {"stream", "attention", "mlp", "hidden"}
    assert (activations[activations["what"] == "hidden"]["sparsity"] > 0.2).all()  # ReLU


def test_cka_of_what_is_known() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8))
    turned = x @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3 * turned + 5) == pytest.approx(1)
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
    assert sorted(set(table["layer"])) == [-1, 0, 1]
    assert table["cka"].between(-0.2, 1.001).all()
    with pytest.raises(UserError, match="two runs of one size are needed"):
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
        assert run_base(run, AloneSession(), in_process).state == "finished"
    chosen = choose(storage, ["f_*", "b_*"])[0]
    first = representations(chosen).table.query("layer == -1")
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
    with h5py.File(storage / "f_s0" / "base.h5", "r+") as file:
        for name, of in values.items():
            file[f"attention/{name}"][-1] = of
    chosen, _ = choose(storage, ["f_*"])
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


def test_what_differs_in_more_than_the_direction_is_refused(
    trained: Path, folders: list[ExperimentFolder], prepared: Prepared, tmp_path: Path
) -> None:
    assert audit(folders).passed == 4
    assert audit(folders).refused == []
    other = make_run(
        prepared, tmp_path, "other", depth=2, direction="backward", budget={"steps": 9, "batch_tokens": 512}
    )
    found = audit([*folders[2:4], other])
    assert found.passed == 0
    [line] = found.refused
    assert line == "refused: f_s0 and other: differ in steps: 12 -> 9"
    # but a bidirectional run of twice the steps has read as much in each direction
    twice = make_run(
        prepared, tmp_path, "twice", depth=2, direction="bidirectional", budget={"steps": 24, "batch_tokens": 512}
    )
    found = audit([*folders[2:4], twice])
    assert (found.passed, found.doubled, found.refused) == (0, 1, [])


def test_a_damaged_log_is_named_and_the_rest_goes_on(trained: Path, tmp_path: Path) -> None:
    storage = tmp_path / "copy"
    shutil.copytree(trained, storage)
    (storage / "f_s0" / "base.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (storage / "b_s1" / "base.h5").unlink()
    found = positions(choose(storage, ["*"])[0])
    assert sorted(note.split(":")[0].removeprefix(f"{storage}/") for note in found.notes) == [
        "b_s1/base.h5",
        "f_s0/base.h5",
    ]
    assert found.table.groupby("direction")["runs"].first().to_dict() == {
        "backward": 1,
        "bidirectional": 1,
        "forward": 1,
    }
    with h5py.File(storage / "b_s0" / "base.h5", "r+") as file:  # readable, with something else in its place
        del file["validation/document"]
    assert any("b_s0/base.h5: damaged (" in note for note in positions(choose(storage, ["*"])[0]).notes)
    (storage / "b_s0" / "metrics.jsonl").write_text("")
    assert compare(choose(storage, ["*"])[0]).notes == ["b_s0: its metrics.jsonl holds no step, so it is left out"]
    with pytest.raises(UserError, match=r"f_s0/base\.h5: damaged, not readable as HDF5"):
        positions(choose(storage, ["f_s0"])[0])


def flip_chunk(path: Path, column: str) -> None:
    """One byte of the compressed data of a column's newest entry."""
    with h5py.File(path, "r") as file:
        chunk = file[column].id.get_chunk_info(file[column].id.get_num_chunks() - 1)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size // 2)
        byte = raw.read(1)
        raw.seek(-1, 1)
        raw.write(bytes([byte[0] ^ 0xFF]))


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("positions", "validation/loss"), ("gradients", "gradients/rms"), ("activations", "activations/rms"),
        ("representations", "representations/states"), ("representations", "attention/entropy"),
    ],
)  # fmt: skip
def test_a_flipped_byte_in_a_log_costs_that_run_in_every_analysis(
    trained: Path, tmp_path: Path, name: str, column: str
) -> None:
    storage = tmp_path / "copy"
    shutil.copytree(trained, storage)
    flip_chunk(storage / "f_s0" / "base.h5", column)
    found = ALL[name](choose(storage, ["*"])[0])
    [note] = found.notes
    assert re.match(r".*f_s0/base\.h5: damaged \(", note)
    assert found.findings
    for file in write_experiment_report(ExperimentFolder(storage, "f_s0")):
        assert file.stat().st_size


def test_states_are_compared_where_attention_was_not_logged(trained: Path, tmp_path: Path) -> None:
    storage = tmp_path / "copy"
    shutil.copytree(trained, storage)
    for run in Ids:
        with h5py.File(storage / run / "base.h5", "r+") as file:
            del file["attention/entropy"]
    found = representations(choose(storage, ["*"])[0])
    assert set(found.table["pair"]) >= {"seeds of forward", "forward and backward"}
    assert found.more == {}
    assert any("holds no attention/entropy" in note for note in found.notes)
    assert len(found.chart.to_dict()["hconcat"]) == 2


def test_curves_are_compared_at_the_rates_of_the_verdict() -> None:
    """Rate 2 has the lower training loss at the end, and rate 1 was the better one on held-out text."""
    one, two = (
        curve("forward", 0, [4.0, 3.0, end]).assign(lr=lr, run=f"r{lr}") for lr, end in ((1.0, 2.0), (2.0, 1.9))
    )
    curves = pd.concat([one, two, curve("backward", 0, [4.0, 3.0, 2.0])], ignore_index=True)
    assert set(at_best_rates(curves, {("d1", "forward"): 1.0})["run"]) == {"r1.0", "backward0"}
    assert set(at_best_rates(curves, {})["run"]) == {"r2.0", "backward0"}


def test_runs_that_have_not_begun_are_left_out(prepared: Prepared, tmp_path: Path) -> None:
    waiting = make_run(prepared, tmp_path, "waiting")
    with pytest.raises(UserError, match=r"^waiting: not begun: there is nothing to analyse yet"):
        begun([waiting], [])
    cut = make_run(prepared, tmp_path, "cut")

    class Killed(AloneSession):
        def report(self, step: int, metrics: dict[str, float]) -> None:
            if step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_base(cut, Killed(), in_process)
    left, notes = begun([waiting, cut], [])
    assert [folder.id for folder in left] == ["cut"]
    assert notes == ["cut is stopped: analysed up to step 7", "not begun, and left out: waiting"]
    assert set(positions(left).table["direction"]) == {"forward"}


def test_the_command(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["bwlm", "analyze", *words, "--storage", str(trained)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    code, out, err = run("transfer", "g", "--json", "--output", str(tmp_path / "t.csv"))
    assert (code, err) == (0, f"written: {tmp_path / 't.csv'}\n")
    shown = json.loads(out)
    assert {row["direction"] for row in shown["table"]} == {"forward", "backward"}
    assert [row["direction"] for row in shown["more"]["other reading"]] == ["backward", "forward"]
    assert run("positions", "f_s9")[0] == 2
    code, out, err = run("compare", "z*")
    assert (code, out, err.count("\n")) == (2, "", 1)
    code, out, err = run("compare", "g")
    assert out.startswith("d2: backward needs ")
    folder = trained / "analyses" / "g"
    assert err.splitlines() == [f"written: {folder / f'compare.{kind}'}" for kind in ("html", "svg", "csv", "md")]
    code, out, err = run("gap", "*")
    assert code == 0
    assert "forward → backward" in out
    assert "too few seeds to tell" in out
    assert "lacks" not in err
    before = len(list(folder.parent.glob("*/gap.svg")))
    run("gap", "f_*", "b_s0")  # another question leaves the first one's files alone
    assert len(list(folder.parent.glob("*/gap.svg"))) == before + 1
    code, _, err = run("gap", "*", "--output", "/proc/gap.svg")
    assert (code, err.splitlines()[-1].startswith("bwlm: --output: /proc/gap.svg cannot be written (")) == (2, True)
    code, _, err = run("gap", "f_*")
    assert code == 2
    assert "only forward has a best learning rate" in err
    assert run("gap")[0] == run("gap", "g", "--from", "x.csv")[0] == 2

"""Tables of what runs left behind, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from bwlm.analysis.runs.document_losses import document_losses, gap_table
from bwlm.analysis.runs.labels import series, sizes
from bwlm.analysis.runs.losses import load_curves, own_losses
from bwlm.analysis.runs.rates import BestRate, TriedRate, best_learning_rates, best_on_test, tried_rates
from bwlm.errors import UserError
from bwlm.record.catalog.rows import load_cell, load_cells
from bwlm.record.experiment import Status
from bwlm.record.labels import setting_of, varying_settings
from bwlm.stats.gaps import gaps
from tests.analysis.storage import finish, make_cell

LN2 = math.log(2)


def rows(direction: str, lr: float, seed: int, tuning: float, test: float, size: str = "d1") -> list[dict[str, object]]:
    """Two documents a half, of 10 and 30 bytes; nll is given in bits per byte."""
    return [
        {"size": size, "direction": direction, "lr": lr, "seed": seed, "half": half, "run": f"{direction}{lr}{seed}",
         "document": document, "nll": bits * count * LN2, "bytes": count, "tokens": count / 4}
        for half, bits in (("tuning", tuning), ("test", test))
        for document, count in (("a", 10), ("b", 30))
    ]  # fmt: skip


def table(*cells: list[dict[str, object]]) -> pd.DataFrame:
    return pd.DataFrame([row for cell in cells for row in cell])


def chosen(losses: pd.DataFrame, *unfinished: TriedRate) -> list[BestRate]:
    """The choice where every cell of the table finished, and of the rates that are `unfinished` not every one."""
    counts = losses.groupby(["size", "direction", "lr"])["seed"].nunique()
    tried = [TriedRate(*key, int(count), int(count)) for key, count in counts.items()]  # type: ignore[misc]
    replaced = {(rate.size, rate.direction, rate.lr) for rate in unfinished}
    kept = [rate for rate in tried if (rate.size, rate.direction, rate.lr) not in replaced]
    return best_learning_rates(losses, [*kept, *unfinished])


# ---- the choice of a learning rate ----


def test_the_best_rate_is_chosen_by_the_mean_over_seeds_on_the_tuning_half() -> None:
    found = chosen(
        table(
            rows("forward", 0.5, 0, tuning=2.0, test=1.0),
            rows("forward", 0.5, 1, tuning=1.6, test=1.0),  # mean 1.8
            rows("forward", 1.0, 0, tuning=1.8, test=9.0),
            rows("forward", 1.0, 1, tuning=1.7, test=9.0),  # mean 1.75, though each is beaten by 1.6
        )
    )
    assert found == [BestRate("d1", "forward", 1.0, 2, 2, pytest.approx(1.75), 2)]  # type: ignore[arg-type]


def test_a_documents_bytes_weigh() -> None:
    """Bits per byte of all text together, not the mean over documents."""
    losses = table(rows("forward", 1.0, 0, tuning=2.0, test=2.0))
    losses.loc[(losses["half"] == "tuning") & (losses["document"] == "a"), "nll"] = 10 * 6.0 * LN2
    assert chosen(losses)[0].bpb == pytest.approx((10 * 6.0 + 30 * 2.0) / 40)


def test_only_seeds_that_every_rate_has_count() -> None:
    """A seed can be a lucky one: a rate that has it must not win by it."""
    found = chosen(
        table(
            rows("forward", 0.5, 0, tuning=2.0, test=0),
            rows("forward", 1.0, 0, tuning=2.1, test=0),
            rows("forward", 1.0, 1, tuning=0.1, test=0),  # mean 1.1 if it counted
        )
    )
    assert found == [BestRate("d1", "forward", 0.5, 2, 1, 2.0, 1)]


def test_where_no_seed_is_shared_all_count() -> None:
    found = chosen(table(rows("forward", 0.5, 0, tuning=2.0, test=0), rows("forward", 1.0, 1, tuning=1.9, test=0)))
    assert found == [BestRate("d1", "forward", 1.0, 2, 1, 1.9, 1)]


def test_the_choice_rests_on_the_rate_with_the_fewest_seeds() -> None:
    """Without shared seeds one of them judges 1.0, whichever rate wins by it."""
    three = [rows("forward", 0.5, seed, tuning=2.0, test=0) for seed in (1, 2, 3)]
    for tuning, lr in ((1.0, 1.0), (3.0, 0.5)):
        [found] = chosen(table(*three, rows("forward", 1.0, 0, tuning=tuning, test=0)))
        assert (found.lr, found.choosing_seeds) == (lr, 1)


def test_a_rate_without_another_is_no_choice() -> None:
    [found] = chosen(table(rows("forward", 0.5, 0, tuning=2.0, test=0)))
    assert found == BestRate("d1", "forward", 0.5, 1, 1, 2.0, None)


def test_a_rate_with_an_unfinished_cell_cannot_win() -> None:
    """It diverged at the seeds that the table lacks; the one that it survived does not speak for it."""
    losses = table(
        rows("forward", 1.0, 0, tuning=2.0, test=0),
        rows("forward", 1.0, 1, tuning=2.2, test=0),
        rows("forward", 4.0, 0, tuning=1.0, test=0),
    )
    found = chosen(losses, TriedRate("d1", "forward", 4.0, cells=2, finished=1))
    assert found == [BestRate("d1", "forward", 1.0, 2, 2, pytest.approx(2.1), 2)]  # type: ignore[arg-type]


def test_a_rate_that_does_not_qualify_takes_no_seed_from_the_others() -> None:
    losses = table(
        rows("forward", 0.5, 0, tuning=2.0, test=0),
        rows("forward", 0.5, 1, tuning=2.0, test=0),
        rows("forward", 1.0, 0, tuning=1.9, test=0),
        rows("forward", 1.0, 1, tuning=2.3, test=0),  # best at seed 0 alone, not over both
        rows("forward", 4.0, 0, tuning=1.0, test=0),
    )
    found = chosen(losses, TriedRate("d1", "forward", 4.0, cells=2, finished=1))
    assert found == [BestRate("d1", "forward", 0.5, 3, 2, 2.0, 2)]


def test_where_no_rate_qualifies_there_is_no_best_one() -> None:
    losses = table(rows("forward", 1.0, 0, tuning=2.0, test=0), rows("backward", 1.0, 0, tuning=2.0, test=0))
    found = chosen(losses, TriedRate("d1", "forward", 1.0, cells=2, finished=1))
    assert [rate.direction for rate in found] == ["backward"]
    assert set(best_on_test(losses, found)["direction"]) == {"backward"}


def test_the_rates_that_were_tried_count_cells_in_any_state(tmp_path: Path) -> None:
    cells = [make_cell(tmp_path, "forward", seed=s, lr=r) for r in (1.0, 4.0) for s in range(3)]
    cells.append(make_cell(tmp_path, "backward"))
    finished = {cell.id for cell in cells[:4]}
    assert tried_rates(cells, sizes(cells), finished) == [
        TriedRate("d1", "backward", 1.0, 1, 0),
        TriedRate("d1", "forward", 1.0, 3, 3),
        TriedRate("d1", "forward", 4.0, 3, 1),
    ]


def test_a_loss_that_is_no_number_cannot_win(tmp_path: Path) -> None:
    bad = finish(make_cell(tmp_path, "forward", lr=4.0), {"forward": [math.nan] * 4})
    cells = [bad, finish(make_cell(tmp_path, "forward"), {"forward": [20.0] * 4})]
    assert [rate.lr for rate in chosen(gap_table(document_losses(cells), sizes(cells)))] == [1.0]


def test_of_equal_rates_the_lower_is_taken() -> None:
    cells = [rows("forward", lr, 0, tuning=2.0, test=0) for lr in (2.0, 0.5, 1.0)]
    assert chosen(table(*cells))[0].lr == 0.5


def test_each_size_and_direction_chooses_for_itself() -> None:
    found = chosen(
        table(
            rows("backward", 0.5, 0, 1.0, 0), rows("backward", 1.0, 0, 2.0, 0),
            rows("forward", 0.5, 0, 2.0, 0), rows("forward", 1.0, 0, 1.0, 0),
            rows("forward", 0.5, 0, 1.0, 0, size="d2"), rows("forward", 1.0, 0, 2.0, 0, size="d2"),
        )
    )  # fmt: skip
    assert [(b.size, b.direction, b.lr) for b in found] == [
        ("d1", "forward", 1.0), ("d1", "backward", 0.5), ("d2", "forward", 0.5)
    ]  # fmt: skip


def test_best_is_compared_on_the_other_half() -> None:
    losses = table(
        rows("forward", 0.5, 0, tuning=1.0, test=5.0),
        rows("forward", 1.0, 0, tuning=2.0, test=1.0),
        rows("backward", 1.0, 0, tuning=1.0, test=3.0),
    )
    compared = best_on_test(losses, chosen(losses))
    assert "half" not in compared
    assert compared.groupby(["direction", "lr"])["nll"].sum().to_dict() == pytest.approx(
        {("forward", 0.5): 5.0 * 40 * LN2, ("backward", 1.0): 3.0 * 40 * LN2}
    )
    assert len(compared) == 4
    choosing_seeds = compared.groupby("direction")["choosing_seeds"].max()
    assert choosing_seeds["forward"] == 1
    assert math.isnan(choosing_seeds["backward"])  # one rate, which nobody chose


# ---- sizes ----


def test_sizes_name_what_varies_beside_direction_rate_and_seed(tmp_path: Path) -> None:
    plain = [make_cell(tmp_path, d, seed=s, lr=r) for d in ("forward", "backward") for s in (0, 1) for r in (1.0, 2.0)]
    assert set(sizes(plain).values()) == {"d1"}


def test_what_follows_from_the_depth_does_not_clutter_its_name(tmp_path: Path) -> None:
    """Under tokens_per_parameter the steps differ by depth, and by nothing else."""
    cells = [make_cell(tmp_path, d, depth=n) for d in ("forward", "backward") for n in (1, 2)]
    assert sizes(cells) == {cell.id: f"d{cell.config().experiment.depth}" for cell in cells}


def test_runs_that_differ_in_something_else_are_of_another_size(tmp_path: Path) -> None:
    cells = [make_cell(tmp_path, d, kind=k) for d in ("forward", "backward") for k in ("muon", "adamw")]
    assert {cell.id.rpartition("kind")[2]: sizes(cells)[cell.id] for cell in cells} == {
        "muon": "d1 kind=muon",
        "adamw": "d1 kind=adamw",
    }


def test_a_digest_that_a_setting_explains_is_not_in_the_label(tmp_path: Path) -> None:
    cells = [
        make_cell(tmp_path, "forward", seed=i, length=n, data=str(i) * 20, tokenizer="ab"[i] * 20)
        for i, n in enumerate((256, 512))
    ]
    assert list(sizes(cells).values()) == ["d1 length=256", "d1 length=512"]


def test_a_digest_that_nothing_explains_is_shortened(tmp_path: Path) -> None:
    digests = ["0123456789" + "f" * 54, "a" * 64]
    cells = [make_cell(tmp_path, "forward", seed=i, data=digest) for i, digest in enumerate(digests)]
    assert list(sizes(cells).values()) == ["d1 data=01234567", "d1 data=aaaaaaaa"]
    # the length explains some of the difference, not all of it
    cells.append(make_cell(tmp_path, "forward", seed=2, data="b" * 64, length=512))
    assert sizes(cells)[cells[2].id] == "d1 length=512 data=bbbbbbbb"
    assert len(set(sizes(cells).values())) == 3


def test_a_series_holds_what_differs_in_the_seed_alone(tmp_path: Path) -> None:
    plain = [make_cell(tmp_path, d, seed) for d in ("forward", "backward") for seed in range(2)]
    assert list(series(plain).values()) == ["forward", "forward", "backward", "backward"]
    more = [*plain[:2], make_cell(tmp_path, "forward", lr=2.0), make_cell(tmp_path, "backward", depth=2)]
    assert list(series(more).values()) == [
        "forward, d1, lr 1", "forward, d1, lr 1", "forward, d1, lr 2", "backward, d2, lr 1",
    ]  # fmt: skip


def test_corpora_go_by_their_source_where_it_tells_them_apart(tmp_path: Path) -> None:
    cells = [make_cell(tmp_path, "forward", source=source) for source in ("builtin:null", "/some/where/corpus/")]
    assert list(sizes(cells).values()) == ["d1 data=builtin:null", "d1 data=corpus"]
    cells.append(make_cell(tmp_path, "forward", source="/else/where/corpus"))
    assert len({label for label in sizes(cells).values() if label.startswith("d1 data=")}) == 3


def test_a_tokenizer_explains_its_data(tmp_path: Path) -> None:
    cells = [make_cell(tmp_path, "forward", seed=i, data=c * 20, tokenizer=c * 20) for i, c in enumerate("ab")]
    assert list(sizes(cells).values()) == ["d1 tokenizer=aaaaaaaa", "d1 tokenizer=bbbbbbbb"]


# ---- reading ----


def test_a_cell_as_lists_and_scripts_see_it(tmp_path: Path) -> None:
    folder = make_cell(tmp_path, "backward", seed=3, lr=0.5, depth=2)
    folder.write_status(Status("failed", "loss nan", 4, {"val_bpb": 1.5}))
    assert load_cell(folder).to_json() == {
        "id": "g_backward_d2_lr0.5_s3", "phase": "base", "direction": "backward", "depth": 2, "lr": 0.5, "seed": 3,
        "parent": None, "state": "failed", "reason": "loss nan", "step": 4, "metrics": {"val_bpb": 1.5},
            "damage": [],
    }  # fmt: skip
    assert load_cells(tmp_path, [folder.id]) == [load_cell(folder)]


def test_settings_of_rl_are_the_runs_own_and_not_of_an_ancestor() -> None:
    assert setting_of("mid.steps") == (2, "steps")
    assert setting_of("rl.samples") == (0, "rl.samples")
    runs = {samples: {"depth": 1, "rl.samples": samples, "optim.init_lr_frac": samples} for samples in ("4", "8")}
    assert varying_settings(runs) == ["optim.init_lr_frac", "rl.samples"]


def test_documents_without_text_are_left_out_of_the_gap_table(tmp_path: Path) -> None:
    """A row of mid-training may end with a conversation's marker, which is not scored: its segment has no token."""
    cells = []
    for direction in ("forward", "backward"):
        cells.append(finish(make_cell(tmp_path, direction), {direction: [1.0, 2.0, 4.0, 0.0]}))
        path = cells[-1].evaluation("base", direction) / "validation.parquet"
        losses = pq.read_table(path).to_pandas()
        losses.loc[3, ["tokens", "bytes"]] = 0
        losses.to_parquet(path)
    losses = gap_table(document_losses(cells), sizes(cells))
    assert list(losses["tokens"]) == [10, 10, 10] * 2
    assert [gap.documents for gap in gaps(losses[losses["half"] == "test"])] == [1]


def test_curves(tmp_path: Path) -> None:
    folder = make_cell(tmp_path, "forward")
    assert load_curves(folder).empty
    curves = load_curves(finish(folder, {"forward": [1.0, 1.0]}))
    assert list(curves["step"]) == list(range(1, 21))
    assert list(curves[curves["val_loss"].notna()]["step"]) == [10, 20]


def test_own_losses_of_a_bidirectional_model_are_the_mean_of_its_two(tmp_path: Path) -> None:
    both = {"forward": [10.0, 20.0, 30.0], "backward": [20.0, 30.0, 40.0]}
    folder = finish(make_cell(tmp_path, "bidirectional"), both)
    assert list(own_losses(folder)["nll"]) == [15.0, 25.0, 35.0]
    assert list(own_losses(folder)["tokens"]) == [10, 10, 10]
    assert own_losses(folder)["end_nll"].tolist()[1] == 1.0
    assert list(own_losses(finish(make_cell(tmp_path, "backward"), both))["nll"]) == both["backward"]
    permuted = both | {"permuted": [1.0, 2.0, 3.0]}
    assert list(own_losses(finish(make_cell(tmp_path, "permuted"), permuted))["nll"]) == [1.0, 2.0, 3.0]


def test_a_bidirectional_model_whose_readings_saw_other_windows_is_refused(tmp_path: Path) -> None:
    folder = finish(make_cell(tmp_path, "bidirectional"), {"forward": [1.0, 2.0, 3.0], "backward": [1.0, 2.0]})
    with pytest.raises(UserError, match="g_bidirectional_d1_lr1_s0: its two readings were measured on different"):
        own_losses(folder)


def test_the_gap_table_has_a_row_for_each_document_and_half(tmp_path: Path) -> None:
    first = finish(make_cell(tmp_path, "forward"), {"forward": [1.0, 2.0, 4.0, 8.0]})
    second = finish(make_cell(tmp_path, "backward", seed=2, lr=0.5), {"backward": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]})
    losses = gap_table(document_losses([first, second]), sizes([first, second]))
    assert {"run", "direction", "seed", "size", "lr", "half", "document", "nll", "tokens", "bytes"} <= set(losses)
    mine = losses[losses["run"] == first.id].set_index(["half", "document"])["nll"].to_dict()
    # windows 0 and 1 are of document 0, 2 and 3 of document 1; even ones tune, odd ones test
    assert mine == {("tuning", 0): 1.0, ("tuning", 1): 4.0, ("test", 0): 2.0, ("test", 1): 8.0}
    other = losses[losses["run"] == second.id]
    assert set(other["windows"]) == {3}  # of six, three a half
    assert set(other["direction"]) == {"backward"}
    assert set(other["seed"]) == {2}
    assert set(other["lr"]) == {0.5}
    assert other["nll"].sum() == 63.0

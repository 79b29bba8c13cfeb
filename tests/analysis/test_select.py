"""Which runs a name on the command line means."""

from __future__ import annotations

from pathlib import Path

import pytest

from bwlm.analysis.commands.positions import positions
from bwlm.errors import UserError
from bwlm.record.catalog.select import begun, choose, shortest_names
from bwlm.record.grids import write_cells
from bwlm.text.prepare import Prepared
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tests.analysis.storage import make_cell
from tests.runs import in_process, make_run


def test_runs_are_named_by_id_glob_or_grid(trained: Path) -> None:
    def ids(*names: str) -> list[str]:
        return [folder.id for folder in choose(trained, list(names))[0]]

    assert ids("*") == ["b_s0", "b_s1", "f_s0", "f_s1", "x_s0"]
    assert ids("g") == ["b_s0", "b_s1", "f_s0", "f_s1"]
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
    with pytest.raises(UserError, match=r"grid.json: not the list of a grid's cells: run the grid's command again"):
        choose(tmp_path, ["g"])


def test_seeds_are_named_by_a_glob_that_matches_no_other_run(tmp_path: Path) -> None:
    runs = [make_cell(tmp_path, d, seed).id for d in ("forward", "backward") for seed in (0, 1, 10)]
    assert shortest_names(tmp_path, runs) == ["g_forward_d1_lr1_s*", "g_backward_d1_lr1_s*"]
    assert shortest_names(tmp_path, runs[1:]) == [*runs[1:3], "g_backward_d1_lr1_s*"]
    middle = make_cell(tmp_path, "forward", 0, loud=1).id
    assert shortest_names(tmp_path, [middle]) == ["g_forward_d1_lr1_s*_loud1"]
    chained = [make_cell(tmp_path, "bidirectional", seed, phase="sft").id for seed in (0, 1)]
    assert shortest_names(tmp_path, chained) == ["g_bidirectional_d1_lr1_s*-sft"]


def test_runs_that_have_not_begun_are_left_out(prepared: Prepared, tmp_path: Path) -> None:
    waiting = make_run(prepared, tmp_path, "waiting")
    with pytest.raises(UserError, match=r"^waiting: has not begun, so there is nothing to analyse: train it first"):
        begun([waiting], [])
    cut = make_run(prepared, tmp_path, "cut")

    class Killed(LocalSession):
        def report(self, step: int, metrics: dict[str, float]) -> None:
            if step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_phase(cut, Killed(), in_process)
    left, notes = begun([waiting, cut], [])
    assert [folder.id for folder in left] == ["cut"]
    assert notes == ["cut is stopped: analysed up to step 7", "not begun, and left out: waiting"]
    assert set(positions(left).table["direction"]) == {"forward"}

"""What a person sees while a grid runs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from bwlm.format import clock
from bwlm.grid.progress import ProgressDisplay
from bwlm.plan.load import load_grid
from bwlm.plan.spec import Cell
from bwlm.record.experiment import Status

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def cells() -> tuple[Cell, ...]:
    return load_grid(ROOT / "grids" / "demo.yaml", []).cells


def seen(progress: ProgressDisplay, width: int = 120) -> str:
    console = progress._console = Console(file=io.StringIO(), force_terminal=False, width=width)
    console.print(progress._picture())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def clock_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the time that the display sees."""
    now = [0.0]
    monkeypatch.setattr("bwlm.grid.progress.time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_the_picture_counts_cells_and_shows_the_running_ones(
    cells: tuple[Cell, ...], clock_at: Callable[[float], None]
) -> None:
    before = {cell.id: Status("finished") for cell in cells[:3]} | {cells[3].id: Status("stopped", "by the scheduler")}
    progress = ProgressDisplay(cells, before)
    progress.began(cells[4].id, 0)
    progress.moved(cells[4].id, {"step": 10})
    clock_at(10.0)
    progress.moved(cells[4].id, {"step": 20, "train_loss_smooth": 4.5, "val_bpb": 2.3, "tokens_per_second": 23456.7})
    progress.began(cells[5].id, 0)
    progress.ended(cells[6].id, Status("failed", "loss nan"))
    shown = seen(progress)
    assert "4 done · 1 failed · 2 running · 29 waiting" in shown
    assert f"{cells[4].id}  20/40" in shown
    assert "4.500   2.3000    23,457" in shown
    assert f"{cells[5].id}   0/40" in shown
    assert "left" in shown
    assert all(len(line.rstrip()) <= 80 for line in seen(progress, width=80).splitlines())


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_figure_is_cut_and_rows_stay_apart_in_a_narrow_terminal(width: int) -> None:
    """Ids of a grid differ at their ends; the bar gives its room first."""
    cells = load_grid(ROOT / "grids" / "tour.yaml", []).cells
    pair = [cell for cell in cells if cell.id.endswith(("backward_d2_lr1_s0-sft_init_lr_frac0.05", "_init_lr_frac0.5"))]
    progress = ProgressDisplay(cells, {})
    for cell in pair[:2]:
        progress.began(cell.id, 0)
        progress.moved(cell.id, {"step": 1, "train_loss_smooth": 4.5, "val_bpb": 2.3, "tokens_per_second": 123456.7})
    heading, *rows = seen(progress, width).splitlines()[-3:]
    assert heading.split() == ["cell", "step", "loss", "val", "bpb", "tokens/s"]
    assert all(row.split()[-3:] == ["4.500", "2.3000", "123,457"] for row in rows)
    assert len({row.split()[0] for row in rows}) == len(rows) == 2
    assert all(len(row.rstrip()) <= width for row in (heading, *rows))


def test_a_thousand_cells_fit_on_a_screen_of_24_lines(clock_at: Callable[[float], None]) -> None:
    """The counts are of all cells; of the running ones those that began first are shown, and of the ends the newest."""
    axes = ["axes.depth=[1]", "axes.lr=[1,2,4]", f"axes.seed={list(range(111))}", "also=[]"]
    cells = load_grid(ROOT / "grids" / "demo.yaml", axes).cells
    progress = ProgressDisplay(cells, {cell.id: Status("finished") for cell in cells[:500]})
    for cell in cells[500:700]:
        progress.began(cell.id, 0)
        progress.moved(cell.id, {"step": 10, "train_loss_smooth": 4.5})
    for cell in cells[700:705]:
        progress.ended(cell.id, Status("finished", step=40, metrics={"val_bpb": 2.5}))
    progress._console = Console(file=io.StringIO(), force_terminal=False, width=80, height=24)
    progress._console.print(progress._picture())
    assert isinstance(progress._console.file, io.StringIO)
    head, _, *lines = progress._console.file.getvalue().splitlines()
    assert head.startswith("505 done · 200 running · 294 waiting")
    assert len(lines) + 2 < 24
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert [line.split()[0] for line in lines[:3]] == [cell.id for cell in cells[500:503]]
    assert lines[-4] == f"and {200 - len(lines) + 4} more running"
    assert lines[-3:] == [f"{cell.id}: finished, val_bpb 2.5000" for cell in cells[702:705]]


def test_elsewhere_a_line_names_few_of_many_running_cells(
    cells: tuple[Cell, ...], clock_at: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = ProgressDisplay(cells, {})
    for cell in cells[:5]:
        progress.began(cell.id, 0)
    clock_at(1000.0)
    progress.moved(cells[0].id, {"step": 10})
    at = ", ".join(f"{cell.id} at step {10 * (cell is cells[0])}/40" for cell in cells[:3])
    assert f"0/36 {at} and 2 more" in capsys.readouterr().err


def test_one_model_has_no_counts_and_its_validation_is_named(
    cells: tuple[Cell, ...], clock_at: Callable[[float], None]
) -> None:
    progress = ProgressDisplay(cells[:1], {})
    assert seen(progress).startswith("0:00 gone · workers start, no step yet\n")
    progress.began(cells[0].id, 0)
    progress.moved(cells[0].id, {"step": 38, "step_seconds": 2.0})
    clock_at(2.0)
    progress.moved(cells[0].id, {"step": 39, "step_seconds": 2.0})
    clock_at(3.0)
    assert "validating" not in seen(progress), "its last step runs"
    clock_at(5.0)
    assert "39/40" in seen(progress)
    assert "validating" in seen(progress)
    progress.moved(cells[0].id, {"step": 40, "step_seconds": 2.0, "val_bpb": 2.3})
    assert "validating" not in seen(progress)


def test_the_cells_of_all_phases_are_counted() -> None:
    """The tour: 3 bases, 3 mid, 6 sft and 6 rl; two cells of sft run."""
    cells = load_grid(ROOT / "grids" / "tour.yaml", []).cells
    done = {cell.id: Status("finished") for cell in cells if cell.experiment.phase in ("base", "mid")}
    progress = ProgressDisplay(cells, done)
    for cell in [cell for cell in cells if cell.experiment.phase == "sft"][:2]:
        progress.began(cell.id, 0)
    assert seen(progress).startswith("6 done · 2 running · 10 waiting · ")


def test_a_chain_counts_its_runs_and_shows_the_figures_of_the_one_that_runs(
    cells: tuple[Cell, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = ProgressDisplay(cells[:3], {cells[0].id: Status("finished")}, in_detail=True)
    progress.began(cells[1].id, 0)
    progress.moved(cells[1].id, {"step": 20, "train_loss_smooth": 4.5, "val_bpb": 2.3, "grad_norm": 0.5})
    assert capsys.readouterr().err.startswith("step 20/40, loss 4.500, val_bpb 2.3000")
    shown = seen(progress)
    assert shown.startswith("1 done · 1 running · 1 waiting · ")
    assert shown.splitlines()[-1].strip() == "grad norm 0.5"


def test_outside_a_terminal_a_validation_is_named_too(cells: tuple[Cell, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("bwlm.grid.progress.working", lambda doing: contextlib.nullcontext(told.append(doing)))
    with ProgressDisplay(cells[:1], {}) as progress:
        progress.began(cells[0].id, 0)
        for step in (18, 38, 39):
            progress.moved(cells[0].id, {"step": step})
    assert told == ["workers start, no step yet", "step 40 and its validation"]


def test_the_time_left_never_grows_while_nothing_is_heard(
    cells: tuple[Cell, ...], clock_at: Callable[[float], None]
) -> None:
    """A long validation lets no report come: the estimate runs down, and then there is none."""
    progress = ProgressDisplay(cells[:1], {})
    progress.began(cells[0].id, 0)
    assert progress._seconds_left() is None
    clock_at(100.0)  # workers started
    progress.moved(cells[0].id, {"step": 1})
    assert progress._seconds_left() is None, "a single report tells no pace"
    clock_at(138.0)
    progress.moved(cells[0].id, {"step": 39})
    left = progress._seconds_left()
    assert left is not None
    for gone in (1.0, 5.0):
        clock_at(138.0 + gone)
        assert progress._seconds_left() == pytest.approx(left - gone)
    clock_at(138.0 + left)
    assert progress._seconds_left() is None


def test_elsewhere_a_line_for_each_cell_that_ends(cells: tuple[Cell, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(cells, {}) as progress:
        progress.began(cells[0].id, 0)
        progress.ended(cells[0].id, Status("finished", "", 40, {"val_bpb": 2.25}))
        progress.ended(cells[1].id, Status("failed", "crashed, see error.txt: oh"))
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith(f"1/36 {cells[0].id}: finished, val_bpb 2.2500, about ")
    assert shown[1].startswith(f"2/36 {cells[1].id}: failed (crashed, see error.txt: oh)")


def test_a_cell_that_is_taken_up_again_is_told(cells: tuple[Cell, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(cells, {}) as progress:
        progress.began(cells[0].id, 0)
        progress.moved(cells[0].id, {"step": 10})
        progress.moved(cells[0].id, {"step": 20, "val_bpb": 2.5})
        progress.broke_off(cells[0].id, 20)
        progress.began(cells[0].id, 20)
    [line] = capsys.readouterr().err.splitlines()  # of a grid, validations are not told
    assert line.startswith(f"{cells[0].id}: broke off at step 20, goes on, about ")


def test_a_grid_tells_now_and_then_where_its_cells_are(
    cells: tuple[Cell, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("bwlm.grid.progress.time.monotonic", lambda: now)
    with ProgressDisplay(cells, {cells[0].id: Status("finished")}) as progress:
        progress.began(cells[1].id, 0)
        progress.began(cells[2].id, 0)
        for now in (10.0, 310.0, 320.0):
            progress.moved(cells[1].id, {"step": int(now) // 10})
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"1/36 {cells[1].id} at step 31/40, {cells[2].id} at step 0/40, about ")


def test_a_single_experiment_tells_its_validations(cells: tuple[Cell, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(cells[:1], {}) as progress:
        progress.began(cells[0].id, 10)
        looked_at = {"memory_bytes": 912e6, "research_log_bytes": 1234567, "disk_free_bytes": 70e9}
        progress.moved(cells[0].id, {"step": 15, "train_loss_smooth": 4.5, **looked_at})
        measured = {"train_loss_smooth": 4.5, "val_bpb": 2.3, "tokens_per_second": 23456.7, "mfu": 0.4821}
        measured |= {"train_loss": 4.4, "train_loss_forward": 4.3, "grad_norm": 0.5123, "lr_matrix": 0.02}
        measured |= {"lr_embedding": 0.2828, "tokens": 1.5e6, "flops": 3.2e15}
        progress.moved(cells[0].id, {"step": 20, **measured})
        progress.ended(cells[0].id, Status("finished", "", 40, {"val_bpb": 2.25}))
    first, learns, rates, takes, last = capsys.readouterr().err.splitlines()
    assert first.startswith("step 20/40, loss 4.500, val_bpb 2.3000, 23,457 tokens/s, about ")
    assert learns == "  loss of this step 4.400 · forward 4.300 · grad norm 0.512"
    assert rates == "  learning rates: matrix 0.02 · embedding 0.283"
    assert takes == "  MFU 48.2% · memory 912MB · records 1.23MB · disk 70GB free · 1.5M tokens · 3.2P FLOPs"
    assert last == f"1/1 {cells[0].id}: finished, val_bpb 2.2500"


def test_what_an_earlier_launch_did_is_not_counted_as_speed(
    cells: tuple[Cell, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = ProgressDisplay(cells[:1], {})
    progress.began(cells[0].id, 10)
    progress.moved(cells[0].id, {"step": 20})
    now[0] = 60.0
    progress.moved(cells[0].id, {"step": 30})  # ten of its forty steps in a minute, ten are left
    left = progress._seconds_left()
    assert left is not None
    ten_steps, validation, reports = 60.0, 60.0 * 2 * 40960 / 3 / (10 * 4096), 2.0  # both readings, forward only
    assert left == pytest.approx(ten_steps + validation + reports)


def test_in_rl_the_reward_is_told_and_not_the_loss(cells: tuple[Cell, ...], capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"step": 20, "train_loss_smooth": -0.001, "train_loss": -0.02, "reward": 0.25, "sample_tokens": 4.0}
    with ProgressDisplay(cells[:1], {}) as progress:
        progress.began(cells[0].id, 0)
        progress.moved(cells[0].id, figures | {"val_bpb": 2.3, "val_reward": 0.5})
    told = capsys.readouterr().err
    assert told.startswith("step 20/40, reward 0.250, val_bpb 2.3000, val_reward 0.500")
    assert "4.0 tokens a sample" in told
    assert "loss" not in told
    progress = ProgressDisplay(cells, {})
    progress.began(cells[0].id, 0)
    progress.moved(cells[0].id, figures)
    heading, row = seen(progress).splitlines()[1:3]
    assert "reward" in heading
    assert "loss" not in heading
    assert " 0.250 " in row


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (187, "3:07"), (3723, "1:02:03"), (59.6, "1:00")])
def test_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_the_picture_of_a_single_experiment_has_its_figures_below(cells: tuple[Cell, ...]) -> None:
    progress = ProgressDisplay(cells[:1], {})
    progress.began(cells[0].id, 0)
    progress.moved(cells[0].id, {"step": 20, "grad_norm": 0.5, "mfu": 0.25, "tokens": 2048})
    *_, learns, takes = seen(progress).splitlines()
    assert learns.strip() == "grad norm 0.5"
    assert takes.strip() == "MFU 25.0% · 2.05k tokens"
    *_, takes = seen(progress, width=20).splitlines()
    assert takes.strip() == "MFU 25.0%", "the last figures go first"

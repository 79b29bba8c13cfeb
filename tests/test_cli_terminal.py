"""Terminal output: tables fit the width, and no id, figure or word is cut in two."""

from __future__ import annotations

import io
import logging
import re
import sys
import textwrap
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from bwlm.cli.terminal import LogLines, say, show, show_fields, show_sentences, show_table
from bwlm.cli.text_table import table_lines
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.grids import write_cells
from tests.analysis.storage import finish, make_cell
from tests.families import untrained_child, validated
from tests.shell import Shell, check_mistake
from tests.test_cli import GOOD, make_run

WIDTH = 80
_WORD = st.text("abcdefgh", min_size=1, max_size=9)
_FIGURE = st.floats(-1e4, 1e4).map("{:+.4f}".format)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_typer_shows_bounds_beside_a_parser_and_checks_none() -> None:
    """So `whole_option` checks its bounds itself; tests/test_cli.py has the errors."""
    app = typer.Typer()

    @app.command()
    def show(number: int = typer.Option(1, parser=int, min=1, max=3)) -> None:
        print(number)

    run = CliRunner().invoke
    assert "1<=x<=3" in run(app, ["--help"]).output
    assert run(app, ["--number", "9"]).output == "9\n"


# ---- one table ----


def test_a_wide_table_breaks_headings_then_drops_columns_then_puts_names_above(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(width: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        show_table(
            ["id", "empty", "bits per byte", "loss"],
            [["mine_s0", "", "1.25", "3.5"], ["mine_s1", "", "1.5", "3.25"]],
            names=("id",),
            least=("loss",),
        )
        return shown(capsys)

    assert lines(40) == [
        "id       bits per byte  loss",
        "────────────────────────────",
        "mine_s0           1.25   3.5",
        "mine_s1            1.5  3.25",
    ]
    assert lines(20) == [
        "         bits",
        "          per",
        "id       byte  loss",
        "───────────────────",
        "mine_s0  1.25   3.5",
        "mine_s1   1.5  3.25",
    ]
    assert lines(14) == [
        "         bits",
        "          per",
        "id       byte",
        "─────────────",
        "mine_s0  1.25",
        "mine_s1   1.5",
    ]
    assert lines(12) == ["bits", " per", "byte  loss", "──────────", "mine_s0", "1.25   3.5", "mine_s1", " 1.5  3.25"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(_WORD, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6, unique=True),
    st.data(),
)
def test_whatever_a_table_holds_it_fits_and_every_cell_is_whole(
    capsys: pytest.CaptureFixture[str], headings: list[str], data: st.DataObject
) -> None:
    rows = data.draw(
        st.lists(st.lists(_FIGURE, min_size=len(headings), max_size=len(headings)), min_size=1, max_size=4)
    )
    named = [[f"run_{number}_" + "x" * 60, *row] for number, row in enumerate(rows)]
    show_table(["id", *headings], named, names=("id",))
    lines = shown(capsys)
    assert max(map(len, lines)) <= WIDTH
    words = " ".join(lines).split()
    assert all(cell in words for row in named for cell in row)


_CELL = st.text(st.sampled_from("abc1.5-東京é "), max_size=6).map(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(_CELL, min_size=3, max_size=3), min_size=1, max_size=4), st.booleans())
def test_a_table_stands_as_rich_would_draw_it(rows: list[list[str]], broken: bool) -> None:
    """Rich measures each cell several times over, which takes seconds of a thousand rows."""
    columns = dict(zip(["id", "bits per byte", "x"], map(list, zip(*rows, strict=True)), strict=True))
    head, lines = table_lines(columns, ["id"], broken)
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, of in columns.items():
        heading = "\n".join(textwrap.wrap(name, max([*map(len, name.split()), *map(len, of)]))) if broken else name
        drawn.add_column(Text(heading), justify="left" if name == "id" else "right", no_wrap=True, vertical="bottom")
    for row in rows:
        drawn.add_row(*map(Text, row))
    console = Console(width=200, highlight=False)
    by_rich = ["".join(part.text for part in line).rstrip() for line in console.render_lines(drawn, pad=False)]
    assert [*head, *lines] == by_rich


def test_a_cell_of_several_lines_is_one_line() -> None:
    assert table_lines({"id": ["a\nb", "**c**\x07"], "x": ["1", "2"]}, ["id"], False)[1] == ["a b  1", "c    2"]


def test_sentences_and_fields_are_wrapped_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    path = "/a/path/that/is/longer/than/the/line"
    show_sentences(f"backward needs 1.12 times the tokens of forward, see {path}")
    assert shown(capsys) == ["backward needs 1.12 times the", "  tokens of forward, see", f"  {path}"]
    show_fields("kept", [("folder", path), ("versions", "bwlm 0.1.0, mlflow 3.17.2, numpy 2.4.6")])
    assert shown(capsys) == [
        "kept",
        f"  folder    {path}",
        "  versions  bwlm 0.1.0, mlflow",
        "            3.17.2, numpy",
        "            2.4.6",
    ]


# ---- messages on stderr ----


class Terminal(io.StringIO):
    """Standard error of a person."""

    def isatty(self) -> bool:
        return True


def said(message: str, monkeypatch: pytest.MonkeyPatch, terminal: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", terminal)
    say(message)
    return terminal.getvalue()


def test_a_message_is_wrapped_between_words_on_a_terminal_and_one_line_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    message = "bwlm: data.source: /a/path/longer/than/the/line.parquet holds one document\n  and a second line"
    assert said(message, monkeypatch, io.StringIO()) == f"{message}\n"
    assert said(message, monkeypatch, Terminal()).splitlines() == [
        "bwlm: data.source:",
        "  /a/path/longer/than/the/line.parquet",
        "  holds one document",
        "  and a second line",
    ]


def test_paths_begin_in_the_working_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "runs"
    show(f"report  {here}/x.md", f"mlflow ui --backend-store-uri sqlite:///{here}/mlflow.db")
    show(f"file://{here}/x and /elsewhere{here}/x and {tmp_path.parent}/x stay, and so does {tmp_path} itself")
    assert shown(capsys) == [
        "report  runs/x.md",
        "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db",
        f"file://{here}/x and /elsewhere{here}/x and {tmp_path.parent}/x stay, and so does {tmp_path} itself",
    ]


def test_a_log_record_is_a_message_that_waits_for_no_line_of_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The handler looks for standard error at each record: a line of progress replaces it while it is shown."""
    handler = LogLines()
    for name, level in (("bwlm.record", logging.WARNING), ("bwlm.record", logging.INFO), ("alembic", logging.ERROR)):
        handler.handle(logging.LogRecord(name, level, "", 0, "it is %s", ("moved",), None))
    assert capsys.readouterr().err == "warning: it is moved\nit is moved\nerror: alembic: it is moved\n"


def test_a_number_that_is_none_is_named(shell: Shell) -> None:
    train = ("train", "--direction", "forward", "--depth", "1")
    for text, told in (("1,5", "(found 1,5): write 1.5"), ("high", "(found high)"), ("1,000,5", "(found 1,000,5)")):
        answer = shell(*train, "--lr", text)
        check_mistake(answer, "'--lr': must be a number, such as 0.5 ")
        assert answer.err.endswith(f"{told}\n")


def test_no_command_prints_its_help_and_no_empty_error(shell: Shell) -> None:
    answer = shell()
    assert answer.code == 2
    assert "Usage: " in answer.out + answer.err
    assert "bwlm:" not in answer.err


# ---- every command ----


def grid(storage: Path) -> list[ExperimentFolder]:
    """A grid of three directions, a failed cell and a child, with losses of two windows a document."""
    cells = []
    for direction, mean in (("forward", 0.0), ("backward", 0.5), ("bidirectional", 12.0)):
        readings = ["forward", "backward"] if direction == "bidirectional" else [direction]
        for seed in range(3):
            losses = [20.0 + mean + 0.1 * seed + 0.01 * window for window in range(24)]
            cells.append(finish(make_cell(storage, direction, seed), dict.fromkeys(readings, losses)))
    child = untrained_child(cells[0], "g_forward_d1_lr1_s0-sft_init_lr_frac0.05", "sft", grid="g")
    validated(child, val_bpb={20: 12.125}, val_bpb_forward={20: 12.125}, val_loss_written={20: 2.5})
    write_cells(storage, "g", [cell.id for cell in cells])
    return [*cells, child]


METRICS = {
    "val_loss": 3.0,
    "val_bpb": 1.125,
    "val_bpb_forward": 1.125,
    "val_bpb_backward": 11.5,
    "tokens_per_second": 1e6,
}
COMMANDS = {
    "runs list": ["runs", "list"],
    "runs list of a phase": ["runs", "list", "--where", "phase=base"],
    "runs show": ["runs", "show", "bars_forward_d2_lr0.5_s0"],
    "runs tree": ["runs", "tree", "g"],
    "grid plan": ["grid", "plan", "g.yaml"],
    "grid status": ["grid", "status", "g.yaml"],
    "analyze gap": ["analyze", "gap", "g"],
    "analyze compare": ["analyze", "compare", "g"],
}


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_fits_80_columns(
    command: str, terminal: bool, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(WIDTH))
    cells = grid(shell.storage)
    shell.file(GOOD)
    make_run(shell.storage, "bars_forward_d1_lr0.5_s0", Status("finished", "", 5, METRICS))
    make_run(
        shell.storage, "bars_forward_d2_lr0.5_s0", Status("failed", "loss nan at step 3, on rows 1, 2", 2, METRICS)
    )
    answer = shell(*COMMANDS[command])
    assert answer.code == 0, answer.err
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", answer.out).splitlines()]
    # a storage's path has no place to break
    too_long = [line for line in lines if len(line) > WIDTH and str(shell.storage) not in line]
    assert too_long == []
    assert not any("…" in line for line in lines)
    if command in ("runs list", "runs tree"):
        words = " ".join(lines).replace(",", " ").split()
        assert all(cell.id in words for cell in cells if command == "runs list" or "forward" in cell.id)

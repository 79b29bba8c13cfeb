"""The report of a grid: what it says of finished, failed and unfinished cells, and charts that can be opened."""

from __future__ import annotations

import html.parser
import os
import re
import shlex
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from bwlm.analysis.charts.losses import gap_chart, learning_curves
from bwlm.analysis.charts.style import save_chart
from bwlm.analysis.commands.compare import curves_of_groups
from bwlm.analysis.commands.gap import GAP_HEADER, gap_columns, gap_metrics
from bwlm.analysis.commands.result import frame_to_markdown, markdown_table
from bwlm.analysis.report.output import write_report
from bwlm.analysis.report.sections import audit_section, configuration_section, cost_section, data_section
from bwlm.analysis.report.study import LOSSES, PAGE, write_experiment_report, write_grid_report
from bwlm.analysis.runs.audit import crossing_words
from bwlm.analysis.runs.findings import find, one_window
from bwlm.cli.analyze import _gaps_of_runs
from bwlm.config import ResourceSettings
from bwlm.errors import UserError
from bwlm.paths import read_json
from bwlm.plan.load import plan_experiment
from bwlm.record.experiment import ExperimentFolder, Status
from bwlm.record.grids import REPORT, cells_of, earlier_reports, grid_folder, keep_report, write_cells
from bwlm.record.journal import Journal
from bwlm.record.repeat import train_command
from bwlm.record.starts import note_start
from bwlm.stats.gaps import PER_DIRECTION
from bwlm.stats.loss_file import gaps_from
from bwlm.text.packing import Manifest, PackedSplit
from tests.analysis.storage import finish, make_cell
from tests.families import rewrite_config

WINDOWS = 24


def losses(mean: float, seed: int) -> list[float]:
    """nll of each window: what the text costs, what the seed adds, and how the model does on the whole."""
    text = np.random.default_rng(7).uniform(20, 40, WINDOWS)
    noise = np.random.default_rng(100 + seed).normal(0, 0.02, WINDOWS)
    return list(text + noise + mean)


def cell(storage: Path, direction: str, seed: int, mean: float, lr: float = 1.0, depth: int = 1) -> ExperimentFolder:
    readings = ["forward", "backward"] if direction == "bidirectional" else [direction]
    folder = make_cell(storage, direction, seed=seed, lr=lr, depth=depth)
    return finish(folder, {reading: losses(mean, seed) for reading in readings})


def ids(folders: Sequence[ExperimentFolder]) -> list[str]:
    return [folder.id for folder in folders]


def mixed_grid(storage: Path) -> list[ExperimentFolder]:
    """Backward is worse at depth 1 with four seeds; depth 2 has one seed; a cell failed, a cell waits."""
    means = {"forward": 0.0, "backward": 1.0, "bidirectional": 0.5}
    cells = [cell(storage, d, s, mean + 0.1 * (s % 2) * mean) for d, mean in means.items() for s in range(4)]
    cells += [cell(storage, d, s, 5.0, lr=2.0) for d in means for s in range(3)]
    cells += [cell(storage, "forward", 0, 0.0, depth=2), cell(storage, "backward", 0, 1.0, depth=2)]
    failed = make_cell(storage, "forward", seed=9, lr=4.0)
    failed.write_status(Status("failed", "loss nan at step 3, on rows 1, 2", 2))
    return [*cells, failed, make_cell(storage, "permuted")]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> list[ExperimentFolder]:
    return mixed_grid(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def written(grid: list[ExperimentFolder]) -> tuple[str, list[Path]]:
    return write(grid[0].path.parent, grid)


def write(storage: Path, folders: Sequence[ExperimentFolder]) -> tuple[str, list[Path]]:
    write_cells(storage, "g", ids(folders))
    files = write_grid_report(storage, "g").files
    return files[0].read_text(), files


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(value) for name, value in attrs if name in ("src", "href") and tag in ("script", "link")]


def check_chart(path: Path) -> ET.Element | None:
    """An SVG that parses and shows something, or a page that needs no network."""
    content = path.read_text()
    if path.suffix == ".svg":
        root = ET.fromstring(content)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(root.attrib["width"]) > 50
        return root
    page = _Page()
    page.feed(content)
    assert "vegaEmbed" in content
    assert page.sources == []
    return None


# ---- the report ----


@pytest.mark.parametrize(
    ("choosers", "verdict", "reason"),
    [
        (0, "different", "paired t over 4 seeds"),  # one rate was tried, so none was chosen
        (1, "too few seeds chose the rate", "the rate was chosen by 1 seed, a verdict needs 3"),
        (2, "too few seeds chose the rate", "the rate was chosen by 2 seeds, a verdict needs 3"),
        (3, "different", "paired t over 4 seeds"),
    ],
)
def test_seeds_that_chose_the_rate_are_counted(tmp_path: Path, choosers: int, verdict: str, reason: str) -> None:
    cells = [cell(tmp_path, d, seed, mean) for d, mean in (("forward", 0.0), ("backward", 1.0)) for seed in range(4)]
    cells += [cell(tmp_path, "backward", seed, 5.0, lr=2.0) for seed in range(choosers)]
    [found] = find(cells).gaps
    assert found.verdict == verdict
    assert found.reason.startswith(reason)
    assert found.choosing_seeds == (choosers or None)
    assert (found.p_adjusted is None) == (verdict != "different")


def test_the_report_gives_verdicts_in_words(written: tuple[str, list[Path]]) -> None:
    text, files = written
    assert files[0].name == REPORT
    assert re.search(r"- d1, forward → backward: \*\*different\*\*, paired t over 4 seeds, p = ", text)
    assert re.search(r"- d1, forward → bidirectional: \*\*different\*\*", text)
    assert "- d2, forward → backward: **too few seeds to tell**, 1 paired seed, a verdict needs 3\n" in text
    # (1.0 + 1.1 + 1.0 + 1.1) / 4 nats a window of 10 tokens
    row = next(line for line in text.splitlines() if line.startswith("| d1 | forward → backward"))
    assert "| **different** | 4 | +0.1050 |" in row
    charts = {"curves.svg", "curves.html", "gaps.svg", "gaps.html", "compare.svg", "transfer.svg"}
    assert {file.name for file in files} == {REPORT, PAGE, LOSSES, *charts}
    assert all(f"({name})" in text for name in charts)
    # the hand-made cells have no research log, and have ended
    for title in ("Where the loss lies", "Gradients", "Activations", "Representations and attention"):
        section = re.search(rf"## {title}\n\n(.*)\n", text)
        assert section, title
        assert re.fullmatch(
            r"Nothing: .*no such file: this run has no research log: .*, and \d+ more like it\.",
            section[1],
        )


def few_chose(storage: Path, tried: dict[str, dict[float, int]]) -> list[ExperimentFolder]:
    """Cells of each direction by rate and number of seeds; backward is worse, and so is every rate but 1."""
    means = {"forward": 0.0, "backward": 1.0}
    return [
        cell(storage, direction, seed, means[direction] + (0.1 * seed) * means[direction] + (5.0 if lr != 1 else 0), lr)
        for direction, rates in tried.items()
        for lr, seeds in rates.items()
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    ("forward", "backward", "choosing_seeds", "verdict"),
    [
        ({1.0: 4}, {1.0: 4}, None, "different"),  # stated beforehand
        ({1.0: 4, 2.0: 1}, {1.0: 4, 2.0: 4}, 1, "too few seeds chose the rate"),
        ({1.0: 4}, {1.0: 4, 0.5: 2}, 2, "too few seeds chose the rate"),
        ({1.0: 4}, {1.0: 4, 0.5: 3}, 3, "different"),
        ({1.0: 2, 2.0: 1}, {1.0: 2, 2.0: 1}, 1, "too few seeds to tell"),
    ],
)
def test_a_verdict_says_how_few_seeds_chose_its_rate(
    forward: dict[float, int], backward: dict[float, int], choosing_seeds: int | None, verdict: str, tmp_path: Path
) -> None:
    folders = few_chose(tmp_path, {"forward": forward, "backward": backward})
    text, _ = write(tmp_path, folders)
    [found] = find(folders).gaps
    assert (found.choosing_seeds, found.verdict) == (choosing_seeds, verdict)
    few = verdict == "too few seeds chose the rate"
    seeds = "1 seed" if choosing_seeds == 1 else f"{choosing_seeds} seeds"
    assert (f"**{verdict}**, the rate was chosen by {seeds}, a verdict needs 3" in text) is few
    assert ("but without the choice of rates" in text) is few
    assert f"**{verdict}** |" in text


def test_a_choice_by_few_seeds_counts_at_equal_tokens_per_direction_too(tmp_path: Path) -> None:
    """One bidirectional rate of twice the steps was tried by one seed: only the pairs with those runs know it."""
    cells = with_doubled_cells(tmp_path)
    other = make_cell(tmp_path, "bidirectional", lr=2.0, steps=40)
    cells.append(finish(other, {reading: losses(9.0, 0) for reading in ("forward", "backward")}))
    choosing_seeds = {(one.size, one.a, one.b): one.choosing_seeds for one in find(cells).gaps}
    assert {key for key, seeds in choosing_seeds.items() if seeds == 1} == {
        (f"d1 steps=20{PER_DIRECTION}", "forward", "bidirectional"),
        (f"d1 steps=20{PER_DIRECTION}", "backward", "bidirectional"),
    }
    assert set(choosing_seeds.values()) == {None, 1}


def with_doubled_cells(storage: Path) -> list[ExperimentFolder]:
    """At equal tokens bidirectional is 0.2 nats a token worse, with twice the steps 0.1 better."""
    means = {("forward", 20): 0.0, ("backward", 20): 1.0, ("bidirectional", 20): 2.0, ("bidirectional", 40): -1.0}
    cells = []
    for (direction, steps), mean in means.items():
        for seed in range(3):
            folder = make_cell(storage, direction, seed=seed, steps=steps)
            readings = ["forward", "backward"] if direction == "bidirectional" else [direction]
            cells.append(finish(folder, {reading: losses(mean, seed + steps) for reading in readings}))
    return cells


@pytest.mark.parametrize("build", [mixed_grid, with_doubled_cells])
def test_every_documents_loss_lies_beside_the_report_and_gives_the_same_verdict(
    build: Callable[[Path], list[ExperimentFolder]], tmp_path: Path
) -> None:
    cells = build(tmp_path)
    text, files = write(tmp_path, cells)
    [file] = [file for file in files if file.name == LOSSES]
    assert f"`bwlm analyze gap --from {LOSSES}`" in text
    again, notes = gaps_from(file)
    assert not [note for note in notes if "alone" not in note]
    found = find(cells).gaps
    assert len(found) == len(again) > 2
    for one, other in zip(found, again, strict=True):
        assert (one.size, one.a, one.b, one.seeds, one.verdict) == (
            other.size, other.a, other.b, other.seeds, other.verdict
        )  # fmt: skip
        assert one.gap_nats == pytest.approx(other.gap_nats)
        assert (one.p, one.p_adjusted) == (pytest.approx(other.p), pytest.approx(other.p_adjusted))


def test_runs_that_the_last_launch_dropped_are_told(tmp_path: Path) -> None:
    runs = mixed_grid(tmp_path)
    assert "last launch left them out" not in write(tmp_path, runs)[0]
    dropped, kept = runs[0].id, runs[1:]
    assert f"Not judged, since the grid's last launch left them out: {dropped}.\n" in write(tmp_path, kept)[0]


def test_the_report_tells_audit_cost_and_how_to_repeat_it(written: tuple[str, list[Path]]) -> None:
    text, files = written
    assert "pairs of runs agree in data, tokenizer, code" in text
    assert "| forward | 8 | " in text  # of the cost: four seeds, another rate at three, another depth
    assert re.search(r'naming this storage:\n\n```bash\nbwlm grid run "\$BWLM_STORAGE"/grids/g/grid.yaml\n```', text)
    assert "## Configuration and lineage\n\n" in text
    assert re.search(r"^\| lr \| .*4\.0", text, re.M)
    assert "torch 2." in text
    page = files[1].read_text()
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "<table>" in page
    assert 'src="c' not in page
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_settings_stand_in_a_column_for_each_phase(tmp_path: Path) -> None:
    """And a setting that nobody gave is told in words; digests of parents say nothing to a reader."""
    none = {"model.kv_heads": None, "optim.warmup_steps": None}
    base, rl = (
        make_cell(tmp_path, "forward", **none),
        make_cell(tmp_path, "forward", phase="rl", **none | {"rl.samples": 8}),
    )
    [title, lineage, table] = configuration_section([base, rl])
    assert title == "## Configuration and lineage"
    assert lineage.startswith("2 runs (base, rl), children of the MLflow run g; `bwlm runs tree` shows")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert rows[0] == ["setting", "base", "rl"]
    by_name = {name: values for name, *values in rows}
    assert by_name["model.kv_heads"] == ["as many as query heads"] * 2
    assert by_name["optim.warmup_steps"] == ["40, but at most a tenth of the run"] * 2
    assert by_name["rl.samples"] == ["–", "8"]
    assert "parent" not in by_name


def test_no_difference_is_said_where_the_seeds_disagree(tmp_path: Path) -> None:
    means = {"forward": [0.0, 0.6, 0.2], "backward": [0.5, 0.1, 0.4]}
    cells = [cell(tmp_path, d, s, mean) for d, by_seed in means.items() for s, mean in enumerate(by_seed)]
    text, _ = write(tmp_path, cells)
    assert "d1, forward → backward: **no difference seen**" in text
    assert "**different**" not in text


def test_the_best_rate_and_not_another_is_compared(
    grid: list[ExperimentFolder], written: tuple[str, list[Path]]
) -> None:
    text, _ = written
    rows = [line for line in text.splitlines() if line.startswith("| d1 | forward | 1 | 3 |")]
    assert len(rows) == 1  # lr 1 of three that were tried, not the 2 that is 5 nats worse
    assert find(grid).best[0].lr == 1.0


def test_a_best_rate_beyond_which_none_was_tried_is_told(grid: list[ExperimentFolder], tmp_path: Path) -> None:
    assert find(grid).at_edge == [  # forward was tried at 4 too; at depth 2 there is no other
        "d1: the best lr, 1, is the lowest that was tried, and a lower one may be better still: "
        "forward, backward, bidirectional",
        "d2: lr 1 is the only one that was tried: forward, backward",
    ]
    rates = [cell(tmp_path, "forward", 0, loss, lr=lr) for lr, loss in ((0.5, 1.0), (1.0, 0.0), (2.0, 1.0))]
    assert find(rates).at_edge == []
    text, _ = write(tmp_path, rates[:2])
    assert "- d1: the best lr, 1, is the highest that was tried, and a higher one may be better still: forward" in text


def test_cells_without_a_result_are_listed_with_the_reason(
    grid: list[ExperimentFolder], written: tuple[str, list[Path]]
) -> None:
    text, _ = written
    assert "- g_forward_d1_lr4_s9: failed (loss nan at step 3, on rows 1, 2)" in text
    assert "- g_permuted_d1_lr1_s0: waiting" in text
    assert text.count("| g_") == len(grid)  # the table of cells has them all


@pytest.mark.parametrize("started", [False, True])
def test_a_grid_without_a_finished_cell_has_a_report_too(started: bool, tmp_path: Path) -> None:
    folder = make_cell(tmp_path, "forward")
    if started:
        finish(folder, {})
    folder.write_status(Status("failed", "out of memory", 3))
    text, files = write(tmp_path, [folder, make_cell(tmp_path, "backward")])
    assert "None: no cell has finished yet." in text
    assert "failed (out of memory)" in text
    assert "## Best learning rate" not in text
    for file in files[2:]:
        check_chart(file)
    assert ("no step has been logged yet" in files[2].read_text()) is not started


def test_one_direction_alone_is_told_so(tmp_path: Path) -> None:
    text, files = write(tmp_path, [cell(tmp_path, "forward", s, 0.0) for s in range(3)])
    assert "Not compared:\n\n- d1: only forward has a best learning rate, and a gap needs two directions" in text
    assert "gaps.svg" not in {file.name for file in files}


def test_one_window_leaves_nothing_to_compare_on(tmp_path: Path) -> None:
    cells = [finish(make_cell(tmp_path, d), {d: [20.0]}) for d in ("forward", "backward")]
    text, _ = write(tmp_path, cells)
    short = "one validation window leaves none to compare on: the validation text fills no second one, give more text"
    assert short in text
    own = write_experiment_report(cells[1])[0].read_text()
    assert f"Nothing yet: {short}." in own
    known = read_json(cells[0].path / "config.json")["experiment"]
    one_row = known["evaluation"] | {"tokens": known["model"]["sequence_length"]}
    rewrite_config(cells[0], experiment=known | {"evaluation": one_row})
    assert one_window(cells[0]).endswith(": raise evaluation.tokens")


def test_one_window_of_the_other_half_leaves_nothing_to_choose_by(tmp_path: Path) -> None:
    cells = [finish(make_cell(tmp_path, d), {d: [20.0, 20.0]}) for d in ("forward", "backward")]
    for one in cells:
        file = one.evaluation("base", one.config().experiment.direction) / "validation.parquet"
        pq.write_table(pq.read_table(file).slice(1), file)
    text, _ = write(tmp_path, cells)
    assert "one validation window leaves none to compare on" in text
    assert "no cell has finished" not in text


def test_a_pair_without_a_common_seed_does_not_silence_the_others(tmp_path: Path) -> None:
    cells = [cell(tmp_path, d, s, m) for d, m in (("forward", 0.0), ("backward", 1.0)) for s in range(3)]
    cells.append(cell(tmp_path, "bidirectional", 7, 0.5))
    text, _ = write(tmp_path, cells)
    assert "- d1, forward → backward: **different**" in text
    assert "- d1: forward (seeds 0, 1, 2) and bidirectional (seeds 7) share no seed at size d1" in text
    assert "- d1: backward (seeds 0, 1, 2) and bidirectional (seeds 7) share no seed at size d1" in text


def diverged(storage: Path, direction: str, seed: int, lr: float) -> ExperimentFolder:
    folder = make_cell(storage, direction, seed=seed, lr=lr)
    folder.write_status(Status("failed", "loss nan at step 3", 2))
    return folder


def test_a_rate_that_diverged_at_some_seeds_is_excluded_and_named(tmp_path: Path) -> None:
    cells = [cell(tmp_path, d, s, m) for d, m in (("forward", 0.0), ("backward", 1.0)) for s in range(3)]
    cells += [cell(tmp_path, "forward", 0, -5.0, lr=4.0)]  # far the best, where it survived
    cells += [diverged(tmp_path, "forward", s, 4.0) for s in (1, 2)]
    found = find(cells)
    assert [(rate.direction, rate.lr, rate.candidates) for rate in found.best] == [
        ("forward", 1.0, 2),
        ("backward", 1.0, 1),
    ]
    assert [one.seeds for one in found.gaps] == [[0, 1, 2]]
    assert "excluded: forward d1 lr 4: 2 of 3 cells gave no result" in found.skipped
    assert "- excluded: forward d1 lr 4: 2 of 3 cells gave no result\n" in write(tmp_path, cells)[0]


def test_a_direction_of_which_no_rate_qualifies_has_no_best_one(tmp_path: Path) -> None:
    cells = [cell(tmp_path, d, s, 0.0) for d in ("forward", "backward") for s in range(2)]
    text, _ = write(tmp_path, [*cells, diverged(tmp_path, "backward", 2, 1.0)])
    assert "- d1: backward has no best learning rate: none is left" in text
    assert "d1: only forward has a best learning rate, and a gap needs two directions" in text
    assert "| d1 | backward |" not in text


def test_a_grid_of_which_no_rate_qualifies_says_so(tmp_path: Path) -> None:
    text, _ = write(tmp_path, [cell(tmp_path, "forward", 0, 0.0), diverged(tmp_path, "forward", 1, 1.0)])
    assert "None: no learning rate finished at every seed." in text
    assert "one validation window" not in text
    assert "- excluded: forward d1 lr 1: 1 of 2 cells gave no result" in text


def test_a_cell_that_is_there_twice_silences_its_own_pairs_only(tmp_path: Path) -> None:
    means = {"forward": 0.0, "backward": 1.0, "bidirectional": 0.5}
    cells = [cell(tmp_path, d, s, m) for d, m in means.items() for s in range(3)]
    again = make_cell(tmp_path, "bidirectional", steps=20)  # the same cell in a folder of another name
    cells.append(finish(again, {reading: losses(0.5, 0) for reading in ("forward", "backward")}))
    found = find(cells)
    assert [(one.a, one.b) for one in found.gaps] == [("forward", "backward")]
    assert len(found.not_compared) == 2
    assert all("bidirectional, seed 0, size d1 has several runs" in line for line in found.not_compared)


def test_a_cell_of_other_text_silences_its_own_pairs_only(tmp_path: Path) -> None:
    cells = [cell(tmp_path, d, s, m) for d, m in (("forward", 0.0), ("backward", 1.0)) for s in range(3)]
    cells.append(finish(make_cell(tmp_path, "permuted"), {"permuted": losses(0.0, 0) * 2}))
    found = find(cells)
    assert found.windows == [12]  # the pair's own, not permuted's 24
    assert [(one.a, one.b) for one in found.gaps] == [("forward", "backward")]
    assert all("evaluate both on the same windows" in line for line in found.not_compared)
    assert len(found.not_compared) == 2


def test_the_report_says_on_how_much_text_it_stands(written: tuple[str, list[Path]]) -> None:
    text, _ = written
    assert "Verdict (on the test half: d1 on 12 documents in 12 windows, d2 on 12 documents in 12 windows)" in text
    assert "a long document can have windows in\nboth" in text
    assert "too few to resample" not in text


@pytest.mark.parametrize(("documents", "shown"), [(1, False), (9, False), (10, True)])
def test_few_documents_are_not_resampled(documents: int, shown: bool, tmp_path: Path) -> None:
    """Drawn from one document, the interval would have no width, and look certain."""
    folders = [
        finish(make_cell(tmp_path, d, seed=s), {d: [20.0 + mean + s] * 2 * documents})
        for d, mean in (("forward", 0.0), ("backward", 1.0))
        for s in range(3)
    ]
    text, _ = write(tmp_path, folders)
    row = gap_columns(find(folders).gaps[0])
    assert (row[GAP_HEADER.index("95 % bootstrap")] != "–") is shown
    words = f"{documents} document{'s' if documents > 1 else ''}: too few to resample"
    assert (words in text) is not shown


def test_a_summary_and_metrics_say_what_the_report_says(
    grid: list[ExperimentFolder], written: tuple[str, list[Path]]
) -> None:
    text, _ = written
    report = write_grid_report(grid[0].path.parent, "g")
    first, *_ = report.findings.gaps
    line = f"- d1 forward → backward: **{first.verdict}**, {first.gap_nats:+.4f} nats/token"
    assert report.summary.startswith(f"{line}\n- ")
    tables = [line for line in report.summary.splitlines() if line.startswith("|")]
    assert tables
    assert set(tables) <= set(text.splitlines())
    assert first.seed_interval is not None
    few = replace(first, size="d1 data=a/b", bootstrap=(0.5, 1.5), documents=9, noise_floor=None)
    assert gap_metrics(few) == {
        "gap/d1 data_a_b_forward-backward": first.gap_nats,
        "gap/seeds_low/d1 data_a_b_forward-backward": first.seed_interval[0],
        "gap/seeds_high/d1 data_a_b_forward-backward": first.seed_interval[1],
        "gap/percent/d1 data_a_b_forward-backward": first.gap_percent,
    }
    whole = gap_metrics(replace(few, documents=10, noise_floor=0.25, seed_interval=None))
    assert next(iter(whole)) == "gap/d1 data_a_b_forward-backward"
    figures = {name.split("/")[1]: value for name, value in list(whole.items())[1:]}
    assert figures.keys() == {"bootstrap_low", "bootstrap_high", "noise_floor", "percent"}
    assert (figures["bootstrap_low"], figures["bootstrap_high"], figures["noise_floor"]) == (0.5, 1.5, 0.25)


def test_writing_it_again_changes_nothing(grid: list[ExperimentFolder], written: tuple[str, list[Path]]) -> None:
    text, files = written
    again = write_grid_report(grid[0].path.parent, "g").files
    assert again == files
    assert files[0].read_text() == text
    assert {path.name for path in files[0].parent.iterdir()} == {"grid.json", *(path.name for path in files)}


@pytest.mark.parametrize("ending", [".md", ".html"])
def test_a_report_is_written_where_asked_with_its_files_beside_it(
    grid: list[ExperimentFolder], written: tuple[str, list[Path]], ending: str, tmp_path: Path
) -> None:
    storage, before = grid[0].path.parent, {path: path.read_bytes() for path in written[1]}
    path = tmp_path / f"mine{ending}"
    files = write_report(path, lambda folder: write_grid_report(storage, "g", folder).files)
    assert {path: path.read_bytes() for path in written[1]} == before, "the grid's own report stays"
    assert files[0] == path
    assert {*files[1:]} == {*(tmp_path / "mine_files").iterdir()}
    text = path.read_text()
    assert "analyze gap --from mine_files/losses.parquet" in text
    if ending == ".md":
        linked = re.findall(r"\]\(([^)]+)\)", text)
        assert {path.parent / name for name in linked} == {file for file in files[1:] if file.name != LOSSES}
        assert text.replace("mine_files/", "") == written[0]
    else:
        assert [file.name for file in files[1:]] == [LOSSES]
        assert text.replace("mine_files/", "") == written[1][1].read_text()


def test_a_launch_of_other_cells_keeps_the_report_before_it(tmp_path: Path) -> None:
    """A seed is added after a look at the verdict: what the first report said must not be lost."""
    cells = [cell(tmp_path, d, s, m + 0.1 * s) for d, m in (("forward", 0.0), ("backward", 1.0)) for s in range(4)]
    few, many = [folder for folder in cells if not folder.id.endswith("s3")], cells
    home = grid_folder(tmp_path, "g")

    def launch(folders: list[ExperimentFolder], grid_file: str) -> str:
        keep_report(tmp_path, "g", ids(folders))
        text, _ = write(tmp_path, folders)
        (home / "grid.yaml").write_text(grid_file)
        return text

    first = launch(few, "few")
    assert launch(few, "few") == first
    os.utime(home / REPORT, (0, 0))
    assert not (home / "earlier").exists(), "the same cells: the report is only made anew"
    second = launch(many, "many")
    [kept] = earlier_reports(tmp_path, "g")
    assert kept.read_text() == first.replace("grids/g/grid.yaml", f"grids/g/earlier/{kept.parent.name}/grid.yaml")
    assert f"[{kept.parent.name}](earlier/{kept.parent.name}/RESEARCH_REPORT.md)" in second
    assert f'href="earlier/{kept.parent.name}/RESEARCH_REPORT.html"' in (home / PAGE).read_text()
    assert {path.name for path in kept.parent.iterdir()} == {path.name for path in home.iterdir() if path.is_file()}
    assert ((kept.parent / "grid.yaml").read_text(), (home / "grid.yaml").read_text()) == ("few", "many")
    assert cells_of(tmp_path, "g") == ids(many)
    for _ in range(2):  # cut off, and launched again
        keep_report(tmp_path, "g", ids(few))
    _, then = sorted(earlier_reports(tmp_path, "g"))
    assert f"[{kept.parent.name}](../{kept.parent.name}/RESEARCH_REPORT.md)" in then.read_text()
    assert f'href="../{kept.parent.name}/RESEARCH_REPORT.html"' in then.with_name(PAGE).read_text()
    assert kept in earlier_reports(tmp_path, "g")


def test_the_report_of_one_experiment(grid: list[ExperimentFolder]) -> None:
    files = write_experiment_report(grid[0])
    text = files[0].read_text()
    assert text.startswith(f"# {grid[0].id}\n\nA forward model of depth 1, finished at step 20 of 20.")
    assert read_json(grid[0].path / "config.json")["fingerprint"] in text
    assert "| lr | 1.0 |" in text
    assert {file.name for file in files} == {REPORT, PAGE, "curves.svg", "curves.html"}
    assert "parent: none" in text
    assert "a cell of the grid g" in text
    brief = write_experiment_report(grid[0], insides=False)
    assert {file.name for file in brief} == {REPORT, PAGE, "curves.svg", "curves.html"}
    assert f"`bwlm analyze report {grid[0].id}` adds" in brief[0].read_text()


def test_one_runs_report_audits_its_own_pairs(grid: list[ExperimentFolder]) -> None:
    text = write_experiment_report(grid[0], insides=False)[0].read_text()
    audit = text.split("## Audit\n\n")[1].split("\n\n")[0]
    # seed 0, depth 1: backward and bidirectional at two rates each, and the permuted one that waits
    assert audit == (
        "- 5 pairs of runs agree in data, tokenizer, code, precision, budget, row order and validation windows."
    )
    assert "## Audit" not in write_experiment_report(grid[-2], insides=False)[0].read_text()  # the only one of seed 9


def test_a_report_says_where_attention_crosses_segments(tmp_path: Path) -> None:
    """And that rows which are read both ways have no mirror image then."""
    made = {direction: make_cell(tmp_path, direction) for direction in ("forward", "backward", "bidirectional")}
    assert crossing_words(list(made.values())) == []
    for direction in ("forward", "bidirectional"):
        experiment = made[direction].config().experiment.model_dump()
        experiment["model"]["document_mask"] = False
        rewrite_config(made[direction], experiment=experiment)
    [crossing] = crossing_words([made["forward"], made["backward"]])
    assert "crosses segments in 1 of 2 runs (`model.document_mask: false`)" in crossing
    assert "no mirror images" in crossing_words(list(made.values()))[1]
    for folder in made.values():
        finish(folder, {reading: [20.0, 30.0] for reading in ("forward", "backward")})
    text = write_experiment_report(made["bidirectional"], insides=False)[0].read_text()
    assert "crosses segments in 1 of 1 runs" in text
    assert "crosses segments" not in write_experiment_report(made["backward"], insides=False)[0].read_text()


def test_a_single_run_is_repeated_by_its_command() -> None:
    flags = {"phase": "base", "direction": "backward", "depth": 2, "lr": 0.3, "seed": 3}
    settings = [
        "data.source=\"my texts/a: b.parquet\"", "data.text_column=\"true\"", "data.validation=\"007\"",
        "budget.batch_tokens=4096", "budget.flops=1e15", "optim.weight_decay=6e-4", "model.document_mask=false",
        "compute.compile=false", "resources.cpus_per_worker=7", "tokenizer.path=/a/b",
    ]  # fmt: skip
    wanted = plan_experiment(flags, settings, "mine").cells[0].experiment
    words = shlex.split(train_command("mine", wanted))
    assert words[:4] == ["bwlm", "train", "--id", "mine"]
    given = [word for at, word in enumerate(words) if words[at - 1] == "--set"]
    own = {name: words[words.index(f"--{name}") + 1] for name in flags}
    again = plan_experiment(own | {"depth": 2, "lr": 0.3, "seed": 3}, given, "mine").cells[0].experiment
    assert again.model_dump(exclude={"resources"}) == wanted.model_dump(exclude={"resources"})
    assert 'data.text_column="true"' in given
    assert "budget.batch_tokens=4096" in given
    assert not any(setting.startswith("resources") for setting in given)


def test_a_run_whose_losses_are_lost_or_damaged_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    runs = [cell(tmp_path, d, seed, m) for d, m in (("forward", 0.0), ("backward", 0.5)) for seed in range(4)]
    (runs[0].evaluation("base", "forward") / "validation.parquet").unlink()
    (runs[5].evaluation("base", "backward") / "validation.parquet").write_text("hello")
    found = find([*runs, cell(tmp_path, "forward", 0, 0.1, lr=2.0), cell(tmp_path, "backward", 0, 0.2, lr=2.0)])
    assert [best.lr for best in found.best] == [2.0, 2.0]  # of the other rate, not every seed has a result
    lost, damaged = found.without_result
    assert lost.startswith(f"{runs[0].id}: ")
    assert lost.endswith("validation.parquet: no such file: a run writes it at its end: finish it, or put it back")
    assert "validation.parquet: damaged (" in damaged
    assert damaged.replace(f"{tmp_path}/", "") in write(tmp_path, runs)[0], "a report tells paths from the storage"


def test_a_cell_whose_config_is_lost_or_damaged_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    runs = [cell(tmp_path, d, seed, m) for d, m in (("forward", 0.0), ("backward", 0.5)) for seed in range(4)]
    lost, damaged = (run.path / "config.json" for run in (runs[0], runs[5]))
    lost.unlink()
    damaged.write_text('{"id": ')
    text, _ = write(tmp_path, runs)
    assert "2 paired seeds" in text.split("\n\n")[2]
    assert f"- {runs[0].id} is left out: {lost.relative_to(tmp_path)}: no such file: put back the file" in text
    assert f"- {runs[5].id} is left out: {damaged.relative_to(tmp_path)}: not valid JSON" in text


@pytest.mark.parametrize(
    ("phase", "shuffle", "words"),
    [
        ("base", True, "shuffled inside each shard"),
        ("base", False, "in the order of their files"),
        ("mid", True, "in the order of their files"),
    ],
)
def test_the_order_of_the_documents_is_told(tmp_path: Path, phase: str, shuffle: bool, words: str) -> None:
    folder = make_cell(tmp_path, "forward", phase=phase)
    empty = PackedSplit.from_shards([])
    Manifest(64, 264, "", empty, empty).write(tmp_path)
    experiment = folder.config().experiment.model_dump()
    experiment["data"]["shuffle"] = shuffle
    rewrite_config(folder, experiment=experiment, corpus=str(tmp_path))
    assert f"| documents | {words} |" in data_section([folder])[1]


def test_an_experiment_stands_beside_its_forward_baseline(tmp_path: Path) -> None:
    forward = [cell(tmp_path, "forward", seed, 0.0) for seed in range(4)]
    backward = [cell(tmp_path, "backward", seed, 0.5) for seed in range(5)]
    cell(tmp_path, "forward", 0, -9.0, lr=2.0)  # of another learning rate: not its baseline
    text = write_experiment_report(backward[1])[0].read_text()
    section = text.split("## Against the forward baseline\n\n")[1].split("\n## ")[0]
    assert section.startswith("Size d1, forward → backward: gap +0.0500 nats per token (")  # 0.5 a window of ten tokens
    assert ", 95 % over seeds +0.0" in section
    assert ("forward has the lower loss" in section) == ("**different**" in section)
    assert "4 seeds" in section
    assert "| d1 | forward → backward | **different** | 4 | +0.0500 |" in section

    assert "This run reads forward: it is the baseline" in write_experiment_report(forward[0])[0].read_text()
    alone = write_experiment_report(backward[4])[0].read_text()
    assert "Nothing yet: no finished forward run with these settings and seed 4 lies in" in alone
    waiting = make_cell(tmp_path, "backward", seed=9)
    assert "Nothing yet: the run is waiting." in write_experiment_report(waiting)[0].read_text()


def test_a_cell_of_a_table_cannot_break_it() -> None:
    assert markdown_table(["a"], [["x | y\nz"]]).splitlines() == ["| a |", "| --- |", "| x \\| y z |"]


def test_whole_numbers_are_shown_as_such() -> None:
    table = pd.DataFrame({"tokens": [38912.0, None], "ratio": [1.0, 1.5], "small": [0.00012, 1.0], "seeds": [2, 3]})
    assert frame_to_markdown(table).splitlines()[2:] == [
        "| 38,912 | 1.0000 | 0.00012 | 2 |",
        "| – | 1.5000 | 1.0000 | 3 |",
    ]


# ---- charts ----


def test_charts_can_be_opened(written: tuple[str, list[Path]]) -> None:
    _, files = written
    roots = {file.name: check_chart(file) for file in files[2:] if file.suffix in (".svg", ".html")}
    curves = roots["curves.svg"]
    assert curves is not None
    shown = "".join(curves.itertext())
    for words in (
        "training tokens",
        "loss (nats per token)",
        "forward",
        "backward",
        "bidirectional",
        "d1",
        "d2",
        "learning rate",
    ):
        assert words in shown
    assert "permuted" not in shown  # it has no curve, so it needs no colour
    gap_texts = roots["gaps.svg"]
    assert gap_texts is not None
    assert "d1: forward → backward" in "".join(gap_texts.itertext())


def test_directions_keep_their_colours(tmp_path: Path) -> None:
    """The same direction has the same colour in every chart, whichever others are there."""

    def strokes(directions: list[str]) -> str:
        curves = pd.DataFrame(
            [
                {
                    "run": d,
                    "direction": d,
                    "size": "d1",
                    "lr": 1.0,
                    "tokens": t,
                    "loss": 5 - t,
                    "val_loss": None,
                }
                for d in directions
                for t in (1, 2)
            ]
        )
        return save_chart(learning_curves(curves, "c"), tmp_path, "c")[0].read_text().lower().partition("</style>")[2]

    assert "#c8553d" in strokes(["backward"])
    assert "#2a6fbb" not in strokes(["backward"])
    assert {"#c8553d", "#2a6fbb"} <= set(re.findall(r"#[0-9a-f]{6}", strokes(["backward", "forward"])))


def test_a_gap_of_one_seed_has_a_point_without_an_interval(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        [("d1, forward → backward", 0.1, np.nan, np.nan, 0.0, 0.0, "too few seeds to tell")],
        columns=["pair", "gap", "low", "high", "floor_low", "floor", "verdict"],
    )
    svg = save_chart(gap_chart(frame, "gaps"), tmp_path, "gaps")[0]
    check_chart(svg)
    assert "NaN" not in svg.read_text()


def test_a_failed_chart_leaves_no_part(tmp_path: Path) -> None:
    class Broken:
        def save(self, path: str, **_: object) -> None:
            Path(path).write_text("half")
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError):
        save_chart(Broken(), tmp_path, "c")
    assert list(tmp_path.iterdir()) == []


def test_bidirectional_cells_are_compared_at_equal_tokens_in_all_and_per_direction(tmp_path: Path) -> None:
    cells = with_doubled_cells(tmp_path)
    found = {(g.size, g.a, g.b): g.gap_nats for g in find(cells).gaps}
    once, per_direction = "d1 steps=20", "d1 steps=20, bidirectional at equal tokens per direction"
    assert found.keys() == {
        (once, "forward", "backward"), (once, "forward", "bidirectional"), (once, "backward", "bidirectional"),
        (per_direction, "forward", "bidirectional"), (per_direction, "backward", "bidirectional"),
    }  # fmt: skip
    assert found[once, "forward", "bidirectional"] == pytest.approx(0.2)
    assert found[per_direction, "forward", "bidirectional"] == pytest.approx(-0.1, abs=0.002)
    assert found[per_direction, "backward", "bidirectional"] == pytest.approx(-0.2, abs=0.002)


def test_energy_is_told_of_runs_whose_gpu_told_its_power(tmp_path: Path) -> None:
    """20 steps of half a second at 400 W, 3 of the first looks missing: 4000 J and 10 s on each of two workers."""
    folder = make_cell(tmp_path, "forward")
    on(folder, ResourceSettings(workers=2, gpus_per_worker=1))
    assert "Energy is not known: no GPU reported its power." in cost_section([finish(folder, {"forward": [20.0]})])[-1]
    journal = Journal(folder.path)
    for step in range(1, 21):
        watts = {"gpu_watts": 400.0} if step > 3 else {}
        journal.append(step, {"tokens": 1.0, "flops": 1.0, "step_seconds": 0.5, **watts})
    journal.close()
    _, table, words = cost_section([folder])
    assert float(table.splitlines()[-1].split("|")[-2]) == pytest.approx(8000 / 3.6e6, abs=1e-4)
    assert "Energy is that of GPUs during steps" in words
    assert table.splitlines()[-1].split("|")[-4].strip() == "20 seconds"
    assert "Times are those of all workers" in words
    on(folder, ResourceSettings(gpus_per_worker=0.25))
    assert float(cost_section([folder])[1].splitlines()[-1].split("|")[-2]) == pytest.approx(1000 / 3.6e6, abs=1e-4)
    silent = finish(make_cell(tmp_path, "forward", seed=1), {"forward": [20.0]})
    assert "Energy is not known" in cost_section([folder, silent])[-1], "of some runs alone it would be too little"


def test_changed_workers_and_lost_steps_are_told_and_paid_for(tmp_path: Path) -> None:
    """Ten steps of a second with one worker, six with two of which three are lost, seven with one."""
    calm, changed = (make_cell(tmp_path, direction) for direction in ("forward", "backward"))
    for folder, starts in ((calm, [(0, 1)]), (changed, [(0, 1), (10, 2), (13, 1)])):
        for at, (step, workers) in enumerate(starts):
            note_start(folder.path, step, workers)
            time.sleep(0.002)  # a step takes longer
            journal = Journal(folder.path, step)
            for done in range(step + 1, (16 if at == 1 else 20) + 1):
                journal.append(done, {"tokens": 1.0, "flops": 1.0, "step_seconds": 1.0})
            journal.close()
    told = "\n".join(audit_section([calm, changed]))
    assert f"- The number of workers changed in 1 of 2 runs: {changed.id} (1, 2 from step 10, 1 from step 13)." in told
    assert "within 1e-05 of their size at the first step after a change, 0.001 later" in told
    assert f"- Steps were lost and trained again in 1 run: {changed.id} (2 resumes, 13 steps lost)." in told
    assert "workers changed" not in "\n".join(audit_section([calm, changed], of=calm))
    table = cost_section([calm, changed])[1].splitlines()
    assert [row.split("|")[-3].strip() for row in table[-2:]] == ["20 seconds", "23 seconds"]


def on(folder: ExperimentFolder, resources: ResourceSettings) -> None:
    config = folder.config()
    experiment = config.experiment.model_copy(update={"resources": resources})
    folder.reconfigure(replace(config, experiment=experiment))


def test_a_grid_of_chains_is_told_by_what_each_phase_learns(tmp_path: Path) -> None:
    """Base by losses and a verdict, RL by rewards; what the insides show is what the verdict is about."""
    folders = [cell(tmp_path, direction, seed, 0.0) for direction in ("forward", "backward") for seed in range(3)]
    rewarded = make_cell(tmp_path, "backward", phase="rl")
    journal = Journal(rewarded.path)
    for step, reward in ((1, 0.25), (2, 0.5)):
        journal.append(step, {"train_loss": -0.125, "reward": reward, "tokens": step, "flops": 1, "step_seconds": 1.0})
    journal.close()
    text, files = write(tmp_path, [*folders, rewarded])
    assert "mean reward 0.250 over the first 1 step, 0.500 over the last 1; it rose in 1 of 1 run" in text
    assert "`bwlm analyze rewards 'g_backward_d1_lr1_s*-rl'`" in text
    efficiency = text.split("## Learning efficiency")[1].split("## ")[0]
    assert "`bwlm analyze compare 'g_forward_d1_lr1_s*' g_backward_d1_lr1_s0 " in efficiency
    assert "-0.125" not in text
    assert {"rewards.svg", "compare.svg", "curves.svg"} <= {file.name for file in files}
    alone, files = write(tmp_path, [rewarded])
    assert "## Learning curves" not in alone
    assert "## Learning efficiency" not in alone
    assert "curves.svg" not in {file.name for file in files}


def test_a_run_of_rl_is_told_by_its_rewards(tmp_path: Path) -> None:
    rewarded = make_cell(tmp_path, "backward", phase="rl")
    journal = Journal(rewarded.path)
    journal.append(1, {"train_loss": -0.125, "reward": 0.25, "tokens": 1, "flops": 1, "step_seconds": 1.0})
    journal.close()
    text = write_experiment_report(rewarded)[0].read_text()
    assert "backward: mean reward 0.250" in text
    assert "![learning curve]" not in text
    assert "## Learning efficiency" not in text
    assert "Not compared: in rl each direction learns to write text of its own." in text


def test_a_grid_without_base_and_mid_says_that_directions_are_not_compared(tmp_path: Path) -> None:
    folders = [make_cell(tmp_path, direction, phase="sft") for direction in ("forward", "backward")]
    for folder in folders:
        folder.write_status(Status("finished", "", 20, {"val_loss": 3.0, "val_bpb": 1.0, "val_loss_written": 2.0}))
    text, _ = write(tmp_path, folders)
    assert text.startswith("# g\n\n## Verdict\n\nNone between directions: in SFT and RL each learns to write its own")
    assert "no cell has finished" not in text
    assert "No pair of runs of two directions" in text.split("## Audit")[1]
    with pytest.raises(
        UserError, match="could be compared; 2 runs of SFT or RL: each direction writes text of its own"
    ):
        _gaps_of_runs(folders, [])


def test_a_phase_has_code_of_its_own_and_two_versions_of_one_phase_are_told(tmp_path: Path) -> None:
    """The code of mid-training is not that of base: only two versions that trained one phase are judged apart."""
    base = [finish(make_cell(tmp_path, "forward", seed=seed, code="b1"), {"forward": [20.0]}) for seed in range(2)]
    mid = finish(make_cell(tmp_path, "forward", phase="mid", code="m1"), {"forward": [20.0]})
    assert not [line for line in find([*base, mid]).skipped if "codes" in line]
    other = finish(make_cell(tmp_path, "forward", seed=2, code="b2"), {"forward": [20.0]})
    told = "d1 base: trained by 2 codes, which are judged apart: b1 seeds 0, 1; b2 seeds 2"
    assert told in find([*base, mid, other]).skipped


def test_a_report_of_many_runs_draws_the_seeds_of_a_setting_as_one_line(tmp_path: Path) -> None:
    cells = [
        finish(make_cell(tmp_path, direction, seed=seed, lr=lr), {direction: losses(lr, seed)})
        for direction in ("forward", "backward")
        for lr in (1.0, 2.0)
        for seed in range(16)
    ]
    write_cells(tmp_path, "g", [cell.id for cell in cells])
    write_grid_report(tmp_path, "g")
    home = grid_folder(tmp_path, "g")
    drawing = ET.parse(home / "curves.svg").getroot()
    lines = [one for one in drawing.iter() if "mark-line" in one.get("class", "").split()]
    drawn = [path for line in lines for path in line.iter() if path.tag.endswith("path")]
    assert len([path for path in drawn if path.get("stroke-width") in ("3.2", "1.2")]) == 4
    assert "the mean over the seeds of a direction and learning rate" in (home / REPORT).read_text()
    page = (home / PAGE).read_text()
    assert '<summary><h2 id="cells">' in page
    assert all(cell.id in page for cell in cells)
    assert " and 4 more, each in the run" in page
    curves = curves_of_groups(cells)
    last = curves[(curves["direction"] == "forward") & (curves["lr"] == 1.0)].dropna(subset="low").iloc[-1]
    ends = [3.0 + 2.0 / 20 + 0.05 * seed for seed in range(16)]
    assert (last["low"], last["high"]) == (min(ends), max(ends))
    assert last["loss"] == pytest.approx(np.mean(ends))

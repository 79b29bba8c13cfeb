"""How reports look to a reader: one sign for a gap, names of layers and columns, narrow and dark screens."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.analysis.charts.insides import position_chart
from bwlm.analysis.charts.losses import gap_chart, learning_curves, transfer_chart
from bwlm.analysis.charts.style import WIDTHS, layers_in_order, write_chart
from bwlm.analysis.commands.gap import GAP_HEADER, gap_columns, gap_frame, gap_sentence
from bwlm.analysis.commands.layers import over_time
from bwlm.analysis.commands.positions import positions
from bwlm.analysis.commands.representations import representations
from bwlm.analysis.commands.result import frame_to_markdown, markdown_table
from bwlm.analysis.commands.transfer import transfer
from bwlm.analysis.report.page import to_page
from bwlm.record.experiment import ExperimentFolder
from bwlm.stats.gaps import gaps
from tests.stats.test_gaps import flat_table

_LOSS = st.floats(2.0, 4.0)
_SEEDS = st.integers(1, 5)


# ---- the sign of a gap ----


def first_number(text: str) -> float:
    found = re.search(r"gap ([+-][\d.]+) nats", text)
    assert found, text
    return float(found[1])


@settings(max_examples=40, deadline=None)
@given(_SEEDS.flatmap(lambda n: st.tuples(*[st.lists(_LOSS, min_size=n, max_size=n)] * 2)))
def test_sentence_table_and_chart_tell_a_gap_with_one_sign(losses: tuple[list[float], list[float]]) -> None:
    forward, backward = losses
    [found] = gaps(flat_table({"forward": forward, "backward": backward}), resamples=2)
    truth = float(np.mean(backward) - np.mean(forward))  # the second minus the first, as `forward → backward` says
    row = dict(zip(GAP_HEADER, gap_columns(found), strict=True))
    assert float(row["gap (nats)"]) == pytest.approx(truth, abs=6e-5)
    [bar] = gap_frame([found]).to_dict("records")
    assert bar["gap"] == pytest.approx(truth)
    ahead = "forward" if truth > 0 else "backward"
    sentence = gap_sentence(found)
    assert first_number(sentence) == float(row["gap (nats)"])
    assert f"({row['gap (%)']} %)" in sentence
    assert row["pair"] in sentence
    if found.seed_interval:
        assert row["95 % over seeds"] in sentence
    assert (f"{ahead} has the lower loss" in sentence) == (found.verdict == "different")


def test_the_axis_of_gaps_says_which_direction_is_ahead_on_which_side() -> None:
    [found] = gaps(flat_table({"forward": [3.0] * 3, "backward": [3.1, 3.1, 3.2]}), resamples=2)
    assert "above 0 the first direction has the lower loss" in str(gap_chart(gap_frame([found]), "g").to_dict())


# ---- names ----


def test_no_layer_is_numbered_beyond_the_last(folders: list[ExperimentFolder]) -> None:
    table = over_time("gradients", folders).table
    assert set(table["layer"]) == {"embedding", "0", "1", "output"}  # of models with two layers
    assert set(table[table["layer"] == "output"]["what"]) == {"lm_head"}
    assert set(over_time("activations", folders).table["layer"]) == {"embedding", "0", "1"}
    found = representations(folders)
    assert set(found.table["layer"]) == {"embedding", "0", "1"}
    axes = re.findall(r"'sort': \[([^]]*)\]", str(found.chart.to_dict()))
    assert "'embedding', '0', '1'" in axes


def test_the_embedding_comes_first_and_the_output_last() -> None:
    assert layers_in_order(pd.Series(["10", "output", "2", "embedding", "2"])) == ["embedding", "2", "10", "output"]


def test_a_log_of_zeros_has_a_chart(folders: list[ExperimentFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient is zero where all samples of an RL step earn the same reward."""
    monkeypatch.setattr("bwlm.analysis.commands.layers._long", lambda run, group: _zeros())
    assert "all values are zero" in str(over_time("gradients", folders).chart.to_dict())


def test_a_text_of_two_lines_has_a_chart_by_place(folders: list[ExperimentFolder], tmp_path: Path) -> None:
    table = positions(folders).table.assign(tokens=29.0)
    drawn = write_chart(position_chart(table, "by place"), tmp_path / "place.svg").read_text()
    assert "fewer than 30 tokens at every place" in drawn


def _zeros() -> pd.DataFrame:
    place = pd.DataFrame({"step": [4], "layer": ["0"], "what": ["mlp.up"]})
    return place.assign(**dict.fromkeys(("norm", "rms", "mean", "max", "sparsity"), 0.0))


def test_columns_are_written_for_people() -> None:
    table = pd.DataFrame(
        {
            "flops": [12_299_325_306, 1_500],
            "tokens": [1234.0, 5678.0],
            "ratio": [1.5, 0.0001],
            "ratio_low": [1.25, None],
            "ratio_high": [1.75, None],
            "native": [True, False],
            "empty_column": [None, None],
            "first_share": [0.5, None],
        }
    )
    header, marks, *rows = frame_to_markdown(table, "95 % over seeds").splitlines()
    assert header == (
        "| FLOPs | tokens | ratio of tokens | ratio of tokens, 95 % over seeds | native | share of the first token |"
    )
    assert marks == "| ---: | ---: | ---: | ---: | --- | ---: |"
    assert rows == [
        "| 12.3G | 1,234 | 1.5000 | 1.2500 .. 1.7500 | yes | 0.5000 |",
        "| 1,500 | 5,678 | 0.0001 | – | no | – |",
    ]


# ---- charts ----


def test_transfer_has_no_row_without_a_point(folders: list[ExperimentFolder], tmp_path: Path) -> None:
    rows = [
        {"size": size, "direction": direction, "lr": lr, "reading": reading, "loss": 3.0, "low": None, "high": None}
        for size, direction, lr in [
            ("d1", "forward", 4),
            ("d1", "backward", 4),
            ("d2", "forward", 2),
            ("d2", "backward", 4),
        ]
        for reading in ("forward", "backward")
    ]
    path = write_chart(transfer_chart(pd.DataFrame(rows), "Transfer"), tmp_path / "transfer.svg")
    labels = [text.text for text in ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]
    models = [label for label in labels if label and " model" in label]
    assert {"read", "forward", "backward"} <= set(labels)  # the legend of the points' colours
    assert models == ["forward model", "backward model", "forward model, lr 2", "backward model, lr 4"]
    assert all("||" not in line.replace(" ", "") for table in transfer(folders).tables() for line in table.splitlines())


def test_lines_on_top_of_each_other_are_both_seen(tmp_path: Path) -> None:
    steps = [(direction, tokens, 3.0) for direction in ("backward", "forward") for tokens in (1, 2, 3)]
    curves = pd.DataFrame(steps, columns=["direction", "tokens", "loss"])
    curves = curves.assign(run=curves["direction"], size="d1", lr=1.0, val_loss=None)
    path = write_chart(learning_curves(curves, "Curves"), tmp_path / "curves.svg")
    drawn = [
        line for line in re.findall(r"<path [^>]*>", path.read_text()) if 'aria-roledescription="line mark"' in line
    ]
    widths = [float(width[1]) for line in drawn if (width := re.search(r'stroke-width="([\d.]+)"', line))]
    assert widths == [WIDTHS["forward"], WIDTHS["backward"]]  # the narrow one is drawn later, on top of the wide one


def test_charts_follow_a_readers_dark_mode(tmp_path: Path) -> None:
    chart = learning_curves(pd.DataFrame(columns=["run"]), "Curves")
    svg = write_chart(chart, tmp_path / "c.svg").read_text()
    ET.fromstring(svg)
    page = write_chart(chart, tmp_path / "c.html").read_text()
    for text in (svg, page):
        assert "@media (prefers-color-scheme:dark)" in text
    dark = re.findall(r'\[(?:fill|stroke)="([^"]+)"\]', svg)
    used = set(re.findall(r'(?:fill|stroke)="(#\w+|white)"', svg.split("</style>")[1]))
    assert used <= set(dark)  # else it would be black on black
    assert '<meta name="viewport"' in page
    style = page.index("@media (prefers-color-scheme:dark)")
    assert style < page.index("<script"), "inside a script no browser reads it"
    assert "svg.marks{background:none!important;max-width:100%" in page


@pytest.mark.parametrize("size", ["d1", "d12 model.sequence_length=4096"])
def test_a_wider_font_does_not_cut_the_label_of_a_gap(size: str, tmp_path: Path) -> None:
    """A browser without Arial draws a letter up to 1.2 pixels wider than the chart was laid out for."""
    found = gaps(flat_table({"forward": [3.0], "bidirectional": [3.1]}, size), resamples=2)
    root = ET.parse(write_chart(gap_chart(gap_frame(found), "g"), tmp_path / "g.svg")).getroot()
    label = f"{size}: forward → bidirectional"
    assert label in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    narrow = gap_chart(gap_frame(found).assign(pair="d"), "g")
    less = ET.parse(write_chart(narrow, tmp_path / "narrow.svg")).getroot()
    wider = float(root.attrib["width"]) - float(less.attrib["width"])
    assert wider > _ARIAL * len(label) + 1.2 * len(label) - 16 - 20


_ARIAL = 5.2
"""Mean width of a letter of Arial at 11 pixels."""


def test_the_page_fits_narrow_and_dark_screens(tmp_path: Path) -> None:
    (tmp_path / "gaps.svg").write_text("<svg/>")
    table = markdown_table(["a"], [["1"]])
    page = to_page(f"{table}\n\n![gaps](gaps.svg) ([in the browser](gaps.html))\n", tmp_path, "Title")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "@media (prefers-color-scheme:dark)" in page
    assert "color-scheme:light dark" in page
    assert page.count('<div class="wide">') == 2
    assert '<div class="wide"><table>' in page
    assert re.search(r'<div class="wide"><img src="data:image/svg\+xml;base64,[^>]*></div>', page)
    assert ".wide{overflow-x:auto" in page


def test_the_page_links_to_its_sections_and_folds_those_that_few_need(tmp_path: Path) -> None:
    text = "# T\n\nA line.\n\n## Verdict\n\none\n\n## Rates & more\n\ntwo\n\n## Cost\n\nthree\n"
    page = to_page(text, tmp_path, "T", folded=["Rates & more"])
    nav = re.search(r"<nav>(.*?)</nav>", page, re.DOTALL)
    assert nav
    assert page.index("</h1>") < nav.start() < page.index("A line.")
    assert re.findall(r'<a href="#([^"]+)">([^<]+)</a>', nav[1]) == [
        (anchor, name)
        for anchor, name in zip(
            re.findall(r'<h2 id="([^"]+)"', page), ("Verdict", "Rates &amp; more", "Cost"), strict=True
        )
    ]
    [folded] = re.findall(r"<details><summary>(.*?)</details>", page, re.DOTALL)
    assert ">Rates &amp; more</h2></summary>" in folded
    assert "two" in folded
    assert "three" not in folded
    assert "<nav>" not in to_page("# T\n\nno section\n", tmp_path, "T")

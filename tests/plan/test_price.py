"""The price of a plan on a GPU: worked out by hand from FLOPs, peak, MFU and the price of an hour."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from bwlm.model.compute import gpu_peak
from bwlm.plan.price import DEVICES, columns, price, price_words
from bwlm.plan.spec import Cell
from tests.plan.test_estimate import cell
from tests.shell import Shell, check_mistake

GRID = """
name: g
data: {source: builtin:pydocs}
axes: {direction: [forward, backward], depth: [1], lr: [1.0], seed: [0]}
model: {sequence_length: 128}
budget: {steps: 20, batch_tokens: 1024}
"""


def named(name: str, **settings: object) -> Cell:
    made = cell(**settings)
    return Cell(name, made.experiment, made.steps)


def test_hours_are_flops_over_a_share_of_the_peak() -> None:
    """Half of the peak of an H100, 989e12 / 2 FLOP/s, for an hour: 1.7802e18 FLOPs."""
    one, half = named("one"), named("half")
    left = one.flops_until(40) - one.flops_until(20)
    priced = price([(one, 0), (half, 20)], "h100", mfu=0.5, per_hour=2.0)
    assert priced["cells"]["one"]["gpu_hours"] == pytest.approx(one.flops_until(40) / 1.7802e18)
    assert priced["cells"]["half"]["gpu_hours"] == pytest.approx(left / 1.7802e18)
    assert priced["gpu_hours"] == pytest.approx((one.flops_until(40) + left) / 1.7802e18)
    assert priced["cost"] == pytest.approx(2 * priced["gpu_hours"])
    assert (priced["device"], priced["peak_flops"], priced["mfu"]) == ("H100", 989e12, 0.5)


def test_without_a_price_there_is_no_cost() -> None:
    priced = price([(named("one"), 0)], "a100")
    assert priced["cost"] is None
    assert priced["cells"]["one"]["cost"] is None
    assert "cost" not in " ".join(price_words(priced))
    assert columns(priced["cells"]["one"])[1] == ""


def test_every_device_has_a_peak() -> None:
    assert all(math.isfinite(gpu_peak(name)) for name in DEVICES)


def test_the_docs_have_the_peaks_that_are_used() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text().partition("| GPU | peak")[2]
    rows = re.findall(r"^\| ([\w, ]+) \| ([\d, ]+) \|$", page, flags=re.MULTILINE)
    shown = {}
    for names, peaks in ((names.split(", "), peaks.split(", ")) for names, peaks in rows):
        shown |= dict(zip(names, peaks * len(names) if len(peaks) == 1 else peaks, strict=True))
    assert shown == {name: f"{gpu_peak(name) / 1e12:.0f}" for name in DEVICES}


@pytest.mark.parametrize(
    ("hours", "shown"),
    [(0.0, "0.000"), (0.0004, "under 0.001"), (0.0204, "0.020"), (31.26, "31.260"), (1234.5, "1,234")],
)
def test_hours_in_a_table(hours: float, shown: str) -> None:
    assert columns({"gpu_hours": hours, "cost": None}) == [shown, ""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "h10"], "--on: h10: no such GPU: give one of B200, H200, H100"),
        (["--on", "h100", "--mfu", "0"], "--mfu: 0 is not a share of the peak"),
        (["--on", "h100", "--mfu", "40"], "--mfu: 40 is not a share of the peak"),
        (["--on", "h100", "--price", "-1"], "--price: -1 is no price"),
        (["--price", "2"], "--price: needs the GPU that it is for, such as --on h100"),
    ],
)
def test_a_price_that_cannot_be_is_told(shell: Shell, options: list[str], message: str) -> None:
    check_mistake(shell("grid", "plan", shell.file(GRID), *options), message)


def test_a_plan_shows_the_price_by_cell_and_in_all(shell: Shell) -> None:
    options = ("--on", "h100", "--mfu", "0.001", "--price", "1000")
    document = shell.json("grid", "plan", shell.file(GRID), *options)
    priced = document["price"]
    assert set(priced["cells"]) == {one["id"] for one in document["cells"]}
    assert sum(one["cost"] for one in priced["cells"].values()) == pytest.approx(priced["cost"])
    shown = shell("grid", "plan", "g.yaml", *options).out
    assert "GPU hours" in shown
    assert f"cost {priced['cost']:,.2f} for what is left, assumed at an MFU of 0.001 of 989TFLOP/s" in shown
    assert "GPU hours" not in shell("grid", "plan", "g.yaml").out
    assert "price" not in shell.json("grid", "plan", "g.yaml")

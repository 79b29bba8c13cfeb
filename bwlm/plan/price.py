"""Price of a plan on a GPU that it has not run on: FLOPs over a stated share of the GPU's peak, in hours and money."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bwlm.errors import UserError, nearest
from bwlm.format import counted, short_number
from bwlm.model.compute import gpu_peak
from bwlm.phases import PHASES
from bwlm.plan.spec import Cell

DEVICES = ("B200", "H200", "H100", "A100", "L40S", "L4", "A10", "5090", "4090", "3090")
"""GPUs that `--on` names; `gpu_peak` has their dense bf16 FLOP/s."""
SOURCE = "NVIDIA's data sheet, dense bf16"
MFU = 0.4
"""Share of the peak that is assumed. nanochat reaches 0.41 to 0.46 on H100s at depth 26; small models reach less."""


def price(
    left: Sequence[tuple[Cell, int]], device: str, mfu: float = MFU, per_hour: float | None = None
) -> dict[str, Any]:
    """Return what it takes to train cells, each from the step that is given with it: in all, and by cell.

    `mfu` is the share of the device's peak that training reaches, `per_hour` the price of one GPU for an hour. Figures:
    `gpu_hours` and, with a price, `cost`, in the same currency. Validations count, the samples of RL do not. Raises
    `UserError` for an unknown device, and for an `mfu` or a price that cannot be.
    """
    name = _device(device)
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: {mfu:g} is not a share of the peak: give a number above 0 and up to 1, such as {MFU}")
    if per_hour is not None and not 0 <= per_hour < float("inf"):
        raise UserError(f"--price: {per_hour:g} is no price: give the price of one GPU for an hour, such as 2.5")
    speed = gpu_peak(name) * mfu * 3600  # FLOPs in an hour
    hours = {cell.id: (cell.flops_until(cell.steps) - cell.flops_until(step)) / speed for cell, step in left}
    sampled = [cell.id for cell, _ in left if PHASES[cell.experiment.phase].has_reward]
    return {
        "device": name, "peak_flops": gpu_peak(name), "source": SOURCE, "mfu": mfu, "price": per_hour,
        **_figures(sum(hours.values()), per_hour), "without_samples": sampled,
        "cells": {id: _figures(of_cell, per_hour) for id, of_cell in hours.items()},
    }  # fmt: skip


def _device(name: str) -> str:
    if name.upper() not in DEVICES:
        raise UserError(f"--on: {name}: no such GPU: give one of {', '.join(DEVICES)}{nearest(name.upper(), DEVICES)}")
    return name.upper()


def _figures(hours: float, per_hour: float | None) -> dict[str, float | None]:
    return {"gpu_hours": hours, "cost": None if per_hour is None else hours * per_hour}


def price_words(priced: dict[str, Any]) -> list[str]:
    """Return the result of `price` as lines of text."""
    assumed = f"at an MFU of {priced['mfu']:.3g} of {short_number(priced['peak_flops'])}FLOP/s ({priced['source']})"
    hours, cost = columns(priced)
    costs = f", cost {cost}" if cost else ""
    lines = [f"on {priced['device']}: {hours} GPU hours{costs} for what is left, assumed {assumed}"]
    if priced["without_samples"]:
        runs = counted(len(priced["without_samples"]), "RL run")
        lines.append(f"without the samples that {runs} must write, which take most of the time of RL")
    return lines


def columns(figures: dict[str, Any]) -> list[str]:
    """Return GPU hours and cost as a table shows them; '' for a cost without a price."""
    hours, cost = figures["gpu_hours"], figures["cost"]
    short = f"{hours:,.3f}" if hours < 100 else f"{hours:,.0f}"
    return ["under 0.001" if 0 < hours < 0.001 else short, "" if cost is None else f"{cost:,.2f}"]

"""Loads the models that are served, for the hardware of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from bwlm.chat.served import ServedModel
from bwlm.model.compute import DeviceType, can_use_gpus, look_at_hardware
from bwlm.trained.load import load_model


def load_served(
    storage: Path,
    names: Sequence[str],
    slots: int,
    waiting: int,
    threads: int | None,
    precision: Literal["auto", "float32", "bfloat16"],
) -> list[ServedModel]:
    """Return models by the names of their checkpoints, on a GPU if there is one; sets torch's number of threads.

    Raises `UserError` as `load_model` does, and for a control direction.
    """
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    device: DeviceType = "cuda" if can_use_gpus() else "cpu"
    dtype = getattr(torch, _precision(device, threads) if precision == "auto" else precision)
    return [ServedModel.from_loaded(name, load_model(storage, name, device, dtype), slots, waiting) for name in names]


def _precision(device: DeviceType, threads: int) -> str:
    hardware, _ = look_at_hardware(device, threads)
    return "bfloat16" if hardware.native_bfloat16 else "float32"

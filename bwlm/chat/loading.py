"""Loads the models that are served, for the hardware of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch

from bwlm.chat.served import ServedModel
from bwlm.errors import UserError
from bwlm.model.compiled_decoder import CannotCompile
from bwlm.storage.opened import open_storage
from bwlm.trained.load import best_device, load_model


def load_served(
    storage: str,
    names: Sequence[str],
    slots: int,
    waiting: int,
    threads: int | None,
    precision: Literal["auto", "float32", "bfloat16"],
    compiled: bool = False,
) -> list[ServedModel]:
    """Return models by the names of their checkpoints, on a GPU if there is one; sets torch's number of threads.

    `storage` is its folder or address, since a replica on another machine has another working folder. Raises
    `UserError` as `load_model` does, for a control direction, and if `compiled` is not possible here.
    """
    root = open_storage(storage)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    device = best_device()
    # a CPU multiplies few rows in bfloat16 no faster, half as fast if there is one (benchmarks/serve.py)
    chosen = {"cpu": "float32", "cuda": "bfloat16"}[device] if precision == "auto" else precision
    loaded = (load_model(root, name, device, getattr(torch, chosen)) for name in names)
    try:
        return [
            ServedModel.from_loaded(name, one, slots, waiting, compiled)
            for name, one in zip(names, loaded, strict=True)
        ]
    except CannotCompile as error:
        raise UserError(f"--compile: {error}: mend that, or leave --compile out") from None

"""The optimizer: Muon for the matrices inside the blocks, AdamW for embedding and head; and their schedules.

Learning rates are nanochat's of October 2025, tuned for width 768: the version whose architecture `gpt.py` has. With
several ranks, each orthogonalizes its share of the matrices and sends them to the others. State is saved and loaded
as named tensors of all ranks together, so that a checkpoint needs no pickle and fits any number of ranks.

Not here: gradient clipping and accumulation, which belong to the training step (`train_step.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bwlm.model.gpt import GPT
from bwlm.model.muon import Muon

Kind = Literal["muon", "adamw"]

TUNED_WIDTH = 768
MUON_RATE = 0.02
EMBEDDING_RATE = 0.2
UNEMBEDDING_RATE = 0.004
ADAMW_MATRIX_RATE = 6e-4

DEFAULT_WARMUP = 40
MOMENTUM_WARMUP = 300  # steps


class Optimizer:
    """torch optimizers that step together on one rank, and their state under flat names.

    Call `set_schedule` before each `step`: learning rates, momentum and decay are functions of the step, not state.
    """

    def __init__(
        self, parts: dict[str, torch.optim.Optimizer], names: dict[Tensor, str], owners: dict[Tensor, int]
    ) -> None:
        """Join `parts`, by the prefix of their state's names; `names` covers all parameters.

        Parameter groups have a 'name'. `owners`: the rank that updates a matrix (in its 'muon' part); a parameter
        that is not in it is updated by every rank.
        """
        self.parts = parts
        self._names = names
        self._owners = owners
        for part in parts.values():
            for group in part.param_groups:
                group["initial_lr"], group["initial_decay"] = group["lr"], group["weight_decay"]
                for parameter in group["params"]:
                    part.state[parameter] = _initial_state(part, parameter)

    def step(self) -> None:
        """Update what this rank owns and receive what the other ranks updated; a collective with several ranks."""
        for part in self.parts.values():
            part.step()
        _share([parameter.detach() for parameter in self._owners], list(self._owners.values()))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._names:
            parameter.grad = None

    def set_schedule(self, multiplier: float, momentum: float, decay: float = 1.0) -> None:
        """Scale every group's learning rate and weight decay, and set Muon's momentum (AdamW's betas stay)."""
        for group in self._groups():
            group["lr"] = group["initial_lr"] * multiplier
            group["weight_decay"] = group["initial_decay"] * decay
            if "momentum" in group:
                group["momentum"] = momentum

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rates of the next step by group: 'matrix', 'embedding', 'unembedding'."""
        return {group["name"]: float(group["lr"]) for group in self._groups()}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the whole state as `part/parameter/key`, complete from the start; a collective with several ranks.

        The state that this rank owns is returned as live tensors, which the next step changes.
        """
        own = self._own_state()
        momenta = {name: own.get(name, torch.empty_like(matrix)) for name, matrix in self._shared_state().items()}
        _share(list(momenta.values()), list(self._owners.values()))
        return own | momenta

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state_tensors` returned on any number of ranks.

        Raises `ValueError`, and changes nothing, unless all state that this rank needs is there and fits.
        """
        own = self._own_state()
        missing = sorted(own.keys() - tensors.keys())
        unexpected = sorted(tensors.keys() - own.keys() - self._shared_state().keys())
        if missing or unexpected:
            raise ValueError(f"optimizer state: {_some('missing', missing)}; {_some('unexpected', unexpected)}")
        for name, value in own.items():
            loaded = tensors[name]
            if (loaded.shape, loaded.dtype) != (value.shape, value.dtype):
                raise ValueError(
                    f"optimizer state {name!r} is {loaded.dtype} {tuple(loaded.shape)}, "
                    f"not {value.dtype} {tuple(value.shape)}"
                )
        for name, value in own.items():
            value.copy_(tensors[name])

    def _own_state(self) -> dict[str, Tensor]:
        return {
            f"{prefix}/{self._names[parameter]}/{key}": value
            for prefix, part in self.parts.items()
            for parameter, state in part.state.items()
            for key, value in state.items()
        }

    def _shared_state(self) -> dict[str, Tensor]:
        """Return the matrix of each momentum buffer that only one rank holds."""
        return {f"muon/{self._names[matrix]}/momentum_buffer": matrix for matrix in self._owners}

    def _groups(self) -> Iterator[dict[str, Any]]:
        for part in self.parts.values():
            yield from part.param_groups


def build_optimizer(
    model: GPT, lr: float = 1.0, weight_decay: float = 0.0, kind: Kind = "muon", rank: int = 0, world: int = 1
) -> Optimizer:
    """Return the optimizer of `model`, which must be on its device already.

    `lr` multiplies every group's learning rate; `weight_decay` acts on the blocks' matrices only. With `world` ranks,
    each rank builds its own with its `rank`, and Muon's work is shared among them.

    'muon' is nanochat's optimizer. 'adamw' uses AdamW for all parameters, the matrices at GPT-3's learning rate and
    betas for its model of width 768 (Brown et al., arXiv:2005.14165, table 2.1 and appendix B; nanoGPT's too), scaled
    with width as nanochat scales its AdamW rates. Embedding and head are the same in both. Raises `ValueError` for an
    unknown `kind` and an `lr` or `weight_decay` out of range.
    """
    if not 0 < lr < math.inf or not 0 <= weight_decay < math.inf:
        raise ValueError(f"lr must be above 0 and weight_decay at least 0, not {lr} and {weight_decay}")
    matrices = [weight for block in model.blocks for weight in block.parameters()]
    for_width = lr * (model.config.width / TUNED_WIDTH) ** -0.5
    adamw_groups = [
        _group("embedding", list(model.embedding.parameters()), for_width * EMBEDDING_RATE),
        _group("unembedding", list(model.lm_head.parameters()), for_width * UNEMBEDDING_RATE),
    ]
    parts: dict[str, torch.optim.Optimizer] = {}
    owners: dict[Tensor, int] = {}
    if kind == "muon":
        owners = _spread(matrices, world) if world > 1 else {}
        mine = [matrix for matrix in matrices if owners.get(matrix, rank) == rank]
        if mine:  # on many ranks, a shallow model leaves some without a matrix
            group = _group("matrix", mine, lr * MUON_RATE)
            parts["muon"] = Muon(group, weight_decay, model.compute_dtype)
    elif kind == "adamw":
        matrix_group = _group("matrix", matrices, for_width * ADAMW_MATRIX_RATE)
        adamw_groups.insert(0, matrix_group | {"betas": (0.9, 0.95), "weight_decay": weight_decay})
    else:
        raise ValueError(f"kind must be 'muon' or 'adamw', not {kind!r}")
    parts["adamw"] = torch.optim.AdamW(adamw_groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return Optimizer(parts, names, owners)


def lr_schedule(
    step: int,
    steps: int,
    warmup_steps: int | None = None,
    warmdown_ratio: float = 0.65,
    final_fraction: float = 0.05,
) -> float:
    """Return the multiplier of the learning rate at `step` of 0 .. steps - 1: linear up, constant, linear down.

    nanochat's `get_lr_multiplier`: it begins at 1 / warmup_steps and would reach `final_fraction` at `steps`, one
    after the last. `warmup_steps` None is 40, but at most a tenth of the steps. Raises `ValueError` if a value is out
    of range, or if warmup and warmdown together are longer than `steps`.
    """
    if warmup_steps is None:
        warmup_steps = min(DEFAULT_WARMUP, steps // 10)
    warmdown_steps = round(warmdown_ratio * steps)
    if not 0 <= step <= steps:
        raise ValueError(f"step {step} is outside 0..{steps}")
    if not (0 <= warmdown_ratio <= 1 and 0 <= final_fraction <= 1):
        raise ValueError(f"warmdown_ratio {warmdown_ratio} and final_fraction {final_fraction} must be in 0..1")
    if warmup_steps < 0 or warmup_steps + warmdown_steps > steps:
        raise ValueError(f"{warmup_steps} steps of warmup and {warmdown_steps} of warmdown do not fit into {steps}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= steps - warmdown_steps:
        return 1.0
    remaining = (steps - step) / warmdown_steps
    return remaining + (1 - remaining) * final_fraction


def muon_momentum(step: int) -> float:
    """Return Muon's momentum at `step`: 0.85 to 0.95 over the first 300 steps, then 0.95 (nanochat, October 2025)."""
    fraction = min(step / MOMENTUM_WARMUP, 1.0)
    return (1 - fraction) * 0.85 + fraction * 0.95


def weight_decay_schedule(step: int, steps: int) -> float:
    """Return the multiplier of the weight decay, a cosine from 1 to 0 (nanochat's `get_weight_decay`, 2026)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def _spread(matrices: list[nn.Parameter], world: int) -> dict[Tensor, int]:
    """Return the rank that updates each matrix: the costliest first, each to the least busy rank (Graham's LPT)."""
    load = [0] * world
    owners: dict[Tensor, int] = {}
    for matrix in sorted(matrices, key=_orthogonalization_cost, reverse=True):
        owner = load.index(min(load))
        load[owner] += _orthogonalization_cost(matrix)
        owners[matrix] = owner
    return owners


def _orthogonalization_cost(matrix: Tensor) -> int:
    """Return the multiplications of a Newton-Schulz step on m x n, m <= n: two products of m m n and one of m m m."""
    m, n = sorted(matrix.shape)
    return m * m * (2 * n + m)


def _share(tensors: list[Tensor], owners: list[int]) -> None:
    """Give every rank's `tensors` the values that their owners hold: one broadcast for each owner."""
    for owner in sorted(set(owners)):
        mine = [tensor for tensor, whose in zip(tensors, owners, strict=True) if whose == owner]
        flat = torch.cat([tensor.flatten() for tensor in mine])
        dist.broadcast(flat, src=owner)
        if dist.get_rank() != owner:
            sizes = [tensor.numel() for tensor in mine]
            for tensor, values in zip(mine, torch.split(flat, sizes), strict=True):
                tensor.copy_(values.view_as(tensor))


def _group(name: str, parameters: list[nn.Parameter], lr: float) -> dict[str, Any]:
    return {"name": name, "params": parameters, "lr": lr}


def _initial_state(part: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the state that torch would make at the first step: so a checkpoint's names are the same at every step."""
    if isinstance(part, torch.optim.Muon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _some(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}" + (f", the first {names[0]!r}" if names else "")

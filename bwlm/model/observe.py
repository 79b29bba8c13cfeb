"""Statistics of gradients, activations and attention, which change nothing in the model.

Training is the same, bit for bit, whether it is observed or not. Activations and attention come from a separate
forward pass, so that training keeps its compiled blocks and kernels.

Axes: B batch, T time, C width, H heads, D head dimension, L layers, P parameters, S places, M positions of a map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bwlm.model.attention import dense_mask
from bwlm.model.gpt import GPT, Block, norm

BINS = 48
"""Bins of a histogram of magnitudes."""
LOWEST_EXPONENT = -40
"""Exponent of the first bin. Bin i counts magnitudes from 2^(i + LOWEST_EXPONENT) to below twice that; the outer bins
are open, and the first one counts zeros too."""

_EXPONENT_BIAS = 127  # float32's


def statistics(values: Tensor) -> dict[str, Tensor]:
    """Return norm, rms, mean, max (of magnitudes), sparsity (share of zeros) and histogram (shares) of a tensor."""
    x = values.detach().float().flatten()
    size = torch.linalg.vector_norm(x)
    exponents = (x.view(torch.int32) >> 23 & 0xFF) - _EXPONENT_BIAS  # of zero: -127
    counts = torch.bincount((exponents - LOWEST_EXPONENT).clamp_(0, BINS - 1), minlength=BINS)
    return {
        "norm": size,
        "rms": size / x.numel() ** 0.5,
        "mean": x.mean(),
        "max": x.abs().max(),
        "sparsity": (x == 0).float().mean(),
        "histogram": counts.float() / x.numel(),
    }


def _stacked(entries: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    entries = list(entries)
    return {name: torch.stack([one[name] for one in entries]).cpu() for name in entries[0]}


def histogram_edges() -> list[float]:
    """Return the edges [BINS + 1] of the bins, as exponents of 2."""
    return [float(exponent) for exponent in range(LOWEST_EXPONENT, LOWEST_EXPONENT + BINS + 1)]


def parameters(model: GPT) -> dict[str, int]:
    """Return the layer of each parameter by its name: -1 for the embedding, the depth for the output head."""
    layers = {"embedding": -1, "lm_head": model.config.depth}
    names = [name for name, _ in model.named_parameters()]
    return {
        name: int(name.split(".")[1]) if name.startswith("blocks.") else layers[name.split(".")[0]] for name in names
    }


def gradient_statistics(model: GPT) -> dict[str, Tensor]:
    """Return the statistics of each parameter's gradient [P], in the order of `parameters`."""
    return _stacked(statistics(parameter.grad) for parameter in model.parameters() if parameter.grad is not None)


PLACES = ("stream", "attention", "mlp", "hidden")
"""Places observed in each layer: the block's output, what attention and MLP add to the stream, and the inside of the
MLP (after ReLU squared)."""


def places(depth: int) -> list[tuple[str, int]]:
    """Return (place, layer) in the order of `activation_statistics`, the embedding's output first, in layer -1."""
    return [("stream", -1), *((place, layer) for layer in range(depth) for place in PLACES)]


@torch.no_grad()
def activation_statistics(model: GPT, ids: Tensor, segments: Tensor | None = None) -> dict[str, Tensor]:
    """Return the statistics of the values at each place [S] while the model reads ids [B, T]."""
    seen: dict[tuple[str, int], dict[str, Tensor]] = {}

    def keep(place: str, layer: int, value: Tensor) -> None:
        seen[place, layer] = statistics(value)

    hooks = []
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        hooks += [
            block.attention.register_forward_hook(lambda _m, _in, out, at=layer: keep("attention", at, out)),
            block.mlp.register_forward_hook(lambda _m, _in, out, at=layer: keep("mlp", at, out)),
            block.mlp.down.register_forward_pre_hook(lambda _m, inputs, at=layer: keep("hidden", at, inputs[0])),
        ]
    try:
        with evaluating(model):
            for layer, state in enumerate(model.states(ids, segments), start=-1):
                keep("stream", layer, state)
    finally:
        for hook in hooks:
            hook.remove()
    return _stacked(seen[key] for key in places(model.config.depth))


@dataclass(frozen=True)
class AttentionStatistics:
    """Means over the positions that count."""

    entropy: Tensor
    """[L, H] nats"""
    distance: Tensor
    """[L, H] mean distance to the attended tokens, in tokens back"""
    first_share: Tensor
    """[L, H] attention paid to the first position of the row, or of the segment where attention stays inside it"""
    maps: Tensor
    """[L, M, M] attention of the first head in the first row: query, key"""


@torch.no_grad()
def attention_statistics(
    model: GPT, ids: Tensor, segments: Tensor | None, counts: Tensor, positions: int
) -> AttentionStatistics:
    """Return how each head attends while the model reads ids [B, T]; `counts` [B, T] is true at positions that count.

    Computes the full attention of one head at a time, in float32: the training kernels never hold it. `positions` is
    M.
    """
    time, (figures, maps) = ids.size(1), ([], [])
    rope, place = model.rope(time, segments), torch.arange(time, device=ids.device)
    back = (place[:, None] - place[None, :]).clamp_min(0).float()
    allowed = dense_mask(torch.zeros_like(ids) if segments is None else segments).squeeze(1)
    first = allowed.to(torch.uint8).argmax(-1)  # the first key that a query may see
    with evaluating(model):
        for block, x in zip(model.blocks, model.states(ids, segments), strict=False):
            assert isinstance(block, Block)
            query, key, _ = block.attention.qkv(norm(x), rope)
            shared = query.size(1) // key.size(1)
            per_head = []
            for head in range(query.size(1)):
                scores = query[:, head].float() @ key[:, head // shared].float().transpose(1, 2)
                p = (scores / query.size(-1) ** 0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
                entropy = torch.special.entr(p).sum(-1)
                looked_back, on_first = (p * back).sum(-1), p.gather(-1, first[..., None]).squeeze(-1)
                per_head.append(torch.stack([value[counts].mean() for value in (entropy, looked_back, on_first)]))
                if head == 0:
                    maps.append(p[0, :positions, :positions].cpu())
            figures.append(torch.stack(per_head))
    entropy, distance, first_share = torch.stack(figures).cpu().unbind(-1)
    return AttentionStatistics(entropy, distance, first_share, torch.stack(maps))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode for a `with` block: its layers run uncompiled."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)

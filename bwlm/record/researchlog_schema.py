"""Schema of the research log: axes, units and meaning of its datasets. `docs/research-log.md` is made from it.

Axes of one entry: R rows of the batch over all ranks, T time, P parameters, S places in the model, B bins, D
readings, N validation tokens, L layers, H heads, M positions of a map, Q tokens, C width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bwlm.directions import READINGS

VERSION = 1
STATE_WINDOWS = 8
"""Validation windows from which states are taken: neighbours in one window are alike."""
MAP_POSITIONS = 128
"""Positions of an attention map that is kept whole."""


@dataclass(frozen=True)
class Column:
    """Dataset of a group."""

    dtype: str
    """Type as NumPy names it; `int` is the integer type that the writer gives."""
    axes: str
    """Axes of one entry; a dataset that is not fixed has `step` before them."""
    unit: str
    description: str


@dataclass(frozen=True)
class Group:
    """Group of datasets: `columns` have an entry for each logged step, `fixed` hold for the whole run."""

    description: str
    columns: dict[str, Column]
    fixed: dict[str, Column] = field(default_factory=dict)


def _scalar(unit: str, description: str) -> Column:
    return Column("float64", "", unit, description)


_STEP = Column("int64", "", "optimizer steps", "number of optimizer steps done at the time of the entry")


def _statistics(axis: str, of: str) -> dict[str, Column]:
    return {
        "step": _STEP,
        "norm": Column("float32", axis, of, "Euclidean norm of the values"),
        "rms": Column("float32", axis, of, "root mean square of the values"),
        "mean": Column("float32", axis, of, "mean of the values"),
        "max": Column("float32", axis, of, "largest magnitude of the values"),
        "sparsity": Column("float32", axis, "share", "share of values that are exactly zero"),
        "histogram": Column("float32", f"{axis} B", "share", "share of values by the power of two of their magnitude"),
    }


_EDGES = Column(
    "float64",
    "B+1",
    "powers of two",
    "edges of the histogram's bins; the outer bins are open, the first one counts zeros",
)

GROUPS = {
    "train": Group(
        "One entry a step: figures of the step, over all ranks.",
        {
            "step": _STEP,
            "tokens": _scalar("tokens", "number of tokens read so far, by all ranks"),
            "flops": _scalar("FLOP", "number of FLOPs spent so far: 6N for each token, and attention"),
            "loss": _scalar("nats per target", "training loss of the step"),
            "loss_smooth": _scalar("nats per target", "exponential average of the loss, factor 0.9, bias corrected"),
            **{
                f"loss_{reading}": _scalar("nats per target", f"training loss of the segments that were read {reading}")
                for reading in READINGS
            },
            "reward": _scalar("reward", "mean reward of the samples, in RL"),
            "reward_forward": _scalar("reward", "mean reward of the samples that were written forwards"),
            "reward_backward": _scalar("reward", "mean reward of the samples that were written backwards"),
            "sample_tokens": _scalar("tokens", "mean length of a sample, its closing marker included"),
            "finished": _scalar("share", "share of the samples that the model ended itself, before the length limit"),
            "entropy": _scalar("nats per token", "mean of -log p over the sampled tokens, at temperature 1"),
            "rollout_seconds": _scalar("s", "time to generate the samples"),
            "grad_norm": _scalar("nats per target per weight", "global norm of the gradient before it was clipped"),
            "lr": _scalar("1", "multiplier of the learning rates, by their schedule"),
            "lr_matrix": _scalar("1", "learning rate of the hidden matrices"),
            "lr_embedding": _scalar("1", "learning rate of the embedding"),
            "lr_unembedding": _scalar("1", "learning rate of the output head"),
            "tokens_per_second": _scalar("tokens/s", "training speed of this launch, without validation"),
            "mfu": _scalar("share", "model FLOPs utilization: FLOPs of the model over the peak of the hardware"),
            "step_seconds": _scalar("s", "time of the step, without validation"),
            "memory_bytes": _scalar(
                "bytes", "resident memory on a CPU, peak of tensors on a GPU; measured once a second"
            ),
            "gpu_watts": _scalar("W", "power of the GPU of rank 0, if its driver reports it"),
        },
    ),
    "tokens": Group(
        "One entry every few steps: every token of the batch, as it was read: a backward row from its last segment "
        "to its first.",
        {
            "step": _STEP,
            "rank": Column("int", "R", "rank", "rank of the worker that read the row"),
            "row": Column("int64", "R", "row", "index of the row in the packed corpus; in RL, index of the problem"),
            "input": Column("int", "R T", "token id", "token that the model read"),
            "target": Column("int", "R T", "token id", "token that the model had to predict; -1: none"),
            "predicted": Column("int", "R T", "token id", "token that the model found most likely"),
            "loss": Column("float16", "R T", "nats", "loss of each target; 0 where there is none"),
        },
    ),
    "gradients": Group(
        "One entry every few steps: the gradient of each parameter, over all ranks, before it was clipped.",
        _statistics("P", "nats per target per weight"),
        {
            "parameter": Column("str", "P", "name", "name of each parameter"),
            "layer": Column("int16", "P", "layer", "layer of each parameter; -1: embedding, depth: output head"),
            "edges": _EDGES,
        },
    ),
    "activations": Group(
        "One entry every few steps: values inside the model on rows of rank 0, before the step's update.",
        _statistics("S", "1"),
        {
            "place": Column(
                "str",
                "S",
                "name",
                "name of each place: the output of a block, of its attention, of its MLP, and inside the MLP",
            ),
            "layer": Column("int16", "S", "layer", "layer of each place; -1: embedding"),
            "edges": _EDGES,
        },
    ),
    "attention": Group(
        "One entry a validation: where heads look, on some of the validation windows, in each own reading of the run.",
        {
            "step": _STEP,
            "entropy": Column("float32", "D L H", "nats", "entropy of attention, mean over positions"),
            "distance": Column("float32", "D L H", "tokens", "distance that attention looks back, mean over positions"),
            "first_share": Column(
                "float32",
                "D L H",
                "share",
                "share of attention on the first position of the row, or of its segment with document_mask",
            ),
            "maps": Column(
                "float16",
                "D L M M",
                "share",
                "attention of the first head at the first positions of one window: [query, key]",
            ),
        },
        {"reading": Column("str", "D", "name", "name of each reading")},
    ),
    "representations": Group(
        "One entry a validation: the residual stream for fixed validation tokens, in reading order.",
        {
            "step": _STEP,
            "states": Column("float16", "D L+1 Q C", "1", "residual stream after the embedding, then after each block"),
        },
        {
            "reading": Column("str", "D", "name", "name of each reading"),
            "token": Column("int32", "Q", "token id", "token of each state, in reading order"),
            "window": Column("int64", "Q", "window", "validation window of each token"),
        },
    ),
    "validation": Group(
        "One entry a validation: the loss of each token of the validation windows, in each reading.",
        {
            "step": _STEP,
            "loss": Column("float32", "D N", "nats", "loss of each token"),
            "correct": Column("int8", "D N", "0 or 1", "1 if the token was the most likely one, else 0"),
        },
        {
            "reading": Column("str", "D", "name", "name of each reading"),
            "token": Column("int32", "N", "token id", "each token, in reading order, segment after segment"),
            "bytes": Column("int16", "N", "bytes", "number of UTF-8 bytes of each token"),
            "segment": Column("int64", "N", "segment", "segment of each token"),
            "document": Column("int64", "N", "document", "document of each token"),
            "window": Column("int64", "N", "window", "validation window of each token"),
        },
    ),
}

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


_STEP = Column("int64", "", "optimizer steps", "optimizer steps done when it was measured")


def _statistics(axis: str, of: str) -> dict[str, Column]:
    return {
        "step": _STEP,
        "norm": Column("float32", axis, of, "Euclidean norm"),
        "rms": Column("float32", axis, of, "root of the mean square"),
        "mean": Column("float32", axis, of, "mean"),
        "max": Column("float32", axis, of, "largest magnitude"),
        "sparsity": Column("float32", axis, "share", "share of exact zeros"),
        "histogram": Column("float32", f"{axis} B", "share", "share of values by the power of two of their magnitude"),
    }


_EDGES = Column(
    "float64", "B+1", "powers of two", "edges of the histogram's bins; the outer bins are open, zeros are in the first"
)

GROUPS = {
    "train": Group(
        "One entry a step: what the step was like, over all ranks.",
        {
            "step": _STEP,
            "tokens": _scalar("tokens", "read so far, by all ranks"),
            "flops": _scalar("FLOP", "spent so far, by the count of 6N and attention"),
            "loss": _scalar("nats per target", "training loss"),
            "loss_smooth": _scalar("nats per target", "exponential average of it, 0.9, without the bias of its start"),
            **{
                f"loss_{reading}": _scalar("nats per target", f"loss of the segments that were read {reading}")
                for reading in READINGS
            },
            "reward": _scalar("reward", "mean over samples, of RL"),
            "reward_forward": _scalar("reward", "of the samples that were written forwards"),
            "reward_backward": _scalar("reward", "of the samples that were written backwards"),
            "sample_tokens": _scalar("tokens", "mean length of a sample, its closing marker included"),
            "finished": _scalar("share", "of samples that ended by themselves"),
            "entropy": _scalar("nats per token", "mean surprise of the model at what it wrote at temperature 1"),
            "rollout_seconds": _scalar("s", "of writing the samples"),
            "grad_norm": _scalar("nats per target per weight", "global norm of the gradient before it was clipped"),
            "lr": _scalar("1", "the schedule's multiplier"),
            "lr_matrix": _scalar("1", "learning rate of the hidden matrices"),
            "lr_embedding": _scalar("1", "learning rate of the embedding"),
            "lr_unembedding": _scalar("1", "learning rate of the output head"),
            "tokens_per_second": _scalar("tokens/s", "of this launch, validation left out"),
            "mfu": _scalar("share", "model FLOPs over the hardware's peak"),
            "step_seconds": _scalar("s", "of the step itself"),
            "memory_bytes": _scalar("bytes", "resident on a CPU, most of tensors on a GPU; looked at once a second"),
            "gpu_watts": _scalar("W", "power of rank 0's GPU, where its driver tells"),
        },
    ),
    "tokens": Group(
        "One entry every few steps: every token of the batch, as it was read: a backward row from its last segment "
        "to its first.",
        {
            "step": _STEP,
            "rank": Column("int", "R", "rank", "which worker read the row"),
            "row": Column("int64", "R", "row", "index of the row in the packed corpus; in RL of the problem"),
            "input": Column("int", "R T", "token id", "what was read"),
            "target": Column("int", "R T", "token id", "what was to be predicted; -1: nothing"),
            "predicted": Column("int", "R T", "token id", "what the model held most likely"),
            "loss": Column("float16", "R T", "nats", "of each target; 0 where there is none"),
        },
    ),
    "gradients": Group(
        "One entry every so many steps: the gradient of each parameter, over all ranks, before it was clipped.",
        _statistics("P", "nats per target per weight"),
        {
            "parameter": Column("str", "P", "name", "of each parameter"),
            "layer": Column("int16", "P", "layer", "of each parameter; -1 the embedding, depth the output head"),
            "edges": _EDGES,
        },
    ),
    "activations": Group(
        "One entry every so many steps: values inside the model on rows of rank 0, before the step's update.",
        _statistics("S", "1"),
        {
            "place": Column(
                "str",
                "S",
                "name",
                "of each place: the output of a block, of its attention, of its MLP, and inside the MLP",
            ),
            "layer": Column("int16", "S", "layer", "of each place; -1 the embedding"),
            "edges": _EDGES,
        },
    ),
    "attention": Group(
        "One entry an evaluation: where heads look, on some of the validation windows, in each own reading of the run.",
        {
            "step": _STEP,
            "entropy": Column("float32", "D L H", "nats", "of a position's attention, mean over positions"),
            "distance": Column("float32", "D L H", "tokens", "mean distance looked back"),
            "first_share": Column(
                "float32",
                "D L H",
                "share",
                "attention paid to the first position of the row, or of its segment under document_mask",
            ),
            "maps": Column(
                "float16",
                "D L M M",
                "share",
                "the first head's attention at the first positions of one window: [query, key]",
            ),
        },
        {"reading": Column("str", "D", "name", "of each reading")},
    ),
    "representations": Group(
        "One entry an evaluation: the residual stream for fixed validation tokens, in reading order.",
        {
            "step": _STEP,
            "states": Column("float16", "D L+1 Q C", "1", "the embedding's output, then each block's"),
        },
        {
            "reading": Column("str", "D", "name", "of each reading"),
            "token": Column("int32", "Q", "token id", "whose state it is, in reading order"),
            "window": Column("int64", "Q", "window", "of each token"),
        },
    ),
    "validation": Group(
        "One entry an evaluation: what each token of the validation windows cost, in each reading.",
        {
            "step": _STEP,
            "loss": Column("float32", "D N", "nats", "of each token"),
            "correct": Column("int8", "D N", "0 or 1", "whether the token was the most likely one"),
        },
        {
            "reading": Column("str", "D", "name", "of each reading"),
            "token": Column("int32", "N", "token id", "in reading order, segment after segment"),
            "bytes": Column("int16", "N", "bytes", "of UTF-8 in each token"),
            "segment": Column("int64", "N", "segment", "that each token stands in"),
            "document": Column("int64", "N", "document", "that each token is of"),
            "window": Column("int64", "N", "window", "that each token stands in"),
        },
    ),
}

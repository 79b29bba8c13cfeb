"""Size of a research log before it exists: the schema's sizes, times what compression leaves of them."""

from __future__ import annotations

import math

import numpy as np

from bwlm.config import Experiment
from bwlm.directions import DIRECTIONS, evaluated_readings, own_readings
from bwlm.model.shape import GPTConfig
from bwlm.phases import PHASES
from bwlm.record.researchlog_schema import GROUPS, MAP_POSITIONS, STATE_WINDOWS, Column

_BINS = 48
_PLACES_PER_LAYER, _MATRICES_PER_LAYER = 4, 6

# Stored bytes over raw bytes of the datasets of each group (`get_storage_size()`, `nbytes`), measured in the log of a
# forward run of depth 2 on English web text: vocabulary 2048, 256 tokens a row, 60 steps, 3 validations. `_FRAME` is
# the rest of its file.
_COMPRESSION = {
    "train": 0.73,
    "tokens": 0.735,
    "gradients": 0.45,
    "activations": 0.555,
    "attention": 0.47,
    "representations": 0.74,
    "validation": 0.67,
}
_PER_VALIDATION_TOKEN = 2.2
"""Bytes stored of each validation token for the whole run: id, bytes, segment, document and window."""
_FRAME = 200_000
"""Bytes of HDF5's own accounts: names, attributes, indices of chunks."""


_OF_SAMPLES = ("reward", "sample_tokens", "finished", "entropy", "rollout_seconds")
"""Scalars that only RL logs."""


def bytes_of_log(experiment: Experiment, shape: GPTConfig, steps: int) -> int:
    """Return the bytes that `<phase>.h5` will take when a run of so many steps has ended.

    An estimate: compression depends on the text, and a validation split may have fewer windows than were asked for.
    """
    raw = raw_bytes(experiment, shape, steps)
    fixed = _PER_VALIDATION_TOKEN * _sizes(experiment, shape)["N"]
    return round(_FRAME + fixed + sum(_COMPRESSION[group] * size for group, size in raw.items()))


def raw_bytes(experiment: Experiment, shape: GPTConfig, steps: int) -> dict[str, int]:
    """Return the bytes of the values of each group, uncompressed."""
    sizes = _sizes(experiment, shape)
    return {
        name: _entries(experiment, name, steps)
        * sum(_bytes(column, sizes, shape) for column in _kept(experiment, name))
        for name in GROUPS
    }


def _kept(experiment: Experiment, group: str) -> list[Column]:
    """Return the columns of one entry: figures by reading for the run's own readings only, power with a GPU only."""
    others = {f"{name}_{reading}" for name in ("loss", "reward") for reading in DIRECTIONS}
    if PHASES[experiment.phase].has_reward:
        others -= {f"reward_{reading}" for reading in own_readings(experiment.direction)}
    else:
        others -= {f"loss_{reading}" for reading in own_readings(experiment.direction)}
        others |= set(_OF_SAMPLES) if group == "train" else set()
    others |= set() if experiment.resources.gpus_per_worker else {"gpu_watts"}
    return [column for name, column in GROUPS[group].columns.items() if name not in others]


def _entries(experiment: Experiment, group: str, steps: int) -> int:
    wanted, every = experiment.research_log, experiment.evaluation.every
    if group in ("validation", "attention", "representations"):
        evaluations = math.ceil(steps / every) if every else 1
        return evaluations if getattr(wanted, group) else 0
    interval: int = getattr(wanted, {"train": "scalars"}.get(group, group))
    return steps // interval if interval else 0


def _sizes(experiment: Experiment, shape: GPTConfig) -> dict[str, int]:
    """Return the length of each of the schema's axes."""
    length, depth, own = shape.sequence_length, shape.depth, own_readings(experiment.direction)
    windows = max(1, experiment.evaluation.tokens // length)
    rows, time = experiment.budget.batch_tokens // length, length
    if PHASES[experiment.phase].has_reward:  # a prompt, of unknown length, and the sample after it
        rows, time = experiment.prompts_per_step * experiment.rl.samples, min(length, 2 * experiment.rl.new_tokens)
    return {
        "R": rows,
        "T": time,
        "P": 2 + _MATRICES_PER_LAYER * depth,
        "S": 1 + _PLACES_PER_LAYER * depth,
        "B": _BINS,
        "D": len(own),
        "validation D": len(evaluated_readings(experiment.direction)),
        "N": windows * length,
        "L": depth,
        "L+1": depth + 1,
        "H": shape.heads,
        "M": min(length, MAP_POSITIONS),
        "Q": min(experiment.research_log.representations, min(windows, STATE_WINDOWS) * length),
        "C": shape.width,
    }


def _bytes(column: Column, sizes: dict[str, int], shape: GPTConfig) -> int:
    kind = ("int16" if shape.vocab_size <= 2**15 else "int32") if column.dtype == "int" else column.dtype
    axes = ["validation D" if axis == "D" and "N" in column.axes.split() else axis for axis in column.axes.split()]
    return int(np.dtype(kind).itemsize * math.prod(sizes[axis] for axis in axes))

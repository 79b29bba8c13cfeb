"""Names of metrics: in a run's journal and `runs list`, and in MLflow. `docs/mlflow.md` is made from these tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Metric of a step, as MLflow shows it.

    MLflow makes a section of charts of what stands before the last slash. It shows sections by the alphabet, and
    `system/`, which is for its own measurements, above all others; so scores and losses come first with these names.
    """

    mlflow: str
    unit: str
    meaning: str


METRICS: Mapping[str, Metric] = {
    "train_loss": Metric("train/loss", "nats/token", "loss of the step's batch"),
    "train_loss_smooth": Metric("train/loss_smooth", "nats/token", "exponential average of `train/loss`"),
    "train_loss_forward": Metric("train/loss_forward", "nats/token", "loss of the segments that are read forward"),
    "train_loss_backward": Metric("train/loss_backward", "nats/token", "loss of the segments that are read backward"),
    "reward": Metric("train/reward", "", "RL: mean reward of the step's samples"),
    "reward_forward": Metric("train/reward_forward", "", "RL: mean reward of the samples written forward"),
    "reward_backward": Metric("train/reward_backward", "", "RL: mean reward of the samples written backward"),
    "entropy": Metric("train/samples/entropy", "nats/token", "RL: entropy of the model, estimated from its samples"),
    "sample_tokens": Metric("train/samples/tokens", "tokens", "RL: mean length of a sample"),
    "finished": Metric("train/samples/finished", "share", "RL: samples that ended before the longest length"),
    "tokens": Metric("train/tokens", "tokens", "tokens trained on so far"),
    "val_bpb": Metric("val/bpb", "bits/byte", "validation loss in the own direction; bidirectional: mean of both"),
    "val_bpb_forward": Metric("val/bpb_forward", "bits/byte", "the same text, read forward"),
    "val_bpb_backward": Metric("val/bpb_backward", "bits/byte", "the same text, read backward"),
    "val_bpb_tuning": Metric("val/bpb_tuning", "bits/byte", "`val/bpb` of the tuning half, which chooses rates"),
    "val_bpb_with_end": Metric("val/bpb_with_end", "bits/byte", "whole documents, the end of each scored too"),
    "val_bpb_with_end_forward": Metric("val/bpb_with_end_forward", "bits/byte", "the same, read forward"),
    "val_bpb_with_end_backward": Metric("val/bpb_with_end_backward", "bits/byte", "the same, read backward"),
    "val_loss": Metric("val/loss", "nats/token", "validation loss in the own direction; bidirectional: mean of both"),
    "val_loss_forward": Metric("val/loss_forward", "nats/token", "the same text, read forward"),
    "val_loss_backward": Metric("val/loss_backward", "nats/token", "the same text, read backward"),
    "val_loss_written": Metric("val/loss_written", "nats/token", "SFT and RL: loss of the text that the model writes"),
    "val_reward": Metric("val/reward", "", "RL: mean reward of greedy samples on validation problems"),
    "val_reward_forward": Metric("val/reward_forward", "", "RL: the same, of samples written forward"),
    "val_reward_backward": Metric("val/reward_backward", "", "RL: the same, of samples written backward"),
    "grad_norm": Metric("train/optim/grad_norm", "", "norm of the whole gradient, before it is clipped"),
    "lr_multiplier": Metric("train/optim/lr_multiplier", "", "factor of the schedule: warm-up, then warm-down"),
    "lr_matrix": Metric("train/optim/lr_matrix", "", "learning rate of the matrices (Muon)"),
    "lr_embedding": Metric("train/optim/lr_embedding", "", "learning rate of the embedding (AdamW)"),
    "lr_unembedding": Metric("train/optim/lr_unembedding", "", "learning rate of the head (AdamW)"),
    "tokens_per_second": Metric("worker/tokens_per_second", "tokens/s", "speed since the process began"),
    "mfu": Metric("worker/mfu", "share", "model FLOPs utilization"),
    "flops": Metric("worker/flops", "FLOPs", "FLOPs spent on training so far"),
    "step_seconds": Metric("worker/step_seconds", "s", "time of the step"),
    "wait_seconds": Metric("worker/wait_seconds", "s", "time before the step: waiting for rows, writing records"),
    "checkpoint_seconds": Metric("worker/checkpoint_seconds", "s", "time of the last save, which runs beside steps"),
    "validation_seconds": Metric("worker/validation_seconds", "s", "time of the validation"),
    "rollout_seconds": Metric("worker/rollout_seconds", "s", "RL: time to write the step's samples"),
    "seconds_left": Metric("worker/seconds_left", "s", "time until the last step, estimated"),
    "memory_bytes": Metric("worker/memory_bytes", "bytes", "memory of the process, or peak memory of the GPU"),
    "gpu_watts": Metric("worker/gpu_watts", "W", "power of the GPU"),
    "research_log_bytes": Metric("worker/research_log_bytes", "bytes", "size of the journal and the research log"),
    "disk_free_bytes": Metric("worker/disk_free_bytes", "bytes", "free space where the run's records are"),
}
"""Metrics of a step by their names in the journal, in the order in which MLflow gets them: losses first."""

TASK_METRICS: Mapping[str, Metric] = {
    "native": Metric("tasks/TASK/native", "share", "accuracy in the own reading; bidirectional: mean of both"),
    "crossed": Metric("tasks/TASK/crossed", "share", "cross-direction accuracy: in the reading that is not the own"),
    "direction_gap": Metric("tasks/TASK/direction_gap", "share", "`native` minus `crossed`"),
    "bidirectional_balance": Metric(
        "tasks/TASK/bidirectional_balance", "share", "bidirectional: accuracy read forward minus accuracy read backward"
    ),
    "RULE_READING": Metric(
        "tasks/TASK/RULE_READING", "share", "accuracy by one rule in one reading: `tasks/arc_easy/conditional_forward`"
    ),
    "FORM/RULE_READING": Metric(
        "tasks/TASK/FORM/RULE_READING", "share", "the same in another form of the questions: `tasks/mmlu/lettered/..`"
    ),
}
"""Metrics of a checkpoint on a task, by step of the checkpoint; capitals stand for names."""

TASKS = "tasks/"
"""Beginning of the names of all of them."""

STEP_METRICS = frozenset(metric.mlflow for metric in METRICS.values())
"""Names in MLflow of the metrics of a step."""

_PLACES = {name: place for place, name in enumerate(METRICS)}


def for_mlflow(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a step's metrics under MLflow's names, losses first; a metric that is not in the table keeps its name."""
    ordered = sorted(metrics, key=lambda name: _PLACES.get(name, len(_PLACES)))
    return {METRICS[name].mlflow if name in METRICS else name: metrics[name] for name in ordered}


def final_for_mlflow(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return how a run ended under MLflow's names: `val/final/bpb` for `val_bpb`, in a section after the curves."""
    ordered = sorted(metrics, key=lambda name: _PLACES.get(name, len(_PLACES)))
    return {_final(METRICS[name].mlflow if name in METRICS else name): metrics[name] for name in ordered}


def _final(name: str) -> str:
    section, _, metric = name.rpartition("/")
    return f"{section}/final/{metric}".lstrip("/")


def task_metric(task: str, figure: str) -> str:
    """Return the name of a task's metric, `tasks/arc_easy/native`; what MLflow allows in no name becomes `-`."""
    name = figure.replace("@", "_at_")  # pass@1
    return re.sub(r"[^\w./ -]", "-", f"{TASKS}{task}/{name}")

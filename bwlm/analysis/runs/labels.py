"""Labels of runs, from their own settings and their ancestors'."""

from __future__ import annotations

from typing import Any

from bwlm.errors import UserError
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.labels import DIGITS, size_labels
from bwlm.record.run_config import RunConfig

_SAID_BY_THE_RUN = (
    *("phase", "direction", "depth", "code", "data", "tokenizer", "precision"),
    *("parent", "parent_seed", "parent_recipe"),
)
"""Fields of an ancestor's identity that add nothing: the run's own, `parent_recipe` or `mixture` hold them."""


def with_ancestors(folder: ExperimentFolder) -> dict[str, Any]:
    """Return a run's identity with the further fields of its ancestors', by phase: `sft.optim.init_lr_frac`, ..

    Mixtures are in words: `mixture`, `mid.mixture`. The line of ancestors ends at one that cannot be read.
    """
    config, link = folder.config(), folder.link()
    fields = config.compared | _mixture(config, "")
    while link is not None:
        parent = ExperimentFolder(folder.path.parent, link.parent)
        try:
            config, link = parent.config(), parent.link()
        except UserError:
            break
        before = f"{config.experiment.phase}."
        fields |= {before + name: value for name, value in config.identity.items() if name not in _SAID_BY_THE_RUN}
        fields |= _mixture(config, before)
    return fields


def _mixture(config: RunConfig, before: str) -> dict[str, str]:
    return {f"{before}mixture": config.experiment.data.mixture_words} if config.experiment.data.mixture else {}


def sizes(folders: list[ExperimentFolder]) -> dict[str, str]:
    """Return labels by run id: runs are compared only if their labels are equal; see `size_labels`.

    Corpora are named by the last part of their source, `data=builtin:null`, if that tells them apart.
    """
    configs = {folder.id: folder.config() for folder in folders}
    labels = size_labels({folder.id: with_ancestors(folder) for folder in folders})
    names = {
        (str(c.identity.get("data")), c.experiment.data.source.rstrip("/").split("/")[-1]) for c in configs.values()
    }
    digests, sources = (len(set(column)) for column in zip(*names, strict=True)) if names else (0, 0)
    if digests == sources == len(names):
        for digest, source in names:
            labels = {run: label.replace(f"data={digest[:DIGITS]}", f"data={source}") for run, label in labels.items()}
    return labels


def series(folders: list[ExperimentFolder]) -> dict[str, str]:
    """Return labels by run id, equal for runs that differ in the seed alone.

    A label names the direction and, if there are several, size and learning rate. Means are taken over a series: over
    more runs they would mix what is to be compared.
    """
    labels, experiments = sizes(folders), {folder.id: folder.config().experiment for folder in folders}
    sized = len(set(labels.values())) > 1
    rated = len({experiment.lr for experiment in experiments.values()}) > 1
    return {
        run: e.direction + (f", {labels[run]}" if sized else "") + (f", lr {e.lr:g}" if rated else "")
        for run, e in experiments.items()
    }

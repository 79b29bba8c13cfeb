"""Tables of what runs left behind: learning curves, the loss of every document, the best learning rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bwlm.analysis.stats import PER_DIRECTION
from bwlm.config import PHASES
from bwlm.errors import UserError
from bwlm.paths import read_json
from bwlm.record.fingerprint import INHERITED, VARIED
from bwlm.record.journal import read_journal
from bwlm.record.lineage import ExperimentFolder, RunConfig

HALVES = ("tuning", "test")
"""Even validation windows choose the learning rate, odd ones compare the directions."""

_TEXT = ["window", "segment", "document", "tokens", "bytes"]
_DIGESTS = ("tokenizer", "data", "code", "parent_recipe")
"""Fields of an identity that are 64 hex digits, a possible cause before its effect."""
_SAID_BY_THE_RUN = ("phase", "direction", "depth", "code", "data", "tokenizer", "precision", *INHERITED)
"""Of an ancestor's identity: in the run's own too, in its parent's recipe, or in words."""
_SHORT = 8
"""So many digits of a digest are shown."""


def load_curves(folder: ExperimentFolder) -> pd.DataFrame:
    """One row a step: step and every metric that was logged."""
    return pd.DataFrame([{"step": entry.step, **entry.metrics} for entry in read_journal(folder.path)])


def load_losses(folder: ExperimentFolder, reading: str) -> pd.DataFrame:
    """One row a segment of the validation windows: window, document, tokens, bytes, nll (nats), end_nll.

    Raises `UserError` that names the file if it is missing or damaged.
    """
    path = folder.evaluation(folder.config().experiment.phase, reading) / "validation.parquet"
    try:
        table: pd.DataFrame = pq.read_table(path).to_pandas()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: a run is evaluated in this reading at its end") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())})") from None
    return table


def byte_counts_of(folder: ExperimentFolder) -> str:
    """The digest of the bytes per token that a run's losses are counted by; empty where it noted none."""
    path = folder.evaluation(folder.config().experiment.phase, "forward") / "validation.json"
    return str(read_json(path).get("token_bytes", "")) if path.exists() else ""


def own_losses(folder: ExperimentFolder) -> pd.DataFrame:
    """Losses in the direction's own reading; a bidirectional model's are the mean of its two."""
    direction = folder.config().experiment.direction
    if direction != "bidirectional":
        return load_losses(folder, direction)
    forward, backward = load_losses(folder, "forward"), load_losses(folder, "backward")
    if not forward[_TEXT].equals(backward[_TEXT]):
        raise UserError(f"{folder.id}: its two readings were measured on other windows: evaluate it again")
    return forward.assign(
        nll=(forward["nll"] + backward["nll"]) / 2, end_nll=(forward["end_nll"] + backward["end_nll"]) / 2
    )


def with_losses(folders: list[ExperimentFolder]) -> tuple[list[ExperimentFolder], list[str]]:
    """The runs whose own losses can be read, and of each other why not."""
    readable, reasons = [], []
    for folder in folders:
        try:
            own_losses(folder)
            readable.append(folder)
        except UserError as error:
            reasons.append(f"{folder.id}: {error}")
    return readable, reasons


def with_ancestors(folder: ExperimentFolder) -> dict[str, Any]:
    """A run's identity, and what those of the runs that it descends from hold besides: `sft.optim.init_lr_frac`, ..

    Mixtures are in words there: `mixture`, `mid.mixture`. An ancestor that cannot be read ends the line.
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
    """A label by id for what cells must agree in to be compared; see `size_labels`.

    Corpora go by the last part of their source, `data=builtin:null`, where that tells them apart.
    """
    configs = {folder.id: folder.config() for folder in folders}
    labels = size_labels({folder.id: with_ancestors(folder) for folder in folders})
    names = {
        (str(c.identity.get("data")), c.experiment.data.source.rstrip("/").split("/")[-1]) for c in configs.values()
    }
    digests, sources = (len(set(column)) for column in zip(*names, strict=True)) if names else (0, 0)
    if digests == sources == len(names):
        for digest, source in names:
            labels = {run: label.replace(f"data={digest[:_SHORT]}", f"data={source}") for run, label in labels.items()}
    return labels


def series(folders: list[ExperimentFolder]) -> dict[str, str]:
    """A label by id of runs that differ in the seed alone: direction and, where there are several, size and rate.

    Means are taken over a series: over more they would mix what is to be compared.
    """
    labels, experiments = sizes(folders), {folder.id: folder.config().experiment for folder in folders}
    sized = len(set(labels.values())) > 1
    rated = len({experiment.lr for experiment in experiments.values()}) > 1
    return {
        run: e.direction + (f", {labels[run]}" if sized else "") + (f", lr {e.lr:g}" if rated else "")
        for run, e in experiments.items()
    }


def size_labels(identities: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A label for what cells must agree in to be compared: all that varies but direction, learning rate and seed.

    The depth is always in it, so what follows from the depth is left out; so is a digest that follows from the rest.
    Where there are several phases theirs is in it, and what follows from it is left out.
    """
    phases = sorted({str(fields["phase"]) for fields in identities.values()}, key=PHASES.index)
    of_phase = {
        phase: {run: fields for run, fields in identities.items() if fields["phase"] == phase} for phase in phases
    }
    if len(phases) < 2:
        return _labels_of_phase(identities)
    return {
        run: f"{phase} {label}" for phase, fields in of_phase.items() for run, label in _labels_of_phase(fields).items()
    }


def _labels_of_phase(identities: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    varying = varying_settings(identities)
    labels = {
        run: " ".join([f"d{fields['depth']}", *(f"{name}={fields.get(name)}" for name in varying)])
        for run, fields in identities.items()
    }
    for name in _DIGESTS:
        digests = {run: str(fields.get(name)) for run, fields in identities.items()}
        if len(set(zip(labels.values(), digests.values(), strict=True))) > len(set(labels.values())):
            labels = {run: f"{label} {name}={digests[run][:_SHORT]}" for run, label in labels.items()}
    return labels


def varying_settings(identities: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Settings other than direction, learning rate, seed and depth that do not follow from the depth, by name.

    Those of ancestors come last, the nearest first, and are left out where they say what another said.
    """
    known = {name for fields in identities.values() for name in fields}
    depths = {fields["depth"] for fields in identities.values()}

    def varies(name: str, depth: int) -> bool:
        return len({str(fields.get(name)) for fields in identities.values() if fields["depth"] == depth}) > 1

    def values(name: str) -> list[str]:
        return [str(fields.get(name)) for fields in identities.values()]

    names = [name for name in known if setting_of(name)[1] not in {*VARIED, *_DIGESTS, "depth"}]
    found: list[str] = []
    for name in sorted(names, key=setting_of):
        said = (setting_of(name)[1] == setting_of(other)[1] and values(name) == values(other) for other in found)
        if any(varies(name, depth) for depth in depths) and not any(said):
            found.append(name)
    return found


def setting_of(name: str) -> tuple[int, str]:
    """How far back the run is that a field of `with_ancestors` is of, and the field: `mid.steps` is (2, steps)."""
    phase, _, setting = name.partition(".")
    return (len(PHASES) - 1 - PHASES.index(phase), setting) if phase in PHASES[:-1] else (0, name)


def load_gap_table(folders: list[ExperimentFolder], labels: dict[str, str]) -> pd.DataFrame:
    """The input of `stats`: run, direction, seed, size, lr, half, document, nll, tokens, bytes; a row a document.

    `windows` beside them is how many the run's half has. Sizes are taken from `labels`, those of the whole grid.
    """
    parts = []
    for folder in folders:
        experiment = folder.config().experiment
        losses = own_losses(folder)
        losses["half"] = [HALVES[window % 2] for window in losses["window"]]
        losses["nll"] = losses["nll"].fillna(math.inf)  # a sum would skip it, and a diverged run look good
        windows = losses.groupby("half")["window"].nunique()
        summed = losses.groupby(["half", "document"], as_index=False)[["nll", "tokens", "bytes"]].sum()
        parts.append(
            summed.assign(
                run=folder.id,
                direction=experiment.direction,
                seed=experiment.seed,
                size=labels[folder.id],
                lr=experiment.lr,
                windows=summed["half"].map(windows),
                token_bytes=byte_counts_of(folder),
            )
        )
    return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class TriedRate:
    """A learning rate that the grid planned for a direction at a size."""

    size: str
    direction: str
    lr: float
    cells: int
    finished: int

    @property
    def qualifies(self) -> bool:
        """Had it diverged at one seed, the seeds that survived would say nothing of it."""
        return self.finished == self.cells


def tried_rates(folders: list[ExperimentFolder], labels: dict[str, str], finished: set[str]) -> list[TriedRate]:
    """Every learning rate of the grid with how many of its cells, one a seed, are among the `finished`."""
    keys = {}
    for folder in folders:
        experiment = folder.config().experiment
        keys[folder.id] = (labels[folder.id], experiment.direction, experiment.lr)
    done = Counter(key for run, key in keys.items() if run in finished)
    return [TriedRate(*key, cells, done[key]) for key, cells in sorted(Counter(keys.values()).items())]


@dataclass(frozen=True)
class BestRate:
    """The learning rate at which a direction is compared."""

    size: str
    direction: str
    lr: float
    candidates: int
    """Learning rates that were tried, those that do not qualify among them."""
    seeds: int
    bpb: float
    """Mean over those seeds, tuning half."""
    choosing_seeds: int | None
    """The fewest seeds that any rate was judged by in the choice; None where one rate alone was tried: no choice."""


def best_learning_rates(table: pd.DataFrame, tried: Sequence[TriedRate]) -> list[BestRate]:
    """For each size and direction the qualifying learning rate with the lowest mean over seeds on the tuning half.

    Only seeds that every qualifying rate of that size and direction was trained with count, where there are any. A
    direction of which no rate qualifies has no best one.
    """
    candidates = Counter((rate.size, rate.direction) for rate in tried)
    qualifying = {(rate.size, rate.direction, rate.lr) for rate in tried if rate.qualifies}
    tuning = table[_among(table, qualifying) & table["half"].eq("tuning")]
    sums = tuning.groupby(["size", "direction", "lr", "seed"], as_index=False)[["nll", "bytes"]].sum()
    sums["bpb"] = sums["nll"] / (math.log(2) * sums["bytes"])
    found = []
    for (size, direction), group in sums.groupby(["size", "direction"]):
        tried_here = candidates[str(size), str(direction)]
        rates = group["lr"].nunique()
        of_seed = group.groupby("seed")["lr"].nunique()
        shared = group[group["seed"].isin(of_seed.index[of_seed == rates])]
        counted = shared if len(shared) else group
        means = counted.groupby("lr")["bpb"].mean()
        lr = float(means.index[int(means.to_numpy().argmin())])  # of equal ones the lowest
        of_rate = counted.groupby("lr")["seed"].nunique()
        choosing_seeds = int(of_rate.min()) if tried_here > 1 else None
        bpb, seeds = float(means.min()), int(of_rate[lr])
        found.append(BestRate(str(size), str(direction), lr, tried_here, seeds, bpb, choosing_seeds))
    return found


def best_on_test(table: pd.DataFrame, best: list[BestRate]) -> pd.DataFrame:
    """The test half of the cells at their direction's best learning rate.

    A column `choosing_seeds` says how many seeds chose that rate; missing where nothing was chosen.
    """
    wanted = {(rate.size, rate.direction, rate.lr): rate.choosing_seeds for rate in best}
    test = table[_among(table, wanted.keys()) & table["half"].eq("test")].drop(columns="half")
    keys = zip(test["size"], test["direction"], test["lr"], strict=True)
    return test.assign(choosing_seeds=pd.Series([wanted[key] for key in keys], index=test.index, dtype=float))


ONE_WAY = ("forward", "backward")


def equal_per_direction(test: pd.DataFrame, folders: list[ExperimentFolder], labels: dict[str, str]) -> pd.DataFrame:
    """Rows of `test` once more, for the pairs of one-directional runs and bidirectional ones of twice their steps.

    Of all pairs these alone may differ in their budget, and so in their row order.
    """
    parts = []
    for once, twice in doubled({labels[folder.id]: folder.config().compared for folder in folders}):
        is_pair = (test["size"].eq(once) & test["direction"].isin(ONE_WAY)) | (
            test["size"].eq(twice) & test["direction"].eq("bidirectional")
        )
        parts.append(test[is_pair].assign(size=f"{once}{PER_DIRECTION}"))
    return pd.concat(parts, ignore_index=True) if parts else test.head(0)


def doubled(identities: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of sizes that differ in their steps alone, of which the second has twice as many."""
    return [
        (once, twice)
        for once, fields in identities.items()
        for twice, others in identities.items()
        if others["steps"] == 2 * fields["steps"] and _same_but_budget(fields, others)
    ]


def _same_but_budget(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    free = dict.fromkeys((*VARIED, "steps"))
    return {**one, **free} == {**other, **free}


def _among(table: pd.DataFrame, wanted: Set[tuple[str, str, float]]) -> pd.Series[bool]:
    """Which rows are of the wanted sizes, directions and learning rates."""
    keys = zip(table["size"], table["direction"], table["lr"], strict=True)
    return pd.Series([key in wanted for key in keys], index=table.index, dtype=bool)

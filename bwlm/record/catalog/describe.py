"""Descriptions of runs from their folders: the tree with each run's best checkpoint, and one run in full.

Needs neither torch nor pandas: everything comes from small files and from the names of large ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bwlm.errors import UserError
from bwlm.paths import read_json
from bwlm.phases import PHASES
from bwlm.record.catalog.rows import CellRow, load_cell
from bwlm.record.checkpoint import checkpoint_steps, step_folder
from bwlm.record.disk import bytes_in
from bwlm.record.experiment import ExperimentFolder, parents_in
from bwlm.record.health import damage_of_weights
from bwlm.record.journal import entries_holding, last_entry
from bwlm.record.lineage import Lineage, LineageNode, ParentLink, skipped
from bwlm.record.mlflow_note import noted_run
from bwlm.record.run_config import RunConfig
from bwlm.record.starts import starts_of, steps_lost
from bwlm.storage.opened import sizes_below

_OF_THE_PHASE = {"phase", "parent"}
"""Settings in which a child differs from its parent in any case."""


_OF_DOCUMENTS = {f"data.{name}" for name in ("source", "text_column", "validation", "shuffle")}
_OF_CONVERSATIONS = {f"data.{name}" for name in ("mixture", "skip_invalid", "reversal")}
"""Settings that phases of the other kind of text do not read."""
_HORIZONS = {f"budget.{name}" for name in ("steps", "tokens", "flops", "tokens_per_parameter")}
"""Settings that are resolved to the number of steps, which is told."""

_TOO_MANY = 4
"""Number of a grid's leaves from which they are shown as one, beside other families."""


@dataclass(frozen=True)
class Best:
    """Best of a run's validations: the lowest `val_bpb`, in RL the highest `val_reward`."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class Member:
    """Run in its family."""

    cell: CellRow
    steps: int
    grid: str | None
    best: Best | None
    note: str
    begins: str
    """Checkpoint that it began from, in words; empty for a base run, and for its parent's last one."""
    children: tuple[Member, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the run and its children as JSON."""
        best = asdict(self.best) if self.best else None
        besides = {"steps": self.steps, "grid": self.grid, "best": best, "begins": self.begins}
        children = [child.to_json() for child in self.children]
        return self.cell.to_json() | besides | {"note": self.note, "children": children}


def best_of(folder: ExperimentFolder, cell: CellRow) -> Best | None:
    """Return the best validation, of equally good ones the earliest; None before the first."""
    phase = PHASES[cell.phase]
    metric, better = phase.best_metric, max if phase.has_reward else min
    figures = [(entry.metrics[metric], entry.step) for entry in entries_holding(folder.path, metric)]
    if metric in cell.metrics:  # how it ended, where the journal is gone
        figures.append((cell.metrics[metric], cell.step))
    value, step = better(figures, key=lambda one: one[0], default=(None, 0))
    return None if value is None else Best(metric, value, step)


def family_of(folders: list[ExperimentFolder]) -> Lineage:
    """Return the lineage of experiments that can be read."""
    return Lineage({folder.id: folder.parent() for folder in folders})


def load_members(storage: Path, trees: list[LineageNode]) -> list[Member]:
    """Return the runs of these trees, each with its children."""
    return [_load_member(storage, kin) for kin in trees]


def _load_member(storage: Path, kin: LineageNode) -> Member:
    folder = ExperimentFolder(storage, kin.id)
    cell, config = load_cell(folder), folder.config()
    children = tuple(load_members(storage, list(kin.children)))
    begins = begin_words(folder.link(), config)
    return Member(cell, config.steps, config.grid, best_of(folder, cell), kin.note, begins, children)


def begin_words(link: ParentLink | None, config: RunConfig) -> str:
    """Return which checkpoint of its parent a run began from, unless it is the last one."""
    if link is None or "parent_checkpoint" not in config.identity:
        return ""
    return f"from its parent's {'best, ' if link.best else ''}step {link.step:,}"


@dataclass(frozen=True)
class Leaves:
    """Runs of one grid and phase that stand side by side and have no children."""

    grid: str
    members: tuple[Member, ...]


def gather(members: Iterable[Member]) -> list[Member | Leaves]:
    """Return the members with a grid's leaves as one, in the place of the first of them, if there are many."""
    kept: dict[tuple[str, str], list[Member]] = {}
    for member in members:
        is_leaf = member.grid and not member.children and not member.note
        key = (member.grid or "", member.cell.phase) if is_leaf else ("", member.cell.id)
        kept.setdefault(key, []).append(member)
    gathered: list[Member | Leaves] = []
    for (grid, _), alike in kept.items():
        gathered += alike if len(alike) < _TOO_MANY else [Leaves(grid, tuple(alike))]
    return gathered


# ---- one experiment ----


def describe(folder: ExperimentFolder) -> dict[str, Any]:
    """Return everything known of an experiment, as JSON. Raises `UserError` if its own records cannot be read."""
    cell, config, link = load_cell(folder), folder.config(), folder.link()
    noted = read_json(folder.path / "config.json")
    best, holder, starts = best_of(folder, cell), folder.busy_with(), starts_of(folder.path)
    faults = folder.damage() + damage_of_weights(folder, config, folder.status())
    return cell.to_json() | {
        "damage": faults,
        "steps": config.steps,
        "best": asdict(best) if best else None,
        "grid": config.grid,
        "parameters": config.parameters.total,
        "tokens": _tokens(folder, config),
        **_kinship(folder, config, link),
        **_text(config),
        "fingerprint": config.fingerprint,
        "code": config.code,
        "other_code": config.other_code(),
        "compute": asdict(config.compute),
        "created": noted.get("created"),
        "versions": noted.get("versions", {}),
        "holder": asdict(holder) if holder else None,
        "starts": [asdict(start) for start in starts],
        "steps_lost": steps_lost(starts),
        "mlflow_run": noted_run(folder.path),
        **_what_is_kept(folder),
    }


def _tokens(folder: ExperimentFolder, config: RunConfig) -> int | None:
    """Return the training tokens of all steps; in RL, where samples decide them, of the steps until now, or None."""
    if not PHASES[config.experiment.phase].has_reward:
        return config.steps * config.experiment.budget.batch_tokens
    last = last_entry(folder.path)
    return int(last.metrics["tokens"]) if last else None


def _text(config: RunConfig) -> dict[str, Any]:
    """Return the text that the run was trained on, by content and by place."""
    experiment, digests = config.experiment, config.identity
    reads_documents = PHASES[experiment.phase].reads_documents
    read = {"source"} if reads_documents else {"mixture", "skip_invalid"}
    named = experiment.data.model_dump(include=read)
    return {
        "data": named | {"digest": digests.get("data", ""), "folder": config.corpus},
        "tokenizer": {
            "vocab_size": experiment.tokenizer.vocab_size,
            "digest": digests.get("tokenizer", ""),
            "folder": config.tokenizer,
        },
    }


def _kinship(folder: ExperimentFolder, config: RunConfig, link: ParentLink | None) -> dict[str, Any]:
    parent = _readable_config(folder.path.parent, link.parent) if link else None
    return {
        "link": asdict(link) if link else None,
        "parent_is_here": parent is not None,
        "skips": skipped(config.experiment.phase, link.phase) if link else [],
        "children": Lineage(parents_in(folder.path.parent)).children(folder.id),
        "changed": _changed(parent, config) if parent else None,
    }


def _readable_config(storage: Path, run: str) -> RunConfig | None:
    try:
        return ExperimentFolder(storage, run).config()
    except UserError:
        return None


def _changed(parent: RunConfig, child: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the settings that differ from the parent's, by name: of those that the child's phase reads."""
    old, new = (_settings(config) for config in (parent, child))
    phase = PHASES[child.experiment.phase]
    unread = _OF_CONVERSATIONS if phase.reads_documents else _OF_DOCUMENTS
    names = sorted((old.keys() | new.keys()) - unread - _HORIZONS)
    return {n: {"parent": old.get(n), "own": new.get(n)} for n in names if old.get(n) != new.get(n)}


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings flat, with the steps as they were resolved."""
    flat: dict[str, Any] = {"steps": config.steps}
    for name, value in config.experiment.model_dump(exclude=_OF_THE_PHASE | {"resources"}).items():
        flat |= {f"{name}.{inner}": value[inner] for inner in value} if isinstance(value, dict) else {name: value}
    return flat


def _what_is_kept(folder: ExperimentFolder) -> dict[str, Any]:
    saved = {step: step_folder(folder.checkpoints, step) for step in checkpoint_steps(folder.checkpoints)}
    files = {name: size for name, size in sizes_below(folder.path).items() if "/" not in name and name[0] != "."}
    evaluations = sorted(folder.path.glob("evaluations/*/*/*.json"))
    return {
        "folder": str(folder.path),
        "bytes": bytes_in(folder.path),
        "checkpoints": [{"step": step, "bytes": bytes_in(path)} for step, path in saved.items()],
        "evaluations": ["/".join(path.with_suffix("").parts[-3:]) for path in evaluations],
        "files": dict(sorted(files.items())),
    }

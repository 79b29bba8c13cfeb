"""Sections of a report after the verdict: data, audit, dynamics, transfer, insides, cost, how to repeat it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from bwlm.analysis.commands.compare import compare
from bwlm.analysis.commands.layers import over_time
from bwlm.analysis.commands.positions import positions
from bwlm.analysis.commands.representations import representations
from bwlm.analysis.commands.result import Analysis, frame_to_markdown, markdown_table
from bwlm.analysis.commands.rewards import rewards
from bwlm.analysis.commands.transfer import transfer
from bwlm.analysis.runs.audit import audit, crossing_words, start_words
from bwlm.analysis.runs.losses import load_curves
from bwlm.config import DataSettings, Experiment, Settings
from bwlm.errors import UserError
from bwlm.format import counted, duration
from bwlm.paths import read_json
from bwlm.phases import PHASES
from bwlm.record.bucket import fetch_text
from bwlm.record.catalog.select import begun
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.run_config import RunConfig
from bwlm.record.starts import starts_of

Analyse = Callable[[list[ExperimentFolder]], Analysis]

_DIGEST, _DIGITS = re.compile(r"[0-9a-f]{16,}"), 12
_ROWS = 40
"""Longest table that a report shows, in rows; longer ones are for the command that makes the whole analysis."""

_MARKS = 60
"""Most fingerprints that a report lists."""

_ANALYSES: dict[str, tuple[str, Analyse, bool]] = {
    "rewards": ("Rewards", rewards, True),
    "compare": ("Learning efficiency", compare, True),
    "transfer": ("Both readings", transfer, True),
    "positions": ("Where the loss lies", positions, False),
    "gradients": ("Gradients", lambda folders: over_time("gradients", folders), False),
    "activations": ("Activations", lambda folders: over_time("activations", folders), False),
    "representations": ("Representations and attention", representations, True),
}
"""Title, analysis and whether its tables are for reading, by command."""
FOLDED = (
    "Tasks by every rule",
    "Gradients",
    "Activations",
    "Representations and attention",
    "Configuration and lineage",
    "Settings",
)
"""Titles of long sections that few readers need: in the HTML page they open at a click."""


def analyses_of(folders: list[ExperimentFolder]) -> list[str]:
    """Return the analyses that have a meaning for such runs: rewards for RL, losses for all others."""
    rewarded = {PHASES[folder.config().experiment.phase].has_reward for folder in folders}
    wanted = {"rewards": True in rewarded, "compare": rewarded != {True}}
    return [command for command in _ANALYSES if wanted.get(command, True)]


def analysis_sections(
    commands: list[str], folders: list[ExperimentFolder], home: Path, names: list[str]
) -> tuple[list[str], list[Path]]:
    """Return Markdown on the findings of each analysis, and its pictures, which are written below `home`.

    `names` are the runs as a person would type them on the command line.
    """
    try:
        folders, _ = begun(folders, [])
    except UserError:
        folders = []
    parts, pictures = [], []
    for command in commands:
        title, analyse, with_tables = _ANALYSES[command]
        again = f"`bwlm analyze {command} {shlex.join(names)}`"
        parts.append(f"## {title}")
        try:
            analysis = analyse(folders)
        except UserError as error:
            ended = bool(folders) and all(folder.status().ended for folder in folders)
            first, *others = str(error).split("; ")
            reason = first + (f", and {len(others)} more like it" if others else "")
            parts.append(f"Nothing: {reason}." if ended else f"Nothing yet ({reason}); later {again} makes it.")
            continue
        pictures.append(home / f"{command}.svg")
        analysis.write(pictures[-1])
        parts.append("\n".join(f"- {line}" for line in analysis.findings))
        parts.append(f"![{analysis.title}]({command}.svg)")
        parts += analysis.tables(_ROWS) if with_tables else []
        parts += ["\n".join(f"- {note}" for note in analysis.notes)] if analysis.notes else []
        parts.append(f"The whole analysis: {again}.")
    return parts, pictures


def audit_section(folders: list[ExperimentFolder], of: ExperimentFolder | None = None) -> list[str]:
    """Return the audit of all pairs among the runs; or of the pairs of one run, and nothing if it is in none."""
    audited = audit(folders, of)
    concerned = [of] if of else folders
    words = audited.words() if audited.pairs or not of else []
    words += crossing_words(concerned) + start_words(concerned)
    return ["## Audit", "\n".join(f"- {line}" for line in words)] if words else []


def configuration_section(folders: list[ExperimentFolder]) -> list[str]:
    """Return the section on every setting that decides what the cells learn, with all its values in each phase."""
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for config in (folder.config() for folder in folders):
        by_phase.setdefault(config.experiment.phase, []).append(config.compared)
    names = sorted({name for of in by_phase.values() for fields in of for name in fields} - _PARENTS)
    rows = [(name, *(_values(name, of) for of in by_phase.values())) for name in names]
    grid = folders[0].config().grid if folders else None
    lineage = f"{counted(len(folders), 'run')} ({', '.join(by_phase)})"
    lineage += f", children of the MLflow run {grid}" if grid else ""
    lineage += "; `bwlm runs tree` shows the parent of each" if len(by_phase) > 1 else ""
    columns = list(by_phase) if len(by_phase) > 1 else ["values"]
    return ["## Configuration and lineage", f"{lineage}.", markdown_table(["setting", *columns], rows)]


_PARENTS = {"parent", "parent_recipe"}
"""Settings that are digests of the parent runs."""


def settings_section(config: RunConfig) -> list[str]:
    """Return the section on every setting that decides what one run learns."""
    rows = [(name, _setting(name, value)) for name, value in sorted(config.compared.items())]
    return ["## Settings", f"Fingerprint `{config.fingerprint}`.", markdown_table(["setting", "value"], rows)]


def _values(name: str, identities: list[dict[str, Any]]) -> str:
    """Return the values that a setting has in the runs of a phase; a dash if the phase has no such setting."""
    return ", ".join(dict.fromkeys(_setting(name, of[name]) for of in identities if name in of)) or "–"


def _setting(name: str, value: Any) -> str:
    """Return a setting as people read it: of a digest only its beginning, and for none what it stands for."""
    if value is None:
        return _default_words(name) or "–"
    text = str(value)
    return text[:_DIGITS] if _DIGEST.fullmatch(text) else text


def _default_words(name: str) -> str:
    """Return what the description of a setting says of its default: `40, but at most a tenth of the run`."""
    section, _, leaf = name.partition(".")
    kind = Experiment.model_fields[section].annotation if leaf else None
    field = kind.model_fields.get(leaf) if isinstance(kind, type) and issubclass(kind, Settings) else None
    return str(field.description).partition("default: ")[2] if field else ""


def _order_words(data: DataSettings) -> str:
    if data.mixture or not data.shuffle:
        return "in the order of their files"
    return "shuffled inside each shard"


def data_section(folders: list[ExperimentFolder]) -> list[str]:
    """Return the section on each corpus that the runs read: its source or mixture, digest and size."""
    rows = {}
    for folder in folders:
        config = folder.config()
        fetch_text(Path(config.corpus))
        if not (manifest := Path(config.corpus) / "manifest.json").exists():
            continue
        content = read_json(manifest)
        counts = {split: _totals(content[split]["shards"]) for split in ("train", "validation")}
        data = config.experiment.data
        rows[content["digest"]] = {
            "source": data.mixture_words or data.source,
            "vocabulary": config.experiment.tokenizer.vocab_size,
            "row": config.experiment.model.sequence_length,
            "documents": _order_words(data),
            **{f"{split} {what}": f"{n:,}" for split, of in counts.items() for what, n in of.items()},
            "validation documents trained on too": _overlap(content),
            "digest": f"`{content['digest'][:12]}`",
        }
    if not rows:
        return [
            "## Data",
            "The packed text is no longer below the storage's cache; its digest is in every config.json.",
        ]
    columns = [f"corpus {number}" for number in range(1, len(rows) + 1)] if len(rows) > 1 else ["corpus"]
    names = next(iter(rows.values()))
    return [
        "## Data",
        markdown_table(["", *columns], [[name, *(row[name] for row in rows.values())] for name in names]),
    ]


def _overlap(manifest: dict[str, Any]) -> str:
    """Return the number of validation documents that stand in the training split too; unknown in older manifests."""
    return f"{manifest['overlap']['validation']:,}" if manifest.get("overlap") else "–"


def _totals(shards: list[dict[str, Any]]) -> dict[str, int]:
    return {what: sum(int(shard[what]) for shard in shards) for what in ("documents", "tokens", "bytes")}


def cost_section(folders: list[ExperimentFolder]) -> list[str]:
    """Return the section on cost by direction: tokens, FLOPs, workers' hours and, if all logged GPU power, energy."""
    rows = []
    for folder in folders:
        curve = load_curves(folder)
        if not curve.empty:
            last = curve.iloc[-1]
            experiment = folder.config().experiment
            workers = _workers(folder, curve)
            validations = curve.get("validation_seconds", pd.Series(0.0, curve.index)).fillna(0)
            rows.append(
                {
                    "direction": experiment.direction,
                    "runs": 1,
                    "tokens": float(last["tokens"]),
                    "FLOPs": float(last["flops"]),
                    "time of steps": (curve["step_seconds"] * workers).sum(),
                    "time of validation": (validations * workers).sum(),
                    "kWh of GPUs": _energy(folder, curve),
                }
            )
    if not rows:
        return ["## Cost", "Nothing has been trained yet."]
    by_direction = pd.DataFrame(rows).groupby("direction", sort=False)
    table = by_direction.sum()
    # the sum over some of the runs would be too little
    table["kWh of GPUs"] = by_direction["kWh of GPUs"].agg(lambda of_runs: of_runs.sum(skipna=False))
    table = table.reset_index()
    for name in ("time of steps", "time of validation"):
        table[name] = table[name].map(duration)
    unknown = table["kWh of GPUs"].isna().all()
    energy = (
        "not known: no GPU reported its power"
        if unknown
        else "that of GPUs during steps: rank 0's power for every GPU; of a shared GPU, the run's part"
    )
    table = table.drop(columns="kWh of GPUs") if unknown else table
    words = f"Times are those of all workers of all runs, added up. Energy is {energy}."
    return ["## Cost", frame_to_markdown(table), words]


def _energy(folder: ExperimentFolder, curve: pd.DataFrame) -> float:
    """Return kWh of all ranks' GPUs in steps, of a shared GPU this run's part; NaN if the power was not logged."""
    if "gpu_watts" not in curve:
        return math.nan
    joules = (curve["gpu_watts"].ffill().bfill() * curve["step_seconds"] * _workers(folder, curve)).sum()
    return float(joules) * folder.config().experiment.resources.gpus_per_worker / 3.6e6


def _workers(folder: ExperimentFolder, curve: pd.DataFrame) -> pd.Series[int]:
    """Return the number of workers that trained each step; by the settings where the run has not noted it."""
    workers = pd.Series(folder.config().experiment.resources.fewest, curve.index)
    for start in starts_of(folder.path):
        workers[curve["step"] > start.step] = start.workers
    return workers


def repeat_section(folders: list[ExperimentFolder], command: str) -> list[str]:
    """Return the section with the command, versions and fingerprints."""
    lines = []
    for folder in folders:
        config = read_json(folder.path / "config.json")
        versions = ", ".join(f"{name} {number}" for name, number in sorted(config["versions"].items()))
        compute = config["compute"]
        how = (
            f"{compute['precision']}, {compute['attention']} attention, {'' if compute['compile'] else 'not '}compiled"
        )
        lines.append((folder.id, config["fingerprint"], versions, how))
    kinds = dict.fromkeys((versions, how) for _, _, versions, how in lines)
    storage_note = ["With `BWLM_STORAGE` naming this storage:"] if "$BWLM_STORAGE" in command else []
    parts = ["## How to repeat it", *storage_note, f"```bash\n{command}\n```"]
    parts += [f"With {versions}; {how}." for versions, how in kinds]
    marks = [f"{run} `{mark}`" for run, mark, _, _ in lines]
    more = f" and {len(marks) - _MARKS} more, each in the run's config.json" if len(marks) > _MARKS else ""
    parts.append(f"Fingerprints: {', '.join(marks[:_MARKS])}{more}.")
    return parts

"""Sections of `bwlm runs show`: the description of a run, in words."""

from __future__ import annotations

import time
from typing import Any

from bwlm.directions import TEXT_READINGS
from bwlm.format import file_size
from bwlm.phases import PHASES
from bwlm.record.starts import STARTS, Start, has_changed_workers, resume_words, worker_words

_INTERNAL = ("lock", "lease.json", "mlflow.json", "mlflow_scores.json", "parent_link.json", STARTS, "status.json")
"""Files that commands read; this overview has what they say."""

Fields = list[tuple[str, str]]
"""Names and values of a section's lines."""


def sections(run: dict[str, Any]) -> list[tuple[str, Fields]]:
    """Return titles and fields of what `bwlm.record.catalog.describe.describe` returns, without empty sections."""
    titled = [
        (_headline(run), _itself(run)),
        ("family", _family(run)),
        (f"set otherwise than in {run['parent']}", _changes(run["changed"] or {})),
        ("figures (all of them: --json)", _figures(run["metrics"])),
        ("made from", _made_from(run)),
        ("computes", list(run["compute"]["reasons"].items())),
        ("kept", _kept(run)),
    ]
    return [(title, fields) for title, fields in titled if fields]


def _headline(run: dict[str, Any]) -> str:
    ended = f": {run['reason']}" if run["reason"] else ""
    return f"{run['id']}: {run['state']}, step {run['step']:,} of {run['steps']:,}{ended}"


def _itself(run: dict[str, Any]) -> Fields:
    best, starts = run["best"], [Start(**start) for start in run["starts"]]
    fields = [
        ("phase", run["phase"]),
        ("direction", run["direction"]),
        ("depth", f"{run['depth']}, {run['parameters']:,} parameters"),
        ("lr, seed", f"{run['lr']:g}, {run['seed']}"),
        ("tokens", _tokens(run)),
        ("best", f"{best['metric']} {best['value']:.4f} at step {best['step']:,}" if best else ""),
        ("workers", worker_words(starts) if has_changed_workers(starts) else ""),
        ("resumed", resume_words(starts)),
        ("grid", run["grid"] or ""),
        ("held by", _holder(run["holder"])),
        ("damaged", "; ".join(run["damage"])),
    ]
    return [(name, value) for name, value in fields if value]


def _figures(metrics: dict[str, float]) -> Fields:
    """Return the figures that a person compares, with their units."""
    readings = [f"{name} {metrics[f'val_bpb_{name}']:.4f}" for name in TEXT_READINGS if f"val_bpb_{name}" in metrics]
    read = f" (read {', '.join(readings)})" if readings else ""
    units = {
        "val_bpb": ("validation", "{:.4f} bits per byte" + read),
        "val_loss": ("", "{:.4f} nats per token"),
        "val_reward": ("reward", "{:.4f} on validation problems"),
        "train_loss_smooth": ("training", "{:.4f} nats per token, averaged over the last steps"),
        "tokens_per_second": ("speed", "{:,.0f} tokens/s"),
    }
    return [(name, words.format(metrics[key])) for key, (name, words) in units.items() if key in metrics]


def _holder(holder: dict[str, Any] | None) -> str:
    from bwlm.record.lease import Holder

    if holder is None:
        return ""
    known = Holder(**holder)
    return f"{known}, {known.since_words}"


def _family(run: dict[str, Any]) -> Fields:
    link = run["link"]
    fields = []
    if link:
        gone = "" if run["parent_is_here"] else ": not here, or damaged"
        best = "best, " if link["best"] else ""
        begins = f"{link['phase']}, its {best}{link['checkpoint']}, weights {link['sha256'][:12]}"
        fields = [("parent", f"{link['parent']} ({begins}){gone}"), ("chain", " > ".join([*link["chain"], run["id"]]))]
    if run["skips"]:
        fields.append(("skips", ", ".join(run["skips"])))
    return [*fields, ("children", ", ".join(run["children"]) or "none")]


def _changes(changed: dict[str, dict[str, Any]]) -> Fields:
    return [(name, f"{_value(values['parent'])} -> {_value(values['own'])}") for name, values in changed.items()]


def _tokens(run: dict[str, Any]) -> str:
    steps = run["step"] if PHASES[run["phase"]].has_reward else run["steps"]
    return f"{run['tokens']:,} in {steps:,} steps" if run["tokens"] is not None else "none yet"


def _value(value: Any) -> str:
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} x {_value(inner)}" for name, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _made_from(run: dict[str, Any]) -> Fields:
    data, tokenizer = run["data"], run["tokenizer"]
    texts = data.get("source") or _value(data["mixture"])
    if data.get("skip_invalid"):
        texts += ", invalid conversations left out"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))
    created = run["created"]
    fields = [
        ("data", f"{texts} (digest {data['digest'][:12]})"),
        ("tokenizer", f"{tokenizer['vocab_size']:,} ids (digest {tokenizer['digest'][:12]})"),
        ("code", run["code"]),
        ("today's code", run["other_code"].removeprefix("code: ")),
        ("fingerprint", run["fingerprint"]),
        ("created", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created)) if created else ""),
        ("versions", versions),
    ]
    return [(name, value) for name, value in fields if value]


def _kept(run: dict[str, Any]) -> Fields:
    checkpoints = [f"step {saved['step']:,} ({file_size(saved['bytes'])})" for saved in run["checkpoints"]]
    files = run["files"]
    logs = {name: f"{name} ({file_size(size)})" for name, size in files.items() if name.endswith(".h5")}
    reports = [name for name in files if name.startswith("RESEARCH_REPORT")]
    told = [*logs, *reports]
    return [
        ("folder", f"{run['folder']} ({file_size(run['bytes'])})"),
        ("checkpoints", ", ".join(checkpoints) or "none"),
        ("research log", ", ".join(logs.values()) or "none"),
        ("report", ", ".join(reports) or "none"),
        ("evaluations", ", ".join(run["evaluations"]) or "none"),
        ("besides", ", ".join(name for name in files if name not in (*told, *_INTERNAL))),
        ("MLflow run", run["mlflow_run"] or "none"),
    ]

"""What a study stands on: controls in the same storage, where a gap must not be found, and where one must."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bwlm.analysis.stats import DIFFERENT, Gap
from bwlm.analysis.tables import load_losses, with_losses
from bwlm.record.lineage import ExperimentFolder, list_experiments, readable
from bwlm.text.controls import null_floor, null_nll_of_rows
from bwlm.text.packing import PackedRows

NULL, POSITIVE = "builtin:null", "builtin:products"


@dataclass(frozen=True)
class Control:
    """One pair of a control."""

    name: str
    gap: Gap
    passed: bool | None
    """None: nothing to hold it against."""
    why: str


def control_runs(storage: Path) -> dict[str, list[ExperimentFolder]]:
    """Finished runs on a control's corpus, by corpus."""
    found: dict[str, list[ExperimentFolder]] = {NULL: [], POSITIVE: []}
    for folder in readable(list_experiments(storage))[0]:
        source = folder.config().experiment.data.source
        if source in found and folder.status().state == "finished":
            found[source].append(folder)
    return found


def judge_control(source: str, gaps: list[Gap], study: float | None) -> list[Control]:
    """Which of a control's pairs do what they must; `study` is the gap (nats) that the null control must be finer than.

    Null, forward against backward: passes if the interval over seeds covers zero and half its width is below the
    study's gap. Positive, and anything against permuted: passes if the verdict is `different`, the second one worse.
    """
    controls = []
    for one in gaps:
        if {one.a, one.b} == {"forward", "backward"} and source == NULL:
            controls.append(_null(one, study))
        elif (one.a, one.b) == ("forward", "backward") or (one.a == "forward" and one.b == "permuted"):
            found = one.verdict == DIFFERENT and one.gap_nats > 0
            name = "positive" if source == POSITIVE else "permuted"
            controls.append(Control(name, one, found, f"{one.verdict}, as it must be" if found else f"{one.verdict}"))
    return controls


def _null(one: Gap, study: float | None) -> Control:
    if one.seed_interval is None:
        return Control("null", one, False, "one seed gives no interval")
    low, high = one.seed_interval
    half = (high - low) / 2
    if not low <= 0 <= high:
        return Control("null", one, False, "a gap was found where there is none")
    if study is not None and half >= abs(study):
        return Control("null", one, False, f"too coarse: half its width, {half:.4f}, is not below the study's gap")
    if study is None:
        return Control("null", one, None, f"covers zero, half its width is {half:.4f}: no study's gap to be below")
    return Control(
        "null", one, True, f"the interval covers zero, half its width {half:.4f} is below the study's {abs(study):.4f}"
    )


def above_floor(folders: list[ExperimentFolder]) -> pd.DataFrame:
    """Of runs on the null corpus: run, direction, bits per symbol above what the true chain pays for the same windows.

    Where the packed text is gone, above what it is expected to pay for segments as long.
    """
    rows = []
    for folder in with_losses(folders)[0]:
        direction = folder.config().experiment.direction
        if direction in ("forward", "backward"):
            losses = load_losses(folder, direction)
            loss = losses["nll"].sum() / losses["tokens"].sum()
            rows.append(
                {"run": folder.id, "direction": direction, "bits": (loss - _floor(folder, losses)) / math.log(2)}
            )
    return pd.DataFrame(rows)


def _floor(folder: ExperimentFolder, losses: pd.DataFrame) -> float:
    """Nats per symbol."""
    corpus = Path(folder.config().corpus)
    if not (corpus / "manifest.json").exists():
        return null_floor(losses["tokens"].to_numpy())
    return null_nll_of_rows(PackedRows(corpus, "validation").take(losses["window"].unique()))

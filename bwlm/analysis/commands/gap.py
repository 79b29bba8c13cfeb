"""Judged gaps as sentences, tables and JSON."""

from __future__ import annotations

import math
import re
from typing import Any

import pandas as pd

from bwlm.analysis.charts.losses import gap_chart
from bwlm.analysis.commands.result import Analysis
from bwlm.analysis.runs.findings import Findings
from bwlm.format import counted
from bwlm.stats.gaps import DIFFERENT, FEWEST_DOCUMENTS, Gap

GAP_HEADER = [
    "size",
    "pair",
    "verdict",
    "seeds",
    "gap (nats)",
    "gap (%)",
    "95 % over seeds",
    "95 % bootstrap",
    "noise floor",
]
"""Header of the verdict table. The verdict stands where no narrow screen cuts it off."""


_LONGEST_NAME = 200
"""Characters of a metric's name, without its suffix; MLflow takes 250."""


def gap_columns(gap: Gap) -> list[str]:
    """Return a gap's line in the verdict table, under `GAP_HEADER`."""
    return [
        str(gap.size),
        gap.pair,
        f"**{gap.verdict}**",
        str(len(gap.seeds)),
        f"{gap.gap_nats:+.4f}",
        f"{gap.gap_percent:+.2f}",
        _interval(gap.seed_interval),
        _interval(gap.bootstrap if _resampled(gap) else None),
        f"{gap.noise_floor:.4f}" if gap.noise_floor is not None else "–",
    ]


SIGN = (
    "A gap is the second direction's loss minus the first's: above 0 the first direction has the lower loss, "
    "below 0 the second."
)


def gap_sentence(gap: Gap) -> str:
    """Tell a judged gap in words: `size 4, forward → backward: gap +0.0210 nats per token (+0.70 %), 95 % over ..`."""
    return f"size {gap.size}, {gap.pair}: {_amount(gap)}: {gap.verdict} ({gap.reason})"


def _amount(gap: Gap) -> str:
    """Return the gap in words with the table's signs: its interval, the noise floor and, where it is
    different, the direction that is ahead.
    """
    parts = [f"gap {gap.gap_nats:+.4f} nats per token ({gap.gap_percent:+.2f} %)"]
    if gap.seed_interval is not None:
        parts.append(f"95 % over seeds {_interval(gap.seed_interval)}")
    parts.append(counted(len(gap.seeds), "seed"))
    if gap.noise_floor is not None:
        parts.append(f"noise floor {gap.noise_floor:.4f}")
    if gap.verdict == DIFFERENT:
        parts.append(f"{gap.a if gap.gap_nats > 0 else gap.b} has the lower loss")
    return ", ".join(parts)


def few_documents(gaps: list[Gap]) -> list[str]:
    """Return a sentence for each size that too few documents validate, so that no interval can be resampled."""
    few = {str(one.size): one.documents for one in gaps if not _resampled(one)}
    return [
        f"{size}: only {counted(documents, 'document')} to compare on: that says little of other text, and a bootstrap "
        f"needs {FEWEST_DOCUMENTS}. Give more validation text or, if there is more, raise evaluation.tokens."
        for size, documents in few.items()
    ]


def _interval(pair: tuple[float, float] | None) -> str:
    return f"{pair[0]:+.4f} .. {pair[1]:+.4f}" if pair else "–"


def gap_figures(gap: Gap) -> dict[str, Any]:
    """Return a judged gap for scripts, at full precision; `bootstrap` says little if `documents` is under 10."""
    return {
        "size": gap.size,
        "a": gap.a,
        "b": gap.b,
        "seeds": len(gap.seeds),
        "paired_seeds": gap.seeds,
        "dropped_seeds": gap.dropped_seeds,
        "documents": gap.documents,
        "gap_nats": gap.gap_nats,
        "gap_bpb": gap.gap_bpb,
        "gap_percent": gap.gap_percent,
        "per_seed": [float(value) for value in gap.per_seed],
        "bootstrap": list(gap.bootstrap),
        "seed_interval": list(gap.seed_interval) if gap.seed_interval else None,
        "noise_floor": gap.noise_floor,
        "choosing_seeds": gap.choosing_seeds,
        "p": gap.p,
        "p_adjusted": gap.p_adjusted,
        "verdict": gap.verdict,
        "reason": gap.reason,
    }


def gap_metrics(gap: Gap) -> dict[str, float]:
    """Return a gap's figures as metrics: `gap/d4_forward-backward` in nats, `gap/seeds_low/d4_forward-backward`, ..

    MLflow makes a section of charts of what stands before the last slash: the gaps of all pairs, then each end.
    """
    name = re.sub(r"[^\w .-]", "_", f"{gap.size}_{gap.a}-{gap.b}")[:_LONGEST_NAME]
    figures: dict[str, float | None] = {}
    for interval, ends in (("seeds", gap.seed_interval), ("bootstrap", gap.bootstrap)):
        if ends is not None and (interval == "seeds" or _resampled(gap)):
            figures |= {f"{interval}_low": ends[0], f"{interval}_high": ends[1]}
    figures |= {"noise_floor": gap.noise_floor, "percent": gap.gap_percent}
    others = {f"gap/{figure}/{name}": value for figure, value in figures.items() if value is not None}
    return {f"gap/{name}": gap.gap_nats} | others


def gap_analysis(gaps: list[Gap], title: str, notes: list[str]) -> Analysis:
    """Return judged gaps as an analysis: a sentence, a row of a table and a bar of a chart for each."""
    shown = pd.DataFrame([gap_columns(one) for one in gaps], columns=GAP_HEADER)
    chart = gap_chart(gap_frame(gaps), f"{title}: gaps between directions")
    return Analysis("gap", title, [gap_sentence(one) for one in gaps], _gap_table(gaps), chart, notes, shown)


def _gap_table(gaps: list[Gap]) -> pd.DataFrame:
    """Return the figures of gaps, a row each: both ends of an interval in columns of their own, lists left out."""
    rows = []
    for one in gaps:
        row = gap_figures(one)
        for name in ("bootstrap", "seed_interval"):
            row[f"{name}_low"], row[f"{name}_high"] = row.pop(name) or (None, None)
        rows.append({name: value for name, value in row.items() if not isinstance(value, list | dict)})
    return pd.DataFrame(rows)


def gap_frame(gaps: list[Gap]) -> pd.DataFrame:
    """Return the input of `charts.losses.gap_chart`."""
    rows = []
    for one in gaps:
        low, high = one.seed_interval or (math.nan, math.nan)
        floor = one.noise_floor or 0.0
        pair = f"{one.size}: {one.pair}"
        rows.append((pair, one.gap_nats, low, high, -floor, floor, one.verdict))
    return pd.DataFrame(rows, columns=["pair", "gap", "low", "high", "floor_low", "floor", "verdict"])


def verdict_line(gap: Gap) -> str:
    """Tell a judged gap in few words: `d4 forward → backward: **different**, +0.0210 nats/token`."""
    return f"{gap.size} {gap.a} → {gap.b}: **{gap.verdict}**, {gap.gap_nats:+.4f} nats/token"


def gap_line(gap: Gap) -> str:
    """Return a verdict and its reason as an item of a Markdown list; the table below it has the figures."""
    few = "" if _resampled(gap) else f"; {counted(gap.documents, 'document')}: too few to resample"
    return f"- {gap.size}, {gap.pair}: **{gap.verdict}**, {gap.reason}{few}"


def gap_caption(findings: Findings) -> str:
    """Return the caption of the verdict table: the documents and windows of each size."""
    pairs = zip(findings.gaps, findings.windows, strict=True)
    lines = dict.fromkeys(f"{gap.size} on {_text_words(gap, windows)}" for gap, windows in pairs)
    return f"Verdict (on the test half: {', '.join(lines)})"


def _text_words(gap: Gap, windows: int) -> str:
    return f"{counted(gap.documents, 'document')} in {counted(windows, 'window')}"


def _resampled(gap: Gap) -> bool:
    """Return whether the bootstrap interval of the gap has a meaning."""
    return gap.documents >= FEWEST_DOCUMENTS

"""Judged gaps as sentences, tables and JSON."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from bwlm.analysis.charts.losses import gap_chart
from bwlm.analysis.commands.result import Analysis
from bwlm.analysis.runs.findings import Findings
from bwlm.format import counted
from bwlm.stats.gaps import FEWEST_DOCUMENTS, Gap

GAP_HEADER = [
    "size",
    "pair",
    "seeds",
    "gap (nats)",
    "gap (%)",
    "95 % over seeds",
    "95 % bootstrap",
    "noise floor",
    "verdict",
]


def gap_columns(found: Gap) -> list[str]:
    """Return a gap's line in the verdict table, under `GAP_HEADER`."""

    def interval(pair: tuple[float, float] | None) -> str:
        return f"{pair[0]:+.4f} .. {pair[1]:+.4f}" if pair else "–"

    return [
        str(found.size),
        f"{found.a} → {found.b}",
        str(len(found.seeds)),
        f"{found.gap_nats:+.4f}",
        f"{found.gap_percent:+.2f}",
        interval(found.seed_interval),
        interval(found.bootstrap if _resampled(found) else None),
        f"{found.noise_floor:.4f}" if found.noise_floor is not None else "–",
        f"**{found.verdict}**",
    ]


def gap_sentence(found: Gap) -> str:
    """Tell a judged gap in words: `size 4: backward is 0.0210 nats/token (0.70 %) worse than forward, 95 % over ..`."""
    return f"size {found.size}: {_amount(found)}: {found.verdict} ({found.reason})"


def _amount(found: Gap) -> str:
    """Return the gap in words, with its interval and the noise floor."""
    sign = -1 if found.gap_nats < 0 else 1  # the interval is told the same way round as the gap
    size = f"{abs(found.gap_nats):.4f} nats/token ({abs(found.gap_percent):.2f} %)"
    than = f"{size} {'better' if sign < 0 else 'worse'} than" if found.gap_nats else "exactly as good as"
    parts = [f"{found.b} is {than} {found.a}"]
    if found.seed_interval is not None:
        low, high = sorted(sign * end for end in found.seed_interval)
        parts.append(f"95 % over seeds {low:.4f} .. {high:.4f}")
    parts.append(counted(len(found.seeds), "seed"))
    if found.noise_floor is not None:
        parts.append(f"noise floor {found.noise_floor:.4f}")
    return ", ".join(parts)


def gap_figures(found: Gap) -> dict[str, Any]:
    """Return a judged gap for scripts, at full precision; `bootstrap` says little if `documents` is under 10."""
    return {
        "size": found.size,
        "a": found.a,
        "b": found.b,
        "seeds": len(found.seeds),
        "paired_seeds": found.seeds,
        "dropped_seeds": found.dropped_seeds,
        "documents": found.documents,
        "gap_nats": found.gap_nats,
        "gap_bpb": found.gap_bpb,
        "gap_percent": found.gap_percent,
        "per_seed": [float(value) for value in found.per_seed],
        "bootstrap": list(found.bootstrap),
        "seed_interval": list(found.seed_interval) if found.seed_interval else None,
        "noise_floor": found.noise_floor,
        "choosing_seeds": found.choosing_seeds,
        "p": found.p,
        "p_adjusted": found.p_adjusted,
        "verdict": found.verdict,
        "reason": found.reason,
    }


def gap_analysis(found: list[Gap], title: str, notes: list[str]) -> Analysis:
    """Return judged gaps as an analysis: a sentence, a row of a table and a bar of a chart for each."""
    shown = pd.DataFrame([gap_columns(one) for one in found], columns=GAP_HEADER)
    chart = gap_chart(gap_frame(found), f"{title}: gaps between directions")
    return Analysis("gap", title, [gap_sentence(one) for one in found], _gap_table(found), chart, notes, shown)


def _gap_table(found: list[Gap]) -> pd.DataFrame:
    """Return the figures of gaps, a row each: both ends of an interval in columns of their own, lists left out."""
    rows = []
    for one in found:
        row = gap_figures(one)
        for name in ("bootstrap", "seed_interval"):
            row[f"{name}_low"], row[f"{name}_high"] = row.pop(name) or (None, None)
        rows.append({name: value for name, value in row.items() if not isinstance(value, list | dict)})
    return pd.DataFrame(rows)


def gap_frame(found: list[Gap]) -> pd.DataFrame:
    """Return the input of `charts.losses.gap_chart`."""
    rows = []
    for one in found:
        low, high = one.seed_interval or (math.nan, math.nan)
        floor = one.noise_floor or 0.0
        pair = f"{one.size}: {one.a} → {one.b}"
        rows.append((pair, one.gap_nats, low, high, -floor, floor, one.verdict))
    return pd.DataFrame(rows, columns=["pair", "gap", "low", "high", "floor_low", "floor", "verdict"])


def gap_line(found: Gap, windows: int) -> str:
    """Tell a judged gap as an item of a Markdown list, with the documents and windows it was measured on."""
    few = "" if _resampled(found) else f" ({counted(found.documents, 'document')}: too few to resample)"
    text = _text_words(found, windows)
    verdict = f"{found.a} against {found.b}: **{found.verdict}** ({found.reason}), on {text}{few}"
    return f"- {found.size}: {verdict}: {_amount(found)}"


def gap_caption(findings: Findings) -> str:
    """Return the caption of the verdict table: the documents and windows of each size."""
    pairs = zip(findings.gaps, findings.windows, strict=True)
    lines = dict.fromkeys(f"{found.size} on {_text_words(found, windows)}" for found, windows in pairs)
    return f"Verdict (on the test half: {', '.join(lines)})"


def _text_words(found: Gap, windows: int) -> str:
    return f"{counted(found.documents, 'document')} in {counted(windows, 'window')}"


def _resampled(found: Gap) -> bool:
    """Return whether the bootstrap interval of the gap has a meaning."""
    return found.documents >= FEWEST_DOCUMENTS

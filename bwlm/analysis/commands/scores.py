"""Judged accuracies as sentences, tables and JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from bwlm.analysis.charts.scores import score_chart
from bwlm.analysis.commands.result import Analysis
from bwlm.format import counted
from bwlm.stats.gaps import Interval
from bwlm.stats.score_table import Setting
from bwlm.stats.scores import Arm, Difference, Scores, best_of

_SETTING = list(Setting._fields)
ARM_NAMES = [*_SETTING, "direction"]
ARM_HEADER = [*ARM_NAMES, "seeds", "items", "accuracy", "95 %", "chance"]
PAIR_NAMES = [*_SETTING, "pair", "verdict"]
PAIR_HEADER = [*_SETTING, "pair", "seeds", "items", "difference", "95 %", "p (Holm)", "seen from", "verdict"]
SIGN = (
    "A difference is the second arm's accuracy minus the first's. Intervals are over seeds and items; with one seed "
    "over items alone. `seen from` is the smallest true difference that a further study like this one would call "
    "different with 80 % power; with one seed, that the items alone would show."
)


def arm_columns(arm: Arm) -> list[str]:
    """Return an arm's line in the table of accuracies, under `ARM_HEADER`."""
    return [
        *map(str, arm.setting),
        arm.direction,
        str(len(arm.seeds)),
        str(arm.items),
        f"{arm.accuracy:.4f}",
        interval_words(arm.interval),
        "" if arm.chance is None else f"{arm.chance:.4f}",
    ]


def pair_columns(one: Difference) -> list[str]:
    """Return a pair's line in the table of differences, under `PAIR_HEADER`."""
    return [
        *map(str, one.setting),
        one.pair,
        str(len(one.seeds)),
        str(one.items),
        f"{one.difference:+.4f}",
        interval_words(one.interval, "+"),
        "–" if one.p_adjusted is None else f"{one.p_adjusted:.3g}",
        "–" if one.detectable is None else f"{one.detectable:.4f}",
        f"**{one.verdict}**",
    ]


def interval_words(ends: Interval, sign: str = "") -> str:
    """Return both ends of an interval in words."""
    return f"{ends[0]:{sign}.4f} .. {ends[1]:{sign}.4f}"


def score_sentences(scores: Scores) -> list[str]:
    """Tell in words, for each setting, the best arm, the arms at chance, each pair, and what is odd about the seeds."""
    sentences = []
    for setting in dict.fromkeys(arm.setting for arm in scores.arms):
        pairs = [one for one in scores.differences if one.setting == setting]
        sentences += [*arm_sentences(scores, setting), *map(pair_sentence, pairs)]
        sentences += [f"{setting}, {one.pair}: {remark}" for one in pairs for remark in one.remarks]
    return sentences


def arm_sentences(scores: Scores, setting: Setting) -> list[str]:
    """Tell in words the best arm of a setting, the arms at chance, and what is odd about their seeds."""
    arms = [arm for arm in scores.arms if arm.setting == setting]
    remarks = [f"{setting}, {arm.direction}: {remark}" for arm in arms for remark in arm.remarks]
    return [_best_sentence(scores, setting), *_chance_sentences(arms), *remarks]


def _best_sentence(scores: Scores, setting: Setting) -> str:
    best, untold, worse = best_of(scores, setting)
    [arm] = [arm for arm in scores.arms if (arm.setting, arm.direction) == (setting, best)]
    shown = f"{arm.accuracy:.4f}, {_over(len(arm.seeds))} {interval_words(arm.interval)}"
    if not (untold or worse):
        return f"{setting}: {best} has accuracy {shown}"
    parts = [f"{setting}: {best} has the highest accuracy ({shown})"]
    parts += [f"{', '.join(untold)} cannot be told from it"] if untold else []
    parts += [f"{', '.join(worse)} {'is' if len(worse) == 1 else 'are'} worse"] if worse else []
    return "; ".join(parts)


def _over(seeds: int) -> str:
    return "95 %" if seeds > 1 else "95 % over items alone"


def _chance_sentences(arms: list[Arm]) -> list[str]:
    return [
        f"{arm.setting}, {arm.direction}: cannot be told from chance ({arm.chance:.4f})"
        for arm in arms
        if arm.chance is not None and arm.interval[0] <= arm.chance <= arm.interval[1]
    ]


def pair_sentence(one: Difference) -> str:
    """Tell a judged pair in words: `arc_easy, forward → backward: difference -0.0121, 95 % -0.0302 .. +0.0060, ..`."""
    parts = [
        f"difference {one.difference:+.4f}",
        f"{_over(len(one.seeds))} {interval_words(one.interval, '+')}",
        counted(len(one.seeds), "seed"),
        counted(one.items, "item"),
        _ahead(one),
    ]
    return f"{one.setting}, {one.pair}: {', '.join(parts)}: {one.verdict} ({one.reason}){_could_see(one)}"


def _ahead(one: Difference) -> str:
    """Return which arm has the higher accuracy, by the sign of the difference alone."""
    if not one.difference:
        return "both have the same accuracy"
    return f"{one.b if one.difference > 0 else one.a} has the higher accuracy"


def _could_see(one: Difference) -> str:
    alone = "" if len(one.seeds) > 1 else ", of the items alone"
    if one.detectable is not None:
        return f"; 80 % power from {one.detectable:.4f} on{alone}"
    return "" if one.p_adjusted is None else "; 80 % power at no difference"


def arm_figures(arm: Arm) -> dict[str, Any]:
    """Return an arm for scripts, at full precision."""
    return arm.setting._asdict() | {
        "direction": arm.direction,
        "seeds": arm.seeds,
        "items": arm.items,
        "accuracy": arm.accuracy,
        "interval": list(arm.interval),
        "per_seed": [float(value) for value in arm.per_seed],
        "chance": arm.chance,
        "remarks": arm.remarks,
    }


def pair_figures(one: Difference) -> dict[str, Any]:
    """Return a judged pair for scripts, at full precision."""
    return one.setting._asdict() | {
        "a": one.a,
        "b": one.b,
        "seeds": one.seeds,
        "dropped_seeds": one.dropped_seeds,
        "items": one.items,
        "difference": one.difference,
        "interval": list(one.interval),
        "per_seed": [float(value) for value in one.per_seed],
        "p": one.p,
        "p_adjusted": one.p_adjusted,
        "detectable": one.detectable,
        "verdict": one.verdict,
        "reason": one.reason,
        "remarks": one.remarks,
    }


def score_figures(scores: Scores) -> dict[str, Any]:
    """Return all results for scripts: arms, pairs, the best arms of each setting, and what was left out."""
    sets = []
    for setting in dict.fromkeys(arm.setting for arm in scores.arms):
        best, untold, worse = best_of(scores, setting)
        sets.append(setting._asdict() | {"best": best, "not_told_from_best": untold, "worse": worse})
    return {
        "arms": [arm_figures(arm) for arm in scores.arms],
        "pairs": [pair_figures(one) for one in scores.differences],
        "best": sets,
        "left_out": scores.left_out,
    }


def without_shared(scores: Scores) -> tuple[Scores, str]:
    """Return the scores without the parts of their settings that all of them share, and these parts in words."""
    settings = {arm.setting for arm in scores.arms}
    values = {name: {getattr(setting, name) for setting in settings} for name in _SETTING[1:]}
    shared = {name: found.pop() for name, found in values.items() if len(found) == 1}
    left_out: dict[str, Any] = dict.fromkeys(shared, "")
    arms = [replace(arm, setting=arm.setting._replace(**left_out)) for arm in scores.arms]
    pairs = [replace(one, setting=one.setting._replace(**left_out)) for one in scores.differences]
    words = ", ".join(f"{name} {value}" for name, value in shared.items() if value != "")
    return replace(scores, arms=arms, differences=pairs), words


def score_analysis(scores: Scores, title: str) -> Analysis:
    """Return judged accuracies as an analysis: sentences, a table of arms and one of pairs, a chart."""
    pairs = _table([pair_figures(one) for one in scores.differences])
    return Analysis(
        name="scores",
        title=title,
        findings=score_sentences(scores),
        table=_table([arm_figures(arm) for arm in scores.arms]),
        chart=score_chart(*_frames(scores), f"{title}: accuracies"),
        notes=scores.left_out,
        bounds="95 %",
        more={} if pairs.empty else {"differences": pairs},
    )


def _table(figures: list[dict[str, Any]]) -> pd.DataFrame:
    """Return figures as a table: both ends of an interval in columns of their own, seeds counted, lists left out."""
    rows = []
    for figures_of_one in figures:
        row: dict[str, Any] = {}
        for name, value in figures_of_one.items():
            if name == "interval":
                row["interval_low"], row["interval_high"] = value
            elif name == "seeds":
                row[name] = len(value)
            elif not isinstance(value, list | dict):
                row[name] = value
        rows.append(row)
    return pd.DataFrame(rows)


def _frames(scores: Scores) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the input of `charts.scores.score_chart`."""
    arms = [(str(arm.setting), arm.direction, arm.accuracy, *arm.interval, arm.chance) for arm in scores.arms]
    seeds = [(str(arm.setting), arm.direction, float(value)) for arm in scores.arms for value in arm.per_seed]
    return (
        pd.DataFrame(arms, columns=["setting", "direction", "accuracy", "low", "high", "chance"]),
        pd.DataFrame(seeds, columns=["setting", "direction", "accuracy"]),
    )

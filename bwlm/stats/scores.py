"""Accuracies of arms and their differences, paired by seed and item: intervals, tests and verdicts.

Input is a table of scores, a row per run and item (`bwlm.stats.score_table`). Output is an `Arm` for each setting and
arm, and a `Difference` for each pair of arms in a setting. The verdict rests on seeds and items at once
(`bwlm.stats.proportions`), so it speaks about further seeds on further items of the task's kind. As for gaps, it needs
three paired seeds. Not covered here: which runs may be compared, and how a learning rate was chosen.

Suffixes of arrays: S paired seeds, I items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Final

import numpy as np
import pandas as pd

from bwlm.directions import rank
from bwlm.errors import UserError
from bwlm.format import counted, listed
from bwlm.stats.columns import FloatArray
from bwlm.stats.gaps import DIFFERENT, FEWEST_SEEDS, NO_DIFFERENCE, TOO_FEW_SEEDS, Interval, Verdict, holm
from bwlm.stats.proportions import Crossed, OneSeed, one_seed, wilson
from bwlm.stats.score_table import ScoreRun, Setting, score_runs
from bwlm.stats.seed_spread import ALPHA, two_groups_p, unequal_spread_p

_ROUNDING: Final = 1e-12


@dataclass(frozen=True, eq=False)
class Arm:
    """Accuracy of one arm in one setting. Scalars are plain Python numbers."""

    setting: Setting
    direction: str
    seeds: list[int]
    items: int
    accuracy: float  # mean of `per_seed`
    interval: Interval  # over seeds and items; over items alone with one seed
    per_seed: FloatArray  # mean score, in the order of `seeds`
    chance: float | None
    remarks: list[str]


@dataclass(frozen=True, eq=False)
class Difference:
    """Accuracy of b minus that of a in one setting. `judge` fills the last four fields."""

    setting: Setting
    a: str
    b: str
    seeds: list[int]  # seeds of both arms, ascending
    dropped_seeds: dict[str, list[int]]  # arm -> its seeds that the other lacks
    items: int
    difference: float  # mean of `per_seed`
    interval: Interval  # over seeds and items; over items alone with one seed
    per_seed: FloatArray
    p: float  # not adjusted; McNemar's with one seed
    measure: Crossed | OneSeed
    are_copies: bool  # neither arm's seeds differ in any score
    remarks: list[str]
    p_adjusted: float | None = None  # Holm over the family; None if the pair is not tested
    detectable: float | None = None  # smallest true difference seen with 80 % power; over items alone with one seed
    verdict: Verdict | None = None
    reason: str = ""

    @property
    def pair(self) -> str:
        """Return the name of the pair, which says what is subtracted from what: the first from the second."""
        return f"{self.a} → {self.b}"


@dataclass(frozen=True)
class Scores:
    """Arms and differences of a table, both by setting, and in words what was left out."""

    arms: list[Arm]
    differences: list[Difference]
    left_out: list[str] = field(default_factory=list)


def compare_scores(rows: pd.DataFrame, alpha: float = 0.05) -> Scores:
    """Measure every arm and pair of arms in every setting, and judge all pairs as one family.

    `rows` are those of `checked_scores`. Arms that cannot be ranked, and pairs that cannot be compared, are left out
    with the reason. Raises `UserError` if the table is wrong, or if no arm is left.
    """
    arms, differences, left_out = [], [], []
    runs = score_runs(rows)
    for setting in sorted(runs, key=_order):
        kept, refused = _arms_to_rank(setting, runs[setting])
        pairs, problems = _measured_pairs(setting, kept)
        arms += [_arm(setting, direction, by_seed) for direction, by_seed in kept.items()]
        differences += pairs
        left_out += [*refused, *problems]
    if not arms:
        raise UserError("; ".join(left_out))
    return Scores(arms, judge(differences, alpha), left_out)


def measure_arms(rows: pd.DataFrame) -> tuple[list[Arm], list[str]]:
    """Return every arm in every setting, also those that cannot be ranked, since all their answers are right or wrong.

    `rows` are those of `checked_scores`. Arms with other items, or without finite scores, are left out with the reason.
    """
    runs, arms, left_out = score_runs(rows), [], []
    for setting in sorted(runs, key=_order):
        for direction in sorted(runs[setting], key=rank):
            by_seed = dict(sorted(runs[setting][direction].items()))
            if reason := _why_not_measured(list(by_seed.values())):
                left_out.append(f"{setting}: {direction} is left out: {reason}")
            else:
                arms.append(_arm(setting, direction, by_seed))
    return arms, left_out


def judge(family: Sequence[Difference], alpha: float = 0.05) -> list[Difference]:
    """Return the differences with p_adjusted, detectable, verdict and reason, judged as one family.

    `different` if and only if p, Holm-adjusted over the family, is below alpha. A pair with fewer than three paired
    seeds gets `too few seeds to tell` whatever its p, and so does a pair whose seeds are copies of one run. Such pairs
    do not count in the family.
    """
    tested = [one for one in family if not _why_not_tested(one)]
    adjusted = dict(zip(map(id, tested), holm([one.p for one in tested]), strict=True))
    return [_judged(one, adjusted.get(id(one)), len(tested), alpha) for one in family]


def best_of(scores: Scores, setting: Setting) -> tuple[str, list[str], list[str]]:
    """Return the arm with the highest accuracy, those that cannot be told from it, and those that are worse.

    An arm is worse if its difference from the best is `different`. Holm's adjustment covers all pairs, whichever arm
    came out best, so the arm that is truly best is called worse in at most 5 % of tables. Arms whose pair with the
    best was not tested cannot be told from it.
    """
    arms = sorted((arm for arm in scores.arms if arm.setting == setting), key=lambda arm: -arm.accuracy)
    best, *others = (arm.direction for arm in arms)
    apart = {
        frozenset((one.a, one.b)) for one in scores.differences if one.setting == setting and one.verdict == DIFFERENT
    }
    worse = [name for name in others if frozenset((best, name)) in apart]
    return best, [name for name in others if name not in worse], worse


# From the runs to arms and pairs


def _order(setting: Setting) -> list[tuple[bool, int | str]]:
    return [(isinstance(value, str), value) for value in setting]


def _arms_to_rank(
    setting: Setting, runs: dict[str, dict[int, ScoreRun]]
) -> tuple[dict[str, dict[int, ScoreRun]], list[str]]:
    """Return the arms that can be ranked, in order, and why each other cannot."""
    kept, refused = {}, []
    for direction in sorted(runs, key=rank):
        by_seed = dict(sorted(runs[direction].items()))
        if reason := _why_not_ranked(list(by_seed.values())):
            refused.append(f"{setting}: {direction} is left out: {reason}")
        else:
            kept[direction] = by_seed
    return kept, refused


def _why_not_ranked(runs: list[ScoreRun]) -> str:
    if reason := _why_not_measured(runs):
        return reason
    scores = np.stack([run.score_i for run in runs])
    if np.ptp(scores) <= _ROUNDING:
        return (
            f"each score of its {counted(len(runs[0].items), 'item')} is {scores[0, 0]:g}, which tells nothing about "
            "other items: check how its answers are read"
        )
    return ""


def _why_not_measured(runs: list[ScoreRun]) -> str:
    for run in runs:
        missing = ~np.isfinite(run.score_i)
        if missing.any():
            item = run.items[int(missing.argmax())]
            return (
                f"run '{run.name}' has no finite score for {counted(int(missing.sum()), 'item')}, such as '{item}': "
                "score it again or leave it out"
            )
    for run in runs[1:]:
        if reason := _why_not_paired(runs[0], run):
            return reason
    if len(runs[0].items) < 2:
        return "it has one item: give more"
    return ""


def _why_not_paired(one: ScoreRun, other: ScoreRun) -> str:
    """Return how the items of two runs differ; empty if they are the same."""
    if one.items != other.items:
        apart = sorted(set(one.items) ^ set(other.items))
        return (
            f"runs '{one.name}' and '{other.name}' differ in {counted(len(apart), 'item')}, such as '{apart[0]}', that "
            "one of them lacks: evaluate both on the same items"
        )
    known = zip(one.items, one.digests, other.digests, strict=True)
    changed = [item for item, digest, of_other in known if digest and of_other and digest != of_other]
    if changed:
        return (
            f"runs '{one.name}' and '{other.name}' have other content under the same name for "
            f"{counted(len(changed), 'item')}, such as '{changed[0]}' (digest): evaluate both on one version"
        )
    return ""


def _arm(setting: Setting, direction: str, by_seed: dict[int, ScoreRun]) -> Arm:
    runs = list(by_seed.values())
    score_si = np.stack([run.score_i for run in runs])
    per_seed = score_si.mean(axis=1)
    items = score_si.shape[1]
    if len(runs) > 1 and np.ptp(score_si) > _ROUNDING:
        interval = Crossed.from_scores(score_si).accuracy_interval()
    else:  # seeds that are all right or all wrong say no more than one of them
        interval = wilson(float(score_si.mean() * items), items)
    return Arm(
        setting=setting,
        direction=direction,
        seeds=list(by_seed),
        items=items,
        accuracy=float(per_seed.mean()),
        interval=interval,
        per_seed=per_seed,
        chance=runs[0].chance,
        remarks=_remarks(runs, per_seed, 1 / items),
    )


def _remarks(runs: Iterable[ScoreRun], per_seed: FloatArray, step: float) -> list[str]:
    constant = [run for run in runs if np.ptp(run.score_i) <= _ROUNDING]
    remarks = [f"run '{run.name}' has {run.score_i[0]:g} on each item" for run in constant]
    if (p := two_groups_p(per_seed, step)) < ALPHA:
        shown = ", ".join(f"{value:.4f}" for value in sorted(per_seed))
        remarks.append(f"its seeds fall into two groups, p = {p:.2g}: {shown}; a mean of both describes neither")
    return remarks


def _measured_pairs(setting: Setting, arms: dict[str, dict[int, ScoreRun]]) -> tuple[list[Difference], list[str]]:
    """Return the differences of all pairs without verdicts, and a reason for each pair that cannot be compared."""
    measured, problems = [], []
    for a, b in combinations(arms, 2):
        if reason := why_not_compared(a, arms[a], b, arms[b]):
            problems.append(f"{setting}: {a} and {b} are not compared: {reason}")
        else:
            measured.append(measure_difference(setting, a, arms[a], b, arms[b]))
    return measured, problems


def why_not_compared(a: str, runs_a: dict[int, ScoreRun], b: str, runs_b: dict[int, ScoreRun]) -> str:
    """Return why two arms cannot be paired; empty if they can."""
    for runs in (runs_a, runs_b):
        if reason := _why_not_measured(list(runs.values())):
            return reason
    if not runs_a.keys() & runs_b.keys():
        return f"{a} (seeds {listed(runs_a)}) and {b} (seeds {listed(runs_b)}) share no seed: runs are paired by seed"
    return _why_not_paired(next(iter(runs_a.values())), next(iter(runs_b.values())))


def measure_difference(
    setting: Setting, a: str, runs_a: dict[int, ScoreRun], b: str, runs_b: dict[int, ScoreRun]
) -> Difference:
    """Return the accuracy of b minus that of a over the seeds that both have, without a verdict."""
    seeds = sorted(runs_a.keys() & runs_b.keys())
    own = {a: runs_a, b: runs_b}
    score_a_si, score_b_si = (np.stack([runs[seed].score_i for seed in seeds]) for runs in own.values())
    difference_si = score_b_si - score_a_si
    measure = Crossed.from_scores(difference_si) if len(seeds) > 1 else one_seed(difference_si[0])
    return Difference(
        setting=setting,
        a=a,
        b=b,
        seeds=seeds,
        dropped_seeds={arm: dropped for arm, runs in own.items() if (dropped := sorted(runs.keys() - set(seeds)))},
        items=difference_si.shape[1],
        difference=measure.mean,
        interval=measure.interval,
        per_seed=difference_si.mean(axis=1),
        p=measure.p,
        measure=measure,
        are_copies=len(seeds) > 1 and all((scores == scores[0]).all() for scores in (score_a_si, score_b_si)),
        remarks=_pair_remarks(a, score_a_si.mean(axis=1), b, score_b_si.mean(axis=1), 1 / difference_si.shape[1]),
    )


def _pair_remarks(a: str, a_s: FloatArray, b: str, b_s: FloatArray, step: float) -> list[str]:
    if (p := unequal_spread_p(a_s, b_s, step)) >= ALPHA:
        return []
    wide, narrow = sorted(((a_s.std(ddof=1), a), (b_s.std(ddof=1), b)), reverse=True)
    return [
        f"the seeds of {wide[1]} have a standard deviation of {wide[0]:.4f}, those of {narrow[1]} of {narrow[0]:.4f}, "
        f"p = {p:.2g}: means alone do not describe the two"
    ]


# Verdicts


def _why_not_tested(one: Difference) -> str:
    if len(one.seeds) < FEWEST_SEEDS:
        return f"{counted(len(one.seeds), 'paired seed')}, a verdict needs {FEWEST_SEEDS}"
    if one.are_copies:
        return "seeds do not differ in either arm: copies of one run are one seed"
    return ""


def _judged(one: Difference, p_adjusted: float | None, family: int, alpha: float) -> Difference:
    if p_adjusted is None:
        reason = _why_not_tested(one) + (f"; McNemar over the items, p = {one.p:.3g}" if len(one.seeds) == 1 else "")
        verdict: Verdict = TOO_FEW_SEEDS
    else:
        reason = f"seeds crossed with items, p = {p_adjusted:.3g} (Holm over {family})"
        verdict = DIFFERENT if p_adjusted < alpha else NO_DIFFERENCE
    return replace(
        one,
        p_adjusted=p_adjusted,
        detectable=_detectable(one, family, alpha),
        verdict=verdict,
        reason=reason + _dropped_words(one),
    )


def _detectable(one: Difference, family: int, alpha: float) -> float | None:
    """Return the smallest true difference that would be seen; None where no pair of accuracies is that far apart.

    Pairs of several seeds that are not tested have none either.
    """
    if isinstance(one.measure, OneSeed):
        found = one.measure.detectable
    elif _why_not_tested(one):
        return None
    else:
        found = one.measure.detectable(family, alpha)
    return found if found < 1 else None


def _dropped_words(one: Difference) -> str:
    return "".join(
        f"; dropped {'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)} (only in {arm})"
        for arm, seeds in one.dropped_seeds.items()
    )

"""Audit of pairs of runs: pairs that may be compared, and the fields that forbid it for the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bwlm.analysis.runs.losses import byte_counts_of
from bwlm.directions import is_marked
from bwlm.format import counted
from bwlm.record.experiment import ExperimentFolder, list_experiments
from bwlm.record.fingerprint import VARIED, differences
from bwlm.record.health import readable
from bwlm.record.starts import has_changed_workers, resume_words, starts_of, steps_lost, worker_words

TUNED = frozenset(VARIED) - {"seed", "parent_seed"}
"""Fields in which the cells of a pair may differ."""

SAME_FIRST, SAME_LATER = 1e-5, 1e-3
"""Most by which float32 losses of two numbers of workers differ, as a share of the loss; tests/train/test_worlds.py."""


@dataclass(frozen=True)
class Audit:
    """Pairs of runs of two directions, one depth and one seed: those that agree, and those that were refused."""

    passed: int
    """Pairs with equal data, tokenizer, code, precision, budget, row order and evaluation windows."""
    doubled: int
    """Pairs whose bidirectional run has twice the other's steps, so equal tokens per direction; all else is equal."""
    refused: list[str]
    """Pairs that differ in more than they may, with these fields."""

    @property
    def pairs(self) -> bool:
        """Return whether there was a pair to audit."""
        return bool(self.passed or self.doubled or self.refused)

    def words(self) -> list[str]:
        """Return the audit as lines of a report."""
        if not self.pairs:
            return ["No pair of runs of two directions has the same depth and the same seed, so nothing is compared."]
        equal = "data, tokenizer, code, precision, budget, row order and validation windows"
        doubled = f"{self.doubled} more agree except that the bidirectional run has twice the steps."
        return [f"{self.passed} pairs of runs agree in {equal}.", *([doubled] if self.doubled else []), *self.refused]


def crossing_words(folders: list[ExperimentFolder]) -> list[str]:
    """Return lines on runs whose attention crosses segments and the effect on their losses; none if no run has it."""
    crossing = [one for folder in folders if not (one := folder.config().experiment).model.document_mask]
    if not crossing:
        return []
    words = [
        f"Attention crosses segments in {len(crossing)} of {len(folders)} runs (`model.document_mask: false`): the "
        "loss of a segment depends on the documents before it in its row."
    ]
    if any(is_marked(experiment.direction) for experiment in crossing):
        words.append(
            "Rows of such a bidirectional run are no mirror images of each other, because its segments are read both "
            "ways: before a segment its two readings see different documents."
        )
    return words


def start_words(folders: list[ExperimentFolder]) -> list[str]:
    """Return lines on runs whose number of workers changed, and on steps that were lost; none if no run has these."""
    starts = {folder.id: starts_of(folder.path) for folder in folders}
    changed = [f"{run} ({worker_words(of)})" for run, of in starts.items() if has_changed_workers(of)]
    lost = [f"{run} ({resume_words(of)})" for run, of in starts.items() if steps_lost(of)]
    words = []
    if changed:
        words.append(
            f"The number of workers changed in {len(changed)} of {counted(len(folders), 'run')}: {'; '.join(changed)}. "
            f"Rows and steps are the same, and losses agree with those of a fixed number within {SAME_FIRST:g} of "
            f"their size at the first step after a change, {SAME_LATER:g} later."
        )
    if lost:
        words.append(f"Steps were lost and trained again in {counted(len(lost), 'run')}: {'; '.join(lost)}.")
    return words


def comparable(folder: ExperimentFolder) -> list[ExperimentFolder]:
    """Return the runs of the same grid, itself among them; for a run without a grid, all runs without one."""
    others, _ = readable(list_experiments(folder.path.parent))
    grid = folder.config().grid
    return [other for other in others if other.config().grid == grid]


def audit(folders: list[ExperimentFolder], of: ExperimentFolder | None = None) -> Audit:
    """Compare the identities of all pairs that a gap could be taken between; many refusals of one kind become one.

    With `of`, only pairs that this run is in are compared.
    """
    identities = {folder.id: folder.config().compared for folder in folders}
    counts = {folder.id: byte_counts_of(folder) for folder in folders}
    passed, doubled, refused = 0, 0, dict[tuple[str, ...], list[str]]()
    for one, other in _pairs(identities):
        if of and of.id not in (one, other):
            continue
        fields, other_fields = identities[one], identities[other]
        twice = _equal_per_direction(fields, other_fields)
        allowed = dict.fromkeys(TUNED | ({"steps"} if twice else set()))
        changed = differences(fields | allowed, other_fields | allowed)
        changed += _counts(counts[one], counts[other])
        if changed:
            refused.setdefault(tuple(changed), []).append(f"{one} and {other}")
        elif twice:
            doubled += 1
        else:
            passed += 1
    return Audit(passed, doubled, [_refusal(changed, pairs) for changed, pairs in refused.items()])


def _pairs(identities: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield each two runs of different directions that have the same depth, seed and phase."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for run, fields in identities.items():
        alike.setdefault(_pair_key(fields), []).append(run)
    for run, fields in identities.items():
        rest = alike[_pair_key(fields)]
        rest.remove(run)
        yield from ((run, other) for other in rest if identities[other]["direction"] != fields["direction"])


def _pair_key(fields: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(fields[name] for name in ("depth", "seed", "phase"))


def _counts(one: str, other: str) -> list[str]:
    """Return true unless the two count the bytes of a token by other tables; earlier versions do not say."""
    return [f"bytes per token: {one} -> {other}"] if one and other and one != other else []


def _equal_per_direction(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether a pair's bidirectional run has twice the other's steps: as many tokens in each direction."""
    once, twice = sorted((one, other), key=lambda fields: is_marked(fields["direction"]))
    return is_marked(twice["direction"]) and bool(twice["steps"] == 2 * once["steps"])


def _refusal(changed: tuple[str, ...], pairs: list[str]) -> str:
    more = f" and {len(pairs) - 1} more pairs" if len(pairs) > 1 else ""
    return f"refused: {pairs[0]}{more}: differ in {'; '.join(changed)}"

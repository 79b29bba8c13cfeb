"""Smallest gap that the planned seeds of a grid can see, before anything is trained."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from bwlm.directions import DIRECTIONS, TEXT_READINGS, is_marked
from bwlm.format import counted
from bwlm.phases import PHASES
from bwlm.plan.spec import Cell, Plan, text_key
from bwlm.record.fingerprint import identity
from bwlm.record.labels import double_budget_pairs, size_labels
from bwlm.stats.gaps import FEWEST_SEEDS, PER_DIRECTION
from bwlm.stats.power import POWER, detectable_gap


@dataclass(frozen=True)
class PlannedPair:
    """Pair of directions that the report of a finished grid will compare."""

    size: str
    a: str
    b: str
    seeds: int
    """Seeds that both directions share, at the least, over the choices of rates that leave enough seeds for a verdict.

    If no choice leaves enough, the most that they can share.
    """
    fewest: int
    """Fewest seeds that both share over all choices of rates, such as a rate that was tried with one seed."""
    choosing_seeds: int | None
    """Seeds that will choose the rates, in the direction with fewer; None if each direction has one rate."""

    @property
    def gets_verdict(self) -> bool:
        """True if the report can give a verdict on the pair."""
        return self.seeds >= FEWEST_SEEDS and (self.choosing_seeds is None or self.choosing_seeds >= FEWEST_SEEDS)


def planned_pairs(plan: Plan) -> list[PlannedPair]:
    """Return every size and pair of directions of a plan, as `analysis.runs.findings.find` will pair its cells."""
    cells = [cell for cell in plan.cells if PHASES[cell.experiment.phase].compared]
    identities = {cell.id: _identity(cell) for cell in cells}
    labels = size_labels(identities)
    pairs = double_budget_pairs({labels[run]: fields for run, fields in identities.items()})
    twice = [(f"{once}{PER_DIRECTION}", once, other) for once, other in pairs]
    seeds: dict[str, dict[str, dict[float, set[int]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    for cell in cells:
        experiment = cell.experiment
        seeds[labels[cell.id]][experiment.direction][experiment.lr].add(experiment.seed)
    return [
        _planned(size, a, seeds[of_a][a], b, seeds[of_b][b])
        for size, of_a, of_b in [*((size, size, size) for size in sorted(seeds)), *twice]
        for a, b in combinations(DIRECTIONS, 2)
        if a in seeds[of_a] and b in seeds[of_b] and (of_a == of_b or (a in TEXT_READINGS and is_marked(b)))
    ]


def _planned(size: str, a: str, rates_a: dict[float, set[int]], b: str, rates_b: dict[float, set[int]]) -> PlannedPair:
    shared = [len(of_a & of_b) for of_a, of_b in product(rates_a.values(), rates_b.values())]
    enough = [seeds for seeds in shared if seeds >= FEWEST_SEEDS]
    choices = [seeds for rates in (rates_a, rates_b) if (seeds := _seeds_that_choose(rates)) is not None]
    return PlannedPair(size, a, b, min(enough, default=max(shared)), min(shared), min(choices, default=None))


def _seeds_that_choose(rates: dict[float, set[int]]) -> int | None:
    """Return how many seeds choose among the rates of one direction if all cells finish; None for one rate."""
    if len(rates) == 1:
        return None
    return len(set.intersection(*rates.values())) or min(len(seeds) for seeds in rates.values())


def detectable(plan: Plan, seed_noise: float | None) -> dict[str, Any]:
    """Return for each planned pair the smallest true gap that is called `different` with a chance of `POWER`.

    `seed_noise` is the standard deviation of the paired per-seed difference in nats per token. The family is all
    pairs that get a verdict; each is held to Holm's strictest step, so the chance is at least that. `gap_sd` is in
    standard deviations of that difference, `gap_nats` in nats per token if the noise is given; both are None if seeds
    are too few for a verdict, or for the choice of the rates.
    """
    pairs = planned_pairs(plan)
    family = sum(pair.gets_verdict for pair in pairs)
    return {
        "power": POWER,
        "seed_noise": seed_noise,
        "family": family,
        "pairs": [
            {
                "size": pair.size, "a": pair.a, "b": pair.b, "seeds": pair.seeds, "fewest_seeds": pair.fewest,
                "choosing_seeds": pair.choosing_seeds,
                "gap_sd": gap,
                "gap_nats": None if gap is None or seed_noise is None else gap * seed_noise,
            }
            for pair in pairs
            for gap in [detectable_gap(pair.seeds, power=POWER, family=family) if pair.gets_verdict else None]
        ],
    }  # fmt: skip


def detectable_words(detected: dict[str, Any]) -> str:
    """Return the result of `detectable` as a line of text."""
    if not detected["pairs"]:
        return "no verdict: no size has two directions to compare"
    of_seeds: dict[tuple[int, int, int], list[dict[str, Any]]] = defaultdict(list)
    for pair in detected["pairs"]:
        choose = FEWEST_SEEDS if pair["choosing_seeds"] is None else min(pair["choosing_seeds"], FEWEST_SEEDS)
        of_seeds[pair["seeds"], pair["fewest_seeds"], choose].append(pair)
    parts = []
    for (seeds, fewest, choose), pairs in sorted(of_seeds.items(), reverse=True):
        which = f"{counted(len(pairs), 'pair')} with {counted(seeds, 'seed')}"
        which += f" ({fewest} where other rates turn out best)" if fewest < seeds else ""
        if seeds < FEWEST_SEEDS:
            parts.append(f"no verdict for {which} (it needs {FEWEST_SEEDS})")
        elif choose < FEWEST_SEEDS:
            parts.append(
                f"no verdict for {which} (the rate is chosen by {counted(choose, 'seed')}, it needs {FEWEST_SEEDS})"
            )
        elif detected["seed_noise"] is None:
            parts.append(f"{pairs[0]['gap_sd']:.2f} standard deviations of the paired seed difference for {which}")
        else:
            parts.append(
                f"{pairs[0]['gap_nats']:.4f} nats per token for {which}, at a seed noise of {detected['seed_noise']:g}"
            )
    if detected["family"] == 0:
        return "; ".join(parts)
    holm = f"Holm over {detected['family']}"
    return f"smallest gap seen with {100 * detected['power']:.0f} % power ({holm}): {'; '.join(parts)}"


def _identity(cell: Cell) -> dict[str, Any]:
    """Return a cell's identity, as a run has it, with a digest of the text's settings instead of its content.

    The text's own digest is not known before the text is read.
    """
    text = hashlib.sha256(text_key(cell.experiment).encode()).hexdigest()
    precision = cell.experiment.compute.precision
    return identity(cell.experiment, data=text, tokenizer="", precision=precision, steps=cell.steps)

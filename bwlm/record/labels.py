"""Labels of runs that are compared: the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bwlm.phases import PHASES, order
from bwlm.record.fingerprint import VARIED

_DIGESTS = ("tokenizer", "data", "code", "parent_recipe")
"""Fields of an identity that are digests in hex, a possible cause before its effect."""


_ANCESTORS = {name for phase in PHASES.values() for name in phase.follows}
"""Phases that fields of ancestors can be of; `rl.samples` is a run's own setting, of the section `rl`."""

DIGITS = 8
"""Digits of a digest that a label shows."""


def size_labels(identities: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a label of each cell, by the settings in which cells must agree to be compared.

    The label holds all settings that vary except direction, learning rate and seed. The depth is always in it, so
    settings that follow from the depth are left out, and so is a digest that follows from the rest. With several
    phases the phase is in it, and settings that follow from the phase are left out.
    """
    phases = sorted({str(fields["phase"]) for fields in identities.values()}, key=order)
    of_phase = {
        phase: {run: fields for run, fields in identities.items() if fields["phase"] == phase} for phase in phases
    }
    if len(phases) < 2:
        return _labels_of_phase(identities)
    return {
        run: f"{phase} {label}" for phase, fields in of_phase.items() for run, label in _labels_of_phase(fields).items()
    }


def _labels_of_phase(identities: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    varying = varying_settings(identities)
    labels = {
        run: " ".join([f"d{fields['depth']}", *(f"{name}={fields.get(name)}" for name in varying)])
        for run, fields in identities.items()
    }
    for name in _DIGESTS:
        digests = {run: str(fields.get(name)) for run, fields in identities.items()}
        if len(set(zip(labels.values(), digests.values(), strict=True))) > len(set(labels.values())):
            labels = {run: f"{label} {name}={digests[run][:DIGITS]}" for run, label in labels.items()}
    return labels


def varying_settings(identities: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the settings, except direction, learning rate, seed and depth, that do not follow from the depth, by name.

    Settings of ancestors come last, the nearest first, and are left out if they repeat another setting.
    """
    known = {name for fields in identities.values() for name in fields}
    depths = {fields["depth"] for fields in identities.values()}

    def varies(name: str, depth: int) -> bool:
        return len({str(fields.get(name)) for fields in identities.values() if fields["depth"] == depth}) > 1

    def values(name: str) -> list[str]:
        return [str(fields.get(name)) for fields in identities.values()]

    names = [name for name in known if setting_of(name)[1] not in {*VARIED, *_DIGESTS, "depth"}]
    varying: list[str] = []
    for name in sorted(names, key=setting_of):
        said = (setting_of(name)[1] == setting_of(other)[1] and values(name) == values(other) for other in varying)
        if any(varies(name, depth) for depth in depths) and not any(said):
            varying.append(name)
    return varying


def setting_of(name: str) -> tuple[int, str]:
    """Return the generation and the name of a field of `with_ancestors`: `mid.steps` is (2, steps).

    Fields of the run itself have generation 0; a phase's number counts back from the last phase.
    """
    phase, _, setting = name.partition(".")
    return (len(PHASES) - 1 - order(phase), setting) if phase in _ANCESTORS else (0, name)


def double_budget_pairs(identities: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the pairs of sizes that differ in their steps alone, of which the second has twice as many."""
    return [
        (once, twice)
        for once, fields in identities.items()
        for twice, others in identities.items()
        if others["steps"] == 2 * fields["steps"] and _same_but_budget(fields, others)
    ]


def _same_but_budget(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    free = dict.fromkeys((*VARIED, "steps"))
    return {**one, **free} == {**other, **free}

"""Settings that a phase takes from its parent run, and its own defaults.

Direction, depth, tokenizer, model and the reversal of conversations are the parent's. Another direction or reversal
is refused unless `differs` names it; the child's config then records it. Of the others only `model.document_mask` can
change on the way.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from bwlm.config import HORIZONS, Experiment
from bwlm.errors import UserError, nearest
from bwlm.paths import local_path
from bwlm.phases import LATER, PHASES
from bwlm.settings_file import Document, assign, holds

_SAME = ("depth", "tokenizer", "model")
_OWN = ("seed", "budget.batch_tokens", "model.document_mask")
"""Fields that are the parent's too, unless they are given."""
_OF_THE_FIRST = ("parent", "direction", *_SAME)
_MAY_DIFFER = {"direction": "direction", "data.reversal": "reversal"}
"""Fields that a phase may change on purpose, with their names in `differs`."""


def split_phases(names: str, where: str) -> list[str]:
    """Return the phases of a text such as `base,mid,sft`.

    Raises `UserError` for a name that is no phase, or an order in which phases cannot follow each other.
    """
    phases = [name.strip() for name in names.split(",")]
    for name in phases:
        if name not in PHASES:
            raise UserError(f"{where}: {name!r} is not one of {', '.join(PHASES)}{nearest(name, PHASES)}")
    _check_chain(phases, where)
    return phases


def check_phase_names(document: Document, first: str) -> list[str]:
    """Return the phases that follow the first of a file, in the order of training.

    Raises `UserError` for an unknown phase, and for one that cannot follow.
    """
    blocks = document.content.get("phases", {})
    if not isinstance(blocks, dict):
        raise UserError(f"{document.where('phases')}: must hold settings by phase, as in phases.sft.seed=1")
    for name, block in blocks.items():
        where = document.where(f"phases.{name}")
        if name not in LATER:
            raise UserError(f"{where}: not one of {', '.join(LATER)}{nearest(name, LATER)}")
        if not isinstance(block, dict | None):
            raise UserError(f"{where}: must hold settings (field: value)")
        _check_block(block or {}, name, document)
    following = [name for name in PHASES if name in blocks]
    _check_chain([first, *following], document.where("phases"))
    return following


def _check_block(block: Mapping[str, Any], name: str, document: Document) -> None:
    """Raise `UserError` if a block states its phase or parent, which follow from the order of the phases."""
    axes = block.get("axes")
    chosen = [f"axes.{field}" for field in axes] if isinstance(axes, dict) else []
    for field in (*block, *chosen):
        if field.removeprefix("axes.") in ("phase", "parent"):
            raise UserError(f"{document.where(f'phases.{name}.{field}')}: set by the order of the phases: leave it out")


def _check_chain(phases: list[str], where: str) -> None:
    for before, after in itertools.pairwise(phases):
        if before not in PHASES[after].follows:
            begins = " or ".join(PHASES[after].follows) or "nothing"
            raise UserError(f"{where}: {after} cannot follow {before}: it begins from {begins}")


def with_defaults(content: Mapping[str, Any], phase: str) -> dict[str, Any]:
    """Return the content of an experiment with its phase's defaults for the settings that it does not give."""
    filled = copy.deepcopy(dict(content))
    budget = filled.get("budget")
    has_horizon = isinstance(budget, dict) and any(budget.get(name) is not None for name in HORIZONS)
    for field, value in PHASES[phase].defaults.items():
        is_horizon = field.startswith("budget.")
        if not (has_horizon if is_horizon else holds(filled, field)):
            assign(filled, field, copy.deepcopy(value), field)
    return filled


def inherit(content: Mapping[str, Any], run: str, parent: Experiment, document: Document) -> dict[str, Any]:
    """Return the content of a child's experiment with the settings that it takes from its parent `run`.

    Raises `UserError` naming the field where another value is asked for.
    """
    child = copy.deepcopy(dict(content))
    child["parent"] = run
    values = parent.model_dump()
    named = child.get("differs")
    differs = named if isinstance(named, list) else []  # validation refuses anything else later
    if PHASES[parent.phase].reads_documents and not holds(child, "data.reversal"):
        assign(child, "data.reversal", parent.data.reversal, run)  # the parent has none: the child may choose
    for field in _fields(values, parent.phase):
        value = _value(values, field)
        if not holds(child, field):
            assign(child, field, value, run)
        elif not _agree(field, _value(child, field), value) and _MAY_DIFFER.get(field) not in differs:
            may = f", or set differs=[{_MAY_DIFFER[field]}] to change it on purpose" if field in _MAY_DIFFER else ""
            raise UserError(
                f"{document.where(field)}: {_value(child, field)}, but the parent {run} has {value}: leave it out{may}"
            )
    for field in _OWN:
        if not holds(child, field):
            assign(child, field, _value(values, field), run)
    if PHASES[child["phase"]].packs_whole and _value(child, "model.document_mask") is False:
        raise UserError(
            f"{document.where('model.document_mask')}: false, but attention in {child['phase']} always stays "
            "inside a conversation, as in a chat: leave it out"
        )
    return child


def _agree(field: str, one: Any, other: Any) -> bool:
    """Return whether two values are equal; a folder equals itself however it is spelled."""
    if field != "tokenizer.path" or not (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    folders = [local_path(address) for address in (one, other)]
    return one == other or (None not in folders and len({folder.resolve() for folder in folders if folder}) == 1)


def _fields(values: Mapping[str, Any], phase: str) -> Iterator[str]:
    for name in _SAME:
        if isinstance(values[name], dict):
            yield from (field for inner in values[name] if (field := f"{name}.{inner}") not in _OWN)
        else:
            yield name
    yield "direction"
    if not PHASES[phase].reads_documents:
        yield "data.reversal"


def _value(content: Mapping[str, Any], field: str) -> Any:
    value: Any = content
    for name in field.split("."):
        value = value[name]
    return value


def without_mixture(content: dict[str, Any], phase: str) -> dict[str, Any]:
    """Return the shared settings as `phase` takes them: if it reads documents, the mixture is for other phases."""
    data = content.get("data")
    if not PHASES[phase].reads_documents or not isinstance(data, dict):
        return content
    return content | {"data": {name: value for name, value in data.items() if name != "mixture"}}


def phase_content(content: Mapping[str, Any], phase: str, document: Document) -> tuple[dict[str, Any], Document]:
    """Return what a file or the flags say of a later phase: all shared settings, and over them `phases.<phase>`.

    Settings that a phase takes from its parent are left out: the file states them for the first phase.
    """
    own = copy.deepcopy({name: value for name, value in content.items() if name not in ("phases", *_OF_THE_FIRST)})
    own = without_mixture(own, phase)
    own["phase"] = phase
    places = dict(document.places)
    block = document.content["phases"][phase] or {}
    settings = dict(leaves({name: value for name, value in block.items() if name != "axes"}))
    if any(f"budget.{name}" in settings for name in HORIZONS) and isinstance(own.get("budget"), dict):
        own["budget"] = {name: value for name, value in own["budget"].items() if name not in HORIZONS}
    for field, value in settings.items():
        places[field] = document.place(f"phases.{phase}.{field}")
        assign(own, field, value, places[field])
    return own, Document(document.name, own, places)


def leaves(block: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted fields of a block and their values; a mixture is one value, and so is `tasks`."""
    for name, value in block.items():
        field = f"{section}{name}"
        if isinstance(value, dict) and field not in ("data.mixture", "tasks"):
            yield from leaves(value, f"{field}.")
        else:
            yield field, value

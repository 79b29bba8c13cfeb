"""Texts of all cells, prepared before anything is trained: documents, or mixtures of conversations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from bwlm.config import Experiment
from bwlm.errors import UserError
from bwlm.grid.cells import text_of
from bwlm.phases import PHASES
from bwlm.plan.spec import Cell, Plan, text_key
from bwlm.record.experiment import ExperimentFolder
from bwlm.text.corpus import Corpus
from bwlm.text.listing import NoSource
from bwlm.text.mixture import prepare_mixture
from bwlm.text.packing import Manifest, PackedSplit, RunJobs
from bwlm.text.prepare import Prepared, find_packed, prepare
from bwlm.text.tokenizer import Tokenizer
from tasks.sources import sources_of


def prepare_texts(plan: Plan, storage: Path, run: RunJobs, show: Callable[[str], None]) -> dict[str, Prepared]:
    """Return the prepared text of every cell, by the cell's id; cells that read the same text share it.

    `run` packs what is not in the cache.

    A phase after base uses its parent's tokenizer. Raises `UserError` for every fault of a text.
    """
    prepared: dict[str, Prepared] = {}
    known: dict[str, Prepared] = {}
    for cell in plan.cells:  # parents stand before their children
        tokenizer = _parents_tokenizer(cell, prepared, storage)
        key = f"{text_key(cell.experiment)} {tokenizer}"
        if key not in known:
            try:
                known[key] = _prepare(cell.experiment, tokenizer, storage, run, show)
                show(_amount_of(known[key]))
                if plan.is_grid and (warning := _warning_of(known[key], cell.experiment)):
                    show(f"warning: {warning}")
            except NoSource as error:
                known[key] = _packed_before(plan, cell, storage, error)
                show(f"note: the text that was packed before is used ({error})")
        prepared[cell.id] = known[key]
    return prepared


def _amount_of(prepared: Prepared) -> str:
    """Return how much text a run trains and validates on, in words."""
    manifest = prepared.manifest
    noun = "conversation" if manifest.sources else "document"
    train, validation = (_amount_words(split, noun) for split in (manifest.train, manifest.validation))
    return f"text: {train} to train on, {validation} for validation"


def _amount_words(split: PackedSplit, noun: str) -> str:
    documents = split.total("documents")
    return f"{documents:,} {noun}{'s' * (documents != 1)} of {split.total('tokens'):,} tokens"


def _warning_of(prepared: Prepared, experiment: Experiment) -> str:
    """Return why directions get no verdict on this text; '' if they may get one."""
    if not PHASES[experiment.phase].compared or prepared.manifest.validation.total("rows") > 1:
        return ""
    return (
        f"the validation text fills one row of {experiment.model.sequence_length:,} tokens, which leaves none to "
        "compare directions on: give more text"
    )


def _packed_before(plan: Plan, cell: Cell, storage: Path, error: NoSource) -> Prepared:
    """Return the text that a run with the same text has packed, for a cell whose source is gone; else raise `error`.

    A source that is gone and that no run of the plan has read is a slip of the pen, not a text that was packed.
    """
    for other in plan.cells:
        folder = ExperimentFolder(storage, other.id)
        if text_key(other.experiment) == text_key(cell.experiment) and folder.exists():
            config = folder.config()
            if text_of(config.experiment) != text_of(cell.experiment):
                raise UserError(f"{error}; {other.id} was trained on {text_of(config.experiment)}") from None
            if (packed := find_packed(storage, Path(config.corpus), config.identity["data"])) is not None:
                tokenizer = Path(config.tokenizer)
                loaded = Tokenizer.load(tokenizer, config.identity["tokenizer"])
                return Prepared(packed, Manifest.read(packed), loaded, tokenizer)
    raise error


def _parents_tokenizer(cell: Cell, prepared: dict[str, Prepared], storage: Path) -> Path | None:
    parent = cell.parent
    if parent is None:
        return None
    if parent in prepared:
        return prepared[parent].tokenizer_folder
    config = ExperimentFolder(storage, parent).config()
    # raises for a damaged tokenizer, before anything is packed with it
    Tokenizer.load(Path(config.tokenizer), config.identity["tokenizer"])
    return Path(config.tokenizer)


def _prepare(
    experiment: Experiment, tokenizer: Path | None, storage: Path, run: RunJobs, show: Callable[[str], None]
) -> Prepared:
    phase = PHASES[experiment.phase]
    if phase.reads_documents:
        recipe = experiment if tokenizer is None else _with_tokenizer(experiment, tokenizer)
        return prepare(recipe, storage, partial(_pack_corpus, run), show)
    assert tokenizer is not None, "only documents are read without a parent"
    width, whole = experiment.model.sequence_length, phase.packs_whole
    return prepare_mixture(sources_of(experiment), tokenizer, width, whole, storage, run, show)


def _pack_corpus(run: RunJobs, corpus: Corpus, tokenizer: Path, width: int, folder: Path) -> Manifest:
    from bwlm.text.stream import pack_corpus  # imports Ray, which text in the cache does not need

    return pack_corpus(corpus, tokenizer, width, folder, run)


def _with_tokenizer(experiment: Experiment, folder: Path) -> Experiment:
    """Return the experiment with a trained tokenizer in place of one that its documents would train."""
    settings = experiment.tokenizer.model_copy(update={"path": str(folder)})
    return experiment.model_copy(update={"tokenizer": settings})

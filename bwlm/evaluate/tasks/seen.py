"""Items that a model was trained on: their conversations stand in the mixture of its run or of an ancestor."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from bwlm.errors import UserError
from bwlm.record.bucket import fetch_text
from bwlm.record.experiment import ExperimentFolder
from bwlm.text.conversation import check_conversation, render
from bwlm.text.overlap import DocumentHashes, count_overlap
from bwlm.text.packing import Manifest
from bwlm.text.prepare import find_packed
from bwlm.text.tokenizer import Tokenizer
from tasks.task import RawConversation


def count_seen(folder: ExperimentFolder, tokenizer: Tokenizer, items: Iterable[RawConversation | None]) -> int | None:
    """Return how many of the items stand in the training conversations of a run or of its ancestors.

    An item is found if it stands there word for word, in the form in which its task is learned. None where the packed
    text of a mixture, or an ancestor, is gone, so that it cannot be known.
    """
    shards = _training_shards(folder)
    if shards is None:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "items.arrow"
        hashes = DocumentHashes()
        for item in items:
            if item is not None:
                hashes.add(render(check_conversation(item, "item"), tokenizer))
        hashes.save(path)
        return count_overlap(shards, [path]).validation


def _training_shards(folder: ExperimentFolder) -> Sequence[Path] | None:
    storage, link = folder.path.parent, folder.link()
    shards: list[Path] = []
    for run in (*(link.chain if link else ()), folder.id):
        try:
            config = ExperimentFolder(storage, run).config()
        except UserError:  # an ancestor that was deleted, or stayed behind when the run was moved
            return None
        if not config.experiment.data.mixture:
            continue
        fetch_text(Path(config.corpus))
        packed = find_packed(storage, Path(config.corpus), config.identity["data"])
        if packed is None:
            return None
        # a mixture's shards lie in the folders of its sources, beside its own
        files = [shard["file"] for shard in Manifest.read(packed).train.shards]
        shards += [Path(os.path.normpath(packed / "train" / str(file))) for file in files]
    return shards

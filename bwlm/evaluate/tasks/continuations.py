"""Texts to predict word for word: right if each token of the continuation is the likeliest one, given all before it.

Only a forward reading has a meaning: read backward, the continuation comes first, and its context would have to be
predicted word for word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bwlm.evaluate.tasks.choices import JudgedItem
from bwlm.evaluate.tasks.layout import Layout
from bwlm.evaluate.tasks.rules import FORWARD, Judged
from bwlm.evaluate.tasks.scores import Row, score
from bwlm.model.gpt import GPT
from tasks.items import ChoiceItem, ContinuationItem


def as_choice(item: ContinuationItem) -> ChoiceItem:
    """Return the item as one of a single choice, for its layout."""
    return ChoiceItem(
        id=item.id,
        place=item.place,
        stems=("",),
        choices=(item.continuation,),
        answer=0,
        context=item.context,
        group=item.group,
        shots=item.shots,
    )


def judge_continuations(
    model: GPT, layout: Layout, items: Sequence[ChoiceItem], progress: Callable[[int], object] = lambda items: None
) -> Iterator[JudgedItem]:
    """Yield whether a model predicts each continuation; the score is its log-probability in nats."""
    laid_out = [layout.lay_out(item, FORWARD) for item in items]
    rows = [Row(row.trunk, (row.branches[0].ids,), row.branches[0].border) for row in laid_out]
    for item, row, [scored] in zip(items, laid_out, score(model, rows, progress), strict=True):
        total = float(scored.log_p.sum())
        judged = Judged(0, float(scored.greedy.all()), False, total == total)
        yield JudgedItem(item, None, "exact", (total,), judged, 0, row.trunk + row.branches[0].ids)

"""ARC: multiple choice questions of school science, an easy and a hard set (Clark et al. 2018, arXiv 1803.05457)."""

from __future__ import annotations

from bwlm.errors import UserError
from tasks.choices import ChoiceQuestion, MultipleChoice, choice_question
from tasks.files import DataSet
from tasks.rows import Row


def _parse(row: Row) -> ChoiceQuestion:
    """Return the question of a row. `answerKey` names an entry of `choices.label`: letters, or in some rows digits."""
    choices = row.within("choices")
    texts, labels, key = choices.texts("text"), choices.texts("label"), row.text("answerKey")
    if len(texts) != len(labels):
        raise UserError(f"{choices.place}: {len(texts)} in text, {len(labels)} in label: give as many labels as texts")
    if key not in labels:
        raise UserError(f"{row.place}: answerKey: must be one of {', '.join(labels)} (found {key!r})")
    return choice_question(row, row.text("question"), texts, labels.index(key))


def _arc(name: str, subset: str) -> MultipleChoice:
    columns = ("question", "choices", "answerKey")
    return MultipleChoice(name, DataSet(f"tasks.{name}.path", "hf://datasets/allenai/ai2_arc", columns, subset), _parse)


ARC_EASY = _arc("arc_easy", "ARC-Easy")
ARC_CHALLENGE = _arc("arc_challenge", "ARC-Challenge")

"""MMLU: questions of 57 subjects with four choices (Hendrycks et al. 2021, arXiv 2009.03300).

The hub's training questions, `auxiliary_train`, come from other data sets; its `validation` and `dev` validate here.
"""

from __future__ import annotations

from tasks.choices import ChoiceQuestion, MultipleChoice, choice_question
from tasks.files import DataSet
from tasks.rows import Row


def _parse(row: Row) -> ChoiceQuestion:
    subject = row.text("subject") if "subject" in row.values else ""  # training does not read the column
    return choice_question(row, row.text("question"), row.texts("choices"), row.integer("answer"), subject)


MMLU = MultipleChoice(
    "mmlu",
    DataSet("tasks.mmlu.path", "hf://datasets/cais/mmlu", ("question", "choices", "answer"), subset="all"),
    _parse,
    test_columns=("subject",),
    shots=5,
)

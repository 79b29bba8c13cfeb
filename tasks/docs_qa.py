"""`builtin:docs_qa`: questions about the installed libraries, answered by the first paragraph of a docstring.

    user: What does `json.dumps` do?
    assistant: Serialize ``obj`` to a JSON formatted ``str``.

Libraries and split by modules are the same as in `builtin:pydocs`: a model whose base was trained on that
corpus has not read the docstrings that validate here. Questions are about public classes and functions whose first
paragraph is prose. Each name is asked about once, and each paragraph is an answer once, where it comes first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from bwlm.text.pydocs import PACKAGES, find_modules, held_out, pydocs_key, read_docstrings
from tasks.task import RawConversation, SplitName, draw, exchange, recipe_key, refuse_path

FORMAT_VERSION = 1
"""Version of this task, raised whenever the same docstrings would give other conversations."""

QUESTIONS = ("What does `{}` do?", "What is `{}` for?", "Explain `{}`.", "Describe `{}`.")
FEWEST_WORDS = 4
LONGEST = 400
"""Characters of the longest answer."""

_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_NOT_PROSE = re.compile(
    r"""
      ^[^A-Za-z`] | :$ | >>> | -> | :: | -- | ==               # lists, directives, signatures, tables
    | :param | :return | @param | \b(?:Args|Returns|Parameters):
    | \{\w*\} | %s | %\(                                       # texts that a program fills in
    | deprecated | obsolete | \b(?:TODO|FIXME)\b
    | ^(?:See|Alias|Same\ as|Like|Inherit|Override|Internal|Private|Copyright|Undocumented|Not\ implemented)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Paragraphs that are no sentence, and sentences that say nothing about the name that they document."""


@dataclass(frozen=True)
class _Entry:
    module: str
    qualified_name: str
    answer: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.qualified_name}"

    @property
    def public(self) -> bool:
        """True for a class or function if no part of its dotted name begins with `_`; False for a module."""
        return bool(self.qualified_name) and not any(part.startswith("_") for part in self.name.split("."))


@dataclass(frozen=True)
class DocsQA:
    """Task `builtin:docs_qa`."""

    name: str = "builtin:docs_qa"

    def conversations(self, split: SplitName, path: str | None = None) -> Iterator[RawConversation]:
        refuse_path(self.name, path)
        for entry in _entries():
            if held_out(entry.module) == (split == "validation"):
                asked = QUESTIONS[draw(f"question about {entry.name}") % len(QUESTIONS)]
                yield exchange(asked.format(entry.name), entry.answer)

    def key(self, path: str | None = None) -> str:
        refuse_path(self.name, path)
        return recipe_key(self.name, FORMAT_VERSION, pydocs_key())


@cache
def _entries() -> tuple[_Entry, ...]:
    """Return all questions' entries, in the order of a hash of their names. Takes some seconds, once in a process."""
    answers: dict[str, _Entry] = {}
    for module, found in read_docstrings(find_modules(PACKAGES)).items():
        for name, text in found:
            entry = _Entry(module, name, first_paragraph(text))
            answers.setdefault(entry.answer, entry)
    asked: dict[str, _Entry] = {}
    for entry in answers.values():
        if entry.public and is_prose(entry.answer):
            asked.setdefault(entry.name, entry)  # a name defined twice, for two platforms say, may have two docstrings
    return tuple(asked[name] for name in sorted(asked, key=draw))


def first_paragraph(docstring: str) -> str:
    """Return the first paragraph of a docstring on one line, with single spaces between its words."""
    text = docstring.encode(errors="ignore").decode()  # a lone surrogate, written as an escape, is not UTF-8
    return " ".join(_BLANK_LINE.split(text.strip(), maxsplit=1)[0].split())


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph can be an answer: enough words, not too many characters, no markup of another kind."""
    enough = len(paragraph.split()) >= FEWEST_WORDS and len(paragraph) <= LONGEST
    return enough and not _NOT_PROSE.search(paragraph)

"""Questions about the installed libraries: prose for answers, none twice, and none of what validates elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from bwlm.errors import UserError
from bwlm.text.pydocs import held_out
from tasks import docs_qa
from tasks.docs_qa import LONGEST, QUESTIONS, DocsQA, first_paragraph, is_prose
from tasks.task import RawConversation, exchange

TASK = DocsQA()
_ASKED = re.compile("|".join(re.escape(text).replace(r"\{\}", "([^`]+)") for text in QUESTIONS))


def asked(conversation: RawConversation) -> str:
    found = _ASKED.fullmatch(conversation[0]["content"])
    assert found
    return next(filter(None, found.groups()))


@pytest.fixture(scope="module")
def train() -> list[RawConversation]:
    return list(TASK.conversations("train"))


@pytest.fixture(scope="module")
def validation() -> list[RawConversation]:
    return list(TASK.conversations("validation"))


def test_some_thousands_of_which_about_a_tenth_validates(
    train: list[RawConversation], validation: list[RawConversation]
) -> None:
    assert 5000 < len(train) < 15_000
    assert 0.05 < len(validation) / (len(train) + len(validation)) < 0.15


def test_conversations_by_hand(train: list[RawConversation], validation: list[RawConversation]) -> None:
    answers = {asked(conversation): conversation[1]["content"] for conversation in train + validation}
    assert answers["json.dumps"] == "Serialize ``obj`` to a JSON formatted ``str``."
    assert answers["asyncio.locks.Event.wait"] == "Block until the internal flag is true."
    assert answers["click.formatting.HelpFormatter.write_usage"] == "Writes a usage line into the buffer."


def test_no_answer_comes_twice_and_no_question(train: list[RawConversation], validation: list[RawConversation]) -> None:
    both = train + validation
    assert len({conversation[1]["content"] for conversation in both}) == len(both)
    assert len({asked(conversation) for conversation in both}) == len(both)


def test_a_module_validates_where_it_does_in_the_corpus(
    train: list[RawConversation], validation: list[RawConversation]
) -> None:
    modules = set(docs_qa.find_modules(docs_qa.PACKAGES))
    for split, wanted in ((train, False), (validation, True)):
        for conversation in split:
            parts = asked(conversation).split(".")
            prefixes = [".".join(parts[:end]) for end in range(1, len(parts))]
            assert any(held_out(prefix) == wanted for prefix in prefixes if prefix in modules)


def test_answers_are_prose_on_one_line_about_what_is_public(
    train: list[RawConversation], validation: list[RawConversation]
) -> None:
    for conversation in train + validation:
        answer = conversation[1]["content"]
        assert answer == " ".join(answer.split())
        assert len(answer.split()) >= 4
        assert len(answer) <= LONGEST
        assert "deprecated" not in answer.lower()
        assert not any(part.startswith("_") for part in asked(conversation).split("."))
        answer.encode()


def test_every_way_of_asking_comes_about_as_often(train: list[RawConversation]) -> None:
    for template in QUESTIONS:
        start, end = template.split("{}")
        matching = [c for c in train if c[0]["content"].startswith(start) and c[0]["content"].endswith(end)]
        assert 0.2 < len(matching) / len(train) < 0.3


def test_neighbours_are_of_different_modules(train: list[RawConversation]) -> None:
    assert len({asked(conversation).split(".")[0] for conversation in train[:100]}) > 15


def test_every_process_gives_the_same(train: list[RawConversation]) -> None:
    command = (
        "import hashlib, json; from tasks.docs_qa import DocsQA\n"
        "print(hashlib.sha256(json.dumps(list(DocsQA().conversations('train'))).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    child = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == hashlib.sha256(json.dumps(train).encode()).hexdigest()


@pytest.mark.parametrize(
    ("docstring", "paragraph"),
    [
        ("One line.", "One line."),
        ("  Two\n   lines\tof it.  \n\nMore.", "Two lines of it."),
        ("First.\n   \nSecond.", "First."),
        ("Odd \udc80 escape.", "Odd escape."),
        ("", ""),
    ],
)
def test_first_paragraphs(docstring: str, paragraph: str) -> None:
    assert first_paragraph(docstring) == paragraph


@pytest.mark.parametrize(
    ("paragraph", "prose"),
    [
        ("Return the name of it.", True),
        ("``x`` stands for a number.", True),
        ("Return it.", False),
        ("word " * 100, False),
        ("a" * 10 + " b c d", True),
        (">>> f(1) is a test", False),
        ("f(x) -> the value of x", False),
        (":param x: the first of all", False),
        ("Deprecated since 3.9, use g instead.", False),
        ("An old name, deprecated in favour of g.", False),
        ("TODO: write what this does.", False),
        ("See the base class for more.", False),
        ("Override of the base class's method.", False),
        ("Seeing is believing, they say.", True),
        ("The first of these is taken:", False),
        ("-- a list of some things", False),
        ("Hello %s, this is a template", False),
        ("Hello {name}, this is a template", False),
        ("A dict such as {1: 2} is taken.", True),
    ],
)
def test_what_can_stand_as_an_answer(paragraph: str, prose: bool) -> None:
    assert is_prose(paragraph) == prose


def test_of_equal_paragraphs_the_first_answers_even_if_it_is_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    read = {
        "a": [("_hidden", "What two modules say alike."), ("f", "What is said\nin two modules.\n\nHere.")],
        "b": [("", "The module b has some words."), ("g", "What is said in two modules.\n\nThere.")],
        "c": [("h", "What two modules say alike."), ("T.__init__", "Make one of these.")],
        "d": [("T.i", "What is said only once."), ("T.i", "What is said of it elsewhere.")],
        "_e": [("j", "What a hidden module says.")],
    }
    monkeypatch.setattr(docs_qa, "find_modules", lambda packages: dict.fromkeys(read, ""))
    monkeypatch.setattr(docs_qa, "read_docstrings", lambda modules: read)
    entries = docs_qa._entries.__wrapped__()
    assert sorted((entry.name, entry.answer) for entry in entries) == [
        ("a.f", "What is said in two modules."),
        ("d.T.i", "What is said only once."),
    ]


def test_the_key_follows_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    key = TASK.key()
    assert TASK.key() == key
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert TASK.key() != key


def test_a_path_is_refused() -> None:
    for read in (TASK.key, lambda path: next(TASK.conversations("train", path))):
        with pytest.raises(UserError, match=r"^tasks\.builtin:docs_qa\.path: "):
            read("docs")


def test_questions_are_the_users_and_answers_the_assistants(train: list[RawConversation]) -> None:
    for conversation in train:
        question, answer = conversation
        assert conversation == exchange(question["content"], answer["content"])
        assert (question["role"], answer["role"]) == ("user", "assistant")

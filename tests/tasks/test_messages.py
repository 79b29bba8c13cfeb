"""Conversation sets as they lie on the hub: read in each of their layouts, and what cannot be used told or left out."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.config import Experiment, Recipe
from bwlm.errors import UserError
from bwlm.plan.spec import text_key
from bwlm.record.repeat import train_command
from bwlm.text.conversation import Message, check_conversation
from bwlm.text.mixture import ConversationSource
from tasks import rows
from tasks.faults import EXAMPLES, Faults
from tasks.messages import FileTask
from tasks.sources import sources_of
from tasks.task import exchange

law = settings(derandomize=True, deadline=None, max_examples=60)
TALKS = [exchange(f"Question {index}?", f"Answer {index}.") for index in range(60)]
BOTH = ("train", "validation")


def as_json(path: Path, held: list[Any]) -> Path:
    path.write_text(json.dumps(held, indent=1))
    return path


def as_lines(path: Path, held: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in held))
    return path


def as_parquet(path: Path, held: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(held), path, row_group_size=7)
    return path


def source_of(path: Path, skip: bool = False) -> ConversationSource:
    data = {"mixture": {str(path): 1.0}, "skip_invalid": skip}
    [source] = sources_of(Recipe.model_validate({"phase": "sft", "data": data}))
    return source


def read(source: ConversationSource) -> list[list[Message]]:
    """The conversations of both splits as they are rendered, in the order of their questions' numbers."""
    found = [check_conversation(messages, "x") for split in BOTH for messages in source.read(split)]  # type: ignore[arg-type]
    return sorted(found, key=lambda talk: int("".join(filter(str.isdigit, talk[0].content))))


def checked(source: ConversationSource) -> list[str]:
    """The lines that the first pass prints."""
    lines: list[str] = []
    source.check(lines.append)
    return lines


PLAIN = [[Message("user", f"Question {index}?"), Message("assistant", f"Answer {index}.")] for index in range(60)]


# ---- layouts ----


def ultrachat(index: int) -> dict[str, Any]:
    """HuggingFaceH4/ultrachat_200k, data/train_sft-*.parquet."""
    messages = [{"content": said["content"], "role": said["role"]} for said in TALKS[index]]
    return {"prompt": messages[0]["content"], "prompt_id": f"{index:064x}", "messages": messages}


def openhermes(index: int) -> dict[str, Any]:
    """teknium/OpenHermes-2.5, openhermes2_5.json: one array of ShareGPT conversations."""
    question, answer = (said["content"] for said in TALKS[index])
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer, "weight": 1}]
    return {"custom_instruction": None, "conversations": talk, "source": "airoboros2.2", "views": float("nan")}


def smoltalk(index: int) -> dict[str, Any]:
    """HuggingFaceTB/smoltalk, data/all/train-*.parquet, with the empty system messages of other exports."""
    return {"messages": [{"role": "system", "content": "" if index % 2 else None}, *TALKS[index]], "source": "magpie"}


def no_robots(index: int) -> dict[str, Any]:
    """HuggingFaceH4/no_robots, data/train-*.parquet."""
    return {**ultrachat(index), "category": "Open QA"}


def oasst(index: int) -> dict[str, Any]:
    """OpenAssistant's roles, its trees joined to conversations."""
    question, answer = (said["content"] for said in TALKS[index])
    talk = [{"role": "prompter", "content": question}, {"role": "assistant", "content": answer}]
    return {"message_tree_id": str(index), "lang": "en", "messages": talk}


def wildchat(index: int) -> dict[str, Any]:
    """allenai/WildChat: a column `conversation`, with more fields in each message."""
    return {"model": "gpt-4", "conversation": [{**said, "toxic": False, "turn_identifier": 1} for said in TALKS[index]]}


def text_parts(index: int) -> dict[str, Any]:
    """Messages as OpenAI's clients take them: lists of parts, and the role `developer`."""
    talk = [
        {"role": said["role"], "content": [{"type": "text", "text": part} for part in said["content"].partition(" ")]}
        for said in TALKS[index]
    ]
    return {"messages": [{"role": "developer", "content": []}, *talk]}


def json_text(index: int) -> dict[str, Any]:
    """Messages as JSON text in a column of strings."""
    return {"id": index, "messages": json.dumps(TALKS[index])}


LAYOUTS = (ultrachat, openhermes, smoltalk, no_robots, oasst, wildchat, text_parts, json_text)


@pytest.mark.parametrize(
    ("write", "ending"), [(as_parquet, ".parquet"), (as_lines, ".jsonl"), (as_json, ".json"), (as_lines, ".json")]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_each_layout_gives_the_same_conversations(
    layout: Callable[[int], Any], write: Callable[[Path, list[Any]], Path], ending: str, tmp_path: Path
) -> None:
    source = source_of(write(tmp_path / f"talks{ending}", [layout(index) for index in range(len(TALKS))]))
    assert read(source) == PLAIN
    assert checked(source) == [f"checking the conversations of {source.name}"]


def test_a_system_message_by_any_of_its_names_begins_the_users(tmp_path: Path) -> None:
    for key, role, text in (
        ("role", "developer", "content"),
        ("from", "system", "value"),
        ("role", "system", "content"),
    ):
        talk = [{key: role, text: "Be kind."}, *({key: one["role"], text: one["content"]} for one in TALKS[7])]
        path = as_lines(tmp_path / "talks.jsonl", [{"messages": talk}])
        assert read(source_of(path)) == [[Message("user", "Be kind.\n\nQuestion 7?"), PLAIN[7][1]]]


@pytest.mark.parametrize("nested", [True, False])
def test_columns_that_are_dictionary_encoded(nested: bool, tmp_path: Path) -> None:
    if nested:
        roles = pa.array(["user", "assistant"] * len(TALKS)).dictionary_encode()
        contents = pa.array([said["content"] for talk in TALKS for said in talk]).dictionary_encode()
        entries = pa.StructArray.from_arrays([roles, contents], names=["role", "content"])
        column = pa.ListArray.from_arrays(range(0, 2 * len(TALKS) + 1, 2), entries)
    else:  # as pandas writes a categorical
        column = pa.array([json.dumps(talk) for talk in TALKS]).dictionary_encode()
    pq.write_table(pa.table({"messages": column}), tmp_path / "talks.parquet", row_group_size=7)
    assert "dictionary" in str(pq.read_schema(tmp_path / "talks.parquet"))
    assert read(source_of(tmp_path / "talks.parquet")) == PLAIN
    if nested:
        file = pq.ParquetFile(tmp_path / "talks.parquet")
        with pytest.raises(pa.ArrowNotImplementedError):  # which is why row groups are read one by one
            list(file.iter_batches())


# ---- JSON arrays ----

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@law
@given(st.lists(values, max_size=6), st.sampled_from([None, 1]), st.integers(1, 9))
def test_an_array_is_read_in_pieces_of_any_size(held: list[Any], indent: int | None, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHARACTERS_AT_ONCE", size)
        text = "[" + json.dumps(held, indent=indent)[1:]
        assert list(rows._elements(io.StringIO(text))) == held


def test_an_array_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHARACTERS_AT_ONCE", 50)
    file = io.StringIO(json.dumps(["x" * 20] * 1000))
    elements = rows._elements(file)
    for index in range(900):
        next(elements)
        assert file.tell() <= 24 * (index + 1) + 100


def test_an_element_that_never_ends_is_not_read_to_the_end_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHARACTERS_AT_ONCE", 10)
    monkeypatch.setattr(rows, "_LONGEST_ELEMENT", 100)
    file = io.StringIO('["a", "' + "x" * 10_000)
    elements = rows._elements(file)
    assert next(elements) == "a"
    with pytest.raises(ValueError, match="Unterminated string"):
        next(elements)
    assert file.tell() < 300


@pytest.mark.parametrize(
    ("cut", "told"),
    [
        (lambda text: text[:-1], "row 59: not valid JSON (the array does not end)"),
        (lambda text: text[: len(text) // 2], "row 30: not valid JSON ("),
        (lambda text: text.replace("},\n {", "}\n {", 1), "row 0: not valid JSON (no comma before '{"),
        (lambda text: text.replace('"id": 3', '"id": three'), "row 3: not valid JSON (Expecting value)"),
    ],
)
def test_a_damaged_array_is_told_with_its_row(cut: Callable[[str], str], told: str, tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    path.write_text(cut(json.dumps([json_text(index) for index in range(60)], indent=1)))
    for skip in (True, False):  # what follows the damage cannot be read, so nothing may be left out
        with pytest.raises(UserError) as error:
            checked(source_of(path, skip))
        assert str(error.value).startswith(f"{path}: {told}")


def test_json_beside_parquet_tells_of_the_data(tmp_path: Path) -> None:
    as_parquet(tmp_path / "train.parquet", [ultrachat(index) for index in range(60)])
    as_json(tmp_path / "dataset_infos.json", [])
    before = source_of(tmp_path)
    assert (read(before), before.notes) == (PLAIN, ())
    other = as_json(tmp_path / "scores.json", [])
    after = source_of(tmp_path)
    assert (read(after), after.key) == (PLAIN, before.key)
    assert after.notes == (f"{other}: not read: files of parquet or JSONL lie beside it",)


def test_a_folder_of_json_alone(tmp_path: Path) -> None:
    as_json(tmp_path / "train.json", [openhermes(index) for index in range(50)])
    as_json(tmp_path / "validation.json", [openhermes(index) for index in range(50, 60)])
    as_json(tmp_path / "dataset_info.json", [{"features": []}])
    assert len(list(source_of(tmp_path).read("validation"))) == 10
    assert read(source_of(tmp_path)) == PLAIN


# ---- what cannot be used ----


def said(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more} for role, content in turns]}


UNUSABLE: dict[str, Any] = {
    "tool turn": said(("user", "a"), ("tool", "b"), ("assistant", "c")),
    "message without text": said(("user", "a"), ("assistant", None)),
    "one role twice in a row": said(("user", "a"), ("user", "b"), ("assistant", "c")),
    "ends with the user": said(("user", "a"), ("assistant", "b"), ("user", "c")),
    "begins with the assistant": said(("assistant", "a"), ("user", "b"), ("assistant", "c")),
    "part that is no text": said(("user", [{"type": "image_url", "image_url": {"url": "x"}}]), ("assistant", "b")),
    "system message after the first message": said(("user", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")),
    "unknown role": said(("user", "a"), ("teacher", "b")),
    "message without a role": said((None, "a"), ("assistant", "b")),  # type: ignore[arg-type]
    "empty conversation": said(),
    "no list of messages": {"text": "### Human: a"},
}


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        *UNUSABLE.items(),
        ("tool turn", said(("user", "a"), ("assistant", "b"), tool_calls=[{"id": "1"}])),
        ("tool turn", {"conversations": [{"from": "human", "value": "a"}, {"from": "function-call", "value": "b"}]}),
        ("tool turn", {"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]}),
        ("part that is no text", said(("user", ["a"]), ("assistant", "b"))),
        ("message without text", said(("user", " "), ("assistant", "b"))),
        ("empty conversation", said(("system", "a"))),
        ("no list of messages", {"messages": "[{'role': 'user'}]"}),
        ("no list of messages", 7),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place_or_left_out(kind: str, row: Any, tmp_path: Path) -> None:
    held = [json_text(index) for index in range(60)]
    for path in (
        as_lines(tmp_path / "talks.jsonl", [*held[:4], row, *held[4:]]),
        as_json(tmp_path / "talks.json", [*held[:4], row, *held[4:]]),
    ):
        place = f"{path}: {'line 5' if path.suffix == '.jsonl' else 'row 4'}: "
        with pytest.raises(UserError) as error:
            checked(source_of(path))
        heading, counted, example, advice = str(error.value).split("\n")
        assert heading == f"data.mixture: {path}: 1 of 61 conversations cannot be used:"
        assert counted == f"  {kind}: 1"
        assert example.startswith(f"    {place}")
        assert advice == "repair the file, or set data.skip_invalid=true to leave these conversations out"
        with pytest.raises(UserError, match=f"^{place}"):
            read(source_of(path))

        left = source_of(path, skip=True)
        assert checked(left)[1:] == [f"{path}: 1 of 61 conversations left out, which cannot be used: {kind} 1"]
        assert read(left) == PLAIN


def test_all_faults_are_told_at_once_the_most_frequent_kind_first(tmp_path: Path) -> None:
    held = [said(*((role, str(index)) for role in ("user", "assistant"))) for index in range(40)]
    bad = [UNUSABLE["tool turn"], *[UNUSABLE["ends with the user"]] * 5, *UNUSABLE.values()]
    path = as_lines(tmp_path / "talks.jsonl", [*held, *bad])
    with path.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError) as error:
        checked(source_of(path))
    lines = str(error.value).split("\n")
    assert lines[0] == f"data.mixture: {path}: 18 of 58 conversations cannot be used:"
    kinds = [line.strip() for line in lines if line.startswith("  ") and not line.startswith("    ")]
    assert kinds[:2] == ["ends with the user: 6", "tool turn: 2"]
    assert sorted(kinds[2:]) == sorted(
        f"{kind}: 1" for kind in {*UNUSABLE, "not valid JSON"} - {"ends with the user", "tool turn"}
    )
    examples = lines[2 : 2 + EXAMPLES]
    assert [line.split(": ")[1] for line in examples] == ["line 42", "line 43", "line 44"]
    assert lines[2 + EXAMPLES] == "  tool turn: 2"
    [told] = checked(source_of(path, skip=True))[1:]
    assert told.startswith(f"{path}: 18 of 58 conversations left out, which cannot be used: ends with the user 6, tool")


def test_parquet_names_its_row_and_a_file_without_the_column_is_refused_whole(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "talks.parquet", [ultrachat(0), UNUSABLE["ends with the user"]])
    with pytest.raises(
        UserError, match=rf"  ends with the user: 1\n    {path}: row 1: messages: from user to user: begin"
    ):
        checked(source_of(path))
    path = as_parquet(tmp_path / "messages.parquet", [{"message_id": "1", "parent_id": None, "text": "a"}])  # oasst2
    for skip in (True, False):
        with pytest.raises(UserError, match=r"no column 'messages' or .*: it has message_id, parent_id, text$"):
            checked(source_of(path, skip))


def test_nothing_usable_leaves_an_empty_split(tmp_path: Path) -> None:
    source = source_of(as_lines(tmp_path / "talks.jsonl", [UNUSABLE["unknown role"]]), skip=True)
    assert "1 of 1 conversations left out" in checked(source)[1]
    assert read(source) == []


# ---- identity ----

FILE_KEY = "2ea5290f4ddacffe"
HELD_OUT = [9, 11, 12, 73, 136, 150, 161, 185, 188, 203, 210, 219, 228, 235, 273, 285, 292, 314, 352]


def test_keys_and_splits_of_files_that_were_always_read_stay(tmp_path: Path) -> None:
    """Runs name their text by these: another key or split would make other data of the same file."""
    talks = [exchange(f"Question {index}?", f"Answer {index}.") for index in range(400)]
    path = as_lines(tmp_path / "talks.jsonl", [{"source": "x", "messages": talk} for talk in talks])
    assert FileTask(str(path)).key() == FILE_KEY
    assert source_of(path).key == FILE_KEY
    assert [talks.index(talk) for talk in source_of(path).read("validation")] == HELD_OUT


def test_what_is_left_out_moves_no_other_conversation_to_the_other_split(tmp_path: Path) -> None:
    held = [openhermes(index) for index in range(60)]
    clean = source_of(as_json(tmp_path / "clean.json", held))
    mixed = [row for index, row in enumerate(held) for row in (*list(UNUSABLE.values())[: index % 3], row)]
    left = source_of(as_json(tmp_path / "mixed.json", mixed), skip=True)
    for split in BOTH:
        assert list(left.read(split)) == list(clean.read(split))  # type: ignore[arg-type]


def test_leaving_out_is_part_of_what_names_the_data(tmp_path: Path) -> None:
    path = as_json(tmp_path / "talks.json", [openhermes(index) for index in range(60)])
    assert source_of(path).key != source_of(path, skip=True).key
    for skip in (False, True):
        assert source_of(path, skip).key == source_of(path, skip).key


def test_a_run_tells_that_it_leaves_conversations_out() -> None:
    content = {
        "phase": "sft",
        "parent": "p",
        "direction": "forward",
        "depth": 1,
        "data": {"mixture": {"talks.json": 2.0}},
    }
    given_all = Experiment.model_validate(content)
    left_out = given_all.model_copy(update={"data": given_all.data.model_copy(update={"skip_invalid": True})})
    assert text_key(left_out) != text_key(given_all), "cells of one launch must not share this text"
    assert "data.skip_invalid=true" in train_command("mine", left_out)
    assert given_all.data.mixture_words == "talks.json x 2"
    assert left_out.data.mixture_words == "talks.json x 2, invalid conversations left out"


def test_a_file_without_a_usable_conversation_is_not_told_to_leave_them_out() -> None:
    faults = Faults("talks", 2, {"no list of messages": 2}, {"no list of messages": ["talks: row 0: x"]})
    assert faults.refusal().endswith("\nrepair the file")
    faults.conversations = 3
    assert faults.refusal().endswith("or set data.skip_invalid=true to leave these conversations out")

"""Files of a task: found wherever they lie, split by their names or by hash, and every fault told with its place."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bwlm.config import Recipe
from bwlm.errors import UserError
from tasks.files import HELD_OUT
from tasks.gsm8k import GSM8K
from tasks.messages import SMOLTALK, FileTask
from tasks.sources import sources_of
from tasks.task import RawConversation, SplitName, exchange

TALKS = [exchange(f"Question {index}?", f"Answer {index}.") for index in range(400)]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
COLUMNS = "'messages' or 'conversations' or 'conversation'"


def write(path: Path, conversations: list[RawConversation]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"messages": conversations, "source": ["x"] * len(conversations)}), path)
    else:
        lines = "".join(json.dumps({"source": "x", "messages": talk}) + "\n" for talk in conversations)
        content = lines.encode()
        compress = {".gz": gzip.compress, ".zst": partial(pa.compress, codec="zstd", asbytes=True)}.get(path.suffix)
        path.write_bytes(compress(content) if compress else content)
    return path


def read(source: Path | str) -> tuple[list[RawConversation], list[RawConversation]]:
    task = FileTask(str(source))
    return list(task.conversations("train")), list(task.conversations("validation"))


def sorted_talks(conversations: list[RawConversation]) -> list[RawConversation]:
    return sorted(conversations, key=TALKS.index)


# ---- formats and places ----


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_formats_hold_the_same_and_split_the_same(ending: str, tmp_path: Path) -> None:
    train, validation = read(write(tmp_path / f"talks{ending}", TALKS))
    assert sorted_talks(train + validation) == TALKS
    assert [talk for talk in TALKS if talk in validation] == validation, "in the order of the file"
    assert len(validation) == pytest.approx(len(TALKS) / HELD_OUT, rel=0.5)
    assert (train, validation) == read(write(tmp_path / "other" / "talks.jsonl", TALKS))


def test_which_rows_validate_does_not_follow_from_their_place(tmp_path: Path) -> None:
    _, validation = read(write(tmp_path / "talks.jsonl", TALKS))
    _, reversed_ = read(write(tmp_path / "reversed.jsonl", TALKS[::-1]))
    _, twice = read(write(tmp_path / "twice.jsonl", TALKS + TALKS))
    assert validation == reversed_[::-1]
    assert twice == validation * 2


def test_a_folder_a_glob_and_a_uri(tmp_path: Path) -> None:
    folder = write(tmp_path / "talks" / "train-00000-of-00002.parquet", TALKS[:100]).parent
    write(folder / "train-00001-of-00002.jsonl", TALKS[100:200])
    write(folder / "test-00000-of-00001.jsonl.gz", TALKS[200:])
    (folder / "README.md").write_text("Not data.")
    for source in (folder, f"{folder}/*", f"file://{folder}", f"file://{folder}/*", f"{folder}/train*"):
        train, validation = read(source)
        assert sorted_talks(train + validation) == TALKS[:200], "the test file is left alone"
        assert 0 < len(validation) < 20


def test_a_home_and_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "talks.jsonl", TALKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("talks.jsonl") == read("~/talks.jsonl") == read(tmp_path / "talks.jsonl")
    assert FileTask("talks.jsonl").key() == FileTask("~/talks.jsonl").key()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    for name, talks in (("train.parquet", TALKS[:50]), ("val.jsonl.gz", TALKS[50:60]), ("val.txt", [])):
        filesystem.put(str(write(tmp_path / name, talks)), f"/bwlm-talks/{name}")
    yield "memory://bwlm-talks"
    filesystem.rm("/bwlm-talks", recursive=True)


def test_any_file_system_of_fsspec(memory: str) -> None:
    assert read(memory) == (TALKS[:50], TALKS[50:60])
    key = FileTask(memory).key()
    assert FileTask(memory).key() == key
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/bwlm-talks/train.parquet", filesystem.cat("/bwlm-talks/train.parquet"))
    assert FileTask(memory).key() != key


def test_a_subset_is_found_below_a_path_or_at_it(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.parquet", TALKS[:9])
    write(tmp_path / "data" / "val-00000-of-00001.parquet", TALKS[9:12])
    for path in (tmp_path, tmp_path / "data"):
        assert list(SMOLTALK.conversations("train", str(path))) == TALKS[:9]
        assert list(SMOLTALK.conversations("validation", str(path))) == TALKS[9:12]


def test_nanochats_lines_are_lists_of_messages(tmp_path: Path) -> None:
    (tmp_path / "identity.jsonl").write_text("".join(json.dumps(talk) + "\n\n" for talk in TALKS))
    assert read(tmp_path / "identity.jsonl") == read(write(tmp_path / "talks.jsonl", TALKS))


def test_other_fields_of_a_message_are_left_out(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be kind.", "name": "x"}, {"content": "Hé 🙂", "role": "user", "n": 1}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}))
    train, validation = read(tmp_path / "talks.jsonl")
    assert train + validation == [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hé 🙂"}],
    ]


def test_no_row_is_no_conversation(tmp_path: Path) -> None:
    assert read(write(tmp_path / "talks.jsonl", [])) == ([], [])


# ---- splits by name ----


def test_a_test_file_is_neither_trained_nor_validated_on_and_that_is_told(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", TALKS[:200])
    test = write(tmp_path / "test.jsonl", TALKS[200:])
    train, validation = read(tmp_path)
    assert sorted_talks(train + validation) == TALKS[:200]
    assert FileTask(str(tmp_path)).splits().notes == (f"{test}: left for evaluation, neither trained nor validated on",)
    write(tmp_path / "dev.jsonl", TALKS[300:])
    assert read(tmp_path) == (TALKS[:200], TALKS[300:])


@pytest.mark.parametrize("name", ["test.jsonl", "gsm8k-test.parquet", "data/eval-00000-of-00001.jsonl"])
def test_a_test_file_alone_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, TALKS)
    told = refusal(path)
    assert told == (
        f"tasks.mine.path: {path}: no file to train on ({path} is left for evaluation): "
        "name a training file, or rename one whose name says another split than it is"
    )
    assert refusal(path.parent).startswith(f"tasks.mine.path: {path.parent}: no file to train on")
    with pytest.raises(UserError, match=rf"^data\.mixture: {path}: no file to train on"):
        FileTask(str(path)).key()


def test_a_copy_of_the_test_file_under_another_name_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", TALKS[:200])
    test = write(tmp_path / "test.jsonl", TALKS[200:])
    copy = Path(shutil.copy(test, tmp_path / "more.jsonl"))
    train, validation = read(tmp_path)
    assert sorted_talks(train + validation) == TALKS[:200]
    assert (
        f"{copy}: not trained on: it has the content of {test}, which is held out"
        in FileTask(str(tmp_path)).splits().notes
    )


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_no_source_of_a_mixture_trains_on_what_another_holds_out(held_out: str, tmp_path: Path) -> None:
    """Neither through a link nor in a copy."""
    first, other = tmp_path / "first", tmp_path / "other"
    write(first / "train.jsonl", TALKS[:40])
    held = write(first / f"{held_out}.jsonl", TALKS[40:60])
    write(other / "mine.jsonl", TALKS[60:90])

    def sources() -> list[str]:
        data = {"mixture": {str(first): 1.0, str(other): 1.0}}
        return [source.name for source in sources_of(Recipe.model_validate({"phase": "sft", "data": data}))]

    assert sources() == [str(first), str(other)]
    for make in (lambda path: path.symlink_to(held), lambda path: shutil.copyfile(held, path)):
        make(other / "more.jsonl")
        refusal = rf"^data\.mixture: {other}: {other}/more\.jsonl is held out by {first}, .*: train on other files"
        with pytest.raises(UserError, match=refusal):
            sources()
        (other / "more.jsonl").unlink()


def test_a_link_to_a_file_is_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "data" / "a.jsonl", TALKS)
    (path.parent / "b.jsonl").symlink_to(path)
    (tmp_path / "data" / "c.jsonl").hardlink_to(path)
    assert read(path.parent) == read(path)
    assert len(FileTask(str(path.parent)).splits().notes) == 2


def test_the_key_does_not_depend_on_the_spelling_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "my talks" / "train.jsonl", TALKS[:9]).parent
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = ("my talks", "link", "~/link/", "link/../my talks", f"{tmp_path}//link", f"FILE://{folder}",
                 f"file:{folder}", f"file://localhost{tmp_path}/my%20talks")  # fmt: skip
    assert {FileTask(spelling).key() for spelling in spellings} == {FileTask(str(folder)).key()}


# ---- keys ----


def test_the_key_follows_from_content_names_and_task(tmp_path: Path) -> None:
    folder = tmp_path / "talks"
    first, second = write(folder / "train.jsonl", TALKS[:9]), write(folder / "val.jsonl", TALKS[9:12])
    task = FileTask(str(folder))
    keys = [task.key()]
    os.utime(first, ns=(1, 1))
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert task.key() == FileTask("elsewhere").key(str(folder)) == FileTask(str(copy)).key() == keys[0]

    first.write_bytes(first.read_bytes().replace(b"a", b"b", 1))  # of the same size
    os.utime(first, ns=(1, 1))
    keys.append(task.key())
    second.rename(folder / "other.jsonl")  # no file validates now
    keys.append(task.key())
    keys.append(GSM8K().key(str(folder)))
    assert len(set(keys)) == len(keys)


class Hub:
    """A file system that tells of a file what the hub's does."""

    blob_id = "0"

    def glob(self, pattern: str) -> list[str]:
        assert pattern == "datasets/openai/gsm8k/main/*"
        return ["datasets/openai/gsm8k/main/train-00000-of-00001.parquet", "datasets/openai/gsm8k/main/README.md"]

    def info(self, name: str) -> dict[str, Any]:
        return {"name": name, "size": 9, "type": "file", "blob_id": self.blob_id, "last_commit": None}

    def isdir(self, name: str) -> bool:
        return False

    def unstrip_protocol(self, name: str) -> str:
        return f"hf://{name}"


def test_the_key_names_the_content_that_the_hub_has(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda address: (hub, address.removeprefix("hf://")))
    key = GSM8K().key()
    assert GSM8K().key() == key
    hub.blob_id = "1"
    assert GSM8K().key() != key


# ---- faults ----


def refusal(source: Path | str, task: Any = None) -> str:
    read_task = task or FileTask("hub", "mine")
    with pytest.raises(UserError) as error:  # noqa: PT012 - which split a bad row falls to is its hash's
        for split in SPLITS:
            list(read_task.conversations(split, str(source)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    kinds = ".parquet, .jsonl, .jsonl.gz, .jsonl.zst or .json"
    assert refusal(tmp_path / "none") == (
        f"tasks.mine.path: {tmp_path}/none does not exist: give a folder, glob, file or URI of {kinds} files"
    )
    assert f"no {kinds} file in {tmp_path}:" in refusal(tmp_path)
    assert refusal("memory://bwlm-no-talks").startswith(f"tasks.mine.path: no {kinds} file in memory://bwlm-no-talks")
    assert refusal(tmp_path / "none", GSM8K()).startswith("tasks.gsm8k.path: ")
    with pytest.raises(UserError, match=rf"^data\.mixture: {tmp_path}/none\.jsonl does not exist: "):
        FileTask(f"{tmp_path}/none.jsonl").key()


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "chat.csv").write_text("role,content")
    assert refusal(tmp_path / "chat.csv") == (
        f"tasks.mine.path: {tmp_path}/chat.csv: name a .parquet, .jsonl, .jsonl.gz, .jsonl.zst or .json file"
    )


def test_the_hub_out_of_reach_says_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(UserError) as error:
        next(GSM8K().conversations("train"))
    assert str(error.value) == (
        "tasks.gsm8k.path: hf://datasets/openai/gsm8k/main cannot be listed (no route to host): check the address, "
        "or give the path of a copy"
    )


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    columns = [pa.array(["x"]), pa.array(["y"]), pa.array([1])]
    pq.write_table(pa.table(columns, names=["question", "question", "answer"]), tmp_path / "talks.parquet")
    assert refusal(tmp_path, GSM8K()) == (
        f"{tmp_path}/talks.parquet: 2 columns are called 'question': rename all but one"
    )


def test_two_fields_of_one_name_in_an_object(tmp_path: Path) -> None:
    message = pa.StructArray.from_arrays([pa.array(["user"])] * 3, names=["role", "content", "content"])
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 1], message)}), tmp_path / "talks.parquet")
    assert refusal(tmp_path) == (
        f"{tmp_path}/talks.parquet: messages: 2 columns are called 'content': rename all but one"
    )


def test_parquet_without_the_column_names_the_nearest(tmp_path: Path) -> None:
    pq.write_table(pa.table({"mesages": ["x"], "id": [1]}), tmp_path / "talks.parquet")
    assert refusal(tmp_path) == (
        f"{tmp_path}/talks.parquet: no column {COLUMNS} (did you mean 'mesages'?): it has mesages, id"
    )
    pq.write_table(pa.table({"questions": ["x"], "answer": ["y"]}), tmp_path / "talks.parquet")
    assert "no column 'question' (did you mean 'questions'?)" in refusal(tmp_path, GSM8K())


ROW = "[{'role': 'user', 'content': 'x'}]".replace("'", '"')


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"mesages": []}', f"no field {COLUMNS} (did you mean 'mesages'?): it has mesages"),
        ('{"messages": 3}', "messages: must be a list of messages (found 3)"),
        ('{"messages": "3"}', "messages: must be a list of messages (found 3)"),
        ('{"messages": null}', "messages: must be a list of messages (found nothing)"),
        ('{"messages": ["x"]}', "messages[0]: must be an object with role and content (found a string)"),
        ('[{"role": "user", "content": "x"}, {"role": "user"}]', "messages[1]: no field 'content': it has role"),
        (
            '[{"rle": "user", "content": "x"}]',
            "messages[0]: no field 'role' (did you mean 'rle'?): it has rle, content",
        ),
        ('[{"role": 3, "content": "x"}]', "messages[0]: role: must be a string (found 3)"),
        (
            '[{"role": "user", "content": ["x"]}]',
            "messages[0]: content[0]: must be a part of type 'text' with a text (found a string)",
        ),
        ('[{"role": "user", "content": null}]', "messages[0]: content: must be a string (found nothing)"),
        ("7", "must be an object or a list of messages (found 7)"),
        ('"x"', "must be an object or a list of messages (found a string)"),
    ],
)
def test_a_line_that_is_no_conversation(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "talks.jsonl").write_text(f"{ROW}\n\n{line}\n{ROW}\n")
    assert refusal(tmp_path) == f"{tmp_path}/talks.jsonl: line 3: {told}"


@pytest.mark.parametrize("line", ["{'messages': []}", "[" * 10**5, "[}", "NULL"], ids=len)
def test_a_line_that_is_not_json(line: str, tmp_path: Path) -> None:
    (tmp_path / "talks.jsonl").write_text(f"{ROW}\n{line}\n")
    assert re.fullmatch(
        rf"{tmp_path}/talks\.jsonl: line 2: not valid JSON \(.+\): correct the line or remove it", refusal(tmp_path)
    )


def test_a_line_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "talks.jsonl").write_bytes(ROW.encode() + b'\n[{"role": "user", "content": "\xff"}]\n')
    assert re.fullmatch(
        rf"{tmp_path}/talks\.jsonl: line 2: not valid JSON \('utf-8' codec .*\): correct .*", refusal(tmp_path)
    )


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (
            pa.array(["x", "y"]),
            "row 0: messages: a text that is not the JSON of a list of messages (Expecting value: line 1 column 1 "
            "(char 0))",
        ),
        (
            pa.array([[{"role": "user", "content": "x"}], None]),
            "row 1: messages: must be a list of messages (found nothing)",
        ),
        (
            pa.array([[{"role": "user", "content": "x"}], [{"role": "user", "content": None}]]),
            "row 1: messages[0]: content: must be a string (found nothing)",
        ),
        (pa.array([[{"role": "user"}]]), "row 0: messages[0]: no field 'content': it has role"),
    ],
)
def test_a_row_of_parquet_that_is_no_conversation(column: pa.Array, told: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": column}), tmp_path / "talks.parquet")
    assert refusal(tmp_path) == f"{tmp_path}/talks.parquet: {told}"


def test_damaged_files(tmp_path: Path) -> None:
    for name in ("talks.parquet", "talks.jsonl.gz"):
        whole = write(tmp_path / name, TALKS).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: ")
    (tmp_path / "talks.jsonl.gz").write_bytes(b"not gzip")
    assert "talks.jsonl.gz: cannot be read after line 0 (zlib inflate failed" in refusal(tmp_path / "talks.jsonl.gz")


def test_a_task_to_evaluate_names_the_hub_that_is_out_of_reach(tmp_path: Path) -> None:
    """A closed port of this machine stands for a network that is not there."""
    names = ("arc_easy", "mmlu", "gsm8k", "humaneval")
    script = f"""
from bwlm.errors import UserError
from bwlm.evaluate.tasks.request import TaskRequest, read_tasks
for name in {names}:
    try:
        read_tasks(TaskRequest(name))
    except UserError as error:
        print(error)
"""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", script]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        assert re.fullmatch(
            rf"tasks\.{name}\.path: hf://datasets/\S+: the hub \(http://127\.0\.0\.1:9\) cannot be reached "
            r"\(.*Connection refused\): check the network, or give the path of a copy",
            line,
        )

"""`bwlm data` and `bwlm tokenizer`, as a person and as a script call them, on the tests' corpus."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bwlm.cli import main
from bwlm.config import Recipe
from bwlm.text.prepare import Pack, Prepared, prepare
from bwlm.text.tokenizer import Tokenizer
from tests.conftest import WriteShards
from tests.families import untrained_child
from tests.runs import make_run

Bwlm = Callable[..., tuple[int, str, str]]
SMALL = ["--set", "tokenizer.vocab_size=400", "--set", "model.sequence_length=64"]


@pytest.fixture
def bwlm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, prepared: Prepared
) -> Bwlm:
    """Runs the command line in this process; storage is below tmp_path. Returns exit code, stdout and stderr."""
    monkeypatch.setenv("BWLM_STORAGE", str(tmp_path / "storage"))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["bwlm", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


def source(corpus: Path) -> list[str]:
    return [*SMALL, "--set", f"data.source={corpus}"]


@pytest.mark.usefixtures("ray_cluster")
def test_prepare_then_inspect_every_direction(bwlm: Bwlm, corpus: Path, prepared: Prepared) -> None:
    code, out, _ = bwlm("data", "prepare", "--json", *source(corpus))
    assert code == 0
    counted = json.loads(out)
    assert counted["digest"] == prepared.manifest.digest
    assert counted["train"]["shards"] == 3
    assert counted["train"]["empty_documents"] > 0
    assert 0 < counted["train"]["padding_share"] < 0.1
    overlap = prepared.manifest.overlap
    assert overlap is not None
    assert (counted["train"]["in_both_splits"], counted["validation"]["in_both_splits"]) == (
        overlap.train, overlap.validation,
    )  # fmt: skip

    shown: dict[str, Any] = {}
    for direction in ("forward", "backward", "bidirectional", "permuted"):
        code, out, _ = bwlm("data", "inspect", "--json", "--direction", direction, "--rows", "8", *source(corpus))
        assert code == 0
        shown[direction] = json.loads(out)
    texts = [[row["text"] for row in document["rows"]] for document in shown.values()]
    assert texts[0]
    assert all(other == texts[0] for other in texts)
    for document in shown.values():
        for row in document["rows"]:
            assert row["segments"][0] == 0
            assert all(row["ids"][start] == document["bos"] for start in row["segments"])
            assert len(row["ids"]) == len(row["targets"]) == 64


def positions(out: str, title: str) -> list[tuple[str, str]]:
    """(read, target) at each position of a row as it is printed."""
    _, _, row = out.partition(title)
    lines = [line for line in row.partition("\nrow ")[0].splitlines() if " -> " in line]
    assert [int(line.split()[0]) for line in lines] == list(range(len(lines)))
    return [(line.split()[1], line.split()[3]) for line in lines]


def test_inspect_shows_a_person_the_reversal(bwlm: Bwlm, write_shards: WriteShards, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "text", ["ab", "cde", "abcdefgh"], ["held out"])
    byte_tokens = ["--set", "tokenizer.vocab_size=264", "--set", "model.sequence_length=16"]
    code, out, err = bwlm("data", "inspect", "--rows", "1", "--set", f"data.source={folder}", *byte_tokens)
    assert code == 0
    assert "a preview: the first documents of shard_00000.parquet; a run shuffles its rows\n" in err
    assert "permuted" not in out, "a control, shown where it is named"
    assert "row 0, forward: 16 positions, 3 segments\n" in out
    bos, none = "<|bos|>", "·"
    assert positions(out, "row 0, forward")[:4] == [(bos, "a"), ("a", "b"), ("b", bos), (bos, "c")]
    assert "segment 1, positions 0 to 2\n" in out
    # the third document goes on in the next row: its last token in this row has no target
    assert positions(out, "row 0, forward")[-1] == ("e", none)
    backward = positions(out, "row 0, backward")
    assert backward[:3] == [(bos, "e"), ("e", "d"), ("d", "c")]
    assert backward[-4:] == [(bos, "b"), ("b", "a"), ("a", bos), (bos, none)]
    marked = positions(out, "row 0, bidirectional")
    assert {marked[at][1] for at, (read, _) in enumerate(marked) if read == bos} == {none}
    assert {marked[at + 1][0] for at, (read, _) in enumerate(marked[:-1]) if read == bos} <= {
        "<|forward|>", "<|backward|>",
    }  # fmt: skip


def test_inspect_reads_only_the_head_of_the_first_shard(
    bwlm: Bwlm, write_shards: WriteShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bwlm.text.prepare._HEAD_CHARACTERS", 1000)
    texts = [f"text {number} " * 50 for number in range(600)]
    folder = write_shards(tmp_path / "text", texts, texts[:9], texts[:8], row_group_size=300, compression="none")
    first, *others = sorted(folder.iterdir())
    for other in others:
        other.write_bytes(b"no parquet " * (len(other.read_bytes()) // 11))
    first.write_bytes(first.read_bytes().replace(b"text 450", b"\xff\xfe\xfd\xfc 450"))  # in the second row group
    shown = ["data", "inspect", "--rows", "1", "--direction", "backward", *source(folder)]
    code, out, _ = bwlm(*shown)
    assert code == 0
    assert len(positions(out, "row 0, backward")) > 60
    assert not (tmp_path / "storage").exists()
    code, _, err = bwlm(*shown, "--json")  # the rows that a run reads need the whole corpus
    assert code == 2
    assert "not a readable parquet file" in err


def test_inspect_shows_the_rows_of_a_run_once_they_are_prepared(
    bwlm: Bwlm, corpus: Path, recipe_for: Callable[..., Recipe], pack_in_process: Pack, tmp_path: Path
) -> None:
    prepare(recipe_for(corpus), tmp_path / "storage", pack_in_process, lambda _: None)
    _, out, err = bwlm("data", "inspect", "--rows", "1", "--direction", "forward", *source(corpus))
    assert "preview" not in err
    row = json.loads(bwlm("data", "inspect", "--json", "--rows", "1", "--direction", "forward", *source(corpus))[1])
    [row] = row["rows"]
    shown = positions(out, "row 0, forward")
    assert [target == "·" for _, target in shown] == [target < 0 for target in row["targets"][: len(shown)]]
    assert [at for at, (read, _) in enumerate(shown) if read == "<|bos|>"][: len(row["segments"])] == row["segments"]
    assert len(row["segments"]) == 1
    assert "row 0, forward: 64 positions, 1 segment\n" in out
    assert "padding, position 63\n" in out


def test_tokenizer_train_show_and_use(bwlm: Bwlm, corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    code, out, _ = bwlm("tokenizer", "train", "--json", "--output", str(own), *source(corpus))
    assert code == 0
    trained = json.loads(out)
    assert trained["vocab_size"] == 400
    assert 1 < trained["bytes_per_token"] < 10
    assert Tokenizer.load(own).digest == trained["digest"]
    code, out, _ = bwlm("tokenizer", "show", "--json", *source(corpus), "--set", f"tokenizer.path={own}")
    assert code == 0
    assert json.loads(out)["digest"] == trained["digest"]
    code, out, _ = bwlm("tokenizer", "show", *source(corpus))
    assert trained["digest"] in out


def test_a_sharegpt_file_is_shown_and_its_faults_are_told(bwlm: Bwlm, corpus: Path, tmp_path: Path) -> None:
    talk = [{"from": "system", "value": ""}, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    talks = [{"id": str(index), "conversations": talk} for index in range(3)]
    (tmp_path / "hermes.json").write_text(json.dumps([{"conversations": talk[1:2]}, *talks], indent=1))
    words = ["data", "inspect", "--phase", "sft", "--rows", "1", "--direction", "forward", *source(corpus)]
    mixture = ["--set", f"data.mixture={{{tmp_path}/hermes.json: 1.0}}"]
    code, out, err = bwlm(*words, *mixture)
    assert (code, out) == (2, "")
    assert f"1 of 4 conversations cannot be used:\n  ends with the user: 1\n    {tmp_path}/hermes.json: row 0: " in err
    code, out, err = bwlm(*words, *mixture, "--set", "data.skip_invalid=true")
    assert code == 0
    assert "1 of 4 conversations left out, which cannot be used: ends with the user 1" in err
    assert "<|user_start|>Why?<|user_end|><|assistant_start|>«Because.<|assistant_end|>»" in out.replace(
        "\n", ""
    )  # a row of 84 columns


def headings(out: str) -> list[str]:
    return re.findall(r"(/\S+\.jsonl \d+, \w+)", " ".join(out.split()))


def write_talks(folder: Path, name: str) -> str:
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": f"Of {name}."}]
    (folder / f"{name}.jsonl").write_text(f"{json.dumps({'messages': talk})}\n" * 3)
    return f"{folder}/{name}.jsonl"


def test_conversations_of_all_sources_come_in_turn_under_a_legend(bwlm: Bwlm, corpus: Path, tmp_path: Path) -> None:
    one, two = write_talks(tmp_path, "one"), write_talks(tmp_path, "two")
    words = ["data", "inspect", "--phase", "sft", "--direction", "forward", *source(corpus)]
    mixture = ["--set", f"data.mixture={{{one}: 1.0, {two}: 1.0}}"]
    code, out, err = bwlm(*words, "--rows", "3", *mixture)
    assert code == 0
    assert headings(out) == [f"{one} 0, forward", f"{two} 0, forward", f"{one} 1, forward"]
    assert out.startswith("between « and »: what a model is trained to write\n")
    assert "«Of two.<|assistant_end|>»" in out.replace("\n", "")
    assert "validation" not in err
    assert headings(bwlm(*words, "--rows", "1", *mixture)[1]) == [f"{one} 0, forward"]


def test_conversations_as_a_child_of_a_run_reads_them(bwlm: Bwlm, prepared: Prepared, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    base = make_run(prepared, storage, "base", direction="backward")
    untrained_child(base, "sft", "sft", data={"reversal": "turns"})
    mixture = f"{{{write_talks(tmp_path, 'one')}: 1.0}}"
    words = ["data", "inspect", "--phase", "sft", "--rows", "1", "--set", f"data.mixture={mixture}"]
    code, out, err = bwlm(*words, "--parent", "base")
    assert (code, [line for line in err.splitlines() if "checking the conversations of" not in line]) == (0, [])
    assert [heading.rpartition(", ")[2] for heading in headings(out)] == ["backward"]
    assert not (storage / "cache").exists()
    assert "<|assistant_start|>" in out.partition("<|user_start|>")[0], "reversed as a whole"
    turns = bwlm(*words, "--parent", "base", "--set", "data.reversal=turns")[1]
    assert "<|assistant_start|>" not in turns.partition("<|user_start|>")[0]
    assert bwlm(*words, "--parent", "sft")[1] == turns, "the parent's reversal"
    code, _, err = bwlm(*words, "--parent", "bas")
    assert code == 2
    assert "bas: no such experiment" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "inspect", "--direction", "backwards"], "did you mean 'backward'"),
        (["data", "inspect", "--parent", "mine"], "--parent: rows of base have none: leave it out, or name a later"),
        (["data", "inspect", "--rows", "0"], "rows"),
        (["data", "inspect", "--json"], "--direction"),
        (["data", "prepare", "--set", "data.source=/no/such/folder"], "data.source: /no/such/folder does not exist"),
        (["data", "prepare", "--set", "model.sequence_lenght=64"], "did you mean 'sequence_length'"),
        (["tokenizer", "train", "--set", "tokenizer.vocab_size=10"], "tokenizer.vocab_size"),
        (["tokenizer", "show", "--set", "tokenizer.path=/no/such"], "/no/such"),
        (["data", "inspekt"], "inspekt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(bwlm: Bwlm, tmp_path: Path, words: list[str], message: str) -> None:
    code, out, err = bwlm(*words)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "storage").exists()

"""What every analysis does with runs that were really trained, whole and damaged; transfer, places and layers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from bwlm.analysis.commands.compare import compare
from bwlm.analysis.commands.layers import over_time
from bwlm.analysis.commands.positions import KINDS, document_lengths, positions
from bwlm.analysis.commands.representations import representations
from bwlm.analysis.commands.result import Analysis
from bwlm.analysis.commands.transfer import transfer
from bwlm.analysis.report.study import write_experiment_report
from bwlm.analysis.runs.audit import audit
from bwlm.analysis.runs.findings import find
from bwlm.analysis.runs.losses import byte_counts_of, load_losses
from bwlm.cli import main
from bwlm.errors import UserError
from bwlm.paths import read_json, write_json
from bwlm.record.catalog.select import choose
from bwlm.record.experiment import ExperimentFolder, list_experiments
from bwlm.text.corpus import read_texts
from bwlm.text.prepare import Prepared
from bwlm.text.tokenizer import Tokenizer, byte_counts
from tests.analysis.storage import without_hash_of_log
from tests.runs import make_run

ALL: dict[str, Callable[[list[ExperimentFolder]], Analysis]] = {
    "compare": compare,
    "transfer": transfer,
    "positions": positions,
    "gradients": lambda folders: over_time("gradients", folders),
    "activations": lambda folders: over_time("activations", folders),
    "representations": representations,
}


@pytest.mark.parametrize("name", ALL)
def test_each_writes_a_picture_and_a_table(folders: list[ExperimentFolder], tmp_path: Path, name: str) -> None:
    found = ALL[name](folders)
    assert found.notes == []
    assert found.findings
    assert not any("nan" in line for line in found.findings)
    files = found.write_all(tmp_path / "deeper" / name)
    assert [path.suffix for path in files] == [".html", ".svg", ".csv", ".md", *[".csv"] * len(found.more)]
    assert all(path.stat().st_size > 200 for path in files[:4])
    assert "http" not in files[1].read_text().replace("http://www.w3.org", "")
    again = pd.read_csv(files[2])
    assert list(again.columns) == list(found.table.columns)
    assert len(again) == len(found.table)
    text = files[3].read_text()
    for file, (title, table) in zip(files[4:], found.more.items(), strict=True):
        assert file.stem == f"{name}-{title.replace(' ', '-')}"
        assert pd.read_csv(file).shape == table.shape
        assert f"\n{title.capitalize()}:\n\n| {table.columns[0]} | " in text
    found.write(tmp_path / "only.png")
    assert (tmp_path / "only.png").read_bytes().startswith(b"\x89PNG")


def test_transfer_is_the_losses_of_both_readings(folders: list[ExperimentFolder], trained: Path) -> None:
    table = transfer(folders).table.set_index(["direction", "reading"])
    losses = [load_losses(ExperimentFolder(trained, run), "backward") for run in ("f_s0", "f_s1")]
    crossed = np.mean([one["nll"].sum() / one["tokens"].sum() for one in losses])
    assert table.loc[("forward", "backward"), "loss"] == pytest.approx(crossed)
    found = transfer(folders).findings
    [misled] = [line for line in found if "on forward text the wrong marker" in line]
    wrong, right = (
        load_losses(ExperimentFolder(trained, "x_s0"), name) for name in ("forward_marked_backward", "forward")
    )
    apart = (wrong["nll"].sum() - right["nll"].sum()) / right["tokens"].sum()
    assert misled.startswith("d2, lr 1: on forward text the wrong marker costs a bidirectional model ")
    assert abs(apart) > 1e-6  # else the marker would not have been another one
    assert misled.endswith(f" {apart:+.4f} nats per token (one seed)")
    more = transfer(folders).more
    price = more["other reading"].set_index("direction")
    native = np.mean([load_losses(ExperimentFolder(trained, run), "forward")["nll"].sum() for run in ("f_s0", "f_s1")])
    assert price.loc["forward", "nats"] == pytest.approx(crossed - native / right["tokens"].sum())
    assert price["reading"].to_dict() == {"forward": "backward", "backward": "forward", "bidirectional": "backward"}
    assert price["seeds"].to_dict() == {"forward": 2, "backward": 2, "bidirectional": 1}
    marker = more["wrong marker"].set_index("reading")
    assert marker.loc["forward", "nats"] == pytest.approx(apart)
    assert set(transfer([folder for folder in folders if folder.id != "x_s0"]).more) == {"other reading"}
    native = table["native"]
    assert native.to_dict() == {
        ("backward", "backward"): True, ("backward", "forward"): False, ("bidirectional", "backward"): True,
        ("bidirectional", "forward"): True, ("forward", "backward"): False, ("forward", "forward"): True,
    }  # fmt: skip


def test_places_share_out_every_token(folders: list[ExperimentFolder], trained: Path) -> None:
    table = positions(folders).table
    losses = load_losses(ExperimentFolder(trained, "x_s0"), "forward")
    for _, group in table.groupby(["direction", "kind"]):
        assert group["tokens"].sum() == losses["tokens"].sum()
        assert group["accuracy"].between(0, 1).all()
    mean = load_losses(ExperimentFolder(trained, "x_s0"), "backward")["nll"].sum() + losses["nll"].sum()
    part = table[(table["direction"] == "bidirectional") & (table["kind"] == KINDS[0])]
    assert (part["loss"] * part["tokens"]).sum() == pytest.approx(mean / 2, rel=1e-5)
    # documents lie where the length of their whole text says, however little of it was evaluated
    lengths = document_lengths(ExperimentFolder(trained, "x_s0").config().corpus)
    assert lengths is not None
    of_document = losses.groupby(2.0 ** np.floor(np.log2(lengths.loc[losses["document"]].to_numpy())))["tokens"].sum()
    part = table[(table["direction"] == "bidirectional") & (table["kind"] == KINDS[3])]
    assert part.set_index("bin")["tokens"].to_dict() == of_document.to_dict()
    for figure in ("loss", "accuracy"):
        assert (table[f"{figure}_low"] <= table[figure]).all()
        assert (table[f"{figure}_high"] >= table[figure]).all()
    spread = (table["loss_low"] < table["loss_high"]).groupby(table["direction"]).all()
    assert spread.to_dict() == {"backward": True, "bidirectional": False, "forward": True}  # one bidirectional seed
    # what a reading begins with costs it most
    first = table[table["bin"] == 1].set_index(["direction", "kind"])["loss"]
    assert first["forward", KINDS[0]] > first["forward", KINDS[1]]


def test_a_documents_length_is_that_of_its_whole_text(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bwlm.analysis.commands.positions._AT_ONCE", 7)
    texts = [text for part in read_texts(prepared.corpus.validation[0].uri, "text") for text in part]
    expected = [len(prepared.tokenizer.encode(text or "")) for text in texts]
    lengths = document_lengths(str(prepared.folder))
    assert lengths is not None
    assert lengths.to_dict() == {document: length for document, length in enumerate(expected) if length}
    assert document_lengths(str(tmp_path)) is None


def test_layers_over_time(folders: list[ExperimentFolder]) -> None:
    gradients = over_time("gradients", folders).table
    assert sorted(set(gradients["step"])) == [4, 8, 12]
    assert set(gradients["layer"]) == {"embedding", "0", "1", "output"}
    assert set(gradients["what"]) == {
        "embedding", "lm_head", "attention.query", "attention.key", "attention.value", "attention.output",
        "mlp.up", "mlp.down",
    }  # fmt: skip
    activations = over_time("activations", folders).table
    assert set(activations["what"]) == {"stream", "attention", "mlp", "hidden"}
    assert (activations[activations["what"] == "hidden"]["sparsity"] > 0.2).all()  # ReLU


def test_what_differs_in_more_than_the_direction_is_refused(
    trained: Path, folders: list[ExperimentFolder], prepared: Prepared, tmp_path: Path
) -> None:
    assert audit(folders).passed == 4
    assert audit(folders).refused == []
    other = make_run(
        prepared, tmp_path, "other", depth=2, direction="backward", budget={"steps": 9, "batch_tokens": 512}
    )
    found = audit([*folders[2:4], other])
    assert found.passed == 0
    [line] = found.refused
    assert line == "refused: f_s0 and other: differ in steps: 12 -> 9"
    # but a bidirectional run of twice the steps has read as much in each direction
    twice = make_run(
        prepared, tmp_path, "twice", depth=2, direction="bidirectional", budget={"steps": 24, "batch_tokens": 512}
    )
    found = audit([*folders[2:4], twice])
    assert (found.passed, found.doubled, found.refused) == (0, 1, [])


def test_pairs_count_the_bytes_of_a_token_alike(trained: Path, tmp_path: Path) -> None:
    storage = tmp_path / "copy"
    shutil.copytree(trained, storage)
    folders = [ExperimentFolder(storage, name) for name in ("f_s0", "b_s0", "f_s1", "b_s1")]
    counts = {byte_counts_of(folder) for folder in folders}
    assert counts == {byte_counts(Tokenizer.load(Path(folders[0].config().tokenizer)).token_bytes())}
    assert (audit(folders).passed, audit(folders).refused) == (2, [])
    for folder in folders:  # as of another version, which counts otherwise
        path = folder.evaluation("base", "forward") / "validation.json"
        if folder.id == "b_s0":
            write_json(path, read_json(path) | {"token_bytes": "0" * 16})
        elif folder.id == "b_s1":  # of an earlier version, which does not say
            write_json(path, {name: value for name, value in read_json(path).items() if name != "token_bytes"})
    found = audit(folders)
    assert found.passed == 1
    assert found.refused == [f"refused: f_s0 and b_s0: differ in bytes per token: {counts.pop()} -> {'0' * 16}"]
    told = find(folders)
    assert any("'b_s0'" in line and "by other tables (token_bytes " in line for line in told.not_compared)
    assert told.gaps == []


def test_a_damaged_log_is_named_and_the_rest_goes_on(trained: Path, tmp_path: Path) -> None:
    storage = tmp_path / "copy"
    shutil.copytree(trained, storage)
    for run in ("f_s0", "b_s0"):
        without_hash_of_log(storage / run)
    (storage / "f_s0" / "base.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (storage / "b_s1" / "base.h5").unlink()
    found = positions(list_experiments(storage))
    assert sorted(note.split(":")[0].removeprefix(f"{storage}/") for note in found.notes) == [
        "b_s1/base.h5",
        "f_s0/base.h5",
    ]
    assert found.table.groupby("direction")["runs"].first().to_dict() == {
        "backward": 1,
        "bidirectional": 1,
        "forward": 1,
    }
    with h5py.File(storage / "b_s0" / "base.h5", "r+") as file:  # readable, with something else in its place
        del file["validation/document"]
    assert any("b_s0/base.h5: damaged (" in note for note in positions(list_experiments(storage)).notes)
    (storage / "b_s0" / "metrics.jsonl").write_text("")
    emptied = "b_s0: its metrics.jsonl holds no step, so it is left out"
    assert compare(list_experiments(storage)).notes == [emptied]
    with pytest.raises(UserError, match=r"f_s0/base\.h5: damaged, not readable as HDF5"):
        positions([ExperimentFolder(storage, "f_s0")])
    whole, told = choose(storage, ["*"])
    assert {folder.id for folder in whole}.isdisjoint({"f_s0", "b_s0", "b_s1"})
    assert [line.split(": ")[:3] for line in told] == [
        ["b_s0 is left out", "it is damaged", "base.h5"],
        ["b_s1 is left out", "it is damaged", "base.h5"],
        ["f_s0 is left out", "it is damaged", "base.h5"],
    ]
    assert "; metrics.jsonl: 0 bytes, and " in told[0]


def flip_chunk(path: Path, column: str) -> None:
    """One byte of the compressed data of a column's newest entry."""
    with h5py.File(path, "r") as file:
        chunk = file[column].id.get_chunk_info(file[column].id.get_num_chunks() - 1)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size // 2)
        byte = raw.read(1)
        raw.seek(-1, 1)
        raw.write(bytes([byte[0] ^ 0xFF]))


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("positions", "validation/loss"), ("gradients", "gradients/rms"), ("activations", "activations/rms"),
        ("representations", "representations/states"), ("representations", "attention/entropy"),
    ],
)  # fmt: skip
def test_a_flipped_byte_in_a_log_costs_that_run_in_every_analysis(
    trained: Path, tmp_path: Path, name: str, column: str
) -> None:
    """HDF5's own checksum tells it of a run that noted no hash."""
    storage = tmp_path / "copy"
    shutil.copytree(trained, storage)
    without_hash_of_log(storage / "f_s0")
    flip_chunk(storage / "f_s0" / "base.h5", column)
    found = ALL[name](choose(storage, ["*"])[0])
    [note] = found.notes
    assert re.match(r".*f_s0/base\.h5: damaged \(", note)
    assert found.findings
    for file in write_experiment_report(ExperimentFolder(storage, "f_s0")):
        assert file.stat().st_size


def test_the_command(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["bwlm", "analyze", *words, "--storage", str(trained)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    code, out, err = run("transfer", "g", "--json", "--output", str(tmp_path / "t.csv"))
    assert (code, err) == (0, f"written: {tmp_path / 't.csv'}\n")
    shown = json.loads(out)
    assert {row["direction"] for row in shown["table"]} == {"forward", "backward"}
    assert [row["direction"] for row in shown["more"]["other reading"]] == ["backward", "forward"]
    assert run("positions", "f_s9")[0] == 2
    code, out, err = run("compare", "z*")
    assert (code, out, err.count("\n")) == (2, "", 1)
    code, out, err = run("compare", "g")
    assert out.startswith("d2: backward needs ")
    folder = trained / "analyses" / "g"
    assert err.splitlines() == [f"written: {folder}/: compare.html, compare.svg, compare.csv, compare.md"]
    code, out, err = run("gap", "*")
    assert code == 0
    assert "forward → backward" in out
    assert "too few seeds to tell" in out
    assert "lacks" not in err
    before = len(list(folder.parent.glob("*/gap.svg")))
    run("gap", "f_*", "b_s0")  # another question leaves the first one's files alone
    assert len(list(folder.parent.glob("*/gap.svg"))) == before + 1
    code, _, err = run("gap", "*", "--output", "/proc/gap.svg")
    assert (code, err.splitlines()[-1].startswith("bwlm: --output: /proc/gap.svg cannot be written (")) == (2, True)
    code, _, err = run("gap", "f_*")
    assert code == 2
    assert "only forward has a best learning rate" in err
    assert run("gap")[0] == run("gap", "g", "--from", "x.csv")[0] == 2

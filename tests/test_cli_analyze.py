"""`bwlm analyze gap`: a verdict on anyone's file, in words, as JSON, as a chart and a table; and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bwlm.stats.gaps import gaps
from bwlm.stats.loss_file import read_losses
from bwlm.stats.loss_table import COLUMNS
from tests.analysis.storage import finish, make_cell
from tests.shell import Shell, check_mistake
from tests.stats.test_gaps import GOLDEN, flat_table, table
from tests.test_readme import ROOT, blocks, write_files

LOSSES = table(GOLDEN)
FINDING = {"size", "a", "b", "seeds", "gap_nats", "gap_percent", "bootstrap", "seed_interval", "noise_floor", "verdict"}


def write(losses: pd.DataFrame, path: Path) -> str:
    losses.to_parquet(path) if path.suffix == ".parquet" else losses.to_csv(path, index=False)
    return path.name


def findings(shell: Shell, losses: pd.DataFrame, name: str = "losses.csv", *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = shell.json("analyze", "gap", "--from", write(losses, shell.folder / name), *options)
    return found


@pytest.mark.parametrize("name", ["losses.csv", "losses.parquet"])
def test_gaps_as_json(name: str, shell: Shell) -> None:
    [found] = findings(shell, LOSSES, name)
    [g] = gaps(LOSSES)
    assert found.keys() >= FINDING
    assert (found["size"], found["a"], found["b"]) == (4, "forward", "backward")
    assert (found["seeds"], found["paired_seeds"]) == (3, [0, 1, 2])
    assert found["gap_nats"] == g.gap_nats == pytest.approx(0.2)  # b - a, worked out in tests/stats/test_gaps.py
    assert (found["gap_bpb"], found["gap_percent"]) == (g.gap_bpb, g.gap_percent)
    assert found["bootstrap"] == list(g.bootstrap)
    assert found["seed_interval"] == pytest.approx([-0.048414, 0.448414], abs=1e-6)
    assert (found["noise_floor"], found["p"], found["p_adjusted"]) == (g.noise_floor, g.p, g.p_adjusted)
    assert (found["verdict"], found["reason"]) == ("no difference seen", g.reason)
    assert [path.name for path in shell.folder.iterdir()] == [name]


def test_losses_whose_bytes_are_counted_by_other_tables_are_refused(shell: Shell) -> None:
    """A public trainer's byte count was once wrong by 0.05 %: more than many a gap."""
    counted = LOSSES.assign(token_bytes="0123456789abcdef")
    assert findings(shell, counted, "one.csv") == findings(shell, counted, "one.parquet") == findings(shell, LOSSES)
    unknown = counted.assign(token_bytes=["" if name == counted["run"].iloc[0] else "1e5" for name in counted["run"]])
    assert findings(shell, unknown, "partly.csv") == findings(shell, LOSSES)
    last = counted["run"].iloc[-1]
    other = counted.assign(token_bytes=["fedcba" if run == last else "1e5" for run in counted["run"]])
    for name in ("two.csv", "two.parquet"):
        answer = shell("analyze", "gap", "--from", write(other, shell.folder / name))
        told = f"and '{last}' of size 4 count the bytes of tokens by other tables (token_bytes 1e5 and fedcba)"
        check_mistake(answer, told)


def test_one_finding_for_each_size_and_pair(shell: Shell) -> None:
    by_direction = {"bidirectional": [2.5, 2.6, 2.4], "backward": [2.2, 2.1, 2.3], "forward": [2.0, 2.1, 1.9]}
    losses = pd.concat([flat_table(by_direction, size) for size in ("124M", 4)])
    found = findings(shell, losses)
    pairs = [("forward", "backward"), ("forward", "bidirectional"), ("backward", "bidirectional")]
    # one column of one type in a CSV: beside a name, 4 is a name too
    assert [(one["size"], one["a"], one["b"]) for one in found] == [(s, *p) for s in ("124M", "4") for p in pairs]
    assert all("(Holm over 6)" in one["reason"] for one in found)


def test_one_seed_has_no_interval_and_its_verdict_says_why(shell: Shell) -> None:
    one_seed = LOSSES[LOSSES["seed"] == 0]
    [found] = findings(shell, one_seed)
    assert (found["seeds"], found["seed_interval"], found["noise_floor"]) == (1, None, None)
    assert found["verdict"] == "too few seeds to tell"
    out = shell("analyze", "gap", "--from", "losses.csv").out
    expected = "size 4, forward → backward: gap +0.1000 nats per token (+5.00 %), 1 seed: too few seeds to tell"
    assert f"{expected} (1 paired seed, a verdict needs 3)\n" in out
    assert "size" not in out.partition("below 0 the second.")[2].partition("\n\n")[0], "documents enough"


def test_findings_in_words(shell: Shell) -> None:
    name = write(flat_table({"forward": [3.0, 3.1, 2.9], "backward": [3.02, 3.121, 2.922]}), shell.folder / "l.csv")
    answer = shell("analyze", "gap", "--from", name)
    assert (answer.code, answer.err) == (0, "")
    # differences 0.020 0.021 0.022: mean 0.021, s 0.001, half width 4.302653 x 0.001 / sqrt 3 = 0.002484;
    # pairs of seeds 0.1 0.1 0.2 and 0.101 0.098 0.199: the root of 0.119406 / 6
    sentence = (
        "size 4, forward → backward: gap +0.0210 nats per token (+0.70 %), 95 % over seeds +0.0185 .. +0.0235, "
        "3 seeds, noise floor 0.1411, forward has the lower loss: different "
        "(paired t over 3 seeds, p = 0.000755 (Holm over 1))"
    )
    assert sentence in answer.out.splitlines()
    assert "+0.0185 .. +0.0235" in answer.out  # the table


def test_too_few_documents_are_told(shell: Shell) -> None:
    def told(documents: int) -> str:
        losses = pd.concat([LOSSES.assign(document=f"{number}") for number in range(documents)])
        return " ".join(shell("analyze", "gap", "--from", write(losses, shell.folder / "few.csv")).out.split())

    assert "4: only 3 documents to compare on: that says little of other text, and a bootstrap needs 10." in told(3)
    assert "documents to compare on" not in told(10)


def test_a_terminal_hears_what_is_being_done(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    write(LOSSES, shell.folder / "[b]l.csv")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "resampling [b]l.csv: 0:0" in shell("analyze", "gap", "--from", "[b]l.csv").err


def test_a_lower_loss_is_better_and_its_interval_holds_the_gap(shell: Shell) -> None:
    name = write(flat_table({"forward": [3.02, 3.121, 2.922], "backward": [3.0, 3.1, 2.9]}), shell.folder / "l.csv")
    out = shell("analyze", "gap", "--from", name).out
    assert "gap -0.0210 nats per token (-0.70 %), 95 % over seeds -0.0235 .. -0.0185, 3" in out
    assert "backward has the lower loss" in out


def test_numbers_and_words_are_ids_in_both_formats(shell: Shell) -> None:
    words = LOSSES.assign(document=["007", "7"] * 6, size="124M")
    numbers = LOSSES.assign(document=[7, 8] * 6, size=124, run=[f"{index // 2}" for index in range(12)])
    for losses, size in ((words, "124M"), (numbers, 124)):
        from_csv, from_parquet = (findings(shell, losses, name) for name in ("l.csv", "l.parquet"))
        assert from_csv == from_parquet
        assert (from_csv[0]["size"], from_csv[0]["documents"]) == (size, 2)
    with_fraction = LOSSES.assign(size=4.0)
    assert findings(shell, with_fraction, "l.csv") == findings(shell, LOSSES, "l.parquet")


def test_a_csv_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Names that look like missing values, spaces after commas, a byte order mark, the last digit of a loss."""
    path = tmp_path / "l.csv"
    text = "document, run,direction,seed,size,nll,tokens,bytes,note\nNA, null,1e3,0,3,0.30000000000000004,2,3,x\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    [row] = read_losses(path).to_dict("records")
    assert row == {
        "run": "null", "direction": "1e3", "seed": 0, "size": 3, "document": "NA", "nll": 0.1 + 0.2, "tokens": 2,
        "bytes": 3,
    }  # fmt: skip


def test_other_separators_and_means_for_sums_are_told(shell: Shell) -> None:
    (shell.folder / "l.csv").write_text(LOSSES.to_csv(index=False, sep=";"))
    answer = shell("analyze", "gap", "--from", "l.csv")
    assert (answer.code, answer.out) == (2, "")
    assert "l.csv: its first line has no comma: separate the columns by commas" in answer.err
    name = write(LOSSES.assign(nll=LOSSES["nll"] / LOSSES["tokens"], tokens=1000), shell.folder / "means.csv")
    assert "nll must be a document's sum, not its mean" in shell("analyze", "gap", "--from", name).err


def test_a_long_csv_has_one_type_in_a_column(tmp_path: Path) -> None:
    """Read piece by piece, size 4 of the first piece would be another than size 4 beside a name in the last."""
    lines = ["r,forward,0,4,d,3.0,2,3"] * 100_000 + ["r,forward,0,124M,d,3.0,2,3"]
    (tmp_path / "l.csv").write_text("\n".join([",".join(COLUMNS), *lines]))
    assert set(read_losses(tmp_path / "l.csv")["size"]) == {"4", "124M"}


def test_a_parquet_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A folder's name is no column, and what pandas kept as an index is one; categories are names."""
    folder = tmp_path / "size=9"
    folder.mkdir()
    losses = LOSSES.astype({"direction": "category", "size": "category"}).set_index(["document", "run"])
    losses.to_parquet(folder / "l.parquet")
    [g], [expected] = gaps(read_losses(folder / "l.parquet"), resamples=9), gaps(LOSSES, resamples=9)
    assert (g.size, g.gap_nats, g.bootstrap) == (4, expected.gap_nats, expected.bootstrap)


def test_a_size_with_one_direction_is_named(shell: Shell) -> None:
    alone = table({"forward": GOLDEN["forward"]}, size=9)
    name = write(pd.concat([LOSSES, alone]), shell.folder / "l.csv")
    answer = shell("analyze", "gap", "--from", name, "--json")
    assert [one["size"] for one in json.loads(answer.out)] == [4]
    assert answer.err == "l.csv: size 9 is not compared: it has runs of forward alone\n"


def test_a_pair_that_cannot_be_measured_hides_no_other(shell: Shell) -> None:
    broken = table(GOLDEN, size=9).iloc[:-1]
    answer = shell("analyze", "gap", "--from", write(pd.concat([LOSSES, broken]), shell.folder / "l.csv"), "--json")
    [found] = json.loads(answer.out)
    assert (found["size"], found["p_adjusted"]) == (4, found["p"])  # a pair that was not measured is not in the family
    assert answer.err.startswith("l.csv: not compared: size 9, forward and backward: document 'd1' differs: run ")


def test_rows_that_stand_there_twice_are_told(shell: Shell) -> None:
    name = write(pd.concat([LOSSES, LOSSES.iloc[2:4]]), shell.folder / "l.csv")
    answer = shell("analyze", "gap", "--from", name)
    assert "document 'd0' differs: run 'forward-0' has 4 tokens" in answer.err
    name = write(pd.concat([LOSSES, LOSSES]), shell.folder / "l.csv")
    words = "l.csv: 12 rows appear twice, the first of document 'd0' in run 'forward-0': summed as windows of one"
    assert words in shell("analyze", "gap", "--from", name).err


def test_names_that_look_like_markup_are_shown(shell: Shell) -> None:
    name = write(LOSSES.replace({"direction": {"backward": "[b]ackward"}}), shell.folder / "[i].csv")
    out = shell("analyze", "gap", "--from", name).out
    assert "forward → [b]ackward" in out
    assert "[i].csv: gaps" in out


# ---- files ----


def test_output_is_what_its_ending_says(shell: Shell) -> None:
    name = write(LOSSES, shell.folder / "l.csv")
    outputs = ["g.svg", "g.PNG", "g.html", "t.csv", "t.md"]
    answer = shell("analyze", "gap", "--from", name, "--json", *(f"--output={output}" for output in outputs))
    [found] = json.loads(answer.out)
    assert answer.err == "".join(f"written: {output}\n" for output in outputs)
    assert sorted(path.name for path in shell.folder.iterdir()) == sorted([*outputs, "l.csv"])
    content = {output: (shell.folder / output).read_bytes() for output in outputs}
    assert b"<svg" in content["g.svg"][:200]
    assert "forward → backward" in content["g.svg"].decode()
    assert content["g.PNG"].startswith(b"\x89PNG")
    assert b"<html" in content["g.html"][:200].lower()
    assert b'src="http' not in content["g.html"]
    [row] = pd.read_csv(io.BytesIO(content["t.csv"]), float_precision="round_trip").to_dict("records")
    assert [row["bootstrap_low"], row["bootstrap_high"]] == found["bootstrap"]
    assert [row["seed_interval_low"], row["seed_interval_high"]] == found["seed_interval"]
    same = ("size", "a", "b", "seeds", "gap_nats", "gap_bpb", "gap_percent", "noise_floor", "p", "verdict", "reason")
    assert {key: row[key] for key in same} == {key: found[key] for key in same}
    title, _, sentence, _, header, _, line = content["t.md"].decode().splitlines()
    assert title == "# l.csv"
    assert header.startswith("| size | pair | verdict | seeds | gap (nats) |")
    assert line.startswith(f"| 4 | forward → backward | **{found['verdict']}** | 3 | +0.2000 |")
    assert sentence.startswith("- size 4, forward → backward: gap +0.2000 nats per token (+10.00 %)")


def test_a_table_of_one_seed_leaves_its_interval_empty(shell: Shell) -> None:
    findings(shell, LOSSES[LOSSES["seed"] == 0], "l.csv", "--output", "t.csv")
    [row] = pd.read_csv(shell.folder / "t.csv").to_dict("records")
    assert all(math.isnan(row[name]) for name in ("seed_interval_low", "seed_interval_high", "noise_floor", "p"))


# ---- the page ----


def test_the_docs_show_what_is_printed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = ROOT / "docs" / "statistics.md"
    assert write_files(page, shell.folder) == ["losses.csv", "scores.csv"]
    (shell.folder / "grids").symlink_to(ROOT / "grids")
    text, _, _ = page.read_text().partition("\n## Scores of tasks\n")  # the rest: tests/test_cli_scores.py
    printed = {}
    for line in "".join(blocks(page, "bash")).splitlines():
        if "analyze scores" in line:
            continue
        program, *arguments = shlex.split(line)
        assert program == "bwlm"
        printed[line] = shell(*arguments)
    assert [answer.code for answer in printed.values()] == [0, 0, 0]
    for_people, for_scripts, plan = (answer.out for answer in printed.values())
    shown = "\n".join(line.rstrip() for line in for_people.splitlines())
    assert f"```\n{shown}\n```\n" in text
    [found] = json.loads(for_scripts)
    assert set(found) == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))) - {
        "run", "direction", "seed", "document", "nll", "tokens", "bytes",
    }  # fmt: skip
    _, _, told = plan.rpartition("storage runs\n")
    assert f"\n{textwrap.indent(told, '    ')}" in text
    assert {"gaps.svg", "gaps.md"} < {path.name for path in shell.folder.iterdir()}
    (program,) = blocks(page, "python")
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(program, page.name, "exec"), {})
    assert told.getvalue() == f"124M forward backward {found['gap_nats']} different\n"


@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
def test_blanks_around_a_name_and_the_case_of_a_direction_make_no_other_group(name: str, shell: Shell) -> None:
    """Half of the rows are written otherwise, so that each spelling alone would be a whole comparison."""
    odd = LOSSES.copy()
    half = odd.index % 2 == 1
    for column in ("run", "document", "direction"):
        odd.loc[half, column] = "  " + odd.loc[half, column] + " \u00a0"
    odd["size"] = [f"{size} M " if is_odd else f"{size} M" for size, is_odd in zip(odd["size"], half, strict=True)]
    odd.loc[half, "direction"] = odd.loc[half, "direction"].str.title()
    odd = odd.rename(columns={"nll": " nll", "run": "run "})
    plain = findings(shell, LOSSES.assign(size="4 M"))
    assert findings(shell, odd, name) == plain
    assert [(one["a"], one["b"]) for one in plain] == [("forward", "backward")]
    assert findings(shell, LOSSES.assign(direction=LOSSES["direction"].str.upper(), size="4 M"), name) == plain


# ---- mistakes ----

Change = Callable[[pd.DataFrame], pd.DataFrame]

TABLES: dict[str, tuple[Change, str]] = {
    "a column misspelt": (
        lambda rows: rows.rename(columns={"nll": "nnl"}),
        "the losses lack column 'nll' (did you mean 'nnl'?); needed: run, direction, seed, size, document, nll",
    ),
    "no rows": (lambda rows: rows.iloc[:0], "the losses hold no rows"),
    "one direction": (lambda rows: rows[rows["direction"] == "forward"], "nothing to compare: no size has runs of two"),
    "a loss that is no number": (
        lambda rows: rows.assign(nll=[math.nan, *rows["nll"][1:]]),
        "row 1: nll of document 'd0' in run 'forward-0' is nan, not a finite number: evaluate that run again or leave",
    ),
    "an endless loss": (
        lambda rows: rows.assign(nll=[math.inf, *rows["nll"][1:]]),
        "row 1: nll of document 'd0' in run 'forward-0' is inf",
    ),
    "log p": (
        lambda rows: rows.assign(nll=[*rows["nll"][:2], *-rows["nll"][2:]]),
        "row 3: nll of document 'd0' in run 'forward-1' is -9.0, which is negative: nll is -log p: turn the sign of",
    ),
    "commas between thousands": (
        lambda rows: rows.assign(tokens=[*rows["tokens"][:3].astype(str), "1,234", *rows["tokens"][4:].astype(str)]),
        "row 4: tokens of document 'd1' in run 'forward-1' is 1,234, which has a comma: write numbers without commas",
    ),
    "decimal commas": (
        lambda rows: rows.assign(nll=rows["nll"].map(lambda nll: f"{nll:.2f}".replace(".", ","))),
        "row 1: nll of document 'd0' in run 'forward-0' is 8,00, which has a comma: write numbers without commas, with",
    ),
    "two spellings": (
        lambda rows: rows.assign(direction=["L2R", *["l2r"] * 5, *rows["direction"][6:]]),
        "column 'direction' has both 'L2R' and 'l2r': write one name one way",
    ),
    "a direction of blanks": (
        lambda rows: rows.assign(direction=["\u00a0", *rows["direction"][1:]]),
        "the losses' row 1 has no direction",
    ),
    "two runs in a cell": (
        lambda rows: rows.assign(run=["again", *rows["run"][1:]]),
        "direction forward, seed 0, size 4 has several runs: again, forward-0; keep one of them",
    ),
    "other documents": (
        lambda rows: rows.iloc[:-1],
        "size 4, forward and backward: document 'd1' differs: run 'forward-0' has 6 tokens",
    ),
    "a document without a name": (
        lambda rows: rows.assign(document=[None, *rows["document"][1:]]),
        "the losses' row 1 has no document",
    ),
}


@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
@pytest.mark.parametrize("mistake", TABLES)
def test_a_bad_table_is_one_line_that_names_the_file(mistake: str, name: str, shell: Shell) -> None:
    change, message = TABLES[mistake]
    write(change(LOSSES), shell.folder / name)
    answer = shell("analyze", "gap", "--from", name, "--output", "gap.svg")
    check_mistake(answer, f"bwlm: {name}: {message}")
    assert [path.name for path in shell.folder.iterdir()] == [name]


def test_rows_that_stand_there_twice_are_named_as_a_cause(shell: Shell) -> None:
    write(pd.concat([LOSSES, LOSSES[:2]]), shell.folder / "l.csv")
    answer = shell("analyze", "gap", "--from", "l.csv")
    check_mistake(answer, "document 'd0' differs: run 'forward-0' has 8 tokens")
    check_mistake(answer, "l.csv: 2 rows appear twice, the first of document 'd0' in run 'forward-0'")


def twice_a_column(folder: Path) -> None:
    names = [*LOSSES.columns, "nll"]
    columns = [pa.array(LOSSES[name]) for name in names]
    pq.write_table(pa.Table.from_arrays(columns, names=names), folder / "twice.parquet")
    pq.write_table(pa.Table.from_arrays(columns, names=[*names[:-1], " nll"]), folder / "blank_twice.parquet")
    others = ["x" if name in ("nll", "bytes") else name for name in names]
    pq.write_table(pa.Table.from_arrays(columns, names=[*others[:-1], "nll"]), folder / "other_twice.parquet")
    text = LOSSES.to_csv(index=False).splitlines()
    (folder / "thousands.csv").write_text("\n".join([text[0], *(line.replace(",4,", ",4,000,") for line in text[1:])]))
    (folder / "semicolons.csv").write_text(LOSSES.to_csv(index=False, sep=";", decimal=","))
    (folder / "twice.csv").write_text("\n".join([f"{text[0]},nll", *(f"{line},1" for line in text[1:])]))


def damaged(folder: Path) -> None:
    LOSSES.to_parquet(folder / "whole.parquet")
    whole = (folder / "whole.parquet").read_bytes()
    (folder / "half.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "rot.parquet").write_bytes(whole[:4] + bytes(len(whole) - 300) + whole[-296:])
    LOSSES.assign(seed=[[seed] for seed in LOSSES["seed"]]).to_parquet(folder / "nested.parquet")
    (folder / "text.parquet").write_text("run,direction\n")
    (folder / "empty.parquet").touch()
    (folder / "empty.csv").touch()
    (folder / "latin.csv").write_bytes(b"run,direction,caf\xe9\n")
    (folder / "really.csv").write_bytes(whole)
    header, first, *_ = LOSSES.to_csv(index=False).splitlines()
    (folder / "shifted.csv").write_text(f"{header}\n{first},9\n{first},9\n")
    (folder / "ragged.csv").write_text(f"{header}\n{first}\n{first},9,9\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.csv", "no such file"),
        ("losses.xlsx", "neither .parquet nor .csv: save the losses as one of them"),
        ("losses", "neither .parquet nor .csv"),
        ("folder.parquet", "is a folder: name one file in it"),
        ("folder.csv", "is a folder: name one file in it"),
        ("half.parquet", "cannot be read as parquet ("),
        ("rot.parquet", "cannot be read as parquet ("),
        ("nested.parquet", "column 'seed' holds lists or records: give it a single value a row"),
        ("text.parquet", "cannot be read as parquet ("),
        ("empty.parquet", "cannot be read as parquet ("),
        ("empty.csv", "cannot be read as csv ("),
        ("latin.csv", "cannot be read as csv ('utf-8' codec can't decode"),
        ("really.csv", "cannot be read as csv ("),
        ("shifted.csv", "cannot be read as csv ("),
        ("ragged.csv", "cannot be read as csv ("),
        ("twice.parquet", "column 'nll' appears twice: keep one"),
        ("twice.csv", "column 'nll' appears twice: keep one"),
        ("blank_twice.parquet", "column 'nll' appears twice: keep one"),
        ("other_twice.parquet", "the losses lack column 'bytes'; needed: run, direction"),
        (
            "thousands.csv",
            "cannot be read as csv (its rows have more fields than its first line): put names with commas between ",
        ),
        ("semicolons.csv", "its first line has no comma: separate the columns by commas, and write decimals with a"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(name: str, message: str, shell: Shell) -> None:
    (shell.folder / "losses.xlsx").touch()
    (shell.folder / "losses").touch()
    for folder in ("folder.parquet", "folder.csv"):
        (shell.folder / folder).mkdir()
    damaged(shell.folder)
    twice_a_column(shell.folder)
    check_mistake(shell("analyze", "gap", "--from", name), f"bwlm: {name}: {message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--from"),
        (
            ["--from", "l.csv", "--output", "g.pdf"],
            "--output: g.pdf: unknown ending: use one of .svg .png .html",
        ),
        (["--from", "l.csv", "--output", "no/g.svg"], "--output: no/g.svg: there is no folder no: make it"),
        (["--from", "l.csv", "--output", "folder.svg"], "--output: folder.svg is a folder"),
        (["--from", "l.csv", "--resamples", "0"], "--resamples"),
    ],
)
def test_a_bad_option_is_one_line(options: list[str], message: str, shell: Shell) -> None:
    write(LOSSES, shell.folder / "l.csv")
    (shell.folder / "folder.svg").mkdir()
    check_mistake(shell("analyze", "gap", *options), message)
    assert sorted(path.name for path in shell.folder.iterdir()) == ["folder.svg", "l.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["g_forward_d1_lr1_s0", "--output", "r.pdf"], "--output: r.pdf: unknown ending: use one of .md .html"),
        (["g_forward_d1_lr1_s0", "--output", "no/r.md"], "--output: no/r.md: there is no folder no: make it"),
        (["g_*", "--output", "r.md"], "--output: one file for 2 reports: name one grid or run"),
    ],
)
def test_a_report_that_cannot_be_written_where_asked_is_one_line(
    options: list[str], message: str, shell: Shell
) -> None:
    for direction in ("forward", "backward"):
        make_cell(shell.storage, direction, 0, 1.0)
    check_mistake(shell("analyze", "report", *options), message)
    assert not list(shell.folder.glob("r*.md*"))


def test_a_rate_whose_cells_have_not_all_begun_is_not_the_best_yet(shell: Shell) -> None:
    """Those that finished may be the ones that went well; the report of the grid says the same."""
    for lr, nll, seeds in ((1.0, 20.0, 3), (2.0, 30.0, 2)):
        for seed in range(seeds):
            for direction in ("forward", "backward"):
                text = np.random.default_rng(seed).uniform(0, 1, 8) + nll
                finish(make_cell(shell.storage, direction, seed, lr), {direction: list(text)})
    make_cell(shell.storage, "forward", 3, 1.0)
    answer = shell("analyze", "gap", "g_*")
    assert answer.code == 0
    assert "excluded: forward d1 lr 1: 1 of 4 cells gave no result" in answer.err
    assert "not begun, and left out: g_forward_d1_lr1_s3" in answer.err
    curves = shell.json("analyze", "compare", "g_*", "--output", "c.csv")
    assert {row["seeds"] for row in curves["table"] if row["direction"] == "forward"} == {2}  # of rate 2, not of rate 1
    refused = shell("analyze", "scaling", "g_*")
    assert refused.code == 2
    assert "forward has 1 size and 1 token budget" in refused.err

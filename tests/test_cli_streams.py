"""Output arrives on any terminal and in any pipe, and files are UTF-8 whatever the locale."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bwlm.cli.streams import tolerate_any_text
from bwlm.paths import readable, write_text
from tests.stats.test_gaps import GOLDEN, table
from tests.test_readme import ROOT

ENVIRONMENTS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
NAME = "é→🙂.csv"


def start(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [Path(sys.executable).parent / "bwlm", *arguments], cwd=folder, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    rows = table(GOLDEN)
    rows.assign(size="größe→4").to_csv(tmp_path / NAME, index=False)
    return tmp_path


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_terminal_that_lacks_characters_gets_the_nearest(environment: str, losses: Path) -> None:
    outputs = ["--output", "gaps.md", "--output", "gaps.csv", "--output", "gaps.svg"]
    child = start(losses, ENVIRONMENTS[environment], "analyze", "gap", "--from", NAME, *outputs)
    out, err = child.communicate()
    assert child.returncode == 0, err
    encoding = ENVIRONMENTS[environment].get("PYTHONIOENCODING", "ascii")
    shown = out.decode(encoding)
    assert ("größe->4" if encoding == "cp1252" else "grosse->4") in shown
    assert "forward -> backward" in shown
    assert ("é->?.csv" if encoding == "cp1252" else "e->?.csv") in shown
    assert "written: gaps.md" in err.decode(encoding)
    for name in ("gaps.md", "gaps.csv", "gaps.svg"):
        assert "größe→4" in (losses / name).read_text("utf-8"), name
    for name in ("gaps.md", "gaps.svg"):
        assert NAME in (losses / name).read_text("utf-8"), name


def test_json_is_ascii_everywhere(losses: Path) -> None:
    child = start(losses, ENVIRONMENTS["ascii"], "analyze", "gap", "--from", NAME, "--json")
    out, err = child.communicate()
    assert child.returncode == 0, err
    [found] = json.loads(out.decode("ascii"))
    assert found["size"] == "größe→4"


@pytest.mark.parametrize(
    "arguments", [["grid", "schema"], ["--help"], ["analyze", "gap", "--from", NAME]], ids=" ".join
)
def test_a_reader_that_goes_away_ends_a_command_quietly(arguments: list[str], losses: Path) -> None:
    child = start(losses, {}, *arguments)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    err = child.stderr.read()
    assert (child.wait(), err) == (1, b"")


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    odd, lost = b"caf\xc3\xa9".decode("ascii", "surrogateescape"), b"caf\xe9".decode("utf-8", "surrogateescape")
    assert [readable(text) for text in (odd, lost, "\ud800", "plain é")] == ["café", "caf\ufffd", "?", "plain é"]
    write_text(tmp_path / "report.md", f"{odd} {lost}")
    assert (tmp_path / "report.md").read_bytes() == "café caf\ufffd".encode()


@pytest.mark.parametrize(
    ("encoding", "text", "plain"),
    [
        ("ascii", "a–b ± 3 · «x»⏎ ─┼─ naïve", "a-b +- 3 . <<x>>| -+- naive"),
        ("latin-1", "a–b ± 3 · «x» naïve 東", "a-b ± 3 · «x» naïve ?"),
        ("utf-8", "東 🙂 →", "東 🙂 →"),
        ("utf-8", "caf\udce9 \ud800", "caf\ufffd ?"),
        ("utf-16-le", "caf\udce9 é", "caf\ufffd é"),
    ],
)
def test_transliteration(encoding: str, text: str, plain: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        tolerate_any_text()
        stream.write(text)
        monkeypatch.undo()
    assert (tmp_path / "out").read_text(encoding) == plain


def uses_the_locales_encoding(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
    given = {keyword.arg for keyword in call.keywords}
    if "encoding" in given or owner in ("os", "fsspec", "filesystem", "h5py"):
        return False
    modes = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return (
        (name in ("open", "fdopen") and not any("b" in mode for mode in modes))
        or (name == "read_text" and not call.args)
        or (name == "write_text" and owner != "" and len(call.args) < 2)
        or "text" in given.intersection(["text"] if owner == "subprocess" else [])
    )


def test_no_file_is_read_or_written_in_the_encoding_of_the_locale() -> None:
    found = []
    for path in (path for room in ("bwlm", "tasks", "jobs") for path in (ROOT / room).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        found += [f"{path}:{call.lineno}" for call in calls if uses_the_locales_encoding(call)]
    assert found == []

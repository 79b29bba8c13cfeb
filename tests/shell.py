"""The command line in this process, for any test."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bwlm import cli


class Answer(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs `bwlm ARGS` in this process, as a person would, in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        self.storage = folder / "runs"

    def __call__(self, *arguments: str) -> Answer:
        self._monkeypatch.setattr(sys, "argv", ["bwlm", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return Answer(ended.value.code, *self._capsys.readouterr())

    def json(self, *arguments: str) -> Any:
        answer = self(*arguments, "--json")
        assert answer.code == 0, answer.err
        return json.loads(answer.out)

    def file(self, text: str) -> str:
        (self.folder / "g.yaml").write_text(text)
        return "g.yaml"


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    monkeypatch.chdir(tmp_path)
    for name in ("BWLM_STORAGE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "1000")  # no table and no sentence is broken; tests of narrow screens set their own
    levels = {name: logging.getLogger(name).level for name in ("mlflow", "alembic", "ray", "ray.tune")}
    yield Shell(tmp_path, monkeypatch, capsys)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def check_mistake(answer: Answer, message: str) -> None:
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("bwlm: ")
    assert answer.err.endswith("\n")
    assert answer.err.count("\n") == 1
    assert message in answer.err

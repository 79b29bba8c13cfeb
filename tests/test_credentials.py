"""A secret in an address is refused with the variable to use, before it is written anywhere, and never printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bwlm.config import Experiment, Recipe
from bwlm.credentials import masked, secret_in, secrets_in
from bwlm.errors import UserError
from bwlm.paths import storage_root
from bwlm.record.mlflow_store import tracking_uri
from bwlm.text.listing import list_files
from tests.shell import Shell

SECRET = "hunter2"

HOLDING = {
    f"s3://AKIAX:{SECRET}@bucket/p": ("a user's password or token", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    f"s3://AKIAX:ab/{SECRET}+x@bucket/p": ("a user's password or token", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    f"simplecache::s3://k:{SECRET}@b/x": ("a user's password or token", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    f"s3://bucket/x?secret_key={SECRET}": ("a secret in secret_key=", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    f"https://u:{SECRET}@h/x.parquet": ("a user's password or token", "HF_TOKEN (hf://), or FSSPEC_HTTPS"),
    f"https://{SECRET}@h/x.parquet": ("a user's password or token", "HF_TOKEN (hf://), or FSSPEC_HTTPS"),
    f"https://u:p@{SECRET}@h/x": ("a user's password or token", "FSSPEC_HTTPS"),
    f"https://h/x?X-Amz-Date=1&X-Amz-Signature={SECRET}": ("a secret in X-Amz-Signature=", "AWS_ACCESS_KEY_ID"),
    f"https://h/x?X-Goog-Signature={SECRET}": ("a secret in X-Goog-Signature=", "GOOGLE_APPLICATION_CREDENTIALS"),
    f"https://a.blob.core.windows.net/c?sv=1&sig={SECRET}": ("a secret in sig=", "AZURE_STORAGE_CONNECTION_STRING"),
    f"https://h/x?token={SECRET}": ("a secret in token=", "HF_TOKEN"),
    f"https://h/x?url=https%3A%2F%2Fu%3A{SECRET}%40h": ("a user's password or token", "HF_TOKEN"),
    f"az://c/x;AccountKey={SECRET}==": ("a secret in AccountKey=", "AZURE_STORAGE_CONNECTION_STRING"),
    f"hf://datasets/o/n?token={SECRET}": ("a secret in token=", "HF_TOKEN"),
    f"https://h/x?subscription-key={SECRET}": ("a secret in subscription-key=", "HF_TOKEN"),
    f"https://h/x?jwt={SECRET}": ("a secret in jwt=", "HF_TOKEN"),
    f"https://h/x#access_key={SECRET}": ("a secret in access_key=", "HF_TOKEN"),
    f"http://u:a#{SECRET}@h/x": ("a user's password or token", "HF_TOKEN"),
    f"http://u:a?{SECRET}@h/x": ("a user's password or token", "HF_TOKEN"),
    f"//u:{SECRET}@h/x": ("a user's password or token", "HF_TOKEN"),
    f"hf://datasets/o/n@hf_{SECRET}0123456789/f": ("a user's password or token", "HF_TOKEN"),
    f"postgresql+psycopg2://me:{SECRET}@h/db": ("a user's password or token", "PGPASSWORD"),
}

PLAIN = [
    "s3://bucket/a=b/c.parquet", "abfs://container@account.dfs.core.windows.net/p", "http://host:8000/data@v1/x",
    "http://[::1]:5000/a@b", "hf://datasets/o/n@rev/f", "postgresql://me@h/db", "ssh://me@host/x", "/data/a:b@c",
    "file:///a:b/c@d", "https://h/x?author=me&tokenizer=x&signed=no", "sqlite:////tmp/a b.db", "builtin:pydocs",
]  # fmt: skip


@pytest.mark.parametrize("address", HOLDING)
def test_a_secret_is_told_with_the_variable_and_never_shown(address: str) -> None:
    kind, variable = HOLDING[address]
    fault = secret_in(address, "data.source")
    assert fault is not None
    assert fault.startswith(f"data.source: holds {kind}: take it out, and set ")
    assert variable in fault
    assert SECRET not in fault
    if "%" not in address and not address.startswith("//"):
        assert SECRET not in masked(f"{address}: cannot be listed")


@pytest.mark.parametrize("blank", [" ", "\t", "\n"])
def test_a_blank_does_not_end_a_password(blank: str) -> None:
    assert "a user's password or token" in str(secret_in(f"http://u:a{blank}{SECRET}@h/x", "data.source"))


@pytest.mark.parametrize("address", ["http://h:notaport", "http://[::1", "http://h:99999"])
def test_a_tracking_uri_that_is_no_address_is_told_in_a_line(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^launch.tracking_uri: .* is no address .*: give http://host:port, or unset"):
        tracking_uri(tmp_path, address)


@pytest.mark.parametrize("address", PLAIN)
def test_what_only_looks_like_a_secret_is_none(address: str) -> None:
    assert secret_in(address, "data.source") is None
    assert masked(address) == address


ADDRESS = f"https://me:{SECRET}@h/x.parquet"

FIELDS: dict[str, dict[str, Any]] = {
    "data.source": {"data": {"source": ADDRESS}},
    "data.validation": {"data": {"validation": ADDRESS}},
    "data.mixture": {"phase": "sft", "data": {"mixture": {ADDRESS: 1.0}}},
    "tasks.gsm8k.path": {"tasks": {"gsm8k": {"path": ADDRESS}}},
    "tokenizer.path": {"tokenizer": {"path": ADDRESS}},
}


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_of_a_run_takes_a_secret(field: str) -> None:
    """Whoever builds settings, not the command line alone."""
    for make in (Recipe, Experiment):
        with pytest.raises(ValidationError) as caught:
            make.model_validate(FIELDS[field] | ({"direction": "forward", "depth": 1} if make is Experiment else {}))
        assert f"{field}: holds a user's password or token" in str(caught.value)
        assert SECRET not in str(caught.value)


def test_secrets_of_nested_settings_are_found_by_field() -> None:
    content = {"axes": {"data.source": ["a", ADDRESS]}, "launch": {"tracking_uri": ADDRESS}, "lr": 0.5}
    found = list(secrets_in(content))
    assert [fault.partition(":")[0] for fault in found] == ["axes.data.source", "launch.tracking_uri"]
    assert "MLFLOW_TRACKING_USERNAME" in found[1]


def test_storage_and_tracking_take_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    monkeypatch.setenv("BWLM_STORAGE", f"s3://k:{SECRET}@bucket/runs")
    for action, told in (
        (lambda: tracking_uri(tmp_path, None), "MLFLOW_TRACKING_URI: holds a user's password or token: take it out"),
        (lambda: tracking_uri(tmp_path, ADDRESS), "launch.tracking_uri: holds a user's password or token"),
        (lambda: storage_root(None), "storage: holds a user's password or token: take it out, and set AWS_ACCESS_KEY"),
        (lambda: list_files(ADDRESS, "tasks.x.path"), "tasks.x.path: holds a user's password or token"),
    ):
        with pytest.raises(UserError) as caught:
            action()
        assert str(caught.value).startswith(told)
        assert SECRET not in str(caught.value)


GRID = """
name: planted
data: {{source: "{source}", mixture: {mixture}}}
axes: {{direction: [forward, backward], depth: [1], lr: [1.0]}}
model: {{sequence_length: 64, head_dim: 32}}
tokenizer: {{vocab_size: 264{tokenizer}}}
budget: {{steps: 2, batch_tokens: 512}}
launch: {{retries: 0{launch}}}
"""


@pytest.mark.parametrize(
    "planted",
    [
        {"source": ADDRESS},
        {"mixture": f'{{"{ADDRESS}": 1.0}}'},
        {"tokenizer": f', path: "{ADDRESS}"'},
        {"launch": f', tracking_uri: "{ADDRESS}"'},
        {"launch": f', storage: "s3://k:{SECRET}@b"'},
    ],
)
def test_a_grid_with_a_secret_writes_it_nowhere(planted: dict[str, str], shell: Shell) -> None:
    text = GRID.format(**{"source": "builtin:null", "mixture": "{}", "tokenizer": "", "launch": ""} | planted)
    file = shell.file(text)
    for command in ("plan", "run", "status"):
        answer = shell("grid", command, file)
        assert answer.code == 2
        assert answer.err.startswith("bwlm: g.yaml:")
        assert answer.err.count("\n") == 1
        assert "take it out, and set " in answer.err
        assert SECRET not in answer.out + answer.err
    assert [path.name for path in shell.folder.iterdir()] == ["g.yaml"]


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--direction", "forward", "--depth", "1", "--set", f"data.source={ADDRESS}"],
        ["train", "--direction", "forward", "--depth", "1", "--set", f"tasks.x/y={ADDRESS}"],
        ["data", "inspect", "--set", f"data.source={ADDRESS}"],
        ["data", "prepare", "--set", f"data.validation={ADDRESS}"],
        ["runs", "list", "--storage", ADDRESS],
        ["tokenizer", "train", "--set", f"data.source={ADDRESS}"],
        ["analyze", "gap", "--from", ADDRESS],
    ],
)
def test_no_command_prints_a_secret(command: list[str], shell: Shell) -> None:
    answer = shell(*command)
    assert answer.code == 2
    assert SECRET not in answer.out + answer.err
    assert list(shell.folder.rglob("*")) == []


def test_a_secret_in_the_environment_reaches_neither_folder_nor_log(tmp_path: Path) -> None:
    """The whole command, in a process of its own, with what Python and MLflow log."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": ADDRESS, "BWLM_STORAGE": str(tmp_path / "runs")}
    sizes = ["model.sequence_length=64", "model.head_dim=32", "tokenizer.vocab_size=264", "data.source=builtin:null"]
    settings = [word for size in [*sizes, "budget.steps=2", "budget.batch_tokens=512"] for word in ("--set", size)]
    bwlm = str(Path(sys.executable).parent / "bwlm")
    command = [bwlm, "train", "--direction", "forward", "--depth", "1", "--id", "x", *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert "MLFLOW_TRACKING_URI: holds a user's password or token" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()

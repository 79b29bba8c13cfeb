"""`bwlm serve`: its mistakes, each before a model is loaded."""

from __future__ import annotations

import importlib
import shutil
import socket
import sys

import pytest

from bwlm.cli.serve import _packages
from bwlm.errors import UserError
from bwlm.model.compiled_decoder import _compiled
from tests.runs import NewFamily
from tests.shell import Shell, check_mistake


@pytest.fixture
def with_a_run(shell: Shell, trained_base: NewFamily) -> Shell:
    shutil.copytree(trained_base("forward").path, shell.storage / "forward")
    return shell


def test_a_run_that_is_none_is_named(with_a_run: Shell) -> None:
    check_mistake(with_a_run("serve", "forwrd"), "forwrd")
    check_mistake(with_a_run("serve", "forward@3"), "forward: no checkpoint of step 3")


def test_others_are_let_in_with_a_token_alone(with_a_run: Shell) -> None:
    told = "--host 0.0.0.0: others can reach it: set a token with --token or $BWLM_SERVE_TOKEN"
    check_mistake(with_a_run("serve", "forward", "--host", "0.0.0.0"), told)


def test_a_port_that_is_taken_is_named(with_a_run: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        check_mistake(with_a_run("serve", "forward", "--port", port), f"--port {port}: cannot listen on 127.0.0.1")
    check_mistake(with_a_run("serve", "forward", "--host", "nowhere.invalid", "--token", "x"), "nowhere.invalid")


def test_a_missing_package_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("server", "endpoints"):
        monkeypatch.delitem(sys.modules, f"bwlm.chat.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn.config", None)
    monkeypatch.delitem(sys.modules, "uvicorn", raising=False)
    told = r"^bwlm serve needs the package uvicorn: pip install 'bwlm\[serve\]'$"
    with pytest.raises(UserError, match=told), _packages():
        importlib.import_module("bwlm.chat.server")


def test_what_replicas_cannot_be_is_told_before_ray_starts(with_a_run: Shell) -> None:
    told = "must be a number, or the least and the most, such as 1:4"
    for number in ("0", "4:2", "two", "1:2:3", "1.5"):
        check_mistake(with_a_run("serve", "forward", "--replicas", number), f"{told} (found {number})")
    check_mistake(with_a_run("serve", "forward", "--replicas", "2", "--port", "0"), "--port 0: replicas need a port")


def test_a_machine_without_a_compiler_is_told_so(with_a_run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    _compiled.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    told = "--compile: CXX names no-such-compiler, which is not there: mend that, or leave --compile out"
    check_mistake(with_a_run("serve", "forward", "--compile", "--threads", "1", "--port", "0"), told)

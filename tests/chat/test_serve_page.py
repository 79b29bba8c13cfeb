"""docs/serve.md: what it shows runs against a server."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from bwlm.text.tokenizer import Tokenizer
from tests.chat.serving import VOICES, Server, running, served
from tests.test_readme import ROOT, blocks

PAGE = ROOT / "docs" / "serve.md"
CURL = [line for block in blocks(PAGE, "bash") for line in block.splitlines() if line.startswith("curl ")]


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    with running([served("mine", VOICES["both"], tokenizer)]) as server:
        yield server


@pytest.mark.parametrize("line", CURL, ids=lambda line: line.split()[2])
def test_a_request_of_the_page_is_answered(line: str, server: Server) -> None:
    words = shlex.split(line.replace("localhost:8000", f"localhost:{server.port}"))
    answer: dict[str, Any] = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    assert "error" not in answer
    assert answer.keys() & {"choices", "results", "content"}


def test_the_program_of_the_page_writes_the_same_text_twice(server: Server) -> None:
    (program,) = blocks(PAGE, "python")
    program = program.replace("localhost:8000", f"localhost:{server.port}")
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    whole, _, rest = shown.partition(" backward document\n")
    assert rest == f"{whole}\n"
    assert whole

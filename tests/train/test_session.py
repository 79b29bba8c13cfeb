"""Ranks that fail together: none waits for one that has gone, and all know why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bwlm.errors import UserError
from bwlm.train.session import LocalSession, raise_on_all_ranks

RANK = """
import sys
from datetime import timedelta
import torch.distributed as dist
from bwlm.errors import BwlmError, UserError
from bwlm.train.session import LocalSession, raise_on_all_ranks
rank = int(sys.argv[1])
dist.init_process_group(
    "gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3, timeout=timedelta(seconds=60)
)
session = LocalSession(rank, 3)
assert raise_on_all_ranks(session, lambda: rank) == rank
def fails_on_the_later_ranks():
    if rank > 0:
        raise UserError(f"tokenizer.json: no such file on node {rank} (\u00fc)")
try:
    raise_on_all_ranks(session, fails_on_the_later_ranks)
except BwlmError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_alone_a_failure_is_raised_as_it_is() -> None:
    with pytest.raises(UserError, match=r"^mine$"):
        raise_on_all_ranks(LocalSession(), _fail)
    assert raise_on_all_ranks(LocalSession(), lambda: 5) == 5


def _fail() -> None:
    raise UserError("mine")


def test_where_one_rank_fails_all_raise_its_words(tmp_path: Path) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONIOENCODING": "utf-8"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for rank in range(3)
    ]
    said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    assert said == [
        "RunError: rank 1: tokenizer.json: no such file on node 1 (ü)",
        "UserError: tokenizer.json: no such file on node 1 (ü)",
        "UserError: tokenizer.json: no such file on node 2 (ü)",
    ]

"""A user's own files bear any names: nothing in the working folder changes what a run imports."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.grids import BWLM, private_environment

pytestmark = pytest.mark.faults
NAMES = ("tasks", "bwlm", "numpy", "random", "statistics", "jobs", "tests")


def test_files_of_a_user_do_not_take_the_place_of_ours(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"raise ImportError('the {name} of the user was imported')\n")
    (folder / "talks").mkdir()
    for split in ("train", "validation"):
        talk = [{"role": "user", "content": f"one {split}"}, {"role": "assistant", "content": "three four"}]
        (folder / "talks" / f"{split}.jsonl").write_text(f"{json.dumps(talk)}\n" * 40)
    settings = [
        f"data.source={corpus}", "tokenizer.vocab_size=400", "model.sequence_length=64", "model.head_dim=32",
        "budget.steps=4", "budget.batch_tokens=512", "phases.sft.data.mixture={talks/: 1.0}",
        "phases.sft.budget.steps=4", "phases.sft.budget.batch_tokens=512",
    ]  # fmt: skip
    command = [BWLM, "train", "--phase", "base,sft", "--direction", "forward", "--depth", "1", "--id", "x"]
    done = subprocess.run(
        [*command, *(word for setting in settings for word in ("--set", setting))],
        cwd=folder,
        env=private_environment(tmp_path / "storage"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of the user" not in done.stderr

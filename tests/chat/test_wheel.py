"""The page and the code that is compiled come with the package, not only with the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "bwlm" / "chat" / "page"


@pytest.mark.faults
def test_the_page_and_the_decode_step_are_in_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("bwlm", "tasks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    assert (tmp_path / "installed" / "bwlm" / "model" / "decode_step.cpp").is_file()
    script = (
        "from importlib.resources import files; page = files('bwlm.chat') / 'page'; "
        "print(*sorted(one.name for one in page.iterdir())); print(page)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "installed", check=True, capture_output=True, text=True
    )
    names, place = run.stdout.splitlines()
    assert names.split() == sorted(path.name for path in PAGE.iterdir())
    assert Path(place).is_relative_to(tmp_path)

"""The upload of a job: what Ray takes from a checkout in use, measured with Ray's own packaging."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from tests.cluster.heads import ROOT

LARGEST = 2_500_000
"""Bytes. Ray's own limit is 512 MiB; a submit over a slow line should still take seconds."""
NEVER = ("tests", "docs", "benchmarks", "findings", ".ci", "README.md", "CHANGELOG.md")
"""Files of the project that no job needs; the others must all be there."""
LEFT_BY_USE = (
    "runs/tiny/checkpoints/step_000010/model.safetensors", "runs/mlflow.db", ".venv/lib/torch.so", "mlruns/0/meta.yaml",
    ".mypy_cache/3.11/a.json", ".ruff_cache/0.17/a", ".pytest_cache/v/cache/lastfailed", ".hypothesis/examples/a",
    "bwlm/__pycache__/paths.cpython-311.pyc", "mlflow.db", "mlflow.db-wal", ".git/objects/pack/a.pack",
)  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project's files, with what use leaves in such a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in (name for name in listed if (ROOT / name).is_file()):
        (tmp_path / "bwlm" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "bwlm" / name)
    for name in LEFT_BY_USE:
        (tmp_path / "bwlm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bwlm" / name).write_bytes(b"\0" * 1000)
    return tmp_path / "bwlm"


def uploaded(checkout: Path) -> Path:
    package = checkout.parent / "package.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    return package


def test_a_job_takes_the_code_and_nothing_that_use_has_left(checkout: Path) -> None:
    package = uploaded(checkout)
    taken = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert not taken & set(LEFT_BY_USE)
    files = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    assert {name for name in files - taken - set(LEFT_BY_USE) if not name.startswith(NEVER)} == set()
    assert {"jobs/run_grid.py", "jobs/env.yaml", "grids/tiny.yaml", "bwlm/analysis/runs/findings.py"} <= taken
    assert package.stat().st_size < LARGEST


def test_a_link_to_the_shared_storage_is_not_followed(checkout: Path) -> None:
    """`runs` may be a link: Ray follows links."""
    shutil.rmtree(checkout / "runs")
    elsewhere = checkout.parent / "shared"
    elsewhere.mkdir()
    (elsewhere / "big.bin").write_bytes(b"\0" * 1000)
    (checkout / "runs").symlink_to(elsewhere)
    assert not any("big.bin" in name for name in zipfile.ZipFile(uploaded(checkout)).namelist())

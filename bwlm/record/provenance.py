"""Provenance of a launch, as MLflow's tags: its user, its command, bwlm's version and the user's git commit."""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from bwlm.credentials import masked


def provenance() -> dict[str, str]:
    """Return the tags; those of git only if the working folder is in a repository."""
    program = Path(sys.argv[0]).name
    about = {
        "mlflow.source.name": program,  # MLflow shows no more of it than what follows the last slash
        "mlflow.source.type": "LOCAL",
        "bwlm.command": masked(shlex.join([program, *sys.argv[1:]])),
        "bwlm.version": version("bwlm"),
    }
    return about | _user() | _git(Path.cwd())


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError, ImportError):  # a container may give its user no name
        return {}


def _git(folder: Path) -> dict[str, str]:
    """Return the commit of a folder's repository, and whether files that git knows have changes since."""
    try:
        commit = _run_git(folder, "rev-parse", "HEAD")
        changes = _run_git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(bool(changes)).lower()}


def _run_git(folder: Path, *words: str) -> str:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # another command of the user's may hold the index
    command = ["git", "-C", str(folder), *words]
    answer = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=10, env=environment
    )
    return answer.stdout.strip()

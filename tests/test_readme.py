"""The README keeps its word: commands run, the grid is valid, the file list is complete, links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bwlm.plan.load import load_grid
from bwlm.stats.gaps import judge, paired_t
from bwlm.stats.loss_file import gaps_from
from tests.file_list import MARK, PAGE, file_list

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

ELSEWHERE = {
    "make demo": "the demo grid is planned in tests/plan/test_load.py, and a whole grid runs in tests/grid/test_run.py",
    "make test": "this",
    "make chat": "the grid is planned in tests/plan/test_load.py; tests/chat talks to models that are made in seconds",
    "make tour": "the grid is planned in tests/plan/test_load.py, and families run in tests/plan/test_inherit.py",
    "bwlm grid run grids/branching.yaml": "planned in tests/plan/test_load.py; tests/grid/test_chain.py runs one",
    "bwlm grid run grids/reversal.yaml": "planned in tests/plan/test_load.py",
    "bwlm eval reversal ": "the items are scored in tests/evaluate/tasks/test_reversal.py",
    **dict.fromkeys(["ray ", "export RAY_AUTH_MODE=token"], "tests/cluster/test_job.py"),
    "bwlm analyze scores --from forward:0=": "tests/test_cli_scores.py",
    "printf ": "tests/test_cli_chat.py",
    "bwlm serve ": "tests/faults/test_serving.py and test_replicas.py",
    "serve shutdown": "tests/cluster/test_job.py",
    "curl ": "tests/chat/test_serve_page.py",
    "python benchmarks/": "tests/test_benchmarks.py",
    "RAY_ADDRESS=auto bwlm doctor --cluster": "tests/cluster/test_doctor.py",
    **dict.fromkeys(
        ["export AWS_ACCESS_KEY_ID=", "export MLFLOW_TRACKING_URI=", "bwlm grid run grids/tiny.yaml --storage s3://"],
        "tests/storage/test_grid.py",
    ),
    **dict.fromkeys(["bwlm runs list --storage ", "bwlm storage "], "tests/storage/test_grid.py, test_training.py"),
    **dict.fromkeys(
        [f"bwlm {command} --storage s3://" for command in ("grid status tiny", "grid stop tiny", "doctor")],
        "tests/storage/test_stop.py, test_control.py",
    ),
    "bwlm grid delete tiny --dry-run --storage s3://": "tests/storage/test_stop.py",
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def write_files(path: Path, folder: Path) -> list[str]:
    """Writes the blocks of a page that are files, such as one under ```csv losses.csv, and returns their names."""
    found = re.findall(r"^```\w+ ([\w.]+)\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name, content in found:
        (folder / name).write_text(content)
    return [name for name, _ in found]


def commands(path: Path) -> list[str]:
    """Return a page's commands that this file runs; each of the others has its test in `ELSEWHERE`."""
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    found = dict.fromkeys(line.split("  #")[0].strip() for line in lines if line.strip())
    return [command for command in found if not any(command.startswith(known) for known in ELSEWHERE)]


WITH_COMMANDS = [path for path in DOCUMENTS if commands(path)]


class NewUser:
    """Someone who types the pages' commands, each with a Ray of its own, where grids, pages and files lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[str, subprocess.CompletedProcess[str]] = {}
        for name in ("grids", "docs"):
            (folder / name).symlink_to(ROOT / name)
        written = [name for path in DOCUMENTS for name in write_files(path, folder)]
        assert len(set(written)) == len(written), "two pages would overwrite each other's file"
        set_elsewhere = ("BWLM_STORAGE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
        self._environment = {k: v for k, v in os.environ.items() if k not in set_elsewhere}
        self._environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command once, whatever number of pages show it."""
        if command not in self._done:
            words = shlex.split(command)
            assert words[0] == "bwlm", f"{command}: run it here, or say in ELSEWHERE which test does"
            self._done[command] = subprocess.run(
                words, cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=300,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        return self._done[command]


@pytest.fixture(scope="module")
def new_user(tmp_path_factory: pytest.TempPathFactory) -> NewUser:
    return NewUser(tmp_path_factory.mktemp("user"))


@pytest.mark.faults
@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_every_command_of_a_page_runs(path: Path, new_user: NewUser) -> None:
    """The README's commands come first: the other pages go on with what it has trained."""
    for command in commands(WITH_COMMANDS[0]):
        new_user.run(command)
    for command in commands(path):
        done = new_user.run(command)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, command


@pytest.mark.faults
def test_the_readme_leaves_what_it_says(new_user: NewUser) -> None:
    ran = [new_user.run(command) for command in commands(ROOT / "README.md")]
    assert len(ran) >= 10
    assert (new_user.folder / "runs" / "grids" / "tiny" / "RESEARCH_REPORT.md").exists()


@pytest.mark.faults
def test_the_python_of_the_readme_runs(new_user: NewUser) -> None:
    for command in commands(ROOT / "README.md"):
        new_user.run(command)
    (program,) = blocks(ROOT / "README.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=new_user.folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_the_grid_of_the_readme_is_valid(corpus: Path, tmp_path: Path) -> None:
    (text,) = blocks(ROOT / "README.md", "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("corpus/", str(corpus)))
    assert len(load_grid(path, []).cells) == 2 * 2 * 3 * 5


def test_the_grid_of_the_reference_is_valid(tmp_path: Path) -> None:
    (text,) = blocks(ROOT / "docs" / "grids.md", "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert len(load_grid(path, []).cells) == 2 * 2 * 2 * 3 + 3


def test_every_file_has_its_line() -> None:
    assert PAGE.read_text().partition(MARK)[2] == file_list(), "run python -m tests.file_list"
    listed = set(re.findall(r"^- `([\w/]+\.py)` .", file_list(), flags=re.MULTILINE))
    assert {path.name for path in (ROOT / "bwlm").rglob("*.py")} - {"__init__.py"} <= listed


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_lines_of_prose_fit_the_screen(path: Path) -> None:
    """Lines of text have at most 120 characters; rows of tables and code cannot be wrapped."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    prose = [line for line in text.splitlines() if not line.lstrip().startswith("|") and not line.startswith("    ")]
    assert not [line for line in prose if len(line) > 120]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_study_says_what_its_losses_say() -> None:
    study = ROOT / "docs" / "studies" / "arrow"
    pairs, _ = gaps_from(study / "losses.parquet")
    found, *with_both = pairs
    assert found.seed_interval is not None
    low, high = found.seed_interval
    words = " ".join((study / "README.md").read_text().split())
    assert "backward is better" not in words
    assert (
        f"Over {len(found.seeds)} seeds the loss of backward less that of forward is {found.gap_nats:.4f} nats" in words
    )
    assert f"({found.gap_percent:.2f} %), 95 % over seeds {low:.4f} .. {high:.4f}, p = {found.p:.3f} before" in words
    chose, *others = found.per_seed
    _, interval = paired_t(np.array(others)) or pytest.fail("seven seeds have an interval")
    assert f"says {chose:+.4f} by itself" in words
    assert f"the seven others {np.mean(others):.4f} ({interval[0]:.4f} .. {interval[1]:.4f})" in words
    [judged] = judge([replace(found, choosing_seeds=1)])
    assert f"the verdict is `{judged.verdict}`" in words
    for one, name in zip(with_both, ("forward", "backward"), strict=True):
        assert (one.a, one.b) == (name, "bidirectional")
        assert re.search(rf"{one.gap_nats:.4f} (nats )?\({one.gap_percent:.2f} %\) worse than {name}", words)
    report = (study / "RESEARCH_REPORT.md").read_text()
    assert report.count(f"**{found.verdict}**") == 2 * len(pairs)

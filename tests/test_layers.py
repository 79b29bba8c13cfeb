"""The architecture of docs/architecture.md, kept: imports point down, heavy libraries stay in their packages."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bwlm.phases import PHASES

PACKAGE = Path(__file__).parent.parent / "bwlm"

# each room may import itself, the ground, and the rooms named; the order is the story's
ROOMS: dict[str, set[str]] = {
    "model": set(),
    "stats": set(),
    "text": set(),
    "storage": set(),
    "record": {"storage", "model.shape", "model.compute"},
    "tasks": {"text"},
    "trained": {"record", "text", "model"},
    "plan": {"record", "storage", "stats", "model.shape", "model.compute"},
    "analysis": {"record", "text", "stats"},
    "evaluate": {"trained", "tasks", "record", "storage", "stats", "text", "model"},
    "chat": {"trained", "record", "storage", "text", "model"},
    "train": {"evaluate", "tasks", "record", "text", "model"},
    "cluster": {"train.termination", "chat", "plan", "record.code", "model.compute"},
    "grid": {"cluster", "train", "evaluate", "tasks", "plan", "analysis", "record", "storage", "text", "model"},
    "cli": {
        "grid",
        "cluster",
        "chat",
        "train",
        "evaluate",
        "trained",
        "tasks",
        "plan",
        "analysis",
        "record",
        "storage",
        "text",
        "stats",
    },
    "jobs": {"cli"},
    "__main__": {"cli"},
}
# the ground, from the bottom up: each may import those before it
GROUND_ORDER = (
    "errors",
    "format",
    "background",
    "progress",
    "phases",
    "directions",
    "credentials",
    "remote",
    "paths",
    "config",
    "settings_file",
)
# of the ground, all that these rooms may import
BARE = {
    "model": set[str](),
    "stats": {"errors", "format", "directions", "paths", "config"},
}
# library -> the only places that may import it, as prefixes of module names
HEAVY = {
    "ray.train": ["grid"],
    "ray.tune": ["grid"],
    "ray.serve": ["cluster.serving"],
    "ray": ["grid", "cluster", "text.stream"],
    "mlflow": ["record.tracking", "record.mlflow_store", "record.mlflow_view", "record.database"],
    "torch": [
        *("model", "record.checkpoint", "evaluate", "trained", "train", "grid.worker"),
        *("chat.engine", "chat.loading", "cluster.doctor"),
    ],
    "altair": ["analysis.charts"],
    "h5py": ["record.researchlog"],
    "tiktoken": ["text.tokenizer"],
    "obstore": ["storage.objects"],
    "typer": ["cli"],
    "prompt_toolkit": ["chat.terminal"],
    "fastapi": ["chat.server", "chat.endpoints"],
    "starlette": ["chat.server", "chat.endpoints", "chat.guard", "chat.metrics", "cluster.serving"],
    "uvicorn": ["chat.server"],
    "lm_eval": ["evaluate.lm_eval_adapter"],
    "transformers": [],  # exports are written by hand; tests alone read them with it
    "tokenizers": [],
}


def modules() -> dict[str, Path]:
    """Every module of bwlm, tasks and jobs by its name, without `bwlm.`."""
    named = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    for folder in ("tasks", "jobs"):
        named |= {f"{folder}.{path.stem}": path for path in (PACKAGE.parent / folder).glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def room_of(name: str) -> str:
    return name.partition(".")[0]


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a module imports, at its top or inside functions, but not for types alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


MODULES = modules()


def edges(name: str) -> set[str]:
    """Modules of ours that a module imports; a phase, which is found by its name, counts as imported by `train.run`."""
    found = {target.removeprefix("bwlm.") for target in imports(MODULES[name])}
    if name == "train.run":
        found |= {f"train.{phase}" for phase in PHASES}
    return (found & MODULES.keys()) - {name}


def may_import(name: str, target: str) -> bool:
    room, other = room_of(name), room_of(target)
    if room in GROUND_ORDER:
        return other in GROUND_ORDER[: GROUND_ORDER.index(room)]
    if other in GROUND_ORDER:
        return other in BARE.get(room, set(GROUND_ORDER))
    return other == room or any(target == one or target.startswith(f"{one}.") for one in ROOMS[room])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    known = {*ROOMS, *GROUND_ORDER, "__init__"}
    assert room_of(name) in known, f"{name} is a new room: it needs a reason in docs/architecture.md and a place here"
    wrong = [target for target in sorted(edges(name)) if not may_import(name, target)]
    assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_no_arrow_is_without_an_import() -> None:
    """A room may not name another room from which it imports nothing."""
    used = {room: {target for name in MODULES if room_of(name) == room for target in edges(name)} for room in ROOMS}
    unused = [
        f"{room} -> {one}"
        for room, allowed in ROOMS.items()
        for one in allowed
        if not any(target == one or target.startswith(f"{one}.") for target in used[room])
    ]
    assert not unused


@pytest.mark.parametrize("name", sorted(MODULES))
def test_heavy_libraries_stay_in_their_packages(name: str) -> None:
    for target in imports(MODULES[name]):
        for library, places in HEAVY.items():
            if target == library or target.startswith(f"{library}."):
                assert any(name == place or name.startswith(f"{place}.") for place in places), (
                    f"{name} imports {target}"
                )


def test_no_circles() -> None:
    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        if name not in visited:
            for other in edges(name):
                visit(other, (*trail, name))
            visited.add(name)

    visited: set[str] = set()
    for name in sorted(MODULES):
        visit(name, ())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("bwlm.model.gpt", ["ray", "mlflow", "pydantic", "pandas"]),
        ("bwlm.analysis.report.study", ["torch", "ray", "mlflow"]),
        ("bwlm.train.loop", ["ray", "mlflow"]),
        ("bwlm.record.checkpoint", ["torch"]),
        ("bwlm.record.catalog.describe", ["torch", "pandas", "scipy"]),
        ("bwlm.record.catalog.filters", ["torch", "pandas", "scipy"]),
        ("bwlm.chat.talkable", ["torch", "ray", "mlflow", "pandas"]),
        ("bwlm.chat.dialogue", ["torch", "ray", "mlflow", "pandas", "fastapi"]),
        ("bwlm.cli", ["torch", "ray", "mlflow", "pandas", "altair"]),
        ("bwlm.plan.load", ["torch", "ray", "mlflow", "pandas"]),
        ("bwlm.evaluate.sandbox", ["torch", "ray", "mlflow", "pandas", "numpy", "pydantic"]),
    ],
)
def test_an_import_does_not_pull_in_what_it_does_not_need(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


_IN_A_CHILD = """
import json, os, signal, sys
import altair, grpc, h5py, lm_eval.api.model, mlflow, pandas, psutil, pyarrow.parquet, pydantic, scipy.stats, tiktoken
import typer
import ray.data, ray.serve, ray.train.torch, ray.tune  # their effects are theirs
import torch._dynamo, torch.nn.attention.flex_attention

def state():
    return dict(os.environ), os.getcwd(), [str(signal.getsignal(number)) for number in (2, 15)]

for module in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        before = state()
        __import__(module)
        os._exit(state() != before)
    if os.waitpid(child, 0)[1]:
        print(module)
"""


def test_an_import_has_no_effect_on_the_process() -> None:
    """Each module in a process without any other of ours: environment, working folder and signals stay as they were."""
    names = [name if room_of(name) in ("tasks", "jobs") else f"bwlm.{name}" for name in sorted(MODULES)]
    command = [sys.executable, "-c", _IN_A_CHILD, json.dumps([name.removesuffix(".__init__") for name in names])]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

"""The architecture of docs/architecture.md, kept: imports point down, heavy libraries stay in their packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bwlm"

# each package may import itself and the packages named; the order is the story's
ALLOWED = {
    "errors": set(),
    "credentials": {"errors"},
    "paths": {"credentials", "errors"},
    "config": {"credentials"},
    "settings_file": {"config", "errors"},
    "model": set(),
    "text": {"model", "config", "paths", "credentials", "errors"},
    "record": {"model", "config", "paths", "credentials", "errors"},
    "evaluate": {"record", "text", "model", "config", "paths", "errors"},
    "train": {"evaluate", "record", "text", "model", "config", "paths", "errors"},
    "analysis": {"train", "evaluate", "record", "text", "model", "settings_file", "config", "paths", "errors"},
    "grid": {"analysis", "train", "evaluate", "record", "text", "model", "settings_file", "config", "paths", "errors"},
    "cli": {
        "grid",
        "analysis",
        "train",
        "evaluate",
        "record",
        "text",
        "model",
        "settings_file",
        "config",
        "paths",
        "credentials",
        "errors",
    },
    "__init__": set(),
}
# library -> the only places that may import it, as prefixes of module names
HEAVY = {
    "ray.train": ["grid"],
    "ray.tune": ["grid"],
    "ray": ["grid", "text.stream"],
    "mlflow": ["record.tracking", "record.database"],
    "torch": ["model", "record.checkpoint", "evaluate", "train", "grid.worker"],
    "altair": ["analysis.charts"],
    "h5py": ["record.researchlog"],
    "tiktoken": ["text.tokenizer"],
    "typer": ["cli"],
    "transformers": [],  # exports are written by hand; tests alone read them with it
    "tokenizers": [],
}


def modules() -> dict[str, Path]:
    named = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


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


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    package = name.split(".")[0]
    assert package in ALLOWED, f"{package} is a new package: it needs a reason in docs/architecture.md and a place here"
    for target in imports(MODULES[name]):
        if target.startswith("bwlm."):
            other = target.split(".")[1]
            if other in ALLOWED:
                assert other == package or other in ALLOWED[package], f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_heavy_libraries_stay_in_their_packages(name: str) -> None:
    for target in imports(MODULES[name]):
        for library, places in HEAVY.items():
            if target == library or target.startswith(f"{library}."):
                assert any(name == place or name.startswith(f"{place}.") for place in places), (
                    f"{name} imports {target}"
                )


def test_no_circles() -> None:
    edges = {
        name: {t.removeprefix("bwlm.") for t in imports(path) if t.removeprefix("bwlm.") in MODULES} - {name}
        for name, path in MODULES.items()
    }

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        if name not in visited:
            for other in edges[name]:
                visit(other, (*trail, name))
            visited.add(name)

    visited: set[str] = set()
    for name in sorted(edges):
        visit(name, ())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("bwlm.model.gpt", ["ray", "mlflow", "pydantic", "pandas"]),
        ("bwlm.analysis.report", ["torch", "ray", "mlflow"]),
        ("bwlm.train.loop", ["ray", "mlflow"]),
        ("bwlm.record.checkpoint", ["torch"]),
        ("bwlm.analysis.overview", ["torch", "pandas", "scipy"]),
        ("bwlm.analysis.conditions", ["torch", "pandas", "scipy"]),
        ("bwlm.cli", ["torch", "ray", "mlflow", "pandas", "altair"]),
        ("bwlm.grid.plan", ["torch", "ray", "mlflow", "pandas"]),
    ],
)
def test_an_import_does_not_pull_in_what_it_does_not_need(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"

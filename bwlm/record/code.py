"""Digests of the code that decides a run's result, by each module's meaning, so that better words re-key no run.

A digest covers a module's syntax tree without the parts that cannot change a result: docstrings, comments, layout,
the annotations of functions and the descriptions of settings. Its encoding is our own, and the same on every Python
from 3.11 on: `ast.dump` prints new fields as Python grows. The annotations in class bodies stay, since pydantic and
dataclasses run them.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard

IDENTITY_VERSION = 3
"""Version of the digests, raised whenever unchanged code would get another digest.

Version 1 hashed whole files; since version 2 many modules have other names.
"""

version = cache(metadata.version)
"""Version of an installed package, which is searched for on the disk once a process."""
REPOSITORY = Path(__file__).parents[2]
_FOLLOWED = ("bwlm.directions", "bwlm.phases", "bwlm.model.", "bwlm.text.", "bwlm.train.", "bwlm.evaluate.", "tasks.")
_ROOTS = ("bwlm.config", "bwlm.record.checkpoint", "bwlm.record.parent", "bwlm.text.stream", "bwlm.train.run")
"""Modules for settings, for loading a run's own and its parent's weights, for the rows, and for the phase."""

_IS_TEXT = "makes the text, whose digest is in the identity"
NO_RESULT: Mapping[str, str] = {
    "bwlm.text.controls": _IS_TEXT,
    "bwlm.text.corpus": _IS_TEXT,
    "bwlm.text.documents": _IS_TEXT,
    "bwlm.text.json_lines": _IS_TEXT,
    "bwlm.text.listing": _IS_TEXT,
    "bwlm.text.pydocs": _IS_TEXT,
    "bwlm.text.reversal": _IS_TEXT,
    "bwlm.text.shards": _IS_TEXT,
    "bwlm.text.tally": "counts for a person what has been read",
    "bwlm.model.compute": "chooses how fast; the precision that it chooses is in the identity",
    "bwlm.train.meter": "tells speed, memory and time left",
    "bwlm.train.records": "writes down what others computed",
    "bwlm.train.scoring": "scores saved checkpoints on tasks",
    "bwlm.train.termination": "ends a run, which then resumes as it was",
}
"""Modules that training imports and that change no result, each with the reason."""
SAME_RESULT: Mapping[str, str] = {
    "3405518402cda760": "aa7d6f1284b0e22b",  # bwlm.text.stream: its tasks ask for no CPU; tests compare their rows
}
"""Digests of modules that decide exactly what they decided before a change, each with the digest of before."""
NO_SETTINGS = frozenset(
    {"CheckpointSettings", "ComputeSettings", "ResearchLogSettings", "ResourceSettings", "WorkerRange"}
)
"""Classes of `bwlm.config` that say where or how fast a run trains, or what is kept of it."""
NO_SETTING_FIELDS = frozenset({"EvaluationSettings.tasks", "EvaluationSettings.max_examples"})
"""Fields of its other classes that ask for scores of what was trained."""


@cache
def module_digests(phase: str, mixture: tuple[str, ...] = (), root: Path = REPOSITORY) -> dict[str, str]:
    """Return the digest of every module that decides the result of a phase, by its name, below the folder `root`.

    Of `tasks`, whose rewards RL learns by, only the modules that `mixture` names count, and the modules that they
    import.
    """
    trees: dict[str, ast.Module] = {}
    pending = [*_ROOTS, f"bwlm.train.{phase}"]
    while pending:
        name = pending.pop()
        path = _file_of(name, root)
        if name in trees or name in NO_RESULT or path is None:
            continue
        trees[name] = ast.parse(path.read_bytes())
        imported = set(_imports(trees[name]))
        pending += sorted(module for module in imported if module.startswith(_FOLLOWED))
        if "tasks" in imported:
            pending += _tasks_named(mixture, root)
    left_out = NO_SETTINGS | NO_SETTING_FIELDS
    digests = {name: _digest(tree, left_out if name == "bwlm.config" else ()) for name, tree in sorted(trees.items())}
    return {name: SAME_RESULT.get(digest, digest) for name, digest in digests.items()}


def _file_of(name: str, root: Path) -> Path | None:
    """Return the file of a module or of a package's `__init__`; None for the name of a member."""
    stem = root / name.replace(".", "/")
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.exists()), None)


def code_digest(modules: Mapping[str, str]) -> str:
    """Return one digest of all the modules and of torch's version."""
    parts = [version("torch").split("+")[0], *(f"{name} {digest}" for name, digest in sorted(modules.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def changed_modules(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return the names of modules whose digests differ, and of modules that only one side has."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules and members that a module imports anywhere, except for types alone."""
    for node in _statements(tree.body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield the statements of a body and of all bodies inside, except those that only a type checker sees."""
    for node in body:
        yield node
        bodies = [node.orelse] if _is_for_types(node) else [getattr(node, name, []) for name in _BODIES]
        for inner in bodies:
            yield from _statements(inner)


_BODIES = ("body", "orelse", "finalbody", "handlers", "cases")
"""Fields of statements that hold statements, or clauses with bodies of their own."""


def _is_for_types(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _tasks_named(mixture: Iterable[str], root: Path) -> list[str]:
    """Return the modules of `tasks` that hold one of the names.

    The registry imports all tasks, and would make all of them count.
    """
    modules = []
    for path in sorted((root / "tasks").glob("*.py")):
        texts = {node.value for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Constant)}
        if path.stem != "__init__" and texts & set(mixture):
            modules.append(f"tasks.{path.stem}")
    return modules


# ---- the encoding ----


def _digest(tree: ast.Module, left_out: Collection[str] = ()) -> str:
    """Return the digest of a module without the classes `left_out`, and the fields of classes: `Class.field`."""
    body = [_without(node, left_out) for node in tree.body if _name(node) not in left_out]
    return hashlib.sha256(encoded(ast.Module(body, [])).encode()).hexdigest()[:16]


def _without(node: ast.stmt, left_out: Collection[str]) -> ast.stmt:
    """Return a class without its fields that are `left_out`; any other statement as it is."""
    if not isinstance(node, ast.ClassDef):
        return node
    body = [one for one in node.body if f"{node.name}.{_name(one)}" not in left_out]
    return ast.ClassDef(**{**dict(ast.iter_fields(node)), "body": body})


def _name(node: ast.stmt) -> str:
    """Return the name of a class or of a field; '' for another statement."""
    if isinstance(node, ast.ClassDef):
        return node.name
    return node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else ""


_SILENT = frozenset({"ctx", "kind", "type_comment", "type_ignores", "returns", "simple"})
"""Fields of nodes that say how something was written, or what a type checker reads."""


def encoded(node: Any, in_class: bool = False) -> str:
    """Return the meaning of a syntax tree as text; `in_class`: the node stands directly in the body of a class.

    Fields go by their names and empty ones are left out, so that a field that a later Python adds changes nothing
    until it is used. Raises TypeError for a value that no tree has.
    """
    if isinstance(node, list):
        return f"[{' '.join(filter(None, (encoded(each, in_class) for each in _plain(node))))}]"
    if isinstance(node, ast.AST):
        return _encoded_node(node, in_class)
    if node is None or isinstance(node, str | bytes | int | float | complex) or node is Ellipsis:
        return f"{type(node).__name__}:{node!r}"
    raise TypeError(f"a syntax tree does not hold {node!r}")


def _encoded_node(node: ast.AST, in_class: bool) -> str:
    if isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return ""  # docstrings, of attributes too: a statement that is only a constant does nothing
    if isinstance(node, ast.AnnAssign) and not in_class:
        return encoded(ast.Assign([node.target], node.value)) if node.value else ""
    fields = {name: value for name, value in ast.iter_fields(node) if name not in _SILENT and value not in (None, [])}
    if isinstance(node, ast.arg):
        fields.pop("annotation", None)
    if isinstance(node, ast.Constant):  # None is a value here
        return f"({encoded(node.value)})"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field":
        fields["keywords"] = [word for word in node.keywords if word.arg != "description"]
    is_class = isinstance(node, ast.ClassDef)
    parts = [f"{name}={encoded(value, is_class and name == 'body')}" for name, value in sorted(fields.items())]
    return f"({type(node).__name__} {' '.join(parts)})"


def _plain(nodes: list[Any]) -> Iterator[Any]:
    """Yield the nodes of a list without code for type checkers, and with f-strings in one way of writing them.

    Neighbouring texts of an f-string are joined, and none is empty: Python versions cut them differently.
    """
    if not any(isinstance(node, ast.FormattedValue) for node in nodes):
        for node in nodes:
            yield from node.orelse if _is_for_types(node) else [node]
        return
    text = ""
    for node in nodes:
        if isinstance(node, ast.Constant):
            text += str(node.value)
            continue
        if text:
            yield ast.Constant(text)
        text = ""
        yield node
    if text:
        yield ast.Constant(text)

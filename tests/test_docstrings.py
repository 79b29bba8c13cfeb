"""Docstrings: every public name has one, and each begins with a verb or with the noun that it holds or returns."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [path for room in ("bwlm", "tasks", "jobs") for path in sorted((ROOT / room).rglob("*.py"))]
FRAGMENTS = """
    Of Those That What Whether Who Whom Whose Where When If As For From To In On By With Without At Also And Or But Than
    Then So Such Only Not Nor Since Because While Until Which How Why It This These They Its Their One Ones Another
    Either Neither Both Between Before After Behind Beside Below Above Instead Here There
"""
RAYS = ("on_trial_", "on_step_", "choose_trial_")
"""Beginnings of the methods that Ray Tune calls: Ray documents them."""

Defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def begins_with_a_fragment(docstring: str) -> bool:
    """True for a docstring whose first word needs a noun that the reader has not met yet."""
    return docstring.split()[0].strip(",.:;`") in FRAGMENTS.split()


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every docstring: of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | Defined) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text
        if isinstance(node, ast.Module | ast.ClassDef):
            for before, statement in zip(node.body, node.body[1:], strict=False):
                if isinstance(before, ast.Assign | ast.AnnAssign) and (text := text_of(statement)):
                    yield statement.lineno, text


def text_of(statement: ast.stmt) -> str | None:
    """Return the text of a statement that is nothing but a string."""
    match statement:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return text
    return None


def public_without(tree: ast.Module, documented: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the public classes, functions and methods without a docstring, unless they are `documented` elsewhere."""

    def visit(body: list[ast.stmt], above: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, Defined) or node.name.startswith("_"):
                continue
            elsewhere = above and (node.name in documented or node.name.startswith(RAYS))
            if not ast.get_docstring(node) and not elsewhere:
                yield f"{node.lineno} {above}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{node.name}.")

    return visit(tree.body, "")


@pytest.fixture(scope="module")
def protocol_methods() -> frozenset[str]:
    """Return the methods that a protocol of ours documents: what implements them needs no docstring of its own."""
    return frozenset(
        method.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "Protocol" for b in node.bases)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and ast.get_docstring(method)
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_of_a_module(path: Path, protocol_methods: frozenset[str]) -> None:
    tree = ast.parse(path.read_text())
    fragments = [f"{line}: {text.splitlines()[0]}" for line, text in docstrings(tree) if begins_with_a_fragment(text)]
    assert not fragments
    assert not list(public_without(tree, protocol_methods))


def test_the_rules_see_what_breaks_them() -> None:
    tree = ast.parse('"""Of a module."""\nclass A:\n    x: int\n    """Those of x."""\n    def f(self): pass\n')
    assert [line for line, text in docstrings(tree) if begins_with_a_fragment(text)] == [1, 4]
    assert list(public_without(tree)) == ["2 A", "5 A.f"]

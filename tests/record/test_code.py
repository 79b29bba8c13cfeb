"""Code: what changes a result changes the digest, words and layout do not, on every Python from 3.11 on."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bwlm.phases import PHASES
from bwlm.record import code, fingerprint
from bwlm.record.code import (
    NO_RESULT,
    NO_SETTING_FIELDS,
    NO_SETTINGS,
    REPOSITORY,
    changed_modules,
    code_digest,
    encoded,
    module_digests,
)
from tasks import TASKS

GOLDEN = Path(__file__).with_name("every_construct.txt")
DIGEST_OF_GOLDEN = "93f90e00"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the code that can be changed."""
    for name in ("bwlm", "tasks"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


Changed = Callable[[str, str, str], list[str]]


@pytest.fixture
def changed(root: Path) -> Changed:
    """Replaces a text of a file, and tells the modules of a base run that are others by it."""

    def change(name: str, old: str, new: str) -> list[str]:
        before = module_digests("base", (), root)
        path = root / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        module_digests.cache_clear()
        return changed_modules(before, module_digests("base", (), root))

    return change


def means(source: str) -> str:
    return encoded(ast.parse(source))


# ---- what a change means ----


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("bwlm/model/gpt.py", "ROPE_BASE = 10_000", "ROPE_BASE = 100_000"),  # a constant
        ("bwlm/model/gpt.py", "x1 * cos + x2 * sin", "x1 * cos - x2 * sin"),  # an operator
        ("bwlm/model/gpt.py", "loss_chunk: int = 0,", "loss_chunk: int = 1,"),  # a default
        ("bwlm/text/plan.py", "    rows_per_step: int\n", "    rows_per_step: int\n    more: int = 0\n"),  # a field
        ("bwlm/config.py", 'Literal["muon", "adamw"]', 'Literal["muon", "adamw", "sgd"]'),  # a Literal
        ("bwlm/config.py", "ge=8, le=2**17", "ge=8, le=2**18"),  # a bound
        (
            "bwlm/config.py",
            "tokens: int = Field(2**18, ge=1",
            "tokens: int = Field(2**18, ge=2",
        ),  # beside one left out
        ("bwlm/config.py", 'Literal["whole", "turns"]', 'Literal["whole", "turns", "none"]'),
        ("bwlm/record/parent.py", "return load_weights(checkpoints, link.step)[0]", "return {}"),
    ],
)
def test_what_can_change_a_result_changes_its_module_alone(changed: Changed, name: str, old: str, new: str) -> None:
    assert changed(name, old, new) == [name.removesuffix(".py").replace("/", ".")]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("bwlm/model/gpt.py", '"""The GPT:', '"""Reworded. The GPT:'),
        ("bwlm/model/gpt.py", "ROPE_BASE = 10_000", "# a comment\n\n\nROPE_BASE = 10000  # another"),
        ("bwlm/text/plan.py", '    """Packed rows of each step\'s batch."""', ""),
        ("bwlm/text/plan.py", "def _draw(places: NDArray[np.int64]", "def _draw(places: NDArray[np.int32]"),
        ("bwlm/text/plan.py", ") -> tuple[NDArray[np.int64], NDArray[np.int64]]:", ") -> object:"),
        ("bwlm/config.py", 'description="T, tokens of a row"', 'description="tokens of a row, T"'),
        ("bwlm/config.py", 'description="steps between checkpoints; 0: only at the end"', 'gt=-1, description="x"'),
        ("bwlm/config.py", "    max_examples: int | None = Field(None, ge=1", "    max_examples: int = Field(5, ge=0"),
        ("bwlm/train/meter.py", "import time", "import time\n\nMORE = 1"),
        ("bwlm/text/corpus.py", "_ROWS_AT_ONCE = 256", "_ROWS_AT_ONCE = 512"),
        ("bwlm/grid/launch.py", "import contextlib", "import contextlib\n\nMORE = 1"),
        ("bwlm/train/rl.py", "_SHOWN = 20", "_SHOWN = 30"),  # another phase's
    ],
)
def test_words_layout_and_what_decides_no_result_change_nothing(
    changed: Changed, name: str, old: str, new: str
) -> None:
    assert changed(name, old, new) == []


def test_another_version_of_torch_is_other_code_and_another_build_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for build in ("2.13.0+cpu", "2.13.0+cu128", "2.14.0+cpu"):
        monkeypatch.setattr(code, "version", {"torch": build}.__getitem__)
        found[build] = code_digest({"a": "1"})
    assert found["2.13.0+cpu"] == found["2.13.0+cu128"] != found["2.14.0+cpu"]


def test_the_digest_of_all_follows_from_those_of_the_modules() -> None:
    one = {"a": "1", "b": "2"}
    assert code_digest(one) == code_digest({"b": "2", "a": "1"})
    assert len({code_digest(one), code_digest({"a": "2", "b": "1"}), code_digest({"a": "1"})}) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x: int = 3", "x = 3"),
        ("def f(a: int = 1) -> str: ...", "def f(a=1): ..."),
        ("def f():\n    x: int\n    return 1", "def f():\n    return 1"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\nelse:\n    b()",
            "from typing import TYPE_CHECKING\nb()",
        ),
        ("class A:\n    x: int = 3\n    'of x'", "class A:\n    x: int = 3"),
        ("def f():\n    'says'\n    pass", "def f():\n    pass"),
        ("f'a' f'{b}' 'c' 'd'", "f'a{b}cd'"),
        ("a = (1 +\n     2)", "a = 1 + 2"),
    ],
)
def test_sources_that_mean_the_same(one: str, other: str) -> None:
    assert means(one) == means(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("class A:\n    x: int = 3", "class A:\n    x = 3"),
        ("class A:\n    x: int", "class A:\n    x: float"),
        ("a = 1", "a = 1.0"),
        ("a = 1", "a = True"),
        ("a = None", "a = ..."),
        ("a = '1'", "a = b'1'"),
        ("a = 0.0", "a = -0.0"),
        ("f(**a)", "f(*a)"),
        ("{**a}", "{a: a}"),
        ("def f(a, /, b): ...", "def f(a, b): ..."),
        ("return_ = [a for a in b]", "return_ = {a for a in b}"),
        ("f'{a!r}'", "f'{a}'"),
        ("f'{a:.2f}'", "f'{a:.3f}'"),
        ("match a:\n    case None: b()", "match a:\n    case True: b()"),
        ("a if b else c", "c if b else a"),
        ("Field(1, description='a', ge=1)", "Field(1, description='a', ge=2)"),
        ("other(description='a')", "other(description='b')"),
    ],
)
def test_sources_that_mean_something_else(one: str, other: str) -> None:
    assert means(one) != means(other)


# ---- which modules ----


def test_every_module_of_the_training_rooms_counts_or_is_left_out_for_a_reason() -> None:
    known = {
        name for phase in PHASES for name in module_digests(phase, ("gsm8k", "builtin:arithmetic", "builtin:spelling"))
    }
    assert {"bwlm.config", "bwlm.record.parent", "bwlm.record.checkpoint", "bwlm.train.run"} <= known
    assert not known & NO_RESULT.keys()
    rooms = ("model", "text", "train", "evaluate")
    files = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for room in rooms
        for path in (REPOSITORY / "bwlm" / room).rglob("*.py")
        if path.stem != "__init__"
    }
    # no phase imports them
    used_after_training = {
        "bwlm.evaluate.texts",
        *("bwlm.evaluate.lm_eval_adapter", "bwlm.evaluate.sandbox", "bwlm.evaluate.sandbox_supervisor"),
        *(name for name in files if name.startswith("bwlm.evaluate.tasks.")),
        *("bwlm.model.compiled_cache", "bwlm.model.compiled_decoder", "bwlm.model.step_graphs"),
        *("bwlm.text.hf_tokenizer", "bwlm.text.inspect", "bwlm.text.mixture", "bwlm.text.prepare"),
    }
    assert files - known - NO_RESULT.keys() == used_after_training


def test_packages_that_decide_a_result_hold_no_code_of_their_own() -> None:
    """A digest covers modules; of `tasks`, only the registry is in its package."""
    for room in ("", "model", "text", "record", "evaluate", "trained", "train"):
        tree = ast.parse((REPOSITORY / "bwlm" / room / "__init__.py").read_text())
        assert all(isinstance(node, ast.Expr | ast.Assign) for node in tree.body), room


def test_settings_that_are_left_out_are_those_that_the_identity_leaves_out() -> None:
    source = (REPOSITORY / "bwlm" / "config.py").read_text()
    assert set(re.findall(r"^class (\w+)\(", source, re.MULTILINE)) >= NO_SETTINGS
    left_out = {f"EvaluationSettings.{name}" for name in fingerprint._NOT_IDENTITY["evaluation"]}
    assert left_out == NO_SETTING_FIELDS


def test_of_the_tasks_those_count_that_the_mixture_names(root: Path) -> None:
    before = module_digests("rl", ("gsm8k",), root)
    assert {name for name in before if name.startswith("tasks")} == {
        "tasks.files",
        "tasks.gsm8k",
        "tasks.rows",
        "tasks.task",
    }
    (root / "tasks" / "unused.py").write_text("NAME = 1\n")
    (root / "tasks" / "spelling.py").rename(root / "tasks" / "letters.py")
    init = root / "tasks" / "__init__.py"
    init.write_text(init.read_text().replace("from tasks.spelling", "from tasks.letters") + '\nFIRST = "gsm8k"\n')
    module_digests.cache_clear()
    assert module_digests("rl", ("gsm8k",), root) == before
    gsm8k = root / "tasks" / "gsm8k.py"
    gsm8k.write_text(gsm8k.read_text() + "\nMORE = 1\n")
    module_digests.cache_clear()
    assert changed_modules(before, module_digests("rl", ("gsm8k",), root)) == ["tasks.gsm8k"]


def test_a_module_counts_once_training_imports_it(root: Path) -> None:
    (root / "bwlm" / "evaluate" / "choices.py").write_text("CHOICES = 4\n")
    assert "bwlm.evaluate.choices" not in module_digests("base", (), root)
    loss = root / "bwlm" / "evaluate" / "windows.py"
    loss.write_text(loss.read_text() + "\n\ndef late() -> None:\n    from bwlm.evaluate import choices  # noqa\n")
    module_digests.cache_clear()
    assert "bwlm.evaluate.choices" in module_digests("base", (), root)


def test_a_module_that_is_imported_for_types_alone_does_not_count(root: Path) -> None:
    (root / "bwlm" / "evaluate" / "choices.py").write_text("CHOICES = 4\n")
    loss = root / "bwlm" / "evaluate" / "windows.py"
    loss.write_text(loss.read_text() + "\n\nif TYPE_CHECKING:\n    from bwlm.evaluate import choices\n")
    assert "bwlm.evaluate.choices" not in module_digests("base", (), root)


def test_every_task_counts_when_a_mixture_names_it() -> None:
    for name, task in TASKS.items():
        assert type(task).__module__ in module_digests("rl", (name,)), name


def test_the_code_of_a_package_counts_as_that_of_a_module(root: Path) -> None:
    kernels = root / "bwlm" / "model" / "kernels" / "__init__.py"
    kernels.parent.mkdir()
    kernels.write_text("TILE = 16\n")
    gpt = root / "bwlm" / "model" / "gpt.py"
    gpt.write_text(gpt.read_text() + "\n\nfrom bwlm.model.kernels import TILE\n")
    before = module_digests("base", (), root)
    kernels.write_text("TILE = 32\n")
    module_digests.cache_clear()
    assert changed_modules(before, module_digests("base", (), root)) == ["bwlm.model.kernels"]


# ---- any Python ----

_PRINT = """
import ast, hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("code_", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
text = module.encoded(ast.parse(open(sys.argv[2]).read()))
print(hashlib.sha256(text.encode()).hexdigest()[:8])
"""


def other_pythons() -> list[str]:
    """Pythons of 3.11 and newer, on the path or where pyenv keeps them; this one first."""
    found = {sys.version_info[:2]: sys.executable}
    for path in sorted(Path.home().glob(".pyenv/versions/3.*/bin/python")):
        major, minor = (int(part) for part in path.parents[1].name.split(".")[:2])
        if (major, minor) >= (3, 11):
            found.setdefault((major, minor), str(path))
    for minor in range(11, 20):
        if path := shutil.which(f"python3.{minor}"):
            found.setdefault((3, minor), path)
    return list(found.values())


@pytest.mark.parametrize("python", other_pythons())
def test_the_encoding_is_the_same_on_every_python(python: str) -> None:
    command = [python, "-c", _PRINT, str(REPOSITORY / "bwlm" / "record" / "code.py"), str(GOLDEN)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == DIGEST_OF_GOLDEN, "raise IDENTITY_VERSION: every run would be taken for another's"

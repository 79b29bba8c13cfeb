"""The corpus `builtin:pydocs`: English text that every install already holds.

It consists of CPython's reference topics (`pydoc_data.topics`) and the docstrings of the standard library and of some
libraries that bwlm depends on. `ast` finds them: nothing is imported or run. A document is a topic, or all docstrings
of one module, each below its qualified name. Documentation of compiled extensions is not covered.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from bwlm.errors import UserError
from bwlm.paths import read_json
from bwlm.text.shards import MANIFEST, counts, refuse_foreign, write_shards

FORMAT_VERSION = 2
"""Version of the text: raise it whenever the same sources would give another text."""

STANDARD_LIBRARY = "python"
PACKAGES = (
    STANDARD_LIBRARY,
    "aiohttp",
    "anyio",
    "click",
    "fsspec",
    "h5py",
    "jinja2",
    "networkx",
    "pyarrow",
    "pydantic",
    "ray.data",
    "ray.serve",
    "ray.train",
    "ray.tune",
    "ray.util",
    "rich",
    "urllib3",
)
"""Packages with prose in modules of a few kilobytes; numpy, scipy and pandas have few, long modules full of numbers."""

TRAIN_SHARDS = 4
VALIDATION_SHARE = 10
"""Ratio of validation: 1 document in 10 goes to the last shard."""

SMALLEST_DOCUMENT = 200
"""Fewest characters of a document."""
LARGEST_DOCUMENT = 100_000
"""Most characters of a document. A longer one would be a tenth of the validation text by itself."""

_NOT_OURS = ("_vendor", "_bundled", "vendor", "vendored", "externals", "thirdparty", "thirdparty_files")
_TESTS = ("tests", "test", "testing", "idlelib", "lib2to3", "turtledemo")
_PASSED_OVER = frozenset({*_NOT_OURS, *_TESTS, "site-packages", "dist-packages"})

Docstring = tuple[str, str]
"""(qualified name in its module, or "" for the module's own; cleaned text)"""


@dataclass(frozen=True)
class PydocsManifest:
    """Contents of a written corpus, and the versions that its text follows from."""

    format: int
    versions: dict[str, str]
    shards: int
    documents: int
    characters: int
    digest: str
    """SHA-256, in hex, over the texts in the order of the shards."""

    @classmethod
    def read(cls, folder: Path) -> PydocsManifest:
        """Return the manifest in `folder`. Raises `UserError` that names it if it is missing or not one of ours."""
        path = folder / MANIFEST
        try:
            return cls(**read_json(path))
        except TypeError:
            raise UserError(f"{path}: not the manifest of a built-in corpus: remove the folder") from None


def pydocs_key() -> str:
    """Return a short hash of everything that determines the corpus: it names its folder without building it."""
    return _key(PACKAGES)


def _key(packages: Sequence[str]) -> str:
    recipe = {"format": FORMAT_VERSION, "packages": packages, "versions": _versions(packages)}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def write_pydocs(folder: Path, progress: Callable[[str], None] | None = None) -> PydocsManifest:
    """Write `shard_00000.parquet`.. (a column `text`; the last shard is validation) and `manifest.json`, or nothing.

    An existing corpus in `folder` stays. Raises `UserError` if something else lies there.
    """
    return _write(folder, PACKAGES, progress or (lambda _: None))


def _write(folder: Path, packages: Sequence[str], progress: Callable[[str], None]) -> PydocsManifest:
    if (folder / MANIFEST).exists():
        return PydocsManifest.read(folder)
    refuse_foreign(folder)
    modules = find_modules(packages)
    progress(f"reading the docstrings of {len(modules)} modules")
    shards = _deal({**_topics(), **_module_documents(read_docstrings(modules))})
    manifest = PydocsManifest(format=FORMAT_VERSION, versions=_versions(packages), **counts(shards))
    progress(f"writing {manifest.documents} documents of {manifest.characters / 1e6:.1f} M characters")
    write_shards(folder, shards, asdict(manifest))
    return manifest


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the distributions, without those that are not installed."""
    versions = {}
    for name in dict.fromkeys(package.split(".")[0] for package in packages):
        if name == STANDARD_LIBRARY:
            versions[name] = platform.python_version()
        elif distribution := _installed(name):
            versions[name] = distribution.version
    return versions


def _installed(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_modules(packages: Iterable[str]) -> dict[str, str]:
    """Return the source file of each module by its dotted name, sorted by name."""
    modules = {}
    for package in packages:
        if package == STANDARD_LIBRARY:
            root = folder = Path(sysconfig.get_path("stdlib"))
        elif distribution := _installed(package.split(".")[0]):
            root = Path(str(distribution.locate_file("")))
            folder = root.joinpath(*package.split("."))
        else:
            continue
        for path in _sources(folder):
            modules[_module_name(path.relative_to(root))] = str(path)
    return dict(sorted(modules.items()))


def _sources(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _PASSED_OVER)
        yield from (Path(where, name) for name in files if name.endswith(".py"))


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_docstrings(modules: dict[str, str]) -> dict[str, list[Docstring]]:
    """Return the docstrings of each module, the modules in the order given."""
    processes = min(8, os.cpu_count() or 1)
    shares = [list(modules.values())[index::processes] for index in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        read = {path: docstrings for part in pool.map(_read_in_child, shares) for path, docstrings in part.items()}
    return {name: read[path] for name, path in modules.items()}


def _read_in_child(paths: list[str]) -> dict[str, list[Docstring]]:
    # A plain interpreter: a multiprocessing child would first import the caller's script, even without a main guard.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "bwlm.text.pydocs"]
    question = json.dumps(paths).encode()
    child = subprocess.run(command, input=question, stdout=subprocess.PIPE, env=environment, check=True)
    return {path: [(name, text) for name, text in documents] for path, documents in json.loads(child.stdout).items()}


def _child() -> None:
    warnings.simplefilter("ignore")
    json.dump({path: list(docstrings(Path(path).read_bytes())) for path in json.load(sys.stdin)}, sys.stdout)


def docstrings(source: bytes) -> Iterator[Docstring]:
    """Yield the docstrings of a module, its classes and functions, in order; none if it is not valid Python."""
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    yield from _walk(module, "")


def _walk(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Docstring]:
    text = ast.get_docstring(node)
    if text:
        yield name, text.strip()
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}" if name else child.name)


def _topics() -> dict[str, str]:
    """Return the topics by name. A topic that is a section of another (`with` of `compound`) is left out."""
    from pydoc_data.topics import topics

    kept: dict[str, str] = {}
    for name, text in sorted(topics.items(), key=lambda topic: (-len(topic[1]), topic[0])):
        body = text.partition("\n\n")[2].strip()
        if not any(body in longer for longer in kept.values()):
            kept[f"topics.{name}"] = text.strip()
    return kept


def _module_documents(read: dict[str, list[Docstring]]) -> dict[str, str]:
    """Return a document for each module; of equal docstrings only the first stays."""
    seen: set[str] = set()
    documents = {}
    for module, texts in read.items():
        fresh = []
        for name, text in texts:
            if text not in seen:
                seen.add(text)
                fresh.append(f"{name}\n\n{text}" if name else text)
        documents[module] = "\n\n".join([module, *fresh])
    return documents


def _deal(documents: dict[str, str]) -> list[list[str]]:
    """Return shards of texts, the last one for validation.

    A text's shard, and its place there, follow from the hash of its name alone.
    """
    shards: list[list[str]] = [[] for _ in range(TRAIN_SHARDS + 1)]
    for name in sorted(documents, key=lambda name: (_hash(name), name)):
        text = documents[name].encode(errors="ignore").decode()
        if SMALLEST_DOCUMENT <= len(text) <= LARGEST_DOCUMENT:
            shards[TRAIN_SHARDS if held_out(name) else _hash(name) // VALIDATION_SHARE % TRAIN_SHARDS].append(text)
    return shards


def held_out(name: str) -> bool:
    """Return true if the document of this name, a topic's or a module's, is validation."""
    return _hash(name) % VALIDATION_SHARE == 0


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


if __name__ == "__main__":
    _child()

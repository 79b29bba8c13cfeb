"""Files behind a folder, a glob, a path or a URI, and what a person is told where there are none."""

from __future__ import annotations

import errno
import glob
import itertools
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

from bwlm.credentials import refuse_secret
from bwlm.errors import UserError, first_line
from bwlm.paths import local_path
from bwlm.text.splits import SPLIT_WORDS, FileSplit, Shard, is_split_folder, split_of

PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXTS = (".txt", ".md")
"""Endings of files that are one document each."""

_PASSED_OVER = (".", "_")
"""First characters of names that are no data, as in pyarrow's data sets: `._a.parquet`, `.DS_Store`, `_SUCCESS`."""
_DATA = "data"
"""Folder in which a data set of the hub keeps its files, beside a README."""
_MOST_LOOKED_AT = 10_000
"""Most paths below a folder among which a file is searched for a hint."""
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created", "blob_id")
"""Names that file systems give to a value that changes with the file."""
PACKAGES = {
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "abfs": ("adlfs", "azure"),
    "hf": ("huggingface_hub", "hf"),
}
"""Package that reads the addresses of a scheme, and the extra of bwlm that installs it."""


class NoSource(UserError):
    """Text is gone, or out of reach from this machine."""


def list_files(source: str, field: str, endings: tuple[str, ...] = PARQUET) -> list[Shard]:
    """Return the files of a folder, glob, path or URI whose names have one of these endings, sorted by name.

    Hidden files are passed over. A path of one file is taken whatever its name. A folder that holds none, or a README
    alone, is read as a data set of the hub: its folder `data`. Raises `UserError` that names `field` if there is no
    file.
    """
    refuse_secret(source, field)
    path = local_path(source)
    return _remote(source, field, endings) if path is None else _local(path, source, field, endings)


def is_hidden(name: str, pattern: str = "") -> bool:
    """Return whether a path below a source has a part that begins with `.` or `_`, which its pattern does not ask for.

    `name` is relative to the source.
    """
    asked = {part[0] for part in pattern.split("/") if part.startswith(_PASSED_OVER)}
    return any(part.startswith(_PASSED_OVER) and part[0] not in asked for part in name.split("/"))


def _local(path: Path, source: str, field: str, endings: tuple[str, ...]) -> list[Shard]:
    root, paths, pattern = path, [path], ""
    if path.is_dir():
        paths = _in_folder(path, endings)
    elif path.exists():
        return [_local_shard(path, _split_of(path.name, _own_split(path.parent)))]
    elif glob.has_magic(str(path)):
        root = Path(_fixed_part(str(path)))
        paths, pattern = [Path(found) for found in sorted(_glob(str(path)))], _below(str(path), str(root))
    else:
        raise NoSource(f"{field}: {_placed(source)} does not exist: {_give(endings)}{_on_the_hub(source, endings)}")
    names = {found: _below(str(found), str(root)) for found in paths}
    chosen = {found: name for found, name in names.items() if name.endswith(endings) and not is_hidden(name, pattern)}
    if not chosen:
        give = deeper(source, endings) or _give(endings)
        raise UserError(f"{field}: no {any_of(endings)} file in {_placed(source)}: {give}")
    own = _own_split(root)
    return [_local_shard(found, _split_of(name, own)) for found, name in chosen.items()]


def _in_folder(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Return what lies in a folder or, where that is a README at most, the files of data in its folder `data`."""
    own, data = sorted(folder.iterdir()), folder / _DATA
    documents = [path for path in own if path.name.endswith(endings) and not is_hidden(path.name)]
    if not data.is_dir() or not all(path.name.lower().startswith("readme.") for path in documents):
        return own
    return [path for path in sorted(data.iterdir()) if path.name.endswith(_data_of(endings))] or own


def _data_of(endings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(ending for ending in endings if ending not in TEXTS)


def _local_shard(path: Path, split: FileSplit) -> Shard:
    """Return a local file as a shard.

    Folders are resolved, so that one file has one URI. The file itself is not: a link may bear the better name.
    """
    status = path.stat()
    return Shard(str(path.parent.resolve() / path.name), status.st_size, str(status.st_mtime_ns), split)


def _own_split(root: Path) -> str:
    folder = root.resolve()
    return folder.name if is_split_folder(str(folder), lambda name: Path(name).is_dir()) else ""


def _split_of(name: str, own: str) -> FileSplit:
    """Return the split that a path below its source says. The name of a document is its title (`test-plan.md`).

    So it says a split only where it is the word alone (`val.txt`); the names of folders count as for other files.
    """
    folder, _, file = name.rpartition("/")
    is_title = file.endswith(TEXTS) and file.partition(".")[0].lower() not in SPLIT_WORDS
    return split_of(f"{folder}/-" if is_title else name, own)


def _below(path: str, root: str) -> str:
    return os.path.relpath(path, root)


def _fixed_part(pattern: str) -> str:
    """Return the folder in which a pattern begins to match: /a/b for /a/b/c*/*.parquet."""
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.split("/"))
    return "/".join(fixed) or ("/" if pattern.startswith("/") else ".")


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern


# ---- other file systems ----


def _remote(source: str, field: str, endings: tuple[str, ...]) -> list[Shard]:
    scheme, rest = source.split("://", 1)
    try:
        filesystem, path = fsspec.core.url_to_fs(f"{scheme.lower()}://{rest}")
        single = path.endswith(endings) and not glob.has_magic(path)
        pattern = path if glob.has_magic(path) else f"{path.rstrip('/')}/*"
        root = path.rpartition("/")[0] if single else _fixed_part(pattern)
        names = [path] if single else _listed(filesystem, pattern, root, endings)
        if not names and not glob.has_magic(path):
            names = _listed(filesystem, f"{root}/{_DATA}/*", root, _data_of(endings))
        infos = [filesystem.info(name) for name in names]
        own = root.rpartition("/")[2] if is_split_folder(root, filesystem.isdir) else ""
        has_folders = not names and not glob.has_magic(path) and _has_folders(filesystem, path)
    except Exception as error:  # every file system has its own errors, without a common base class
        raise NoSource(f"{field}: {_fault(source, error, endings)}") from None
    if not names:
        below = _name_below(source, endings[0]) if has_folders else ""
        raise UserError(f"{field}: no {any_of(endings)} file in {source}: {below or _give(endings)}")
    return [
        Shard(
            filesystem.unstrip_protocol(name),
            int(info.get("size") or 0),
            _stamp(info),
            _split_of(name.removeprefix(root).lstrip("/"), own),
        )
        for name, info in zip(names, infos, strict=True)
    ]


def _listed(filesystem: Any, pattern: str, root: str, endings: tuple[str, ...]) -> list[str]:
    below = pattern.removeprefix(root)
    names = sorted(name for name in filesystem.glob(pattern) if name.endswith(endings))
    return [name for name in names if not is_hidden(name.removeprefix(root).lstrip("/"), below)]


def _has_folders(filesystem: Any, path: str) -> bool:
    try:
        return any(entry["type"] == "directory" for entry in filesystem.ls(path, detail=True))
    except FileNotFoundError:
        return False


def _stamp(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _STAMPS if info.get(name) is not None), "")


def _fault(source: str, error: Exception, endings: tuple[str, ...]) -> str:
    """Return why a URI cannot be listed, and the fix."""
    scheme = source.partition("://")[0].lower()
    if isinstance(error, ImportError) and scheme in PACKAGES:
        package, extra = PACKAGES[scheme]
        return f"{source}: {scheme}:// is read by the package {package}: pip install 'bwlm[{extra}]'"
    if isinstance(error, ImportError):
        return f"{source}: {error}"
    if cause := unreachable(error):
        return f"{source}: {_host(scheme)} cannot be reached ({first_line(cause)}): check the network"
    if isinstance(error, FileNotFoundError):
        return f"{source} does not exist: {_give(endings)}"
    return f"{source} cannot be listed ({first_line(error)}): check the address"


def unreachable(error: BaseException | None) -> BaseException | None:
    """Return the error that says that a host cannot be reached, among this one and those that led to it."""
    while error is not None:
        errors = (errno.ENETUNREACH, errno.EHOSTUNREACH)
        is_far = isinstance(error, OSError) and error.errno in errors
        if is_far or isinstance(error, socket.gaierror | ConnectionError | TimeoutError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _host(scheme: str) -> str:
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"the hub ({hub})" if scheme == "hf" else "its server"


# ---- hints ----


def any_of(endings: Iterable[str]) -> str:
    """Return endings in words: `.parquet, .jsonl or .txt`."""
    *others, last = endings
    return f"{', '.join(others)} or {last}" if others else last


def _give(endings: Iterable[str]) -> str:
    return f"give a folder, glob, file or URI of {any_of(endings)} files"


def _placed(source: str) -> str:
    """Return a source as it is written, with the folder from which a relative path is read."""
    path = local_path(source)
    is_relative = path is not None and not path.is_absolute()
    return f"{source} (from the working folder, {Path.cwd()})" if is_relative else source


def deeper(source: str, endings: Iterable[str]) -> str:
    """Return the glob that reads the files in the folders of a local folder, as a hint; '' if there are none."""
    folder = local_path(source)
    if folder is None or not folder.is_dir():
        return ""
    names = (_below(str(path), str(folder)) for path in itertools.islice(folder.rglob("*"), _MOST_LOOKED_AT))
    found = [name for name in names if "/" in name and not is_hidden(name)]
    ending = next((ending for ending in endings if any(name.endswith(ending) for name in found)), None)
    return _name_below(source, ending) if ending else ""


def _name_below(source: str, ending: str) -> str:
    return f"its folders are not read: to read them too, name {source.rstrip('/')}/**/*{ending}"


def _on_the_hub(source: str, endings: tuple[str, ...]) -> str:
    """Return a hint where an address that does not exist may be a data set of the hub: `owner/name`."""
    owner, _, name = source.partition("/")
    may_be = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not name.endswith(endings)
    return f"; a data set of the hub is hf://datasets/{source}" if may_be and not Path(owner).exists() else ""

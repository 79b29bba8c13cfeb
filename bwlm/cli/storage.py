"""`bwlm storage`: what takes space below the storage, and the removal of what nothing needs any more."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.cli.app import App
from bwlm.cli.bucket import pull, push
from bwlm.cli.terminal import Json, Storage, confirmed, print_json, say, show, show_table
from bwlm.errors import UserError
from bwlm.format import counted, file_size
from bwlm.progress import working
from bwlm.remote import address_of, shown

if TYPE_CHECKING:
    from bwlm.record.cleaning import Item, Unneeded

storage_app = App(help="Look after a storage: its space, and its copy in a bucket.", no_args_is_help=True)
storage_app.command("push")(push)
storage_app.command("pull")(pull)

_DEFAULT_AGE = "30d"
_UNITS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
_MOST_GRIDS = 20


def _seconds(text: str) -> float:
    """Return the seconds of an age such as 12h, 30d or 8w."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hdw])", text.strip())):
        raise UserError(f"--older: {text!r} is not an age: write hours, days or weeks, such as 12h, 30d or 8w")
    return float(match[1]) * _UNITS[match[2]]


@storage_app.command("usage")
def storage_usage(storage: Storage = None, as_json: Json = False) -> None:
    """Show the bytes below the storage by kind of file and by grid, and how much `bwlm storage clean` would free.

    Of a bucket these are the bytes of its objects. Parts of uploads that were killed are not among them.

    Example: `bwlm storage usage --json`
    """
    from bwlm.record.cleaning import find_unneeded
    from bwlm.record.disk import KINDS, StoredFiles, disk_usage
    from bwlm.storage.opened import open_storage

    root = open_storage(storage)
    with working(f"counting {address_of(root)}"):
        files = StoredFiles(root)
        usage, free = disk_usage(files), shutil.disk_usage(next(p for p in (root, *root.parents) if p.exists())).free
        unneeded = find_unneeded(files, _seconds(_DEFAULT_AGE), logs=False)
    kinds = {kind: usage.kinds[kind] for kind in KINDS if usage.kinds[kind]}
    grids = usage.grids.most_common()
    total = usage.kinds.total()
    if as_json:
        listed = [{"grid": name, "runs": usage.runs[name], "bytes": size} for name, size in grids]
        document = {"storage": address_of(root), "bytes": total, "free_bytes": free, "kinds": kinds, "grids": listed}
        return print_json(document | {"unneeded_bytes": unneeded.bytes})
    if kinds:
        show_table(["files", "size"], [[kind, file_size(size)] for kind, size in kinds.items()])
        show("")
    if grids:
        rows = [[name or "(no grid)", str(usage.runs[name]), file_size(size)] for name, size in grids[:_MOST_GRIDS]]
        show_table(["grid", "runs", "size"], rows)
        show(f"{len(grids) - _MOST_GRIDS} more grids: --json" if len(grids) > _MOST_GRIDS else "")
    what = "its disk" if files.there is None else f"the disk of {root}"
    show(f"{file_size(total)} in {address_of(root)}; {file_size(free)} of {what} are free")
    if unneeded.bytes:
        show(f"bwlm storage clean would free {file_size(unneeded.bytes)} that is older than {_DEFAULT_AGE}")
    return None


@storage_app.command("clean")
def storage_clean(
    older: Annotated[
        str, typer.Option(metavar="AGE", help="Remove only what has not changed for so long: 12h, 30d, 8w.")
    ] = _DEFAULT_AGE,
    logs: Annotated[bool, typer.Option("--logs", help="Also remove the HDF5 research logs of finished runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Remove files that nothing needs: from finished runs, unused caches, and what killed processes left.

    Of a finished run it removes the checkpoints that `checkpoint.keep` alone kept, and the optimizer states of earlier
    ones. The last checkpoint stays whole, and so does each from which another run began. Runs that have not finished,
    and runs that a process trains, are not touched.

    Example: `bwlm storage clean --dry-run`

    Example: `bwlm storage clean --older 8w --logs --yes`
    """
    from bwlm.record.cleaning import find_unneeded
    from bwlm.record.disk import StoredFiles
    from bwlm.storage.opened import open_storage

    seconds = _seconds(older)
    root = open_storage(storage)
    found = find_unneeded(StoredFiles(root), seconds, logs)
    if not as_json:
        _print_items(found, older)
    if dry_run or not found.items:
        return print_json(_document(found.items, [], found.passed_over)) if as_json else None
    question = f"Remove {counted(len(found.items), 'item')}, {file_size(found.bytes)}?"
    if not yes and not confirmed(question):
        say("nothing is removed")
        raise typer.Exit(1)
    chosen = {item.path for item in found.items}
    # again, since a person may have thought for an hour: a run may have begun from a checkpoint meanwhile
    again = find_unneeded(StoredFiles(root), seconds, logs)
    removed, left = _remove_all([item for item in again.items if item.path in chosen])
    if as_json:
        print_json(_document(removed, left, found.passed_over))
    else:
        show(f"removed {counted(len(removed), 'item')}, {file_size(sum(item.bytes for item in removed))}")
    for line in left:
        say(line)
    if left:
        raise typer.Exit(1)
    return None


def _remove_all(items: list[Item]) -> tuple[list[Item], list[str]]:
    """Return the items that are removed, and a line on each that is left."""
    from bwlm.progress import track
    from bwlm.record.cleaning import remove_all

    removed, left = [], []
    for item, fault in remove_all(track(items, "removing", "items")):
        if fault:
            left.append(f"{shown(item.path)}: {fault}")
        else:
            removed.append(item)
    return removed, left


def _document(items: list[Item], left: list[str], passed_over: list[str]) -> dict[str, Any]:
    listed = [
        {"kind": i.kind, "path": shown(i.path), "reason": i.reason, "bytes": i.bytes, "run": i.folder and i.folder.id}
        for i in items
    ]
    return {"items": listed, "bytes": sum(i.bytes for i in items), "left": left, "passed_over": passed_over}


def _print_items(found: Unneeded, older: str) -> None:
    """Print each item if they are few, else their number and size by kind."""
    for line in found.passed_over:
        say(f"not touched: {line}")
    if not found.items:
        show(f"nothing to remove that is older than {older}")
    elif len(found.items) <= _MOST_GRIDS:
        for item in found.items:
            show(f"{item.kind}, {item.reason}, {file_size(item.bytes)}: {shown(item.path)}")
    else:
        sizes, numbers = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        for item in found.items:
            sizes[item.kind, item.reason] += item.bytes
            numbers[item.kind, item.reason] += 1
        rows = [[kind, reason, str(numbers[kind, reason]), file_size(size)] for (kind, reason), size in sizes.items()]
        show_table(["kind", "why", "number", "size"], rows)
        show("each of them: --dry-run --json")

"""`bwlm grid delete` in processes that are killed before each change, in the bucket or here, and then once more.

Each process is forked before it opens a client of the bucket, which no fork survives.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bwlm.cli.grid_control import grid_delete
from bwlm.errors import UserError
from bwlm.storage.folder import SharedFolder
from bwlm.storage.objects import Bucket
from bwlm.storage.opened import open_storage
from tests.storage.pusher import save, write

CHANGES = ("swap", "delete")
MOST = 18
"""More changes than a deletion makes."""


def make(address: str) -> None:
    """A grid of one cell, as a launch leaves it."""
    root = open_storage(address)
    cell, grid = SharedFolder(root, "cell"), SharedFolder(root, "grids/g")
    write(cell, "config.json", json.dumps({"grid": "g"}))
    write(cell, "status.json", "{}")
    save(cell, 4)
    write(grid, "grid.json", json.dumps({"name": "g", "cells": ["cell"]}))
    for folder in (cell, grid):
        folder.push()


def delete(address: str) -> None:
    grid_delete("g", yes=True, dry_run=False, storage=address)


def delete_until(number: int) -> Callable[[str], None]:
    """Return the deletion by a process that is killed before its change of that number."""

    def killed(address: str) -> None:
        left = number

        def change() -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        def counted(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                change()
                return method(*arguments)

            return call

        for name in CHANGES:
            setattr(Bucket, name, counted(getattr(Bucket, name)))
        sys.addaudithook(lambda event, told: change() if event == "os.rename" and "deleted" in str(told[1]) else None)
        delete(address)

    return killed


def finish(address: str) -> None:
    with contextlib.suppress(UserError):  # there is no grid of this name any more
        delete(address)
    check_gone(address)


def check_gone(address: str) -> None:
    root = open_storage(address)
    left = [one.key for one in Bucket(address).list("") if not one.key.startswith((".heads/", ".leases/", ".probe/"))]
    assert not left, left
    there = [path for path in root.rglob("*") if path.is_file() and ".bucket" not in path.parts]
    assert not there, there


def forked(scratch: Path, do: Callable[[str], None], address: str) -> bool:
    """Do it in a process on the machine `scratch`; return False if that was killed."""
    if (child := os.fork()) == 0:
        os.environ["BWLM_SCRATCH"] = str(scratch)
        try:
            do(address)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"{do}: {status}"
    return status == 0


def main(home: str, address: str) -> None:
    one, two = Path(home) / "one", Path(home) / "two"
    storages = [f"{address}/{number}" for number in range(MOST)]

    def on_each(do: Callable[[str], object]) -> Callable[[str], None]:
        def each(_: str) -> None:
            for storage in storages:
                do(storage)

        return each

    forked(one, on_each(make), address)
    forked(two, on_each(open_storage), address)
    kills = 0
    while not forked(one, delete_until(kills), storages[kills]):
        forked(one, finish, storages[kills])
        kills += 1
    del storages[kills + 1 :]
    forked(two, on_each(check_gone), address)
    print(kills)


if __name__ == "__main__":
    main(*sys.argv[1:])

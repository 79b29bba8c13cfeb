"""`bwlm storage push` and `pull`: a storage in a bucket and its working folder on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bwlm.cli.terminal import Json, Storage, print_json, say, show
from bwlm.errors import UserError
from bwlm.format import counted
from bwlm.progress import working
from bwlm.remote import address_of


def push(storage: Storage = None, as_json: Json = False) -> None:
    """Take to the bucket what was written on this machine and is not there yet.

    A launch pushes everything itself. This command is for what was left behind because the bucket did not answer.

    Example: `bwlm storage push --storage s3://bucket/runs`
    """
    from bwlm.paths import storage_root
    from bwlm.record.bucket import push_all
    from bwlm.storage.opened import in_bucket

    root = storage_root(storage)
    if not in_bucket(root):
        raise UserError(f"--storage: {root} is a folder, and only a bucket needs it: name s3://bucket/prefix")
    pushed, outdated = push_all(root)
    for name in outdated:
        say(f"{name}: another machine has gone on with it or deleted it, so what was left here is dropped")
    if as_json:
        print_json({"storage": address_of(root), "pushed": pushed, "outdated": outdated})
    else:
        show(f"{counted(len(pushed), 'folder')} pushed to {address_of(root)}")


def pull(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; new or empty.", show_default=False)],
    storage: Storage = None,
) -> None:
    """Copy a whole storage from its bucket into a folder, which then is a storage of its own.

    Example: `bwlm storage pull runs --storage s3://bucket/runs`
    """
    from bwlm.record.bucket import copy_out
    from bwlm.storage.opened import in_bucket, open_storage

    root = open_storage(storage)
    if not in_bucket(root):
        raise UserError(f"--storage: {root} is a folder already: name s3://bucket/prefix")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target}: not empty: name a new folder")
    with working(f"copying {address_of(root)}"):
        names = copy_out(root, target)
    show(f"{counted(len(names), 'folder')} copied to {target}")

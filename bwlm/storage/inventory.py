"""Inventory of a bucket's storage: one listing of its objects, and which files of which folders they are.

An object that no head names is waste: of a push, or of a deletion, that was killed, or one that a later push replaced.
A push that goes on has such objects too, until it swaps the head. So their age is that of the newest object of their
push, or of the head if that is younger. Parts of an upload that was killed are in no listing that obstore can ask for.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from bwlm.remote import address_of
from bwlm.storage.claim import LEASES
from bwlm.storage.folder import SharedFolder, bucket_at
from bwlm.storage.head import HEADS, head_key, is_inside
from bwlm.storage.objects import Listed
from bwlm.storage.opened import folder_name, refresh

_PUSHED = re.compile(r"(?P<folder>.+?)/\d{4,}\.[0-9a-f]{8}/.+")
"""Keys of objects that a push writes."""
_PROBE = re.compile(r"\.probe/[0-9a-f]{32}")


@dataclass(frozen=True)
class Waste:
    """Objects of one push, or of one file that was replaced, that no head names."""

    folder: str
    """Folder that they were written for."""
    prefix: str
    """Key of the object, or what the keys of all objects of the push begin with."""
    keys: tuple[str, ...]
    size: int
    seconds: float
    """Time of the newest change, in seconds since the epoch, by the server's clock."""
    is_dropped: bool
    """True if a head says that they were replaced or deleted: no push will name them any more."""


class Inventory:
    """Objects of a bucket's storage, as they were when it was made."""

    def __init__(self, root: Path) -> None:
        """List the objects, and bring the heads up to date after that: they name each object that is no waste."""
        bucket = bucket_at(address_of(root))
        listed = {one.key: one for one in bucket.list("")}
        refresh(root)
        self.clock_ahead = bucket.clock_ahead
        self.files: dict[str, Listed] = {}
        """Object of each file, by its path below the storage."""
        self._dropped: set[str] = set()
        named = self._name(root, listed)
        self._paths = sorted(self.files)
        storages = tuple(f"{key.partition(f'/{HEADS}/')[0]}/" for key in listed if f"/{HEADS}/" in key)
        rest = [one for key, one in listed.items() if key not in named and not key.startswith(storages)]
        self.own_bytes = sum(one.size for one in rest if one.key.startswith((f"{HEADS}/", f"{LEASES}/")))
        """Bytes of heads and leases."""
        self.waste = self._sorted_waste(rest, listed)

    def below(self, path: str) -> list[tuple[str, Listed]]:
        """Return the file of a path, as '', or the files that lie below it, by their path there."""
        if one := self.files.get(path):
            return [("", one)]
        first, last = bisect_left(self._paths, f"{path}/"), bisect_left(self._paths, f"{path}0")  # 0 follows /
        return [(one.removeprefix(f"{path}/"), self.files[one]) for one in self._paths[first:last]]

    def _name(self, root: Path, listed: dict[str, Listed]) -> set[str]:
        """Take up the files of each folder; return the keys of their objects."""
        named = set()
        heads = [key for key in listed if key.startswith(f"{HEADS}/") and is_inside(key)]
        for name in (key.removeprefix(f"{HEADS}/").removesuffix(".json") for key in heads):
            head = SharedFolder(root, name).head()
            self._dropped |= set(head.dropped)
            for path, stored in head.files.items():
                named.add(stored.key)
                if stored.key in listed:
                    self.files[f"{name}/{path}"] = listed[stored.key]
        return named

    def _sorted_waste(self, rest: list[Listed], listed: dict[str, Listed]) -> list[Waste]:
        groups: dict[tuple[str, str], list[Listed]] = {}
        for one in rest:
            if place := self._place_of(one.key):
                groups.setdefault(place, []).append(one)
        waste = []
        for (folder, prefix), objects in groups.items():
            head = listed.get(head_key(folder))
            seconds = max(one.seconds for one in [*objects, *([head] if head else [])])
            keys, size = tuple(one.key for one in objects), sum(one.size for one in objects)
            waste.append(Waste(folder, prefix, keys, size, seconds, all(key in self._dropped for key in keys)))
        return waste

    def _place_of(self, key: str) -> tuple[str, str] | None:
        """Return the folder and the prefix under which a key is waste; None for an object of another program."""
        if _PROBE.fullmatch(key):
            return ".probe", key
        match = _PUSHED.fullmatch(key)
        if not match or folder_name(key) != match["folder"]:
            return None
        version = key.removeprefix(match["folder"]).split("/")[1]
        return match["folder"], key if key in self._dropped else f"{match['folder']}/{version}/"

"""Folder of a storage in a bucket: a run, a grid or a text, and its copy in the working folder.

`pull` brings small files, `fetch` those that are large, `push` takes to the bucket what was written here. The bucket
decides (`head.py`): a push takes effect as a whole, and only while no newer attempt has begun.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from bwlm.errors import RunError
from bwlm.paths import sha256_of
from bwlm.remote import address_of
from bwlm.storage.head import Head, LateWriter, Stored, read_head, swap_head
from bwlm.storage.index import Index, IndexFile, Sign, sign_in, sign_of
from bwlm.storage.objects import Bucket, Tag

_LARGE = ("*.safetensors", "*.h5", "*.h5.tail", "*.h5.damaged", "*.arrow")
_TRAINED = (
    *("metrics.jsonl", "status.json", "warnings.log", "worker.json", "starts.json"),
    *("checkpoints/*", "evaluations/*", "samples/*", "*.h5", "*.h5.tail", "*.h5.damaged"),
)
"""Files that only the holder of a run's lease writes."""
_LOCKS = ("lease.json", "launch.json", "lock")
_LAUNCHES = ("launches/*.lease",)
"""Files that have a meaning on this machine alone; what a launch used goes to the bucket."""
_MARKS = ("meta.json", "manifest.json")
"""Files without which a checkpoint or a packed text does not count."""
_ORDER = ("checkpoints/*.safetensors", "checkpoints/*", "*.h5.tail", "*.h5", "*")
"""Order of uploads. A tail is read before its log, into which it may be merged meanwhile, and the journal after the
checkpoints, whose steps it then holds."""
_IN_MEMORY = 64 * 2**20
"""Bytes of a file that is read at once; of a larger one, the open file is the copy that is pushed."""
_TRIES = 5
"""Tries of a pull or push whose files were replaced meanwhile."""

Choice = Callable[[str], bool]
"""(path in the folder) -> whether it is meant"""


def is_small(path: str) -> bool:
    """Return whether lists and analyses read a file whole."""
    return not _matches(path, _LARGE)


def is_trained(path: str) -> bool:
    """Return whether only the holder of a run's lease writes a file."""
    return _matches(path, _TRAINED)


def _nothing(path: str) -> bool:
    return False


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


@cache
def bucket_at(address: str) -> Bucket:
    """Return the client of a bucket; one for each address in a process."""
    return Bucket(address)


class _Replaced(Exception):
    """File or object that is not there any more: it was replaced meanwhile."""


class SharedFolder:
    """Folder `name` below a working folder, and its objects in the bucket."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name, self.path = root, name, root / name
        self.bucket = bucket_at(address_of(root))
        self._index = IndexFile(root, name)

    # -- from the bucket --

    def pull(self, wanted: Choice = is_small) -> None:
        """Bring the files that are meant up to date; those that wait to be pushed stay, and those of a training here.

        Files that the bucket has no more are deleted here. If another place has ended the attempt of a training here,
        nothing is done until that has ended too: its next push is refused.
        """
        for _ in range(_TRIES):
            with suppress(_Replaced), self._index.locked() as index:
                (head, tag), is_training = read_head(self.bucket, self.name), self._index.is_training()
                if is_training and head.attempt != index.head.attempt:
                    return
                stays = is_trained if is_training else _nothing
                self._learn(index, head, tag, stays)
                self._bring(index, wanted, stays)
                self._drop(index, stays)
                return
        raise RunError(f"{self.path}: changed in the bucket at each of {_TRIES} tries to read it: try it again")

    def fetch(self, *patterns: str) -> None:
        """Bring the files whose paths match, also large ones, unless they are here already."""
        self.pull(lambda path: _matches(path, patterns))

    def is_behind(self, etag: str) -> bool:
        """Return whether small files here are not those of the bucket, whose head has this ETag now.

        A push, or a fetch of large files, learns the head, but brings no other files.
        """
        index = self._index.read()
        if index.tag is None or index.tag[0] != etag:
            return True
        keys = {path: stored.key for path, stored in index.head.files.items() if is_small(path)}
        return any(index.here.get(path, ("",))[0] != key for path, key in keys.items()) or any(
            path not in index.head.files for path in index.here
        )

    def head(self) -> Head:
        """Return the head as it was pulled last."""
        return self._index.read().head

    def size_of(self, path: str) -> int | None:
        """Return the bytes of a file as the bucket has it, by what was pulled last; None if it has none."""
        stored = self._index.read().head.files.get(path)
        return stored.size if stored else None

    def sizes(self, below: str) -> dict[str, int]:
        """Return the bytes of the files in the bucket whose paths begin so, by the rest of the path."""
        files = self._index.read().head.files
        return {path.removeprefix(below): stored.size for path, stored in files.items() if path.startswith(below)}

    def _learn_head(self, index: Index) -> None:
        self._learn(index, *read_head(self.bucket, self.name), _nothing)

    def _learn(self, index: Index, head: Head, tag: Tag | None, stays: Choice) -> None:
        """Take a head over. If another place has begun an attempt since, what a training left here is out of date.

        If another place has deleted the run since, all is.
        """
        if head.attempt != index.head.attempt:
            if index.head.files and head.is_deleted:
                shutil.rmtree(self.path, ignore_errors=True)
            self._forget_training(head, index)
        index.head, index.tag = head, tag
        for path in list(index.here):
            if not (self.path / path).exists() and not stays(path):
                del index.here[path]  # deleted by hand: it is brought again

    def _bring(self, index: Index, wanted: Choice, stays: Choice) -> None:
        # a checkpoint or a text counts as whole once this file is there
        for path, stored in sorted(index.head.files.items(), key=lambda one: one[0].endswith(_MARKS)):
            key, sign = index.here.get(path, ("", None))
            if not wanted(path) or stays(path) or key == stored.key:
                continue
            if not self._waits(path, sign):
                index.here[path] = stored.key, self._download(path, stored)
            elif sha256_of(self.path / path) == stored.sha256:
                index.here[path] = stored.key, sign_of(self.path / path)

    def _waits(self, path: str, sign: Sign | None) -> bool:
        """Return whether a file here was written since it was pushed or pulled."""
        try:
            return sign_of(self.path / path) != sign
        except FileNotFoundError:
            return False

    def _download(self, path: str, stored: Stored) -> Sign:
        target = self.path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            if not self.bucket.download(stored.key, stored.size, temporary) or sha256_of(temporary) != stored.sha256:
                raise _Replaced
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return sign_of(target)

    def _drop(self, index: Index, stays: Choice) -> None:
        """Delete files here that the bucket has no more."""
        for path, (_, sign) in list(index.here.items()):
            if path not in index.head.files and not stays(path):
                if not self._waits(path, sign):
                    (self.path / path).unlink(missing_ok=True)
                del index.here[path]
        if index.head.is_deleted and not self._written(index, lambda path: not is_trained(path)):
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in sorted(self.path.glob("checkpoints/*"), reverse=True):
            with suppress(OSError):  # not empty
                folder.rmdir()

    # -- to the bucket --

    def push(self, meant: Choice = lambda path: True, attempt: int | None = None) -> None:
        """Take to the bucket what was written here since the last push or pull.

        With the number of an `attempt`, also what was deleted. Without it, files of a run's training are pushed only
        while the attempt is the newest that was pulled. Raises `LateWriter` if a newer one has begun, or the folder was
        deleted, and `BucketAway` if the bucket does not answer: then nothing of it shows, and the next push takes all
        of it.
        """
        for _ in range(_TRIES):
            with suppress(_Replaced):
                return self._push(meant, attempt)
        raise RunError(f"{self.path}: changed at each of {_TRIES} tries to push it: try it again")

    def _push(self, meant: Choice, attempt: int | None) -> None:
        index = self._index.read()
        paths = self._written(index, meant)
        gone = self._deleted(index, meant) if attempt is not None else set()
        if not paths and not gone:
            return
        fence = index.head.attempt if attempt is None and any(map(is_trained, paths)) else attempt
        version = f"{self.name}/{fence or 0:04d}.{uuid.uuid4().hex[:8]}"
        uploaded = {path: self._upload(path, f"{version}/{path}", fence or 0) for path in paths}
        # a tail that was read after it had been merged belongs to the log that holds its entries now
        merged = [path for path in self._written(index, meant) if path.endswith(".h5") and path not in uploaded]
        uploaded |= {path: self._upload(path, f"{version}/{path}", fence or 0) for path in merged}
        files = {path: stored for path, (stored, _) in uploaded.items()}
        head, tag = swap_head(
            self.bucket, self.name, (index.head, index.tag), files, lambda path, _: path in gone, fence
        )
        with self._index.locked() as now:
            now.keep(head, tag)
            for path in gone:
                now.here.pop(path, None)
            now.here |= {path: (stored.key, sign) for path, (stored, sign) in uploaded.items()}

    def push_rest(self) -> bool:
        """Push all that waits here; return False if some is out of date: a newer attempt began, or it was deleted."""
        try:
            self.push(lambda path: not is_trained(path))
            index = self._index.read()
            self.push(is_trained, index.attempt if index.attempt == index.head.attempt > 0 else None)
        except LateWriter:
            self.pull()
            return False
        return True

    def waiting(self) -> list[str]:
        """Return the paths of files that were written here and are not in the bucket yet."""
        return self._written(self._index.read(), lambda path: True)

    def _written(self, index: Index, meant: Choice) -> list[str]:
        """Return the files that wait to be pushed, in the order in which they are."""
        found = [path for path in self._files() if meant(path)]
        waiting = [path for path in found if self._waits(path, index.here.get(path, ("", None))[1])]
        return sorted(waiting, key=lambda path: (next(n for n, one in enumerate(_ORDER) if fnmatch(path, one)), path))

    def _files(self) -> Iterator[str]:
        """Yield the paths of the files here, without temporary ones, locks, and checkpoints that are not whole."""
        for folder, below, names in os.walk(self.path):
            below[:] = [name for name in below if not name.startswith(".")]
            place = Path(folder).relative_to(self.path)
            if place.parent.name == "checkpoints" and "meta.json" not in names:
                continue
            for name in names:
                path = (place / name).as_posix()
                if not name.startswith(".") and name not in _LOCKS and not _matches(path, _LAUNCHES):
                    yield path

    def _deleted(self, index: Index, meant: Choice) -> set[str]:
        """Return the files in the bucket that the training has deleted: checkpoints, and the tail of a merged log."""
        gone = {path for path in index.here if meant(path) and not (self.path / path).exists()}
        steps = {path.removesuffix("meta.json") for path in gone if fnmatch(path, "checkpoints/*/meta.json")}
        files = {path for path in index.head.files if path.startswith(tuple(steps))} if steps else set()
        return files | {path for path in gone if fnmatch(path, "*.h5.tail") or path.startswith("checkpoints/")}

    def _upload(self, path: str, key: str, attempt: int) -> tuple[Stored, Sign]:
        try:
            with (self.path / path).open("rb") as file:
                sign = sign_in(os.fstat(file.fileno()))
                if sign[0] <= _IN_MEMORY:
                    content = file.read()
                    self.bucket.write(key, content)
                    return Stored(key, len(content), hashlib.sha256(content).hexdigest(), attempt), sign
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                self.bucket.write(key, file)
                return Stored(key, sign[0], digest, attempt), sign
        except FileNotFoundError:
            raise _Replaced from None

    # -- attempts --

    def begin(self, attempt: int) -> None:
        """Begin an attempt: end all older ones in the bucket, and bring what the run needs to resume.

        What an attempt wrote here stays unless another place has begun one since. Raises `LateWriter` if a newer one
        has begun meanwhile.
        """
        with self._index.locked() as index:
            self._learn_head(index)
            known = index.head, index.tag
            index.head, index.tag = swap_head(self.bucket, self.name, known, {}, attempt=attempt, begins=True)
            index.attempt = attempt
        self._delete_unnamed(index.head, attempt)
        for _ in range(_TRIES):
            with suppress(_Replaced), self._index.locked() as index:
                self._learn_head(index)
                self._bring(index, _for_resuming(index.head), _nothing)
                self._drop(index, _nothing)
                return
        raise LateWriter(f"{self.name}: written to by another process at each of {_TRIES} tries to begin")

    def _delete_unnamed(self, head: Head, attempt: int) -> None:
        """Delete what killed pushes of older attempts left; those of launches, which have number 0, may go on."""
        named = {*head.dropped, *(stored.key for stored in head.files.values())}
        listed = [one.key for one in self.bucket.list(f"{self.name}/") if one.key not in named]
        numbers = {key: int(key.removeprefix(f"{self.name}/").partition(".")[0]) for key in listed}
        self.bucket.delete(key for key, number in numbers.items() if 0 < number < attempt)

    def _forget_training(self, head: Head, index: Index) -> None:
        for path in [path for path in self._files() if is_trained(path)]:
            stored = head.files.get(path)
            key, sign = index.here.get(path, ("", None))
            if stored is None or key != stored.key or self._waits(path, sign):
                (self.path / path).unlink(missing_ok=True)
                index.here.pop(path, None)

    def training(self) -> AbstractContextManager[None]:
        """Say that this process trains in the folder."""
        return self._index.training()

    def remove(self, meant: Choice) -> None:
        """Delete files in the bucket and here, as they were pulled last; one that was replaced since stays."""
        with self._index.locked() as index:
            keys = {stored.key for path, stored in index.head.files.items() if meant(path)}
            if keys:
                known = index.head, index.tag
                index.keep(*swap_head(self.bucket, self.name, known, {}, lambda _, stored: stored.key in keys))
                self._drop(index, _nothing)
        self.bucket.delete(keys)

    def delete(self, attempt: int | None = None) -> None:
        """Delete the folder in the bucket. Its head stays, empty, so that no late writer brings it back.

        `attempt` is the number of the lease under which a run is deleted: it ends all older attempts, and raises
        `LateWriter` if a newer one has begun. What lies here the caller deletes, or the next pull. After a kill
        `finish_deletion` completes it.
        """
        with self._index.locked() as index:
            self._learn_head(index)
            if index.head.files:
                known, ends = (index.head, index.tag), attempt is not None
                index.head, index.tag = swap_head(
                    self.bucket, self.name, known, {}, lambda path, stored: True, attempt, begins=ends
                )
            self.bucket.delete(one.key for one in self.bucket.list(f"{self.name}/"))
            self._finish_deletion(index)

    def finish_deletion(self) -> None:
        """Complete a deletion that was cut off, unless the folder has been made anew since."""
        with self._index.locked() as index:
            self._learn_head(index)
            self._finish_deletion(index)

    def _finish_deletion(self, index: Index) -> None:
        if index.head.is_half_deleted:
            self.bucket.delete(index.head.dropped)
            index.keep(*swap_head(self.bucket, self.name, (index.head, index.tag), {}))


def _for_resuming(head: Head) -> Choice:
    """Return the choice of the files that a run needs to resume: the small ones, its logs, its newest checkpoint."""
    metas = sorted(path for path in head.files if fnmatch(path, "checkpoints/step_*/meta.json"))
    newest = max(metas, key=lambda path: int(path.split("/")[1].removeprefix("step_")), default="").removesuffix(
        "meta.json"
    )
    return lambda path: is_small(path) or fnmatch(path, "*.h5*") or bool(newest and path.startswith(newest))

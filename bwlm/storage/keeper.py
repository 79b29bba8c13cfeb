"""Push of a run to its bucket while it trains, beside the training, by the process that holds the run's lease."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bwlm.errors import BwlmError, RunError, UserError
from bwlm.remote import address_of
from bwlm.storage.claim import Claim
from bwlm.storage.folder import SharedFolder, is_small, is_trained
from bwlm.storage.head import LateWriter
from bwlm.storage.objects import BucketAway
from bwlm.storage.opened import shared

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""Seconds between looks for a new checkpoint."""
_JOURNAL_SECONDS = 15.0
"""Seconds between pushes of the journal while there is no new checkpoint."""
_PATIENCE_SECONDS = 120.0
"""Seconds in which the last push is tried again, once the training is over."""


@contextmanager
def kept_in_bucket(path: Path, claim: Claim | None, trains: bool) -> Iterator[None]:
    """Push a run's folder while the block runs, and at its end; without a lease of the bucket, do nothing.

    A run that `trains` begins an attempt and gets what it needs to resume. A block that only adds results to a run ends
    no attempt: what waits of it on another machine is pushed later. Raises `RunError` if the rest cannot be pushed,
    unless the block has raised an error of its own.
    """
    folder = shared(path)
    if folder is None or claim is None:
        yield
        return
    keeper = Keeper(folder, claim, trains)
    try:
        yield
    except BaseException:
        try:
            keeper.close()
        except RunError as failed:
            log.error("%s", failed)  # only logged: the error that ended the run is raised
        raise
    keeper.close()


class Keeper:
    """Thread that pushes what the holder of a run's lease writes: checkpoints with logs, and between them the journal.

    A bucket that does not answer holds nothing up: the next push takes everything.
    """

    def __init__(self, folder: SharedFolder, claim: Claim, trains: bool) -> None:
        """Begin the attempt of the claim in the folder if that `trains`. Raises as `SharedFolder.begin`."""
        self._folder, self._claim = folder, claim
        self._attempt = claim.number if trains else None
        self._until_end = ExitStack()
        if trains:
            folder.begin(claim.number)
            self._until_end.enter_context(folder.training())
        else:
            folder.pull()
        self._pushed = self._checkpoints()
        self._is_away = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"push of {folder.name}", daemon=True)
        self._thread.start()

    def _checkpoints(self) -> frozenset[str]:
        return frozenset(str(path) for path in self._folder.path.glob("checkpoints/step_*/meta.json"))

    def _keep(self) -> None:
        last = time.monotonic()
        while not self._over.wait(_LOOK_SECONDS) and not self._claim.lost:
            checkpoints = self._checkpoints()
            if checkpoints - self._pushed:
                if self._try_push():
                    self._pushed = checkpoints
            elif time.monotonic() - last >= _JOURNAL_SECONDS:
                last = time.monotonic()
                self._try_push(only_small=True)

    def _try_push(self, only_small: bool = False) -> bool:
        """Push, and return whether the bucket took it; the first failure of several in a row is a warning."""
        try:
            self._push(only_small)
        except LateWriter as late:
            self._claim.lost = self._claim.lost or str(late)
        except (BwlmError, OSError) as error:
            if not self._is_away:
                log.warning("%s; the training goes on, and its records wait in %s", error, self._folder.path)
            self._is_away = True
        else:
            self._is_away = False
            return True
        return False

    def _push(self, only_small: bool = False) -> None:
        checkpoints = "checkpoints/"
        self._folder.push(
            lambda path: is_trained(path) and not (only_small and (path.startswith(checkpoints) or not is_small(path))),
            self._attempt,
        )

    def close(self) -> None:
        """Push the rest. Raises `RunError` with the fix if the bucket does not take it."""
        self._over.set()
        self._thread.join()
        with self._until_end:
            if not self._claim.lost:
                self._push_rest()

    def _push_rest(self) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return self._push()
            except LateWriter as late:
                self._claim.lost = str(late)
                return None
            except (BucketAway, UserError) as error:
                if time.monotonic() >= deadline:
                    raise RunError(f"{error}; {rest_words(self._folder.root)}") from None
                time.sleep(_LOOK_SECONDS)


def rest_words(root: Path) -> str:
    """Return where the files wait that are not in the bucket, and the command that pushes them."""
    return (
        f"the rest waits on {socket.gethostname()} in {root}: run there: bwlm storage push --storage {address_of(root)}"
    )

"""Progress of long work on stderr: a line that overwrites itself on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from bwlm.background import in_background
from bwlm.format import clock

Item = TypeVar("Item")

_FIRST_LINE = 10.0
"""Seconds until work gets a line outside a terminal; each next line comes after twice the time."""
_LONGEST_PAUSE = 300.0
"""Most seconds between two such lines."""


@dataclass(eq=False)
class _Work:
    doing: str
    noun: str
    total: int
    done: Callable[[], int]
    """Number of items that are done now."""
    began: float
    next_line: float = _FIRST_LINE
    """Seconds from the beginning at which the next line is due, outside a terminal."""

    def words(self, gone: float) -> str:
        """Return `packing: 1,200 of 6,000 documents, about 0:20 left`, or `starting Ray: 0:12`."""
        done = self.done() if self.noun else 0
        if not done:
            return f"{self.doing}: {clock(gone)}"
        counted = max(done, self.total)
        noun = self.noun.removesuffix("s") if counted == 1 else self.noun
        if done >= self.total:
            return f"{self.doing}: {done:,} {noun}, {clock(gone)}"
        left = gone * (self.total - done) / done
        return f"{self.doing}: {done:,} of {self.total:,} {noun}, about {clock(left)} left"

    def line_if_due(self, gone: float) -> str:
        """Return the line that is due, else ''."""
        if gone < self.next_line:
            return ""
        self.next_line = gone + min(gone, _LONGEST_PAUSE)
        return self.words(gone)


_works: list[_Work] = []
"""Work that goes on now, the innermost last: the only one that is shown."""


@contextmanager
def working(doing: str, noun: str = "", total: int = 0, done: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Show on stderr what is being done until the block ends; with a `noun`, also how many of them are `done`.

    With a `total`, also the time left. Inside another such block, only the inner one is shown.
    """
    work = _Work(doing, noun, total, done, time.monotonic())
    _works.append(work)
    try:
        with _display() if len(_works) == 1 else nullcontext():
            yield
    finally:
        _works.remove(work)


def track(items: Iterable[Item], doing: str, noun: str, total: int = 0) -> Iterator[Item]:
    """Yield the items, and show on stderr how many are done and, if their number is known, the time left."""
    count = 0
    with working(doing, noun, len(items) if isinstance(items, Sized) else total, lambda: count):
        for item in items:
            yield item
            count += 1


def loading() -> AbstractContextManager[None]:
    """Show that libraries are loaded, for imports that take seconds."""
    return working("loading libraries")


def _display() -> AbstractContextManager[Any]:
    return _live_line() if sys.stderr.isatty() else _lines_now_and_then()


@contextmanager
def _live_line() -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def picture() -> Text:
        words = [work.words(time.monotonic() - work.began) for work in _works[-1:]]
        return Text("".join(words), style="dim", no_wrap=True, overflow="ellipsis")

    # what is printed on stdout meanwhile must stay there, although the line is on stderr
    console = Console(stderr=True)
    with Live(
        console=console, get_renderable=picture, refresh_per_second=4, transient=True, redirect_stdout=False
    ) as live:
        live.refresh()
        yield


@contextmanager
def _lines_now_and_then() -> Iterator[None]:
    def tell(over: threading.Event) -> None:
        while not over.wait(1.0):
            print_if_due()

    with in_background("progress", tell):
        yield


def print_if_due() -> None:
    """Print the line of the innermost work on stderr if it is due: the thread outside a terminal asks each second."""
    for work in _works[-1:]:
        if line := work.line_if_due(time.monotonic() - work.began):
            print(line, file=sys.stderr, flush=True)

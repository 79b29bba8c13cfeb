"""An engine in a thread of its own, for programs that serve many clients in one event loop.

The thread steps the engine as long as it has requests. What a step brings is handed to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from bwlm.chat.engine import Busy, Engine, Event, Request
from bwlm.errors import BwlmError, UserError


class OutOfTime(BwlmError):
    """The model did not finish within the time that a stream may take."""


class Broken(BwlmError):
    """The engine does not work any more, as after a fault of its GPU."""


_MOST_FAILURES = 3
"""Steps that may fail one after the other, each for its own requests."""


@dataclass
class _Stream:
    """Requests of one client: those in the engine, and those that wait for one of its places."""

    places: int
    unfinished: set[str]
    later: list[Request]
    least: int = 0
    """Places that are kept for requests which come after these."""
    queue: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)


class EngineService:
    """Serves requests of one event loop. Make it inside the running loop, and `close` it at the end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.busy_seconds = 0.0
        """Seconds that the engine's steps took in all."""
        self._failures = 0
        """Steps that failed, one after the other."""
        self._loop = asyncio.get_running_loop()
        self._live: list[_Stream] = []
        self._streams: dict[str, _Stream] = {}
        """Stream of each request that has not ended."""
        self._inbox: list[Request | str] = []
        """New requests, and ids of those that are cancelled, for the next step."""
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bwlm-engine", daemon=True)
        self._thread.start()

    @property
    def live(self) -> int:
        """Number of places that are taken: by requests that run, or wait for a slot."""
        return sum(stream.places for stream in self._live)

    @property
    def places(self) -> int:
        """Number of requests that may run or wait at once."""
        return self.engine.slots + self.engine.waiting

    async def stream(
        self,
        *requests: Request,
        at_once: int | None = None,
        seconds: float | None = None,
        then: Callable[[], Sequence[Request]] | None = None,
    ) -> AsyncGenerator[Event]:
        """Yield what the steps bring to requests, up to the end of all. A stream that is closed early frees its slots.

        At most `at_once` of them take a place of the engine at a time. `then` is called after the last event, and its
        requests follow, one after the other, in a place that is kept for them. Raises, before any work, `ValueError`
        for a request that the model cannot serve, `UserError` for more requests than there are places at all, and
        `Busy` if not enough of them are free; `OutOfTime` after `seconds`.
        """
        for request in requests:
            self.engine.check(request)
        places = min(len(requests), at_once or len(requests))
        if places > self.places:
            raise UserError(f"n: {places} texts at once, and the server has places for {self.places}: ask for fewer")
        if self.live + places > self.places:
            raise Busy("too many requests wait: try again in a second")
        stream = _Stream(
            places, {request.id for request in requests}, list(requests[places:]), least=int(then is not None)
        )
        self._live.append(stream)
        self._begin(stream, requests[:places])
        late = OutOfTime(f"the model did not finish within {seconds} s: ask for fewer tokens")
        timer = self._loop.call_later(seconds, stream.queue.put_nowait, late) if seconds else None
        left = len(requests)
        try:
            while left:
                event = await stream.queue.get()
                if isinstance(event, Exception):
                    raise event
                left -= event.finish is not None
                yield event
                if not left and then is not None:
                    left, then = self._follow(stream, then()), None
        finally:
            if timer:
                timer.cancel()
            self._abandon(stream)

    def check(self) -> None:
        """Raise `Broken` if the engine's thread has ended, or its last steps all failed."""
        if not self._thread.is_alive() or self._failures >= _MOST_FAILURES:
            raise Broken("the engine does not work any more")

    def end_all(self, reason: Exception) -> None:
        """Raise `reason` in every stream."""
        for stream in self._live:
            stream.queue.put_nowait(reason)

    def close(self) -> None:
        """End the thread after the current step. Requests that still run get nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # ---- in the event loop ----

    def _begin(self, stream: _Stream, requests: Sequence[Request]) -> None:
        for request in requests:
            self._streams[request.id] = stream
            self._tell(request)

    def _follow(self, stream: _Stream, requests: Sequence[Request]) -> int:
        """Let requests take the place that was kept for them, one after the other; return their number."""
        for request in requests:
            self.engine.check(request)
        stream.unfinished = {request.id for request in requests}
        stream.later = list(requests[1:])
        stream.least = 0
        self._begin(stream, requests[:1])
        return len(requests)

    def _end(self, stream: _Stream, request: str) -> None:
        """Give the place of a request that has ended to the next one of the stream, or free it.

        That does not wait for the client to read what came.
        """
        stream.unfinished.discard(request)
        stream.places = max(stream.least, min(stream.places, len(stream.unfinished)))
        del self._streams[request]
        self._begin(stream, stream.later[:1])
        del stream.later[:1]

    def _abandon(self, stream: _Stream) -> None:
        self._live.remove(stream)
        for request in stream.unfinished & self._streams.keys():
            del self._streams[request]
            self._tell(request)

    def _deliver(self, events: Sequence[Event] | Exception) -> None:
        if isinstance(events, Exception):
            self.end_all(events)
            return
        for event in events:
            stream = self._streams.get(event.request)
            if stream is None:  # it was abandoned
                continue
            stream.queue.put_nowait(event)
            if event.finish is not None:
                self._end(stream, event.request)

    # ---- between the event loop and the thread ----

    def _tell(self, news: Request | str) -> None:
        with self._changed:
            self._inbox.append(news)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._inbox or self.engine.running or self.engine.queued)
                if self._closed:
                    return
                inbox, self._inbox = self._inbox, []
            began = time.perf_counter()
            try:
                self._take(inbox)
                events: Sequence[Event] | Exception = self.engine.step()
                self._failures = 0
            except Exception as error:  # of any request, such as too little memory: none can go on
                self.engine.cancel_all()
                self._failures += 1
                events = error
            self.busy_seconds += time.perf_counter() - began
            if events:
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _take(self, inbox: Sequence[Request | str]) -> None:
        for news in inbox:
            if isinstance(news, Request):
                self.engine.add(news)
            else:
                self.engine.cancel(news)

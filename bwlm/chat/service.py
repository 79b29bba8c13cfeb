"""An engine in a thread of its own, for programs that serve many clients in one event loop.

The thread steps the engine as long as it has requests. What a step brings is handed to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

from bwlm.chat.engine import Busy, Engine, Event, Request


class EngineService:
    """Serves requests of one event loop. Make it inside the running loop, and `close` it at the end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, asyncio.Queue[Event | Exception]] = {}
        self._inbox: list[Request | str] = []
        """New requests, and ids of those that are cancelled, for the next step."""
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bwlm-engine", daemon=True)
        self._thread.start()

    @property
    def live(self) -> int:
        """Number of requests that have not ended."""
        return len(self._streams)

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """Yield what the steps bring to a request, up to its end. A stream that is closed early frees its slot.

        Raises `ValueError` for a request that the model cannot serve, and `Busy` if too many requests wait.
        """
        self.engine.check(request)
        if self.live >= self.engine.slots + self.engine.waiting:
            raise Busy("too many requests wait: try again in a second")
        queue = self._streams[request.id] = asyncio.Queue()
        self._tell(request)
        finished = False
        try:
            while not finished:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                finished = event.finish is not None
                yield event
        finally:
            del self._streams[request.id]
            if not finished:
                self._tell(request.id)

    def close(self) -> None:
        """End the thread after the current step. Requests that still run get nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

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
            try:
                self._take(inbox)
                events: Sequence[Event] | Exception = self.engine.step()
            except Exception as error:  # of any request, such as too little memory: none can go on
                self.engine.cancel_all()
                events = error
            if events:
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _take(self, inbox: Sequence[Request | str]) -> None:
        for news in inbox:
            if isinstance(news, Request):
                self.engine.add(news)
            else:
                self.engine.cancel(news)

    def _deliver(self, events: Sequence[Event] | Exception) -> None:
        if isinstance(events, Exception):
            for queue in self._streams.values():
                queue.put_nowait(events)
            return
        for event in events:
            if event.request in self._streams:
                self._streams[event.request].put_nowait(event)

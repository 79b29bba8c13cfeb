"""The engine's thread: places are taken at once or not at all, and are free when the engine is done with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from bwlm.chat.endpoints import EventStream
from bwlm.chat.engine import Busy, Event, Request
from bwlm.chat.service import Broken, EngineService, OutOfTime
from bwlm.text.tokenizer import Tokenizer
from tests.chat.serving import WAIT, GatedEngine, tiny_model

Work = Callable[[EngineService, GatedEngine], Awaitable[Any]]


@pytest.fixture
def run(tokenizer: Tokenizer) -> Callable[[Work], Any]:
    """Runs work beside a service of two slots, where one more may wait."""

    async def main(work: Work) -> Any:
        engine = GatedEngine(tiny_model(tokenizer), slots=2, waiting=1)
        service = EngineService(engine)
        try:
            return await asyncio.wait_for(work(service, engine), WAIT)
        finally:
            engine.gate.open()
            service.close()

    return lambda work: asyncio.run(main(work))


def requests(*names: str, tokens: int = 3) -> list[Request]:
    return [Request(name, [1, 2, 3], tokens) for name in names]


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def test_requests_of_a_stream_take_their_turns(run: Callable[[Work], Any]) -> None:
    async def work(service: EngineService, engine: GatedEngine) -> list[Event]:
        return [event async for event in service.stream(*requests(*"abcde"), at_once=1)]

    events = run(work)
    assert [event.request for event in events] == [name for name in "abcde" for _ in range(3)]


def test_places_are_taken_at_once_or_not_at_all(run: Callable[[Work], Any]) -> None:
    async def work(service: EngineService, engine: GatedEngine) -> None:
        engine.gate.close()
        async with aclosing(service.stream(*requests("a", "b"))) as first:
            reading = asyncio.ensure_future(anext(first))
            await until(lambda: service.live == 2)
            with pytest.raises(Busy):
                await anext(service.stream(*requests("c", "d")))
            assert service.live == 2
            engine.gate.open()
            await reading
            assert [event async for event in service.stream(*requests("c", "d"), at_once=1)], "one place is free"
        assert service.live == 0

    run(work)


def test_requests_that_follow_have_a_place(run: Callable[[Work], Any]) -> None:
    """Others take what is free, and not the place that a stream keeps for requests it does not know yet."""

    async def work(service: EngineService, engine: GatedEngine) -> None:
        seen: list[str] = []
        async with aclosing(service.stream(*requests("a", "b"), then=lambda: requests(*seen[-2:], "e"))) as events:
            async for event in events:
                seen += [f"{event.request}2"] if event.finish else []
                if len(seen) == 2 and event.finish:
                    assert service.live == 1
                    with pytest.raises(Busy):
                        await anext(service.stream(*requests("x", "y", "z")))
                    assert len([other async for other in service.stream(*requests("x", "y"))]) == 6
        assert seen == ["a2", "b2", "a22", "b22", "e2"]
        assert service.live == 0

    run(work)


def test_what_follows_is_checked_too(run: Callable[[Work], Any]) -> None:
    async def work(service: EngineService, engine: GatedEngine) -> None:
        with pytest.raises(ValueError, match="ids"):
            [event async for event in service.stream(*requests("a"), then=lambda: [Request("b", [], 3)])]
        assert service.live == 0
        assert len([event async for event in service.stream(*requests("c"), then=list)]) == 3, "nothing need follow"

    run(work)


def test_a_place_is_free_before_the_client_has_read(run: Callable[[Work], Any]) -> None:
    """A client that does not read keeps no other one out."""

    async def work(service: EngineService, engine: GatedEngine) -> None:
        async with aclosing(service.stream(*requests("a", "b", "c"))) as slow:
            await anext(slow)
            await until(lambda: service.live == 0)
            assert len([event async for event in service.stream(*requests("d"))]) == 3
            assert len([event async for event in slow]) == 8, "nothing is lost"

    run(work)


def test_a_failure_of_the_engine_reaches_every_stream(run: Callable[[Work], Any]) -> None:
    async def work(service: EngineService, engine: GatedEngine) -> None:
        engine.gate.close()
        streams = [service.stream(*requests(name)) for name in "ab"]
        reading = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await until(lambda: service.live == 2)
        engine.failure = MemoryError("none left")
        engine.gate.open()
        assert [str(one) for one in await asyncio.gather(*reading, return_exceptions=True)] == ["none left"] * 2
        assert len([event async for event in service.stream(*requests("c"))]) == 3, "it goes on"

    run(work)


def test_a_stream_that_takes_too_long_ends_and_frees_its_place(run: Callable[[Work], Any]) -> None:
    async def work(service: EngineService, engine: GatedEngine) -> None:
        engine.gate.close()
        with pytest.raises(OutOfTime):
            await anext(service.stream(*requests("a"), seconds=0.01))
        assert service.live == 0

    run(work)


def test_a_request_that_cannot_be_served_takes_no_place(run: Callable[[Work], Any]) -> None:
    async def work(service: EngineService, engine: GatedEngine) -> None:
        with pytest.raises(ValueError, match="the prompt has 0 ids"):
            await anext(service.stream(Request("a", [], 3)))
        assert service.live == 0

    run(work)


def test_a_client_that_never_reads_is_given_up() -> None:
    closed: list[str] = []

    async def source(name: str) -> AsyncGenerator[Any]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append(name)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def main() -> None:
        events = source("events")
        await anext(events)
        await EventStream(lines := source("lines"), events, 0.01)({"type": "http"}, receive, send)
        assert closed == ["lines", "events"], "not only once nobody holds them"
        del lines, events

    asyncio.run(main())


def test_an_engine_whose_steps_fail_one_after_the_other_is_broken(run: Callable[[Work], Any]) -> None:
    async def work(service: EngineService, engine: GatedEngine) -> None:
        async def fail(name: str) -> None:
            engine.failure = RuntimeError("out of memory")
            with pytest.raises(RuntimeError, match="out of memory"):
                await anext(service.stream(*requests(name)))

        for name in "ab":
            await fail(name)
        service.check()
        assert len([event async for event in service.stream(*requests("c"))]) == 3
        for name in "def":
            service.check()
            await fail(name)
        with pytest.raises(Broken):
            service.check()

    run(work)

"""Continuous batching: a request says in company what it says alone, and nothing is read twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from random import Random

import pytest
import torch

from bwlm.chat.engine import Busy, Engine, Event, Request, Scored
from bwlm.model.decoder import CachedAttention, Decoder
from bwlm.model.sampling import Sampling
from bwlm.model.shape import GPTConfig
from tests.model.test_kv_cache import lively

T, V = 64, 300
CONFIG = GPTConfig(V, depth=2, width=32, heads=4, kv_heads=2, sequence_length=T)
MODEL = lively(CONFIG)
MARGIN = 1e-4
"""Draws that are nearer than this to another id may differ by rounding."""


def drawn(random: Random, count: int) -> list[Request]:
    """Requests of every kind, some that begin like the one before."""
    requests: list[Request] = []
    for number in range(count):
        ids = [random.randrange(V) for _ in range(random.randrange(1, 40))]
        if number % 3 == 2:
            ids = [*requests[-1].ids, *ids][:T]
        sampling = Sampling(
            temperature=random.choice([0.0, 0.7, 1.0]),
            top_k=random.choice([None, 5]),
            top_p=random.choice([1.0, 0.9]),
            repetition_penalty=random.choice([1.0, 1.3]),
        )
        scored = 1 if number % 5 == 0 else None
        stop = frozenset(range(10)) if number % 4 == 0 else frozenset[int]()
        requests.append(
            Request(f"r{number}", ids, random.randrange(1, T), sampling, number, stop, None, 2, prompt_logprobs=scored)
        )
    return requests


def served(engine: Engine, requests: Sequence[Request], random: Random) -> dict[str, list[Event]]:
    """The events of requests that come at random steps."""
    events, pending = defaultdict[str, list[Event]](list), list(requests)
    while pending or engine.running or engine.queued:
        if pending and random.random() < 0.5:
            engine.add(pending.pop(0))
        for event in engine.step():
            events[event.request].append(event)
    return events


def ids_of(events: Sequence[Event]) -> list[int]:
    return [event.token.id for event in events if event.token]


@torch.no_grad()
def log_p(ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [T, V] after each id, by one pass over the row alone."""
    return torch.log_softmax(MODEL(torch.tensor([list(ids)]))[0], -1)


@pytest.mark.parametrize(("slots", "compiled"), [(1, False), (3, False), (8, False), (8, True)])
def test_a_request_says_in_company_what_it_says_alone(slots: int, compiled: bool) -> None:
    random = Random(slots)
    requests = drawn(random, 40)
    engine = Engine(MODEL, slots=slots, waiting=99, prompt_part=7, compiled=compiled)
    together = served(engine, requests, random)
    different = 0
    for request in requests:
        alone = ids_of(list(Engine(MODEL, slots=1).stream(request)))
        different += ids_of(together[request.id]) != alone
    assert different <= 0.01 * len(requests), "texts part only where a draw is within the margin"
    assert engine.reused_ids > 0
    assert engine.generated_ids == sum(len(ids_of(events)) for events in together.values())
    assert (engine.running, engine.queued) == (0, 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_log_probabilities_are_those_of_the_whole_row_alone(compiled: bool) -> None:
    random = Random(5)
    requests = drawn(random, 30)
    together = served(Engine(MODEL, slots=4, waiting=99, prompt_part=7, compiled=compiled), requests, random)
    for request in requests:
        events, begin = together[request.id], len(request.ids)
        said = ids_of(events)
        expected = log_p([*request.ids, *said[:-1]])
        for place, event in enumerate(events, begin - 1):
            assert event.token is not None
            best = expected[place].topk(2)
            assert event.token.logprob == pytest.approx(expected[place, event.token.id].item(), abs=1e-4)
            assert [logprob for _, logprob in event.token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        if request.prompt_logprobs is not None:
            prompt = events[0].prompt
            assert [scored.id for scored in prompt] == list(request.ids)
            assert prompt[0].logprob is None
            found = [scored.logprob for scored in prompt[1:]]
            assert found == pytest.approx([expected[n, id].item() for n, id in enumerate(request.ids[1:])], abs=1e-4)


def test_a_request_ends_at_a_stop_id_or_when_told_or_at_its_length_or_where_the_row_is_full() -> None:
    def ends(request: Request) -> tuple[int, str | None]:
        events = list(Engine(MODEL).stream(request))
        assert all(event.finish is None for event in events[:-1])
        return len(events), events[-1].finish

    ids = [1, 2, 3]
    said = ids_of(list(Engine(MODEL).stream(Request("a", ids, 9))))
    assert ends(Request("a", ids, 9)) == (9, "length")
    first = said.index(said[4])
    assert ends(Request("a", ids, 9, stop=frozenset({said[4]}))) == (first + 1, "stop")
    assert ends(Request("a", ids, 9, is_over=lambda id: id == said[4])) == (first + 1, "stop")
    assert ends(Request("a", ids, 1000)) == (T + 1 - 3, "length")
    assert ends(Request("a", [1] * T, 9)) == (1, "length")


def test_a_prompt_can_be_scored_without_an_answer() -> None:
    [event] = Engine(MODEL, prompt_part=2).stream(Request("a", [5, 6, 7, 8, 9], 0, prompt_logprobs=0))
    expected = log_p([5, 6, 7, 8, 9])
    assert event.token is None
    assert event.prompt[0] == Scored(5, None)
    scores = [scored.logprob for scored in event.prompt[1:]]
    assert scores == pytest.approx([expected[n, 6 + n].item() for n in range(4)], abs=1e-5)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes [B, T] of what the model reads."""
    shapes: list[tuple[int, ...]] = []
    inner = Decoder.states

    def spy(self: Decoder, ids: torch.Tensor, places: torch.Tensor, attention: CachedAttention) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return inner(self, ids, places, attention)

    monkeypatch.setattr(Decoder, "states", spy)
    return shapes


def test_the_next_turn_of_a_chat_is_read_from_where_it_differs(reads: list[tuple[int, ...]]) -> None:
    engine = Engine(MODEL, slots=3)
    said = ids_of(list(engine.stream(Request("a", [1, 2, 3], 4))))
    for other in ("b", "c"):  # other chats between the turns take the other slots
        list(engine.stream(Request(other, [9, 9, ord(other)], 2)))
    reads.clear()
    list(engine.stream(Request("a", [1, 2, 3, *said, 7, 8], 1)))
    assert reads == [(1, 3)], "the last id of the answer, which nobody had to read, and two new ones"


def test_a_turn_goes_on_in_its_own_slot_and_leaves_the_other_chats_theirs(reads: list[tuple[int, ...]]) -> None:
    engine = Engine(MODEL, slots=2)
    for chat in (1, 2):
        list(engine.stream(Request("a", [chat, 3, 4, 5], 1)))
    for chat in (2, 1):  # the last one first: the slot that was used least lately is the other one's
        reads.clear()
        list(engine.stream(Request("a", [chat, 3, 4, 5, 6], 1)))
        assert reads == [(1, 1)]


def test_equal_prompts_are_read_once(reads: list[tuple[int, ...]]) -> None:
    engine = Engine(MODEL, slots=4)
    for number in range(4):
        engine.add(Request(f"{number}", [1, 2, 3, 4, 5, 6], 3, Sampling(1.0), seed=number))
    while engine.running or engine.queued:
        engine.step()
    assert reads == [(1, 6), (1, 1), (1, 1), (1, 1), (4, 1), (4, 1)]
    assert (engine.prompt_ids, engine.reused_ids) == (24, 15)


def test_a_long_prompt_is_read_in_parts_between_the_steps_of_others(reads: list[tuple[int, ...]]) -> None:
    engine = Engine(MODEL, slots=2, prompt_part=10)
    engine.add(Request("short", [1], 20))
    engine.step()
    engine.add(Request("long", list(range(35)), 1))
    reads.clear()
    steps = [[event.request for event in engine.step()] for _ in range(4)]
    assert steps == [["short"], ["short"], ["short"], ["long", "short"]]
    assert [shape for shape in reads if shape[1] > 1] == [(1, 10), (1, 10), (1, 10), (1, 5)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("id", ["decoding", "reading", "waiting"])
def test_a_cancelled_request_frees_its_slot_at_once_and_disturbs_nobody(id: str, compiled: bool) -> None:
    requests = [Request("decoding", [1], 9), Request("reading", list(range(30)), 9), Request("waiting", [2, 3], 9)]
    engine = Engine(MODEL, slots=2, prompt_part=5, compiled=compiled)
    for request in requests:
        engine.add(request)
    first = engine.step()
    assert (engine.running, engine.queued) == (2, 1)
    engine.cancel(id)
    engine.cancel("nobody")
    assert engine.running + engine.queued == 2
    later = served(engine, [], Random(0))
    assert id not in later
    for request in requests:
        if request.id != id:
            events = [*(event for event in first if event.request == request.id), *later[request.id]]
            assert ids_of(events) == ids_of(list(Engine(MODEL).stream(request)))


def test_a_stream_that_is_closed_early_is_cancelled() -> None:
    engine = Engine(MODEL)
    stream = engine.stream(Request("a", [1], 30))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.running == 0
    assert len(list(engine.stream(Request("a", [1], 3)))) == 3


def test_more_requests_than_wait_are_refused() -> None:
    engine = Engine(MODEL, slots=1, waiting=1)
    engine.add(Request("a", [1], 2))
    engine.add(Request("b", [1], 2))
    with pytest.raises(Busy):
        engine.add(Request("c", [1], 2))
    served(engine, [], Random(0))
    engine.add(Request("c", [1], 2))


@pytest.mark.parametrize("ids", [[], [1] * (T + 1)])
def test_a_prompt_that_does_not_fit_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=f"give 1 to {T}"):
        Engine(MODEL).add(Request("a", ids, 1))

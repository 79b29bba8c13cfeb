"""Generated items: what a model is given in each phase and reading, where its output ends, and how it is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from bwlm.config import Experiment
from bwlm.errors import UserError
from bwlm.evaluate.tasks import answers
from bwlm.evaluate.tasks.answers import Generated, NotApplicable, evaluate_generated
from bwlm.evaluate.tasks.writers import Output, Sampling, TextWriter
from bwlm.model.compute import Compute
from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig
from bwlm.record.run_config import RunConfig
from bwlm.text.conversation import Prompt
from bwlm.trained.load import LoadedModel
from tasks.items import Example, GeneratedItem
from tasks.task import exchange
from tests.evaluate.tasks.bigram import LETTERS, bigram_model

TABLE = {
    "q": {"a": 0.9},
    "a": {"b": 0.6, "c": 0.3},
    "b": {"#": 0.9},
    "#": {"#": 0.9},
    "c": {"c": 0.9},
    "x": {"x": 0.9},
    "e": {"^": 0.9},
    "<|assistant_start|>": {"a": 0.9},
}
"""p(next | previous). Greedily q gives `ab##..`, x never ends, and e ends the text."""
ANSWERS = TABLE | {"b": {"<|assistant_end|>": 0.9}}


@dataclass(frozen=True)
class Echo:
    """Task whose right output is the reference."""

    name: str = "echo"
    shots: int = 0
    new_tokens: int = 8
    stops: tuple[str, ...] = ("##", "\n\n")

    def test_source(self, path: str | None = None) -> str:
        return self.name

    def generated_items(self, shots: int, path: str | None = None) -> Sequence[GeneratedItem]:
        return []

    def correct(self, output: str, item: GeneratedItem) -> bool:
        return bool(output == item.reference)


class Programs(Echo):
    """Task whose program is the reference; an output of any kind."""

    correct = None  # type: ignore[assignment]

    def program(self, output: str, item: GeneratedItem) -> str:
        return f"output = {output!r}\n{item.reference}"


def loaded(model: GPT, direction: str = "forward", phase: str = "base", reversal: str = "whole") -> LoadedModel:
    content: dict[str, Any] = {"direction": direction, "depth": 1, "lr": 1.0, "seed": 0, "budget": {"steps": 1}}
    mixture = {} if phase == "base" else {"mixture": {"builtin:arithmetic": 1.0}}
    experiment = Experiment.model_validate(content | {"phase": phase, "data": {"reversal": reversal, **mixture}})
    config = RunConfig("run", experiment, {}, 1, Compute("float32", "sdpa", 0, False, 8, 1), "", "")
    return LoadedModel(model, LETTERS, config, {}, 1, None)


def item(prompt: str = "q", reference: Any = "ab", shots: Sequence[Example] = (), name: str = "0") -> GeneratedItem:
    return GeneratedItem(name, f"file: {name}", prompt, exchange(prompt, "ab"), shots=tuple(shots), reference=reference)


def evaluated(
    items: GeneratedItem | Sequence[GeneratedItem],
    model: LoadedModel | None = None,
    task: Echo | None = None,
    reading: str = "forward",
    **settings: Any,
) -> Generated:
    every = [items] if isinstance(items, GeneratedItem) else items
    result = evaluate_generated(model or loaded(bigram_model(TABLE)), task or Echo(), every, reading, **settings)
    assert isinstance(result, Generated)
    return result


@pytest.fixture(scope="module")
def lively() -> GPT:
    """A model whose every id depends on all before it."""
    model = GPT(GPTConfig(LETTERS.vocab_size, depth=2, width=32, heads=2, kv_heads=2, sequence_length=256))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def several(count: int = 12) -> list[GeneratedItem]:
    """Items of different lengths, some alike."""
    return [item("pq" * (n % 5 + 1), name=str(n)) for n in range(count)]


# ---- what is read ----


def test_a_base_model_continues_the_examples_and_the_prompt() -> None:
    [attempt] = evaluated(item(shots=[Example("p", "a"), Example("r", "b")])).attempts
    assert LETTERS.decode(attempt.ids) == "<|bos|>pa\n\nrb\n\nq"


def test_a_bidirectional_base_model_has_its_marker() -> None:
    [attempt] = evaluated(item(), loaded(bigram_model(TABLE), "bidirectional")).attempts
    assert attempt.ids == (LETTERS.bos, LETTERS.forward, ord("q"))


def test_a_later_model_is_asked_in_a_conversation_without_examples() -> None:
    model = loaded(bigram_model(ANSWERS), phase="sft")
    [attempt] = evaluated(item(shots=[Example("p", "a")]), model).attempts
    assert LETTERS.decode(attempt.ids) == "<|bos|><|user_start|>q<|user_end|><|assistant_start|>"
    assert (attempt.output, attempt.outcome) == ("ab", "right")


@pytest.mark.parametrize("phase", ["mid", "sft", "rl"])
def test_turns_read_backward_are_answered_from_their_end(phase: str) -> None:
    """The prompt's message stands reversed, and the output comes back in reading order."""
    for direction in ("backward", "forward", "bidirectional"):  # forward: crossed
        model = loaded(bigram_model(ANSWERS), direction, phase, "turns")
        [attempt] = evaluated(item("pq", "ba"), model, reading="backward").attempts
        marker = "<|backward|>" if direction == "bidirectional" else ""
        assert LETTERS.decode(attempt.ids) == f"<|bos|>{marker}<|user_start|>qp<|user_end|><|assistant_start|>"
        assert (attempt.output, attempt.outcome) == ("ba", "right")


@pytest.mark.parametrize(
    ("direction", "phase", "reversal", "reading", "reason"),
    [
        ("backward", "base", "whole", "backward", "an output would stand before its prompt"),
        ("forward", "base", "whole", "backward", "an output would stand before its prompt"),
        ("backward", "base", "turns", "backward", "an output would stand before its prompt"),
        ("permuted", "base", "whole", "permuted", "cannot be written in the order permuted"),
        ("backward", "sft", "whole", "backward", "the model writes the question, given the answer"),
        ("forward", "mid", "whole", "backward", "the model writes the question, given the answer"),
    ],
)
def test_a_reading_without_meaning_has_its_reason(
    direction: str, phase: str, reversal: str, reading: str, reason: str
) -> None:
    model = loaded(bigram_model(TABLE), direction, phase, reversal)
    result = evaluate_generated(model, Echo(), [item()], reading)
    assert isinstance(result, NotApplicable)
    assert reason in result.reason


@pytest.mark.parametrize(("direction", "phase"), [("backward", "base"), ("permuted", "base"), ("backward", "sft")])
def test_a_crossed_forward_reading_is_scored(direction: str, phase: str) -> None:
    table = TABLE if phase == "base" else ANSWERS
    [attempt] = evaluated(item(), loaded(bigram_model(table), direction, phase)).attempts
    assert attempt.correct


# ---- where an output ends ----


def test_an_output_ends_before_the_first_stop() -> None:
    [attempt] = evaluated(item()).attempts
    assert (attempt.output, attempt.outcome) == ("ab", "right")
    [attempt] = evaluated(item(), task=Echo(stops=("b#", "##"))).attempts
    assert (attempt.output, attempt.outcome) == ("a", "wrong")


def test_the_end_of_the_text_ends_an_output() -> None:
    [attempt] = evaluated(item("e", "")).attempts
    assert (attempt.output, attempt.outcome) == ("", "right")


def test_an_output_that_does_not_end_is_not_right() -> None:
    [attempt] = evaluated(item("x", "x" * 8)).attempts
    assert (attempt.output, attempt.outcome, attempt.correct) == ("x" * 8, "unfinished", False)
    model = loaded(bigram_model(ANSWERS | {"a": {"a": 0.9}}), phase="sft")
    [attempt] = evaluated(item("q", "a" * 8), model).attempts
    assert attempt.outcome == "unfinished"


@pytest.mark.parametrize("new_tokens", [1, 31, 32, 33, 70, 100])
def test_an_output_in_parts_has_as_many_ids_as_allowed(new_tokens: int, lively: GPT) -> None:
    writer = TextWriter("forward", "forward", LETTERS, ("no such text",))
    prompts = [writer.fit(one, 100).prompt for one in several(3)]  # type: ignore[union-attr]
    for output in writer.write(lively, prompts, [0, 1, 2], Sampling(new_tokens)):
        assert output.finished or len(output.text.encode("utf-8", "replace")) >= new_tokens


def test_parts_write_what_one_piece_would(lively: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    from bwlm.evaluate.tasks import writers

    task = Echo(new_tokens=100, stops=("no such text",))
    in_parts = evaluated(several(), loaded(lively), task)
    monkeypatch.setattr(writers, "_FIRST_PART", 1000)
    assert [one.output for one in in_parts.attempts] == [
        one.output for one in evaluated(several(), loaded(lively), task).attempts
    ]


def test_rows_that_have_ended_are_not_written_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from bwlm.evaluate.tasks import writers

    sizes: list[int] = []
    real = writers.generate

    def counted(model: GPT, prompts: Sequence[Sequence[int]], *rest: Any, **settings: Any) -> list[list[int]]:
        sizes.append(len(prompts))
        return real(model, prompts, *rest, **settings)

    monkeypatch.setattr(writers, "generate", counted)
    monkeypatch.setattr(writers, "_FIRST_PART", 4)
    items = [item(name="0"), item("x", name="1"), item(name="2")]
    result = evaluated(items, task=Echo(new_tokens=20))
    assert [one.outcome for one in result.attempts] == ["right", "unfinished", "right"]
    assert sizes == [3, 1, 1]  # 4, 8 and 8 ids


# ---- what fits ----


def test_examples_that_are_far_from_the_item_are_dropped_first() -> None:
    """A row of 64 holds a prompt of 57 ids before 8 of an output: BOS, and 14 ids for each example."""
    shots = [Example(f"{n}" * 11, f"{n}") for n in range(5)]
    result = evaluated([item(shots=shots), item(name="1")])
    ids = LETTERS.decode(result.attempts[0].ids)
    assert ids == "<|bos|>" + "\n\n".join("222222222222 333333333333 444444444444 q".replace(" ", "|").split("|"))
    assert (result.dropped_shots, result.cut) == (2, 1)


@pytest.mark.parametrize(("length", "fits"), [(56, True), (57, False)])
def test_an_item_fits_to_the_id(length: int, fits: bool) -> None:
    """BOS, the prompt and 8 ids of an output are 65: the last id of a row of 64 is written and not read."""
    result = evaluated([item("p" * (length - 1) + "x", name="long"), *(item(name=str(n)) for n in range(20))])
    assert [one.id for one in result.left_out] == ([] if fits else ["long"])
    assert len(result.attempts) == 20 + fits
    if fits:
        assert result.attempts[0].output == "x" * 8


def test_a_long_conversation_is_left_out() -> None:
    model = loaded(bigram_model(ANSWERS), phase="sft")
    items = [item("p" * 60, name="long"), *(item(name=str(n)) for n in range(20))]
    assert [one.id for one in evaluated(items, model).left_out] == ["long"]


def test_a_task_that_mostly_does_not_fit_is_refused() -> None:
    items = [item("p" * 60, name="long"), *(item(name=str(n)) for n in range(18))]
    result = evaluated(items)
    assert result.refusal == "1 of 19 items do not fit into a row"
    assert result.attempts == ()
    assert evaluated(items[1:]).refusal == ""
    assert evaluated([*items, item(name="18")]).refusal == "", "1 of 20 may be left out"


def test_an_output_has_at_most_half_of_a_row() -> None:
    assert evaluated(item(), task=Echo(new_tokens=1000)).sampling.new_tokens == 32


# ---- samples ----


def test_samples_depend_on_item_number_and_seed_alone(lively: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs(items: Sequence[GeneratedItem], samples: int = 3, seed: int = 0) -> dict[tuple[str, int], str]:
        result = evaluated(items, loaded(lively), samples=samples, seed=seed)
        return {(one.item.id, one.number): one.output for one in result.attempts}

    together = outputs(several())
    assert outputs(several()[::-1]) == together
    assert len(set(together.values())) > len(together) / 2
    assert outputs(several()[3:4]) == {key: text for key, text in together.items() if key[0] == "3"}
    assert outputs(several(), samples=2) == {key: text for key, text in together.items() if key[1] < 2}
    assert outputs(several(), seed=1) != together
    monkeypatch.setattr(answers, "_ROWS_AT_ONCE", 2)
    assert outputs(several()) == together


def test_each_part_of_a_sample_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ids are equally likely here: equal draws would write equal parts."""
    from bwlm.evaluate.tasks import writers

    monkeypatch.setattr(writers, "_FIRST_PART", 4)
    writer, written = TextWriter("forward", "forward", LETTERS, ("no such text",)), []
    monkeypatch.setattr(TextWriter, "_read", lambda self, ids: written.append(list(ids)) or Output("", False))
    writer.write(bigram_model({}), [Prompt([LETTERS.bos], LETTERS.bos)], [0], Sampling(12, temperature=1.0))
    assert len(written[-1]) == 12
    assert written[-1][:4] != written[-1][4:8]


def test_samples_of_a_conversation_likewise(lively: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(lively, phase="sft")
    together = [one.output for one in evaluated(several(), model, samples=2, temperature=1.0).attempts]
    monkeypatch.setattr(answers, "_ROWS_AT_ONCE", 3)
    assert [one.output for one in evaluated(several(), model, samples=2, temperature=1.0).attempts] == together


def test_attempts_come_item_by_item() -> None:
    result = evaluated(several(3), samples=2)
    assert [(one.item.id, one.number) for one in result.attempts] == [(f"{n}", k) for n in range(3) for k in range(2)]


def test_pass_at_k_counts_right_samples() -> None:
    """`a` is followed by b or c; only `b` ends the text, and is right."""
    result = evaluated(item(), samples=16, temperature=1.0, seed=1)
    right = sum(one.correct for one in result.attempts)
    assert 0 < right < 16
    assert result.pass_at(1) == {"0": pytest.approx(right / 16)}
    assert result.pass_at(16) == {"0": 1.0}
    assert result.outcomes.total() == 16


def test_top_k_of_one_is_greedy() -> None:
    result = evaluated(item(), samples=4, temperature=2.0, top_k=1)
    assert {one.output for one in result.attempts} == {"ab"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"samples": 0}, "samples: must be 1 or more"),
        ({"samples": 2, "temperature": 0.0}, "temperature: at 0 all 2 samples are the same"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        evaluated(item(), **settings)


def test_batches_are_bounded_and_the_longest_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(LETTERS.vocab_size, depth=2, width=32, heads=2, kv_heads=1, sequence_length=64)
    writer = TextWriter("forward", "forward", LETTERS, ())
    pending = [answers._Pending(one, writer.fit(one, 60), 0) for one in several()]  # type: ignore[arg-type]
    lengths = [len(one.prompt.ids) for one in pending]
    monkeypatch.setattr(answers, "_CACHE_BYTES", 4 * 2 * 2 * 16 * 40)  # 40 ids of such a model
    batches = list(answers._batches(config, pending, 4))
    assert sorted(n for batch in batches for n in batch) == list(range(len(pending)))
    flat = [lengths[n] for batch in batches for n in batch]
    assert flat == sorted(lengths, reverse=True)
    assert all(len(batch) * (lengths[batch[0]] + 4) <= 40 for batch in batches)
    assert len(batches) < len(pending)


def test_progress_counts_attempts() -> None:
    counted: list[int] = []
    evaluated(several(), samples=2, progress=counted.append)
    assert sum(counted) == 24


# ---- programs ----


def test_programs_run_only_where_the_user_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "run_programs", lambda programs: pytest.fail("ran a program"))
    with pytest.raises(UserError, match=r"--tasks echo: .* docs/security\.md, then add --allow-code-execution"):
        evaluated(item(), task=Programs())


def test_outcomes_of_programs() -> None:
    items = [
        item(name="0", reference="assert output == 'ab'"),
        item(name="1", reference="assert output == 'ba'"),
        item("x", name="2", reference="print('not run')"),
    ]
    result = evaluated(items, task=Programs(), allow_code_execution=True)
    assert [(one.outcome, one.detail) for one in result.attempts] == [
        ("right", ""),
        ("wrong", "AssertionError"),
        ("unfinished", ""),
    ]
    assert result.isolation is not None
    assert evaluated(item()).isolation is None


def test_a_timeout_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from bwlm.evaluate import sandbox

    limits = replace(sandbox.LIMITS, cpu_seconds=1)
    monkeypatch.setattr(answers, "run_programs", lambda programs: sandbox.run_programs(programs, limits))
    result = evaluated(item(reference="while True: pass"), task=Programs(), allow_code_execution=True)
    assert [(one.outcome, one.detail) for one in result.attempts] == [("timeout", "over 1 s of CPU time")]

"""Generated items evaluated in a reading: prompts fitted, outputs written in batches, each output checked or run.

The rules:

- An output may have `new_tokens` ids of its task, but at most half of a row. The prompt has the rest of the row; it
  loses its examples where it is longer, and an item whose prompt alone is longer is left out.
- An output that the model did not end is `unfinished` and not right: what would have followed is not known, and could
  change the answer (`19` of `198`). RL rewards by the same rule.
- One sample is greedy. With several, the seed of each follows from the item and the sample's number alone.
- A program that took too long is a `timeout`: not right, and counted apart from programs that are wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bwlm.errors import UserError
from bwlm.evaluate.sandbox import Isolation, Outcome, find_isolation, run_programs
from bwlm.evaluate.tasks.choices import MOST_LEFT_OUT
from bwlm.evaluate.tasks.writers import FittedPrompt, Output, Sampling, Writer, writer_of
from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig
from bwlm.stats.pass_at_k import pass_at_k
from bwlm.text.conversation import Prompt
from bwlm.trained.load import LoadedModel
from tasks.items import CheckedTask, ExecutedTask, GeneratedItem, GeneratedTask
from tasks.task import draw

AttemptOutcome = Literal["right", "wrong", "timeout", "unfinished"]
DEFAULT_TEMPERATURE = 0.8
"""Temperature of several samples, unless one is given: that of Chen et al. 2021 for pass@k of many."""

_CACHE_BYTES = 2**30
"""Memory for keys and values of a batch."""
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Attempt:
    """Output of a model for an item, judged."""

    item: GeneratedItem
    number: int
    """Number of the sample, from 0."""
    output: str
    """Output in reading order, without what follows a stop text."""
    outcome: AttemptOutcome
    detail: str
    """Reason why a program did not pass, or an empty text."""
    ids: tuple[int, ...]
    """Ids of the prompt, as the model reads them."""

    @property
    def correct(self) -> bool:
        """True if the output is right."""
        return self.outcome == "right"


@dataclass(frozen=True)
class NotApplicable:
    """Reading in which a model cannot write outputs for a task."""

    reason: str


@dataclass(frozen=True)
class Generated:
    """Attempts of a model at the items of a task in one reading."""

    attempts: tuple[Attempt, ...]
    """Attempts item by item, in the order of the items."""
    left_out: tuple[GeneratedItem, ...]
    """Items whose prompt alone does not fit."""
    dropped_shots: int
    """Number of examples that were dropped, over all items."""
    cut: int
    """Number of items that lost examples."""
    sampling: Sampling
    isolation: Isolation | None
    """Protection that programs ran under; None for a task that runs none."""
    refusal: str = ""
    """Reason why there are no attempts: too many items do not fit."""

    @property
    def outcomes(self) -> Counter[AttemptOutcome]:
        """Number of attempts by outcome."""
        return Counter(attempt.outcome for attempt in self.attempts)

    def pass_at(self, k: int) -> dict[str, float]:
        """Return the unbiased estimate of pass@k for each item, by its id; k is at most the number of samples."""
        by_item: dict[str, list[bool]] = {}
        for attempt in self.attempts:
            by_item.setdefault(attempt.item.id, []).append(attempt.correct)
        return {item: pass_at_k(len(right), sum(right), k) for item, right in by_item.items()}


def evaluate_generated(
    loaded: LoadedModel,
    task: GeneratedTask,
    items: Sequence[GeneratedItem],
    reading: str,
    *,
    samples: int = 1,
    temperature: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
    progress: Callable[[int], object] = lambda attempts: None,
) -> Generated | NotApplicable:
    """Return the attempts of a model at items, `samples` at each, or the reason why it can make none.

    `temperature` None: 0 for one sample, else 0.8. `progress` is called with numbers of attempts written. Raises
    `UserError` if the task runs programs and the user has not allowed it, and for settings of samples that make no
    sense.
    """
    isolation = _permitted(task, allow_code_execution)
    sampling = _sampling(loaded.model.config, task, samples, temperature, top_k)
    writer = writer_of(loaded, task, reading)
    if isinstance(writer, str):
        return NotApplicable(writer)
    room = loaded.model.config.sequence_length + 1 - sampling.new_tokens  # the last id of an output is not read
    fits = [writer.fit(item, room) for item in items]
    fitted = [(item, fit) for item, fit in zip(items, fits, strict=True) if fit is not None]
    left_out = tuple(item for item, fit in zip(items, fits, strict=True) if fit is None)
    refusal = _refusal(len(left_out), len(items))
    pending = [] if refusal else [_Pending(*one, number) for one in fitted for number in range(samples)]
    outputs = _write(loaded.model, writer, pending, sampling, seed, progress)
    dropped = [fit.dropped_shots for _, fit in fitted]
    return Generated(
        tuple(_judge(task, pending, outputs)),
        left_out,
        sum(dropped),
        sum(map(bool, dropped)),
        sampling,
        isolation,
        refusal,
    )


def _permitted(task: GeneratedTask, allowed: bool) -> Isolation | None:
    """Return the protection of programs, found out before anything is written; None for a task that runs none."""
    if not isinstance(task, ExecutedTask):
        return None
    if not allowed:
        raise UserError(
            f"--tasks {task.name}: runs programs that the model writes: read docs/security.md, then add "
            "--allow-code-execution"
        )
    return find_isolation()


def _refusal(left_out: int, total: int) -> str:
    return f"{left_out} of {total} items do not fit into a row" if left_out > MOST_LEFT_OUT * total else ""


def _sampling(
    config: GPTConfig, task: GeneratedTask, samples: int, temperature: float | None, top_k: int | None
) -> Sampling:
    if samples < 1:
        raise UserError(f"samples: must be 1 or more (found {samples})")
    if temperature is None:
        temperature = 0.0 if samples == 1 else DEFAULT_TEMPERATURE
    if samples > 1 and temperature == 0:
        raise UserError(f"temperature: at 0 all {samples} samples are the same: give one above 0, or 1 sample")
    return Sampling(max(1, min(task.new_tokens, config.sequence_length // 2)), temperature, top_k)


# ---- writing ----


class _Pending(NamedTuple):
    """Attempt that is not written yet."""

    item: GeneratedItem
    fitted: FittedPrompt
    number: int

    @property
    def prompt(self) -> Prompt:
        return self.fitted.prompt

    def seed(self, seed: int) -> int:
        """Return the seed of this attempt, the same in any company."""
        return draw(f"{seed} {self.item.id} {self.number}")


def _write(
    model: GPT,
    writer: Writer,
    pending: Sequence[_Pending],
    sampling: Sampling,
    seed: int,
    progress: Callable[[int], object],
) -> list[Output]:
    """Return an output for each attempt; prompts of about the same length are written together, the longest first."""
    outputs: dict[int, Output] = {}
    for batch in _batches(model.config, pending, sampling.new_tokens):
        chosen = [pending[n] for n in batch]
        written = writer.write(model, [one.prompt for one in chosen], [one.seed(seed) for one in chosen], sampling)
        outputs |= dict(zip(batch, written, strict=True))
        progress(len(batch))
    return [outputs[n] for n in range(len(pending))]


def _batches(config: GPTConfig, pending: Sequence[_Pending], new_tokens: int) -> Iterator[list[int]]:
    """Yield the places of attempts to write together, as many as the memory for keys and values allows."""
    order = sorted(range(len(pending)), key=lambda n: -len(pending[n].prompt.ids))  # stable: samples stay together
    a_place = 2 * config.depth * config.kv_heads * config.head_dim * 4
    while order:
        row = (len(pending[order[0]].prompt.ids) + new_tokens) * a_place
        count = max(1, min(_ROWS_AT_ONCE, _CACHE_BYTES // row))
        yield order[:count]
        order = order[count:]


# ---- judging ----


def _judge(task: GeneratedTask, pending: Sequence[_Pending], outputs: Sequence[Output]) -> Iterator[Attempt]:
    finished = [n for n, output in enumerate(outputs) if output.finished]
    judged = dict(zip(finished, _outcomes(task, [(pending[n].item, outputs[n].text) for n in finished]), strict=True))
    for n, (one, output) in enumerate(zip(pending, outputs, strict=True)):
        outcome, detail = judged.get(n, ("unfinished", ""))
        yield Attempt(one.item, one.number, output.text, outcome, detail, tuple(one.prompt.ids))


_OF_PROGRAM: dict[Outcome, AttemptOutcome] = {"passed": "right", "failed": "wrong", "timeout": "timeout"}


def _outcomes(task: GeneratedTask, written: Sequence[tuple[GeneratedItem, str]]) -> list[tuple[AttemptOutcome, str]]:
    """Return the outcome of each output, and a detail."""
    if isinstance(task, ExecutedTask):
        runs = run_programs([task.program(text, item) for item, text in written])
        return [(_OF_PROGRAM[run.outcome], run.detail) for run in runs]
    assert isinstance(task, CheckedTask), "a generated task is one of the two"
    return [("right" if task.correct(text, item) else "wrong", "") for item, text in written]

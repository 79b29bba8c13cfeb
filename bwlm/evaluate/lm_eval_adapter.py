"""lm-eval drives a trained run, forward or backward, with BOS and marker where training had them.

    python -m bwlm.evaluate.lm_eval_adapter --model bwlm --model_args storage=runs,run=mine,reading=backward \\
        --tasks arc_easy

`python -m lm_eval` itself does not know the model `bwlm`; this module registers it and then is lm-eval's command.
Every text begins with exactly one BOS (and the marker of a bidirectional model), also where its beginning is cut off
to fit into a row. Needs the extra `bwlm[lm-eval]`.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch

from bwlm.directions import TEXT_READINGS, is_marked, own_readings
from bwlm.errors import UserError, nearest
from bwlm.evaluate.tasks.rules import FORWARD
from bwlm.evaluate.tasks.scores import Row, Scored, score
from bwlm.model.generate import generate
from bwlm.storage.opened import open_storage
from bwlm.trained.load import load_model

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise UserError("lm-eval is not installed: pip install 'bwlm[lm-eval]'") from None

Ids = tuple[int, ...]
_NEW_TOKENS = 256
"""Most new tokens where a task does not say, as in lm-eval's own models."""


@register_model("bwlm")
class BwlmLM(LM):  # type: ignore[misc]
    """Trained run as a model of lm-eval.

    `reading`: forward or backward; by default the run's own. The log-likelihood of a continuation is log p of the
    continuation given the context forward, and log p of the context given the continuation backward, which ranks
    choices too (the rule `conditional`); with `rule="joint"` it is that of both together. Raises `UserError` for an
    unknown run, reading or rule.
    """

    def __init__(self, storage: str, run: str, reading: str = "", rule: str = "conditional", **ignored: Any) -> None:
        super().__init__()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.loaded = load_model(open_storage(storage), str(run), device)
        direction = self.loaded.config.experiment.direction
        self.reading = reading or own_readings(direction)[0]
        for name, value, known in (("reading", self.reading, TEXT_READINGS), ("rule", rule, ("conditional", "joint"))):
            if value not in known:
                raise UserError(f"{name}: {value!r} is not one of {', '.join(known)}{nearest(value, known)}")
        self.rule = rule
        tokenizer = self.loaded.tokenizer
        marker = tokenizer.forward if self.reading == FORWARD else tokenizer.backward
        self._head: Ids = (tokenizer.bos, marker) if is_marked(direction) else (tokenizer.bos,)
        self._room = self.loaded.model.config.sequence_length + 1 - len(self._head)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, in nats, and whether greedy decoding would give it.

        A long context loses its beginning. Raises `UserError` for a continuation that is longer than a row.
        """
        parts = [self._parts(*request.args) for request in requests]
        by_first: dict[Ids, list[int]] = {}
        for n, (first, _) in enumerate(parts):
            by_first.setdefault(first, []).append(n)
        start = {first: 0 if self.rule == "joint" else len(first) for first in by_first}
        rows = [Row(self._head, tuple(first + parts[n][1] for n in of), start[first]) for first, of in by_first.items()]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for of, scored in zip(by_first.values(), score(self.loaded.model, rows), strict=True):
            for n, one in zip(of, scored, strict=True):
                answers[n] = _answer(one)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in nats.

        A text that is longer than a row is cut into rows that each begin with BOS, as documents are in training.
        """
        texts = [self._encode(*request.args) for request in requests]
        pieces = [
            (n, ids[at : at + self._room]) for n, ids in enumerate(texts) for at in range(0, len(ids), self._room)
        ]
        rows = [Row(self._head, (self._arranged(piece),)) for _, piece in pieces]
        totals = [0.0] * len(requests)
        for (n, _), (scored,) in zip(pieces, score(self.loaded.model, rows), strict=True):
            totals[n] += _answer(scored)[0]
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model writes after each context, up to the first of the texts in `until`.

        Raises `UserError` for a backward reading, which writes what stands before a text, and for sampling.
        """
        if self.reading != FORWARD:
            raise UserError("reading: backward: a model that reads backward cannot continue a text from its end")
        texts, tokenizer = [], self.loaded.tokenizer
        stop = {tokenizer.bos}
        banned = set(tokenizer.specials.values()) - stop
        for request in requests:
            context, settings = request.args
            if settings.get("do_sample") or settings.get("temperature", 0):
                raise UserError("gen_kwargs: only greedy decoding is supported: leave do_sample and temperature out")
            new = int(settings.get("max_gen_toks", _NEW_TOKENS))
            keep = max(1, self._room - new)
            prompt = [*self._head, *self._encode(context)[-keep:]]
            [ids] = generate(self.loaded.model, [prompt], new, stop=stop, banned=banned)
            texts.append(_until(tokenizer.decode([token for token in ids if token not in stop]), settings))
        return texts

    def _encode(self, text: str) -> Ids:
        return tuple(self.loaded.tokenizer.encode(text).tolist())

    def _arranged(self, ids: Ids) -> Ids:
        return ids if self.reading == FORWARD else ids[::-1]

    def _parts(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Return the ids of the part that is read first, and of the part that is scored."""
        whole, before = self._encode(context + continuation), self._encode(context.rstrip())
        # white space at the end of a context belongs to the continuation, as in lm-eval's own models
        border = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
        if len(whole) - border > self._room:
            raise UserError(
                f"a continuation of {len(whole) - border} tokens does not fit into a row of {self._room}: choose a "
                "model with a longer sequence_length"
            )
        cut = max(0, len(whole) - self._room)
        before, after = whole[cut:border], whole[border:]
        return (before, after) if self.reading == FORWARD else (after[::-1], before[::-1])


def _answer(scored: Scored) -> tuple[float, bool]:
    return float(scored.log_p.sum()), bool(scored.greedy.all())


def _until(text: str, settings: dict[str, Any]) -> str:
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text


def main() -> None:
    """Run lm-eval's command line, in which `--model bwlm` is known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

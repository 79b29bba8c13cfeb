"""Scores of rows that share beginnings: those of each row alone, whatever it is read with."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bwlm.evaluate.tasks import scores
from bwlm.evaluate.tasks.scores import Ids, Row, score
from bwlm.model.decoder import Decoder
from bwlm.model.gpt import GPT
from bwlm.model.shape import GPTConfig

VOCABULARY, LENGTH = 37, 48


@pytest.fixture(scope="module", params=[2, 1], ids=["heads share no keys", "heads share keys"])
def model(request: pytest.FixtureRequest) -> GPT:
    config = GPTConfig(VOCABULARY, depth=2, width=32, heads=2, kv_heads=request.param, sequence_length=LENGTH)
    model = GPT(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # the first weights would make each block the identity
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


def alone(model: GPT, trunk: Ids, branch: Ids) -> tuple[NDArray[np.float64], list[bool]]:
    """Log-probabilities of a branch by one plain pass over its whole row."""
    with torch.no_grad():
        logits = model(torch.tensor([[*trunk, *branch][:-1]]))[0, len(trunk) - 1 :].double()
    log_p = logits.log_softmax(-1)[torch.arange(len(branch)), torch.tensor(branch)]
    return log_p.numpy(), (logits.argmax(-1) == torch.tensor(branch)).tolist()


def rows_at_random(seed: int, count: int = 12) -> list[Row]:
    rng = random.Random(seed)

    def ids(most: int) -> Ids:
        return tuple(rng.randrange(3) for _ in range(rng.randint(1, most)))  # few ids, so that much is shared

    trunks = [ids(12), ids(1), ids(20)]
    return [Row(rng.choice(trunks), tuple(ids(12) for _ in range(rng.randint(1, 6)))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_each_row_alone(model: GPT, seed: int) -> None:
    rows = rows_at_random(seed)
    for row, scored in zip(rows, score(model, rows), strict=True):
        for branch, got in zip(row.branches, scored, strict=True):
            log_p, greedy = alone(model, row.trunk, branch)
            np.testing.assert_allclose(got.log_p, log_p, atol=1e-4)
            assert got.greedy.tolist() == greedy


def test_no_score_depends_on_company_order_or_the_size_of_a_pass(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_at_random(7)
    together = score(model, rows)
    backwards = score(model, rows[::-1])[::-1]
    monkeypatch.setattr(scores, "_NODES_AT_ONCE", 5)
    monkeypatch.setattr(scores, "_LOGITS_AT_ONCE", 3)
    for others in (backwards, score(model, rows), [score(model, [row])[0] for row in rows]):
        for one, other in zip(together, others, strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_allclose(a.log_p, b.log_p, atol=1e-4)


def test_equal_branches_have_equal_scores_and_a_prefix_of_another_has_its_own(model: GPT) -> None:
    short, long = (3, 4), (3, 4, 5)
    ((first, second, third, again),) = score(model, [Row((1, 2), (short, long, (9,), short))])
    assert first.log_p.tolist() == again.log_p.tolist()
    assert first.log_p.tolist() == second.log_p[:2].tolist()
    assert (len(first.log_p), len(second.log_p), len(third.log_p)) == (2, 3, 1)
    assert np.isfinite([*first.log_p, *second.log_p, *third.log_p]).all()


def test_only_what_is_scored_is_returned(model: GPT) -> None:
    ((whole,),) = score(model, [Row((1,), ((2, 3, 4, 5),))])
    ((end,),) = score(model, [Row((1,), ((2, 3, 4, 5),), scored_from=3)])
    np.testing.assert_allclose(end.log_p, whole.log_p[3:], atol=1e-5)
    ((none,),) = score(model, [Row((1,), ((2, 3),), scored_from=2)])
    assert len(none.log_p) == 0


def test_trees_larger_than_a_row_are_cut(model: GPT) -> None:
    rng = random.Random(3)
    branches = tuple(tuple(rng.randrange(VOCABULARY) for _ in range(20)) for _ in range(9))
    (scored,) = score(model, [Row((1, 2, 3), branches)])
    for branch, got in zip(branches, scored, strict=True):
        np.testing.assert_allclose(got.log_p, alone(model, (1, 2, 3), branch)[0], atol=1e-4)


def test_a_full_row_is_scored_and_a_longer_one_refused(model: GPT) -> None:
    full = tuple(n % VOCABULARY for n in range(LENGTH))
    ((got,),) = score(model, [Row((1,), (full,))])
    np.testing.assert_allclose(got.log_p, alone(model, (1,), full)[0], atol=1e-4)
    with pytest.raises(ValueError, match="49 ids to read, but sequence_length is 48"):
        score(model, [Row((1, 1), (full,))])


def test_the_kernel_of_other_devices_gives_the_same(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_at_random(0)
    expected = [one.log_p for row in score(model, rows) for one in row]
    monkeypatch.setattr(scores, "_attend_plainly", scores._attend)
    for one, log_p in zip([one for row in score(model, rows) for one in row], expected, strict=True):
        np.testing.assert_allclose(one.log_p, log_p, atol=1e-4)


def test_a_trunk_that_rows_share_is_read_once(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    states = Decoder.states
    monkeypatch.setattr(
        Decoder, "states", lambda self, ids, *rest: (sizes.append(tuple(ids.shape)), states(self, ids, *rest))[1]
    )
    score(model, [Row(tuple(range(30)), ((n, 1), (n, 2))) for n in range(5)])
    assert sizes == [(1, 29), (5, 2)]  # the trunk; five trees of the trunk's last id and the id that both choices share


def test_what_two_trunks_begin_with_is_read_once(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trunks 20 and 30 long, read 19 and 29 ids of them: the second one's first 19 are known."""
    lengths: list[int] = []
    states = Decoder.states
    monkeypatch.setattr(
        Decoder, "states", lambda self, ids, *rest: (lengths.append(ids.size(1)), states(self, ids, *rest))[1]
    )
    long, short = tuple(range(30)), tuple(range(20))
    both = score(model, [Row(long, ((5, 1),)), Row(short, ((6, 2),))])
    assert lengths == [19, 2, 10, 2]
    for trunk, branch, ((got),) in ((long, (5, 1), both[0]), (short, (6, 2), both[1])):
        np.testing.assert_allclose(got.log_p, alone(model, trunk, branch)[0], atol=1e-4)


def test_the_model_keeps_its_mode(model: GPT) -> None:
    model.train()
    score(model, [Row((1,), ((2,),))])
    assert model.training
    model.eval()

"""One step is the same step however it is cut into passes, and touches nothing when it is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bwlm.model.gpt import GPT
from bwlm.model.optim import build_optimizer
from bwlm.model.shape import GPTConfig
from bwlm.model.train_step import StepResult, TrainStep

CONFIG = GPTConfig(vocab_size=64, depth=2, width=32, heads=2, kv_heads=1, sequence_length=16)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """6 rows with unequal numbers of targets, and segments."""
    ids = torch.randint(64, (6, 17), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    for row in range(6):
        targets[row, : 2 * row] = -1
    return ids[:, :-1], targets, (torch.arange(16) >= 7).long().expand(6, 16)


def fresh(micro_rows: int, grad_clip: float = 1.0) -> TrainStep:
    model = GPT(CONFIG, loss_chunk=20)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return TrainStep(model, build_optimizer(model), micro_rows, grad_clip)


@pytest.mark.parametrize("micro_rows", [1, 2, 4, 5, 6, 100])
def test_passes_change_nothing(micro_rows: int) -> None:
    whole, parts = fresh(6), fresh(micro_rows)
    one, other = whole(*batch()), parts(*batch())
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    torch.testing.assert_close(other.token_losses, one.token_losses)
    second, again = whole(*batch()), parts(*batch())
    assert second.loss < one.loss
    assert again.loss == pytest.approx(second.loss, rel=1e-3)


def test_the_loss_is_the_mean_over_targets() -> None:
    inputs, targets, segments = batch()
    result = fresh(4)(inputs, targets, segments)
    assert result.token_losses.shape == targets.shape
    assert result.loss == pytest.approx(float(result.token_losses.sum() / (targets >= 0).sum()), rel=1e-6)
    assert (result.token_losses[targets < 0] == 0).all()


def test_gradients_are_clipped_to_the_norm_and_told_before() -> None:
    """After a clip to c, AdamW's first moment of the embedding is (1 - beta1) times a gradient of at most that norm."""
    step = fresh(6, grad_clip=1e-3)
    result = step(*batch())
    assert result.grad_norm > 0.1
    moments = [value for name, value in step.optimizer.state_tensors().items() if name.endswith("exp_avg")]
    norm = math.sqrt(sum(float(moment.square().sum()) for moment in moments))
    assert norm <= 0.2 * 1e-3 * (1 + 1e-4)
    free = fresh(6, grad_clip=0.0)
    free(*batch())
    loose = [value for name, value in free.optimizer.state_tensors().items() if name.endswith("exp_avg")]
    assert math.sqrt(sum(float(moment.square().sum()) for moment in loose)) > 100 * norm


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    step = fresh(6)
    assert isinstance(step.model.lm_head, nn.Linear)
    with torch.no_grad():
        step.model.lm_head.weight[3, 3] = math.inf
    before = {name: weight.clone() for name, weight in step.model.state_dict().items()}
    result = step(*batch())
    assert not result.is_finite
    for name, weight in step.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_a_step_without_any_gradient_changes_nothing() -> None:
    """Of its momentum alone Muon would move the weights as far as ever, however long ago it was told anything."""
    step = fresh(6)
    step(*batch())
    before = {name: weight.clone() for name, weight in step.model.state_dict().items()}
    result = step(*batch(), importance=torch.zeros(6, 16))
    assert (result.loss, result.grad_norm) == (0, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in step.model.state_dict().items())


def test_it_passes_on_that_somebody_was_asked_to_stop() -> None:
    step = fresh(6)
    assert not step(*batch()).asked_to_stop
    assert step(*batch(), stop=True).asked_to_stop


@pytest.mark.parametrize(("loss", "norm", "finite"), [(1.0, 1.0, True), (math.nan, 1.0, False), (1.0, math.inf, False)])
def test_both_loss_and_gradient_must_be_finite(loss: float, norm: float, finite: bool) -> None:
    assert StepResult(loss, norm, torch.zeros(1), torch.zeros(0), False).is_finite == finite

"""What the optimizer promises: it learns, it stops and goes on bit for bit, and its schedule is as written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bwlm.model.gpt import GPT
from bwlm.model.optim import (
    Kind,
    Optimizer,
    _orthogonalization_cost,
    build_optimizer,
    lr_schedule,
    muon_momentum,
    weight_decay_schedule,
)
from bwlm.model.shape import GPTConfig

CONFIG = GPTConfig(vocab_size=64, depth=2, width=32, heads=2, kv_heads=1, sequence_length=16)
KINDS: list[Kind] = ["muon", "adamw"]
PLACE = {"up": "mlp", "down": "mlp", "query": "attention"}


def new_model(seed: int = 0, config: GPTConfig = CONFIG) -> GPT:
    model = GPT(config)
    model.init_weights(seed)
    return model


def lively_model() -> GPT:
    """A model of which every weight gets a gradient: at nanochat's zeros most get none."""
    model, generator = new_model(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batch(seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def train_step(model: GPT, optimizer: Optimizer, seed: int, step: int = 0) -> float:
    ids, targets = batch(seed)
    loss = model.loss(ids, targets)[0] / targets.numel()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.set_schedule(lr_schedule(step, 100), muon_momentum(step))
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_a_batch_by_heart(kind: Kind) -> None:
    model = new_model()
    optimizer = build_optimizer(model, kind=kind)
    losses = [train_step(model, optimizer, seed=1, step=step) for step in range(40)]
    assert losses[0] == pytest.approx(4.16, abs=0.02)
    assert losses[-1] < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_and_going_on_changes_no_bit(kind: Kind) -> None:
    straight = new_model()
    optimizer = build_optimizer(straight, kind=kind, weight_decay=0.1)
    for step in range(3):
        train_step(straight, optimizer, seed=step, step=step)
    weights = {name: weight.clone() for name, weight in straight.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}

    resumed = new_model(seed=9)
    other = build_optimizer(resumed, kind=kind, weight_decay=0.1)
    train_step(resumed, other, seed=7)  # nothing of a past of its own may stay
    resumed.load_state_dict(weights)
    other.load_state_tensors(state)
    for step in range(3, 6):
        assert train_step(straight, optimizer, step, step) == train_step(resumed, other, step, step)
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, other.state_tensors()[name]), name


def test_state_made_at_the_start_is_what_torch_would_make() -> None:
    ours, theirs = new_model(), new_model()
    optimizer, plain = build_optimizer(ours), build_optimizer(theirs)
    for part in plain.parts.values():
        part.state.clear()
    names = optimizer.state_tensors().keys()
    for step in range(3):
        train_step(ours, optimizer, step)
        train_step(theirs, plain, step)
    assert optimizer.state_tensors().keys() == plain.state_tensors().keys() == names
    for name, tensor in plain.state_tensors().items():
        assert tensor.dtype == optimizer.state_tensors()[name].dtype
        assert torch.equal(tensor, optimizer.state_tensors()[name]), name


def test_state_names_are_flat_and_complete() -> None:
    names = set(build_optimizer(new_model()).state_tensors())
    assert "muon/blocks.0.attention.query.weight/momentum_buffer" in names
    assert {
        f"adamw/{weight}.weight/{key}" for weight in ("embedding", "lm_head") for key in ("step", "exp_avg")
    } < names
    assert len(names) == 2 * 6 + 2 * 3
    everything = set(build_optimizer(new_model(), kind="adamw").state_tensors())
    assert len(everything) == 3 * (2 * 6 + 2)
    assert all(name.startswith("adamw/") for name in everything)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("adamw/embedding.weight/step"), "1 missing, the first 'adamw/embedding.weight/step'"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected, the first 'extra'"),
        (lambda state: state.update({"adamw/lm_head.weight/exp_avg": torch.zeros(64, 31)}), r"\(64, 31\)"),
        (lambda state: state.update({"adamw/lm_head.weight/exp_avg": torch.zeros(64, 32).double()}), "float64"),
    ],
)
def test_state_that_does_not_fit_is_refused_whole(spoil: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    source = build_optimizer(model := new_model())
    train_step(model, source, seed=0)
    state = dict(source.state_tensors())
    spoil(state)
    target = build_optimizer(new_model())
    with pytest.raises(ValueError, match=message):
        target.load_state_tensors(state)
    assert not any(tensor.any() for tensor in target.state_tensors().values())


def test_rates_are_nanochats_for_the_width() -> None:
    # a width of 192 is a quarter of 768: AdamW's rates are doubled
    model = new_model(config=GPTConfig.from_depth(3, vocab_size=64, sequence_length=8))
    rates = build_optimizer(model, lr=0.5).learning_rates()
    assert rates == pytest.approx({"matrix": 0.01, "embedding": 0.2, "unembedding": 0.004})
    rates = build_optimizer(model, kind="adamw").learning_rates()
    assert rates == pytest.approx({"matrix": 1.2e-3, "embedding": 0.4, "unembedding": 0.008})


def test_a_schedule_scales_from_the_first_rates_and_sets_muons_momentum() -> None:
    optimizer = build_optimizer(new_model())
    before = optimizer.learning_rates()
    optimizer.set_schedule(0.5, 0.85)
    optimizer.set_schedule(0.25, 0.9)
    assert optimizer.learning_rates() == pytest.approx({name: rate / 4 for name, rate in before.items()})
    assert optimizer.parts["muon"].param_groups[0]["momentum"] == 0.9
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.parts["adamw"].param_groups)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps (Jordan, https://kellerjordan.github.io/posts/muon/), here in float32."""
    x: Tensor = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("name", "scale"), [("up", 2.0), ("down", 1.0), ("query", 1.0)])
def test_matrices_move_as_muon_is_published(name: str, scale: float) -> None:
    """Nesterov momentum, orthogonalised, times sqrt(max(1, rows / columns)): two steps by hand, within bf16."""
    model = lively_model()
    optimizer = build_optimizer(model)
    weight = next(weight for key, weight in model.named_parameters() if f"blocks.1.{PLACE[name]}.{name}." in key)
    expected, momentum_buffer = weight.detach().clone(), torch.zeros_like(weight)
    for step, momentum in enumerate((0.5, 0.9)):
        ids, targets = batch(step)
        model.loss(ids, targets)[0].backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * weight.grad
        update = orthogonalised((1 - momentum) * weight.grad + momentum * momentum_buffer)
        expected -= 0.02 * 0.3 * scale * update
        optimizer.set_schedule(0.3, momentum)
        optimizer.step()
        optimizer.zero_grad()
    error = (expected - weight).norm() / (0.02 * 0.3 * update.norm())
    assert float(error.detach()) < 0.08  # bf16 leaves 0.04; another momentum or number of steps far more


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_pulls_at_the_matrices_alone(kind: Kind) -> None:
    def after(weight_decay: float) -> dict[str, Tensor]:
        model = new_model()
        train_step(model, build_optimizer(model, weight_decay=weight_decay, kind=kind), seed=0)
        return model.state_dict()

    plain, decayed = after(0.0), after(0.5)
    assert torch.equal(plain["embedding.weight"], decayed["embedding.weight"])
    assert torch.equal(plain["lm_head.weight"], decayed["lm_head.weight"])
    unread = torch.ones(64, dtype=torch.bool).index_fill(0, batch(0)[0].flatten(), False)
    assert unread.any()
    assert torch.equal(decayed["embedding.weight"][unread], new_model().state_dict()["embedding.weight"][unread])
    key = "blocks.1.attention.query.weight"
    assert float(decayed[key].norm()) < float(plain[key].norm())


def test_misuse_is_refused() -> None:
    for lr in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lr"):
            build_optimizer(new_model(), lr=lr)
    with pytest.raises(ValueError, match="weight_decay"):
        build_optimizer(new_model(), weight_decay=-0.1)
    with pytest.raises(ValueError, match="kind"):
        build_optimizer(new_model(), kind="sgd")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "multiplier"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (50, 1.0), (75, 0.6), (99, 0.216), (100, 0.2)],
)
def test_schedule_by_hand(step: int, multiplier: float) -> None:
    # 10 steps up, constant, the last 50 of 100 down to a fifth: 0.2 + 0.8 x (100 - step) / 50
    assert lr_schedule(step, 100, 10, 0.5, 0.2) == pytest.approx(multiplier)


def test_schedule_defaults_by_hand() -> None:
    assert lr_schedule(0, 1000) == pytest.approx(1 / 40)
    assert lr_schedule(39, 1000) == lr_schedule(350, 1000) == 1.0
    assert lr_schedule(675, 1000) == pytest.approx(0.525)
    assert lr_schedule(0, 50) == pytest.approx(1 / 5)  # a tenth of the steps
    assert lr_schedule(0, 4) == 1.0  # a tenth of few steps is none
    assert lr_schedule(0, 1, warmdown_ratio=0.0) == lr_schedule(99, 100, warmdown_ratio=0.0) == 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": -1},
        {"step": 101},
        {"warmup_steps": -1},
        {"warmup_steps": 36},
        {"warmdown_ratio": 1.1},
        {"warmdown_ratio": -0.1},
        {"final_fraction": 1.5},
        {"steps": 0, "step": 0, "warmup_steps": 1},
    ],
)
def test_impossible_schedules_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        lr_schedule(**({"step": 0, "steps": 100} | arguments))


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.85), (150, 0.90), (300, 0.95), (10_000, 0.95)])
def test_muons_momentum_by_hand(step: int, momentum: float) -> None:
    assert muon_momentum(step) == pytest.approx(momentum)


def test_each_matrix_has_one_owner_and_the_work_is_even() -> None:
    model = new_model(config=GPTConfig(vocab_size=64, depth=6, width=32, heads=2, kv_heads=2, sequence_length=16))
    matrices = {name for name, _ in model.named_parameters() if name.startswith("blocks.")}
    for world in (2, 3, 4):
        owned = [
            {
                name.split("/")[1]
                for name in build_optimizer(model, rank=rank, world=world)._own_state()
                if "muon" in name
            }
            for rank in range(world)
        ]
        assert sum(map(len, owned)) == len(matrices)
        assert set().union(*owned) == matrices
        costs = [sum(_orthogonalization_cost(dict(model.named_parameters())[name]) for name in some) for some in owned]
        assert max(costs) <= 1.3 * sum(costs) / world


def test_more_ranks_than_matrices_leave_some_without() -> None:
    model = new_model(config=GPTConfig(vocab_size=64, depth=1, width=32, heads=2, kv_heads=2, sequence_length=16))
    idle = build_optimizer(model, rank=7, world=8)
    assert "muon" not in idle.parts
    assert "muon" in build_optimizer(model, rank=0, world=8).parts


def test_state_of_all_ranks_loads_on_each() -> None:
    """A rank takes what it owns, and nothing less than all of it."""
    state = build_optimizer(new_model()).state_tensors()
    for rank in range(2):
        sharded = build_optimizer(new_model(), rank=rank, world=2)
        marked = {name: torch.full_like(value, 3.0) for name, value in state.items()}
        sharded.load_state_tensors(marked)
        assert all((value == 3.0).all() for value in sharded._own_state().values())
        own = next(name for name in sharded._own_state() if name.startswith("muon/"))
        with pytest.raises(ValueError, match="1 missing"):
            sharded.load_state_tensors({name: value for name, value in state.items() if name != own})


@pytest.mark.parametrize(("step", "multiplier"), [(0, 1.0), (50, 0.5), (100, 0.0), (25, 0.853553)])
def test_weight_decay_falls_as_a_cosine(step: int, multiplier: float) -> None:
    assert weight_decay_schedule(step, 100) == pytest.approx(multiplier, abs=1e-6)

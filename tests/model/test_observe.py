"""What is seen inside a model is what is there, and looking changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bwlm.model.attention import segment_mask
from bwlm.model.gpt import GPT, norm, rotate
from bwlm.model.observe import (
    BINS,
    PLACES,
    activation_statistics,
    attention_statistics,
    gradient_statistics,
    histogram_edges,
    parameters,
    places,
    statistics,
)
from bwlm.model.optim import build_optimizer
from bwlm.model.train_step import TrainStep
from tests.model.test_gpt import CONFIG, B, T, halves, lively, some_ids

ALL = torch.ones(B, T, dtype=torch.bool)

# ---- statistics ----


def test_statistics_by_hand() -> None:
    found = statistics(torch.tensor([[3.0, 0.0], [-4.0, 0.0]]))
    assert {name: value.item() for name, value in found.items() if name != "histogram"} == {
        "norm": 5, "rms": 2.5, "mean": -0.25, "max": 4, "sparsity": 0.5
    }  # fmt: skip
    assert shares(found) == {0: 0.5, 41: 0.25, 42: 0.25}  # zeros; 3 in [2, 4); 4 in [4, 8)


def shares(found: dict[str, Tensor]) -> dict[int, float]:
    return {index: share for index, share in enumerate(found["histogram"].tolist()) if share}


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (0.0, 0), (-0.0, 0), (2.0**-40, 0), (2.0**-41, 0), (1e-38, 0), (1e-42, 0),
        (2.0**-39, 1), (math.nextafter(2.0**-39, 0), 1), (0.75, 39), (-0.75, 39), (1.0, 40), (-1.0, 40), (1.99, 40),
        (2.0, 41), (-2.0, 41), (127.0, 46), (128.0, 47), (255.0, 47), (256.0, 47), (-1e30, 47), (math.inf, 47),
        (math.nan, 47),
    ],
)  # fmt: skip
def test_the_bin_of_a_value(value: float, place: int) -> None:
    assert shares(statistics(torch.tensor([value]))) == {place: 1.0}
    edges = histogram_edges()
    assert len(edges) == BINS + 1
    if 0 < place < BINS - 1:
        assert 2.0 ** edges[place] <= abs(torch.tensor(value).item()) < 2.0 ** edges[place + 1]


def test_statistics_are_those_of_a_plain_computation() -> None:
    x = torch.randn(7, 11, 13, generator=torch.Generator().manual_seed(0)).relu().bfloat16()
    found, values = statistics(x), x.double().flatten()
    assert found["norm"].item() == pytest.approx(values.square().sum().sqrt().item(), rel=1e-6)
    assert found["rms"].item() == pytest.approx(values.square().mean().sqrt().item(), rel=1e-6)
    assert found["mean"].item() == pytest.approx(values.mean().item(), rel=1e-6)
    assert found["max"].item() == values.max().item()
    assert found["sparsity"].item() == pytest.approx((values == 0).double().mean().item(), rel=1e-6)
    exponents = values[values > 0].log2().floor().long() + 40
    counted = torch.bincount(exponents, minlength=BINS).double()
    counted[0] += (values == 0).sum()
    assert torch.allclose(found["histogram"].double(), counted / len(values))


# ---- gradients ----


def test_parameters_and_their_layers() -> None:
    found = parameters(lively())
    assert list(found) == [name for name, _ in lively().named_parameters()]
    assert found["embedding.weight"] == -1
    assert found["lm_head.weight"] == CONFIG.depth
    assert {found[name] for name in found if name.startswith("blocks.1.")} == {1}


def test_gradient_statistics_are_of_each_parameter_in_order() -> None:
    model = lively()
    model.loss(some_ids(), some_ids(3)).total.backward()
    found = gradient_statistics(model)
    assert all(len(value) == len(parameters(model)) for value in found.values())
    for index, name in enumerate(parameters(model)):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert found["norm"][index].item() == pytest.approx(gradient.double().norm().item(), rel=1e-5)
        assert found["max"][index] == gradient.abs().max()
        assert found["mean"][index].item() == pytest.approx(gradient.double().mean().item(), rel=1e-4, abs=1e-7)
        assert found["sparsity"][index].item() == pytest.approx((gradient == 0).double().mean().item())
        assert found["histogram"][index].sum().item() == pytest.approx(1, rel=1e-5)
    assert found["sparsity"][0] > 0  # ids that no row holds
    assert len(set(found["norm"].tolist())) == len(found["norm"])


# ---- activations ----


def captured(model: GPT, ids: Tensor, segments: Tensor | None) -> dict[tuple[str, int], Tensor]:
    """The values at each place, by the arithmetic of a block written out."""
    rope, x = model.rope(ids.size(1), segments), norm(model.embedding(ids))
    mask = segment_mask(segments, "sdpa", CONFIG.heads)
    found = {("stream", -1): x}
    for layer, block in enumerate(model.blocks):
        attended = block.attention(norm(x), rope, mask)
        x = x + attended
        hidden = F.linear(norm(x), block.mlp.up.weight).relu().square()
        added = F.linear(hidden, block.mlp.down.weight)
        x = x + added
        found |= {
            ("stream", layer): x,
            ("attention", layer): attended,
            ("hidden", layer): hidden,
            ("mlp", layer): added,
        }
    return found


@pytest.mark.parametrize("segments", [None, halves()], ids=["plain", "segments"])
def test_activation_statistics_are_of_each_place_in_order(segments: Tensor | None) -> None:
    model = lively()
    order = places(CONFIG.depth)
    assert order == [("stream", -1), *((place, layer) for layer in (0, 1) for place in PLACES)]
    found = activation_statistics(model, some_ids(), segments)
    with torch.no_grad():
        expected = captured(model, some_ids(), segments)
    assert expected.keys() == set(order)
    for index, key in enumerate(order):
        for name, value in statistics(expected[key]).items():
            assert torch.allclose(found[name][index], value, rtol=1e-4, atol=1e-6), (key, name)
    hidden = [index for index, (place, _) in enumerate(order) if place == "hidden"]
    assert (found["sparsity"][hidden] > 0.1).all()  # ReLU squared
    assert found["norm"].unique().numel() == len(order)


# ---- attention ----


def weights(model: GPT, layer: int, ids: Tensor, segments: Tensor | None) -> Tensor:
    """[B, H, T, T], double precision, keys and values repeated for their heads."""
    with torch.no_grad():
        x = list(model.states(ids, segments))[layer]
        attention = model.blocks[layer].attention
        split = [
            linear(norm(x)).unflatten(-1, (-1, CONFIG.head_dim)).transpose(1, 2)
            for linear in (attention.query, attention.key)
        ]
        q, k = (norm(rotate(part, model.rope(ids.size(1)))).double() for part in split)
        k = k.repeat_interleave(CONFIG.heads // CONFIG.kv_heads, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(CONFIG.head_dim)
    visible = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).tril()
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    return scores.masked_fill(~visible, -math.inf).softmax(-1)


@pytest.mark.parametrize("counts", [ALL, torch.arange(B * T).view(B, T) % 3 != 0], ids=["all", "some"])
@pytest.mark.parametrize("segments", [None, halves()], ids=["plain", "segments"])
def test_attention_statistics_are_those_of_a_plain_computation(segments: Tensor | None, counts: Tensor) -> None:
    """CONFIG shares each key among two heads."""
    model, ids = lively(), some_ids()
    found = attention_statistics(model, ids, segments, counts, positions=7)
    assert found.maps.shape == (CONFIG.depth, 7, 7)
    ordinal = torch.zeros(B, T, dtype=torch.long) if segments is None else segments
    for layer in range(CONFIG.depth):
        p = weights(model, layer, ids, segments)
        assert torch.allclose(found.maps[layer].double(), p[0, 0, :7, :7], atol=1e-5)
        for head in range(CONFIG.heads):
            sums = [0.0, 0.0, 0.0]
            for row, place in counts.nonzero().tolist():
                attended = p[row, head, place]
                first = ordinal[row].tolist().index(int(ordinal[row, place]))
                sums[0] += -sum(share * math.log(share) for share in attended.tolist() if share > 0)
                sums[1] += sum(share * (place - key) for key, share in enumerate(attended.tolist()))
                sums[2] += attended[first].item()
            expected = [total / int(counts.sum()) for total in sums]
            seen = [figure[layer, head].item() for figure in (found.entropy, found.distance, found.first_share)]
            assert seen == pytest.approx(expected, rel=1e-4)


def uniform() -> GPT:
    """Every key is as good as every other."""
    model = lively()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query.weight.zero_()
    return model


def test_uniform_attention_by_hand() -> None:
    """Position t attends to t + 1 keys alike."""
    found = attention_statistics(uniform(), some_ids(), None, ALL, positions=4)
    for figure, expected in [
        (found.entropy, sum(math.log(t + 1) for t in range(T)) / T),
        (found.distance, sum(t / 2 for t in range(T)) / T),
        (found.first_share, sum(1 / (t + 1) for t in range(T)) / T),
    ]:
        assert figure.shape == (CONFIG.depth, CONFIG.heads)
        assert torch.allclose(figure, torch.tensor(expected), rtol=1e-5)
    assert torch.allclose(
        found.maps[0], torch.tensor([[1.0, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [1 / 3] * 3 + [0], [1 / 4] * 4])
    )


def test_with_segments_each_begins_anew() -> None:
    """Lengths of the halves: 10 and 14, 17 and 7."""
    found = attention_statistics(uniform(), some_ids(), halves(), ALL, positions=12)
    inside = [t for length in (10, 14, 17, 7) for t in range(length)]
    assert torch.allclose(found.first_share, torch.tensor(sum(1 / (t + 1) for t in inside) / len(inside)), rtol=1e-5)
    assert torch.allclose(found.distance, torch.tensor(sum(t / 2 for t in inside) / len(inside)), rtol=1e-5)
    assert torch.allclose(found.entropy, torch.tensor(sum(math.log(t + 1) for t in inside) / len(inside)), rtol=1e-5)
    assert (found.maps[:, 10:, :10] == 0).all()


def test_positions_that_do_not_count_change_nothing() -> None:
    """Padding stands at a row's end."""
    ids, counts = some_ids(), torch.arange(T).expand(B, T) < 15
    padded = ids.clone()
    padded[:, 15:] = 7
    one, other = (attention_statistics(lively(), given, None, counts, 4) for given in (ids, padded))
    for name in ("entropy", "distance", "first_share", "maps"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    short = attention_statistics(lively(), ids[:, :15], None, counts[:, :15], 4)
    assert torch.allclose(one.entropy, short.entropy, rtol=1e-5)


def test_maps_of_rows_that_are_shorter() -> None:
    assert attention_statistics(lively(), some_ids(), None, ALL, 128).maps.shape == (CONFIG.depth, T, T)


# ---- observing changes nothing ----


def look(model: GPT) -> None:
    for segments in (None, halves()):
        activation_statistics(model, some_ids(5), segments)
        attention_statistics(model, some_ids(5), segments, ALL, 4)


def state_of(model: GPT) -> list[Tensor]:
    """Weights and gradients."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *gradients)]


@pytest.mark.parametrize("training", [True, False])
def test_looking_changes_nothing(training: bool) -> None:
    model = lively().train(training)
    model.loss(some_ids(), some_ids(3)).total.backward()
    before = state_of(model)
    rng = torch.get_rng_state()
    gradient_statistics(model)
    look(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(one, other) for one, other in zip(state_of(model), before, strict=True))


def test_hooks_go_also_when_the_model_fails() -> None:
    model = lively()
    with pytest.raises(IndexError):
        activation_statistics(model, torch.full((1, 4), 10_000))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("loss_chunk", [0, 7])
def test_training_that_is_looked_at_is_the_same_to_the_last_bit(loss_chunk: int) -> None:
    def train(**options: Any) -> tuple[list[float], GPT]:
        model = lively(loss_chunk=loss_chunk)
        step = TrainStep(model, build_optimizer(model, 1.0, 0.0, "muon"), 1, 1.0)
        given = {name: value(model) if name == "before_update" else value for name, value in options.items()}
        return [step(some_ids(seed), some_ids(seed + 1), **given).loss for seed in range(4)], model

    def watched(model: GPT) -> Any:
        def see(_: torch.Tensor) -> None:
            assert all(p.grad is not None for p in model.parameters())
            gradient_statistics(model)
            look(model)

        return see

    (plain, one), (seen, other) = train(), train(predict=True, before_update=watched)
    assert seen == plain
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_gradients_are_seen_whole_and_before_they_are_clipped() -> None:
    """Two passes, and a norm that is cut to a thousandth."""
    model, whole = lively(), lively()
    norms: list[float] = []
    step = TrainStep(model, build_optimizer(model, 1.0, 0.0, "muon"), 1, 1e-3)
    result = step(
        some_ids(), some_ids(3), before_update=lambda _: norms.append(gradient_statistics(model)["norm"].norm().item())
    )
    (whole.loss(some_ids(), some_ids(3)).total / (B * T)).backward()
    assert norms == pytest.approx([gradient_statistics(whole)["norm"].norm().item()], rel=1e-4)
    assert norms == pytest.approx([result.grad_norm], rel=1e-5)

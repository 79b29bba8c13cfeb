"""What the model promises, a property at a time.

nanochat's initialisation makes every block the identity, so tests of what attention sees use `lively`, which has
weights everywhere.
"""

import ast
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bwlm.model.attention import AttentionKernel
from bwlm.model.gpt import GPT, Attention
from bwlm.model.kv_cache import KVCache
from bwlm.model.shape import GPTConfig, count_parameters

B, T, V = 2, 24, 50
CONFIG = GPTConfig(vocab_size=V, depth=2, width=32, heads=4, kv_heads=2, sequence_length=T)


def lively(
    config: GPTConfig = CONFIG,
    compute_dtype: torch.dtype = torch.float32,
    attention: AttentionKernel = "sdpa",
    loss_chunk: int = 0,
) -> GPT:
    model = GPT(config, compute_dtype, attention, loss_chunk)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def some_ids(seed: int = 2, shape: tuple[int, ...] = (B, T)) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def halves() -> Tensor:
    """Two segments in each row, their boundary at another place in each."""
    return torch.stack([torch.arange(T) >= 10, torch.arange(T) >= 17]).long()


def changed_positions(model: GPT, position: int, segments: Tensor | None) -> Tensor:
    """[B, T]: where another id at `position` changes a logit."""
    ids = some_ids()
    other = ids.clone()
    other[:, position] = (other[:, position] + 1) % V
    with torch.no_grad():
        changed: Tensor = (model(ids, segments) != model(other, segments)).any(-1)
    return changed


@pytest.mark.parametrize("segments", [None, halves()], ids=["plain", "segments"])
@pytest.mark.parametrize("position", [0, 5, 12, 20, T - 1])
@pytest.mark.parametrize("attention", ["sdpa", "blocked", "flex"])
def test_the_past_does_not_see_the_future(attention: AttentionKernel, position: int, segments: Tensor | None) -> None:
    changed = changed_positions(lively(attention=attention), position, segments)
    assert not changed[:, :position].any()
    assert changed[:, position].all()


def test_without_segments_a_change_reaches_the_whole_rest_of_the_row() -> None:
    assert changed_positions(lively(), 5, None)[:, 5:].all()


@pytest.mark.parametrize("attention", ["sdpa", "blocked", "flex"])
def test_segments_do_not_see_each_other(attention: AttentionKernel) -> None:
    segments = halves()
    changed = changed_positions(lively(attention=attention), 5, segments)
    assert changed[:, 5:][segments[:, 5:] == 0].all()
    assert not changed[segments == 1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "blocked", "flex"])
def test_a_segment_costs_the_same_at_any_place_of_a_row(attention: AttentionKernel, dtype: torch.dtype) -> None:
    """At 0, at 1,500, and alone in a row, as a chat and an export read it; unlike RoPE's bfloat16 angles."""
    model = lively(replace(CONFIG, sequence_length=2048), dtype, attention, loss_chunk=256)
    piece, length = some_ids(3, (300,)), 2048
    losses = []
    for offset in (0, 1500):
        row = some_ids(4, (length,))
        row[offset : offset + 300] = piece
        ends = [0, *([offset] if offset else []), offset + 300, length]
        segments = torch.arange(len(ends) - 1).repeat_interleave(torch.tensor(ends).diff())
        # a neighbour that is cut otherwise, as in a batch
        ids, both = torch.stack([row, some_ids(5, (length,))]), torch.stack([segments, torch.arange(length) // 400])
        with torch.no_grad():
            losses.append(model.loss(ids, ids.roll(-1, 1), both).each[0, offset : offset + 299])
    with torch.no_grad():
        alone = model.loss(piece[None], piece[None].roll(-1, 1)).each[0, :299]
    # in bfloat16 sums of other blocks are rounded otherwise, by a step of 2^-8; other angles would cost far more
    atol = 1e-5 if dtype == torch.float32 else 0.02
    for found in (losses[1], alone):
        torch.testing.assert_close(found, losses[0], atol=atol, rtol=0)


def test_angles_are_those_of_the_position_in_the_segment_before_they_are_rounded() -> None:
    model = lively(compute_dtype=torch.bfloat16)
    cos, sin = model.rope(T, halves())
    for row, begin in ((0, 10), (1, 17)):
        for table, exact in ((cos, model.cos), (sin, model.sin)):
            assert torch.equal(table[row, 0, begin:], exact[: T - begin].bfloat16())
            assert torch.equal(table[row, 0, :begin], exact[:begin].bfloat16())


def test_a_segment_of_a_row_is_what_a_cache_reads() -> None:
    model = lively()
    ids, segments = some_ids(), halves()
    with torch.no_grad():
        inside = model(ids, segments)[0, 10:]
    piece = ids[0, 10:].tolist()
    reader = KVCache(model)
    read = [reader.read([piece[:3]], T)[0], *(reader.follow([new])[0] for new in piece[3:])]
    torch.testing.assert_close(torch.stack(read), inside[2:], atol=1e-5, rtol=1e-5)


def test_one_segment_is_plain_causal_attention() -> None:
    model, ids = lively(), some_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, torch.full_like(ids, 7)), model(ids), atol=1e-4, rtol=0)


def test_logits_are_those_of_the_published_formulas() -> None:
    """The forward pass written out with transformers' NanoChat formulas (its `rotate_half`, its norm, no SDPA)."""
    model, ids = lively(), some_ids()
    config, weights = model.config, dict(model.named_parameters())
    h, k, d = config.heads, config.kv_heads, config.head_dim

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1.1920929e-07).sqrt()

    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def rope(x: Tensor) -> Tensor:
        return x * cos + torch.cat([x[..., d // 2 :], -x[..., : d // 2]], -1) * sin

    x = norm(weights["embedding.weight"][ids])
    for n in range(config.depth):
        w = {name: weights[f"blocks.{n}.attention.{name}.weight"] for name in ("query", "key", "value", "output")}
        y = norm(x)
        q = norm(rope((y @ w["query"].T).view(B, T, h, d).transpose(1, 2)))
        keys = norm(rope((y @ w["key"].T).view(B, T, k, d).transpose(1, 2))).repeat_interleave(h // k, 1)
        values = (y @ w["value"].T).view(B, T, k, d).transpose(1, 2).repeat_interleave(h // k, 1)
        scores = (q @ keys.mT / d**0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
        x = x + (scores.softmax(-1) @ values).transpose(1, 2).reshape(B, T, -1) @ w["output"].T
        up, down = weights[f"blocks.{n}.mlp.up.weight"], weights[f"blocks.{n}.mlp.down.weight"]
        x = x + (norm(x) @ up.T).relu().square() @ down.T
    expected = 15 * torch.tanh(norm(x) @ weights["lm_head.weight"].T / 15)
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=0)


def test_heads_share_kv_heads() -> None:
    model, ids = lively(), some_ids()
    attention = model.get_submodule("blocks.0.attention")
    assert isinstance(attention, Attention)
    q, k, v = attention.qkv(torch.randn(B, T, 32), (model.cos, model.sin))
    assert q.shape == (B, 4, T, 8)
    assert k.shape == v.shape == (B, 2, T, 8)
    assert attention.key.weight.shape == attention.value.weight.shape == (16, 32)
    logits = model(ids)
    assert logits.shape == (B, T, V)
    assert logits.dtype == torch.float32


def test_logits_are_capped() -> None:
    model = lively()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
        logits = model(some_ids())
    assert 14.9 < logits.abs().max() <= 15


def test_weights_come_from_the_seed_alone() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        model = GPT(CONFIG)
        model.init_weights(seed)
        return model.state_dict()

    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    again, other = weights(0), weights(1)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        if weight.any():
            assert not torch.equal(weight, other[name]), name


def test_initialisation_is_nanochats() -> None:
    model = GPT(GPTConfig.from_depth(2, vocab_size=1000, sequence_length=8, kv_heads=1))
    model.init_weights(0)
    width = model.config.width
    deviations = {"embedding": 0.8, "lm_head": 0.001, "query": width**-0.5, "key": width**-0.5, "value": width**-0.5}
    deviations |= {"up": 0.4 * width**-0.5, "output": 0.0, "down": 0.0}
    for name, weight in model.named_parameters():
        expected = deviations[name.split(".")[-2]]
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.03), name
        if name.split(".")[-2] in ("query", "key", "value", "up"):
            assert float(weight.detach().abs().max()) <= expected * 3**0.5


def test_a_model_without_weights_cannot_pass_for_one() -> None:
    assert GPT(CONFIG)(some_ids()).isnan().all()


def test_a_new_model_knows_nothing() -> None:
    model, ids = GPT(CONFIG), some_ids()
    model.init_weights(0)
    loss = model.loss(ids, some_ids(3))[0] / ids.numel()
    assert float(loss.detach()) == pytest.approx(math.log(V), abs=0.01)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_counts_are_those_of_the_module(kv_heads: int) -> None:
    model = GPT(GPTConfig(vocab_size=V, depth=3, width=32, heads=4, kv_heads=kv_heads, sequence_length=T))
    counts = count_parameters(model.config)
    assert counts.embedding == model.embedding.weight.numel()
    assert counts.lm_head == model.lm_head.weight.numel()
    assert counts.matrices == sum(p.numel() for p in model.blocks.parameters())
    assert counts.total == sum(p.numel() for p in model.parameters())


def test_only_weights_are_saved() -> None:
    assert set(GPT(CONFIG).state_dict()) == {name for name, _ in GPT(CONFIG).named_parameters()}


def test_losses_of_tokens_add_up_and_ignored_targets_cost_nothing() -> None:
    model, ids, targets = lively(), some_ids(), some_ids(3)
    targets[0, 4:9] = -1
    with torch.no_grad():
        total, each, _ = model.loss(ids, targets)
        log_probabilities = model(ids).log_softmax(-1)
    assert each.shape == (B, T)
    assert each.dtype == total.dtype == torch.float32
    assert (each[targets == -1] == 0).all()
    assert float(each[1, 3]) == pytest.approx(-float(log_probabilities[1, 3, targets[1, 3]]), abs=1e-5)
    torch.testing.assert_close(each.sum(), total)


def test_loss_looks_at_segments() -> None:
    model, ids, targets = lively(), some_ids(), some_ids(3)
    with torch.no_grad():
        confined = model.loss(ids, targets, halves()).each
        expected = torch.nn.functional.cross_entropy(model(ids, halves()).mT, targets, reduction="none")
        torch.testing.assert_close(confined, expected)
        assert not torch.equal(confined, model.loss(ids, targets).each)


@pytest.mark.parametrize("segments", [None, halves()], ids=["plain", "segments"])
@pytest.mark.parametrize(("attention", "loss_chunk"), [("sdpa", 0), ("blocked", 10)])
def test_bfloat16_is_close_to_float32(attention: AttentionKernel, loss_chunk: int, segments: Tensor | None) -> None:
    model, ids = lively(), some_ids()
    coarse = lively(compute_dtype=torch.bfloat16, attention=attention, loss_chunk=loss_chunk)
    seen: list[torch.dtype] = []
    coarse.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        exact, rounded = model(ids, segments), coarse(ids, segments)
    assert seen == [torch.bfloat16]
    assert rounded.dtype == torch.float32
    assert float((exact - rounded).abs().mean()) < 0.01 * float(exact.std())
    coarse.loss(ids, ids, segments)[0].backward()  # type: ignore[no-untyped-call]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in coarse.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in coarse.parameters())


def gradients(model: GPT, segments: Tensor | None) -> dict[str, Tensor]:
    targets = some_ids(3)
    targets[0, 4:9] = -1
    model.loss(some_ids(), targets, segments)[0].backward()  # type: ignore[no-untyped-call]
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("segments", [None, halves()], ids=["plain", "segments"])
@pytest.mark.parametrize("loss_chunk", [0, 1, 7, 10**6])
@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
def test_kernels_change_no_gradient(attention: AttentionKernel, loss_chunk: int, segments: Tensor | None) -> None:
    plain = gradients(lively(), segments)
    other = gradients(lively(attention=attention, loss_chunk=loss_chunk), segments)
    assert plain.keys() == other.keys() == dict(lively().named_parameters()).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, rtol=2e-4, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_misuse_is_refused() -> None:
    model = lively()
    with pytest.raises(ValueError, match="sequence_length is 24"):
        model(some_ids(shape=(1, T + 1)))
    with pytest.raises(ValueError, match=r"ids must be \[B, T\]"):
        model(some_ids(shape=(T,)))
    with pytest.raises(ValueError, match="segments have shape"):
        model(some_ids(), halves()[:1])
    with pytest.raises(ValueError, match="compute_dtype"):
        GPT(CONFIG, torch.float16)


def test_importing_the_model_pulls_in_nothing_of_the_lab() -> None:
    code = (
        "import sys, bwlm.model, bwlm.model.gpt, bwlm.model.optim;"
        "heavy = {'ray', 'mlflow', 'pydantic', 'pyarrow', 'h5py', 'pandas'} & set(sys.modules);"
        "rooms = {m for m in sys.modules if m.startswith('bwlm.') and not m.startswith('bwlm.model')};"
        "sys.exit(str(heavy | rooms) if heavy | rooms else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_model_room_asks_for_torch_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch"}
    for path in Path(__file__).parents[2].joinpath("bwlm/model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [str(node.module)]
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith("bwlm.model"), f"{path.name} imports {name}"

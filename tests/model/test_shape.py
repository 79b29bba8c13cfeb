"""The arithmetic of sizes, by hand, and that it needs no torch."""

import subprocess
import sys

import pytest

from bwlm.model.shape import GPTConfig, batch_tokens_for, count_parameters, flops_per_token


@pytest.mark.parametrize(
    ("depth", "head_dim", "kv_heads", "width", "heads", "expected_kv_heads"),
    [
        (4, 64, None, 256, 4, 4),
        (3, 128, None, 256, 2, 2),  # 192 is rounded up to two whole heads
        (8, 64, 2, 512, 8, 2),
        (1, 16, 1, 64, 4, 1),
    ],
)
def test_depth_sets_every_size(
    depth: int, head_dim: int, kv_heads: int | None, width: int, heads: int, expected_kv_heads: int
) -> None:
    config = GPTConfig.from_depth(depth, vocab_size=300, sequence_length=32, head_dim=head_dim, kv_heads=kv_heads)
    assert config == GPTConfig(300, depth, width, heads, expected_kv_heads, 32)
    assert config.head_dim == head_dim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"width": 60}, "width 60 is not a multiple of heads 8"),
        ({"kv_heads": 3}, "heads 8 is not a multiple of kv_heads 3"),
        ({"kv_heads": 16}, "kv_heads 16"),
        ({"width": 24}, "must be even"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    sizes = {"vocab_size": 10, "depth": 1, "width": 64, "heads": 8, "kv_heads": 8, "sequence_length": 4}
    GPTConfig(**sizes)
    with pytest.raises(ValueError, match=message):
        GPTConfig(**(sizes | changes))


def test_from_depth_refuses_no_head_dimension() -> None:
    with pytest.raises(ValueError, match="head_dim"):
        GPTConfig.from_depth(2, vocab_size=10, sequence_length=4, head_dim=0)


def test_parameters_by_hand() -> None:
    # width 64, 4 heads of 16 sharing 2 kv heads: query and output 64 x 64, key and value 32 x 64, MLP 2 x 256 x 64
    counts = count_parameters(GPTConfig(vocab_size=100, depth=3, width=64, heads=4, kv_heads=2, sequence_length=8))
    assert counts.embedding == counts.lm_head == 6400
    assert counts.matrices == 3 * (2 * 4096 + 2 * 2048 + 2 * 16384)
    assert counts.total == 2 * 6400 + 3 * 45056


@pytest.mark.parametrize(
    ("depth", "flops"),
    [
        # 6 x (4 x 12 x 256^2 + 4096 x 256) + 12 x 4 x 256 x 512
        (4, 31_457_280),
        # 6 x (6 x 12 x 384^2 + 4096 x 384) + 12 x 6 x 384 x 512
        (6, 87_293_952),
    ],
)
def test_flops_by_hand(depth: int, flops: int) -> None:
    assert flops_per_token(GPTConfig.from_depth(depth, vocab_size=4096, sequence_length=512)) == flops


def test_planning_does_not_import_torch() -> None:
    code = "import sys, bwlm.model.shape; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("depth", "vocab", "tokens"), [(12, 32768, 2**19), (24, 32768, 2**20), (4, 4096, 2**17), (20, 32768, 2**20)]
)
def test_the_batch_is_nanochats_for_the_depth(depth: int, vocab: int, tokens: int) -> None:
    """Depth 24, V 32768: (679.5 M + 50.3 M) / (84.9 M + 25.2 M) = 6.63 times as many tokens, 6.63^0.383 = 2.06."""
    assert batch_tokens_for(GPTConfig.from_depth(depth, vocab, 2048)) == tokens

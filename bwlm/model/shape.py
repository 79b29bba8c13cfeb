"""The shape of a model, and what it costs: arithmetic on integers, so that a grid is planned without torch.

Not here: what the model computes (`gpt.py`), and the cost of a whole step or run (the caller knows its tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDTH_PER_DEPTH = 64  # nanochat's one dial: depth sets the width
_BATCH_DEPTH, _BATCH_TOKENS, _BATCH_POWER = 12, 2**19, 0.383


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. Raises `ValueError` for sizes that no model can have."""

    vocab_size: int
    depth: int
    width: int
    heads: int
    kv_heads: int
    sequence_length: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head dimension {self.head_dim} (width / heads) must be even: RoPE turns pairs")

    @classmethod
    def from_depth(
        cls, depth: int, vocab_size: int, sequence_length: int, head_dim: int = 64, kv_heads: int | None = None
    ) -> GPTConfig:
        """Return nanochat's model of a depth: width 64 x depth, rounded up to whole heads.

        `kv_heads` None: as many as heads. Raises `ValueError` for sizes that no model can have.
        """
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, not {head_dim}")
        heads = -(-WIDTH_PER_DEPTH * depth // head_dim)
        return cls(
            vocab_size=vocab_size,
            depth=depth,
            width=heads * head_dim,
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            sequence_length=sequence_length,
        )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by their use; `matrices` are those inside the blocks."""

    embedding: int
    lm_head: int
    matrices: int

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.embedding + self.lm_head + self.matrices

    @property
    def scaling(self) -> int:
        """N of budgets, FLOPs and scaling laws: the parameters that multiply, so without the embedding's lookup."""
        return self.matrices + self.lm_head


def count_parameters(config: GPTConfig) -> ParameterCounts:
    """Return the numbers of parameters, counted without allocating any.

    A block has query, output (C x C), key, value (C x KD) and the MLP (2 x 4C x C).
    """
    width = config.width
    attention = 2 * width * width + 2 * width * config.kv_heads * config.head_dim
    mlp = 2 * 4 * width * width
    return ParameterCounts(
        embedding=config.vocab_size * width,
        lm_head=config.vocab_size * width,
        matrices=config.depth * (attention + mlp),
    )


def batch_tokens_for(config: GPTConfig) -> int:
    """Return the tokens of a step for a model of this size: a power of two, 2^19 at depth 12.

    It grows with the 0.383rd power of the training tokens, which are taken in proportion to the parameters that
    multiply (Bergsma et al., Power Lines, arXiv:2505.13738, as in nanochat's `base_train.py` of 2026).
    """
    reference = GPTConfig.from_depth(_BATCH_DEPTH, config.vocab_size, config.sequence_length, config.head_dim)
    ratio = count_parameters(config).scaling / count_parameters(reference).scaling
    return int(2 ** round(math.log2(_BATCH_TOKENS * ratio**_BATCH_POWER)))


def flops_per_token(config: GPTConfig) -> int:
    """Return the FLOPs to train on one token, forward and backward, in rows of `sequence_length` tokens.

    6 N + 12 L H D T, N the parameters that multiply (the embedding is a lookup): PaLM, arXiv:2204.02311, appendix B;
    nanochat's `estimate_flops`. Nothing is subtracted for the causal half of the attention or for what a document
    mask hides: so MFU compares with PaLM's and nanochat's, and budgets do not depend on the length of documents.
    """
    attention = 12 * config.depth * config.heads * config.head_dim * config.sequence_length
    return 6 * count_parameters(config).scaling + attention

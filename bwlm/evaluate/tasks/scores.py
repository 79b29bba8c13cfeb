"""Log-probabilities of many rows that share beginnings, each beginning read once.

The rows of one item are a tree: a beginning that several share is one path, and each id is a node below the id before
it. A tree is flattened into one row of nodes in depth-first order, where a node attends to its ancestors alone and has
the position of its depth. So all choices of an item, and all rules that need the same layout, cost one pass, and a
choice that is a prefix of another needs no rule of its own. Rows that share a long trunk (examples) read it once: its
keys and values stand before the nodes. Nodes without a child are not read: nothing is predicted from them.

The result of a row does not depend on the others, except for rounding.

Axes: B trees, N nodes, P ids of the trunk, H heads, K kv heads, D head dimension, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bwlm.model.decoder import CachedAttention, Decoder
from bwlm.model.gpt import GPT
from bwlm.model.observe import evaluating

Ids = tuple[int, ...]
KeysValues = tuple[Tensor, Tensor]
_NODES_AT_ONCE = 1024
"""Nodes of one pass, padding included."""
_LOGITS_AT_ONCE = 256
"""Nodes whose logits exist at once."""


class Row(NamedTuple):
    """Ids to score: `branches` follow `trunk`, which is not scored and has at least one id (BOS)."""

    trunk: Ids
    branches: tuple[Ids, ...]
    scored_from: int = 0
    """First id of each branch that is scored."""


class Scored(NamedTuple):
    """Scores of one branch, from its first scored id on."""

    log_p: NDArray[np.float64]
    """Log-probability of each id given all before it, in nats."""
    greedy: NDArray[np.bool_]
    """True where no id is likelier."""


@torch.inference_mode()
def score(model: GPT, rows: Sequence[Row], progress: Callable[[int], object] = lambda rows: None) -> list[list[Scored]]:
    """Return the scores of every branch of every row. `progress` is called with the number of rows that are done.

    Raises `ValueError` for a row that is longer than the model's sequence length; its last id is not read.
    """
    results: list[list[Scored]] = [[] for _ in rows]
    longest = max((len(row.trunk) + max(map(len, row.branches)) - 1 for row in rows), default=0)
    if longest > model.config.sequence_length:
        raise ValueError(f"a row has {longest} ids to read, but sequence_length is {model.config.sequence_length}")
    with evaluating(model):
        decoder, prefix = _Reader(model), _Prefix((), [])
        for trunk, members in sorted(_by_trunk(rows).items()):  # neighbours have the longest beginnings in common
            prefix = prefix.replaced(decoder, trunk[:-1])
            trees = [tree for n in members for tree in _trees(rows[n], n, model.config.sequence_length)]
            done: dict[int, dict[Ids, Scored]] = {n: {} for n in members}
            for batch in _batches(trees):
                for tree, scores in zip(batch, _score_trees(decoder, prefix, batch), strict=True):
                    done[tree.row] |= scores
                    if all(branch in done[tree.row] for branch in rows[tree.row].branches):
                        results[tree.row] = [done[tree.row][branch] for branch in rows[tree.row].branches]
                        progress(1)
    return results


def _by_trunk(rows: Sequence[Row]) -> dict[Ids, list[int]]:
    groups: dict[Ids, list[int]] = {}
    for n, row in enumerate(rows):
        groups.setdefault(row.trunk, []).append(n)
    return groups


# ---- trees ----


@dataclass
class _Tree:
    """Some branches of a row. Node 0 is the last id of the trunk; the nodes are in depth-first order."""

    row: int
    scored_from: int
    tokens: list[int]
    parents: list[int]
    depths: list[int]
    paths: dict[Ids, list[int]]
    """Nodes of each branch."""

    @property
    def read(self) -> NDArray[np.int64]:
        """Nodes that have a child, in order."""
        return np.unique(self.parents[1:])


def _trees(row: Row, index: int, most: int) -> Iterator[_Tree]:
    """Yield the trees of a row: one, or several where one would have more than `most` nodes."""
    tree, path = _new_tree(row, index), [0]
    previous: Ids = ()
    for branch in sorted(set(row.branches)):
        shared = _common(previous, branch)
        if len(tree.tokens) + len(branch) - shared > most and tree.paths:
            yield tree
            tree, path, shared = _new_tree(row, index), [0], 0
        del path[shared + 1 :]
        for token in branch[shared:]:
            tree.tokens.append(token)
            tree.parents.append(path[-1])
            tree.depths.append(len(path))
            path.append(len(tree.tokens) - 1)
        tree.paths[branch] = path[1:]
        previous = branch
    yield tree


def _new_tree(row: Row, index: int) -> _Tree:
    return _Tree(index, row.scored_from, [row.trunk[-1]], [-1], [0], {})


def _common(one: Ids, other: Ids) -> int:
    """Return the number of ids with which both begin."""
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))


def _batches(trees: Sequence[_Tree]) -> Iterator[list[_Tree]]:
    """Yield trees of similar size together, so that little is padded."""
    batch: list[_Tree] = []
    for tree in sorted(trees, key=lambda tree: -len(tree.read)):
        if batch and (len(batch) + 1) * max(1, len(batch[0].read)) > _NODES_AT_ONCE:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


# ---- passes ----


class _Reader(Decoder):
    """Decoder that knows its device, here and not there: each change of `Decoder` asks runs of RL for consent."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model)
        self.device = model.embedding.weight.device


class _Prefix(NamedTuple):
    """Keys and values [1, K, P, D] of each layer for ids that all rows of a group begin with."""

    ids: Ids
    kept: list[KeysValues]

    def replaced(self, decoder: _Reader, ids: Ids) -> _Prefix:
        """Return the prefix of other ids. What both begin with is not read again."""
        start = _common(self.ids, ids)
        begun = _Prefix(ids[:start], [(k[:, :, :start], v[:, :, :start]) for k, v in self.kept])
        if start == len(ids):
            return begun
        causal = torch.ones(len(ids) - start, len(ids) - start, dtype=torch.bool, device=decoder.device).tril()
        attention, own = begun.attention(causal[None, None]), []

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own.append((k, v))
            return attention(layer, q, k, v)

        places = torch.arange(start, len(ids), device=decoder.device)
        decoder.states(torch.tensor([ids[start:]], device=decoder.device), places[None], keep)
        return _Prefix(ids, [_joined(*of) for of in zip(begun.kept, own, strict=True)] if start else own)

    def attention(self, may_see: Tensor) -> CachedAttention:
        """Return the attention of nodes over the prefix, and over those nodes that `may_see` [B, 1, N, N] tells."""

        def attending(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            before = self.kept[layer] if self.ids else None
            return (_attend_plainly if q.device.type == "cpu" else _attend)(q, k, v, before, may_see)

        return attending


def _attend(q: Tensor, k: Tensor, v: Tensor, before: KeysValues | None, may_see: Tensor) -> Tensor:
    """Return the attention [B, H, N, D] of nodes over those that they may see, and over all `before`."""
    if before is not None:
        k, v = _joined(before, (k, v))
        may_see = F.pad(may_see, (before[0].size(2), 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=may_see, enable_gqa=k.size(1) < q.size(1))


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, before: KeysValues | None, may_see: Tensor) -> Tensor:
    """Return the same in float32, by plain matmuls: on a CPU they are faster than torch's kernel with a mask.

    Queries and keys are normed, so that exponents are at most sqrt(D): no largest one has to be taken away.
    """
    shape = q.shape
    q = q.float() * shape[3] ** -0.5
    weights = (q @ _of_heads(k, q).mT).exp_().mul_(may_see)
    out, total = weights @ _of_heads(v, q), weights.sum(-1, keepdim=True)
    if before is not None:
        keys, values = (_of_heads(part, q)[0] for part in before)
        weights = (q.transpose(0, 1).flatten(1, 2) @ keys.mT).exp_()  # [H, B N, P]
        out += (weights @ values).view(shape[1], shape[0], shape[2], -1).transpose(0, 1)
        total += weights.sum(-1).view(shape[1], shape[0], shape[2], 1).transpose(0, 1)
    return out.div_(total)


def _joined(before: KeysValues, own: KeysValues) -> KeysValues:
    """Return keys and values [B, K, P + N, D] of those that all rows share, [1, K, P, D], and [B, K, N, D]."""
    k, v = (torch.cat((part.expand(len(of), -1, -1, -1), of), 2) for part, of in zip(before, own, strict=True))
    return k, v


def _of_heads(part: Tensor, q: Tensor) -> Tensor:
    """Return keys or values [B, K, N, D] for each head of q, in its dtype: [B, H, N, D]."""
    part = part.to(q.dtype)
    return part if part.size(1) == q.size(1) else part.repeat_interleave(q.size(1) // part.size(1), 1)


def _score_trees(decoder: _Reader, prefix: _Prefix, trees: Sequence[_Tree]) -> Iterator[dict[Ids, Scored]]:
    read = [tree.read for tree in trees]
    hidden = _read_trees(decoder, prefix, trees, read)
    owner = np.concatenate([np.full(len(tree.tokens) - 1, n) for n, tree in enumerate(trees)])
    slot = np.concatenate([np.searchsorted(nodes, tree.parents[1:]) for tree, nodes in zip(trees, read, strict=True)])
    tokens = np.concatenate([np.array(tree.tokens[1:], np.int64) for tree in trees])
    depth = np.concatenate([np.array(tree.depths[1:], np.int64) for tree in trees])
    wanted = depth > np.array([tree.scored_from for tree in trees])[owner]
    log_p, greedy = np.full(len(tokens), np.nan), np.zeros(len(tokens), bool)
    if wanted.any():
        log_p[wanted], greedy[wanted] = _predict(decoder, hidden, owner[wanted], slot[wanted], tokens[wanted])
    start = 0
    for tree in trees:
        at = {branch: np.array(path[tree.scored_from :], np.int64) - 1 + start for branch, path in tree.paths.items()}
        yield {branch: Scored(log_p[nodes], greedy[nodes]) for branch, nodes in at.items()}
        start += len(tree.tokens) - 1


def _read_trees(decoder: _Reader, prefix: _Prefix, trees: Sequence[_Tree], read: Sequence[NDArray[np.int64]]) -> Tensor:
    """Return the normed states [B, N, C] of the nodes in `read`."""
    size = max(1, max(map(len, read)))
    ids, position = np.zeros((len(trees), size), np.int64), np.zeros((len(trees), size), np.int64)
    end = np.tile(np.arange(1, size + 1), (len(trees), 1))  # padding sees itself alone
    for n, (tree, nodes) in enumerate(zip(trees, read, strict=True)):
        ids[n, : len(nodes)] = np.array(tree.tokens)[nodes]
        position[n, : len(nodes)] = np.array(tree.depths)[nodes] + len(prefix.ids)
        end[n, : len(nodes)] = _ends(np.searchsorted(nodes, np.array(tree.parents)[nodes]))
    place = np.arange(size)
    may_see = (place <= place[:, None]) & (place[:, None] < end[:, None, :])  # j is an ancestor of i: j <= i < end[j]
    ids_, places, mask = (torch.from_numpy(part).to(decoder.device) for part in (ids, position, may_see))
    return decoder.states(ids_, places, prefix.attention(mask[:, None]))


def _ends(parents: NDArray[np.int64]) -> list[int]:
    """Return where the nodes below each node end; `parents` is an index for each node, of node 0 it is ignored."""
    ends = list(range(1, len(parents) + 1))
    for node in range(len(parents) - 1, 0, -1):
        ends[parents[node]] = max(ends[parents[node]], ends[node])
    return ends


def _predict(
    decoder: _Reader, hidden: Tensor, owner: NDArray[np.int64], slot: NDArray[np.int64], tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return log-probability, and whether none is likelier, of each token after the state at `owner`, `slot`."""
    states, which = np.unique(owner * hidden.size(1) + slot, return_inverse=True)
    flat, device = hidden.flatten(0, 1), hidden.device
    log_p, greedy = np.empty(len(tokens)), np.empty(len(tokens), bool)
    order = np.argsort(which, kind="stable")
    for first in range(0, len(states), _LOGITS_AT_ONCE):
        last = min(first + _LOGITS_AT_ONCE, len(states))
        logits = decoder.logits(flat[torch.from_numpy(states[first:last]).to(device)])
        mine = order[slice(*np.searchsorted(which[order], (first, last)))]
        at = torch.from_numpy(which[mine] - first).to(device)
        wanted = torch.from_numpy(tokens[mine]).to(device)
        own, best = logits[at, wanted], logits.amax(-1)[at]
        # capped logits cannot overflow: without a look for the largest, a sum of exponents takes half the time
        log_p[mine] = (own - logits.exp_().sum(-1).log_()[at]).double().cpu().numpy()
        greedy[mine] = (own == best).cpu().numpy()
    return log_p, greedy

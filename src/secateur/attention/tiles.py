"""Attention summed over blocks of queries and keys, without the whole matrix.

    P[i, j] = softmax_j(scaling q_i k_j + bias[i, j])     over the keys j that query i may see
    T[r, c] = sum over i in block r, j in block c of P[i, j]

The queries go by in chunks of whole block rows, so that one chunk times all keys is held, never N x N of all heads.
Beside T, four facts of every query are summed block row by block row, exactly, whatever the block (`FACTS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

FACTS = ("entropy", "distance", "first", "itself")
"""Of a query i: the entropy of its row in nats, E|i - j| in tokens, its mass on key 0, its mass on key i."""
CACHED, ON_DEVICE = 1 << 20, 1 << 28  # bytes that one chunk of scores may take: small enough for a processor's cache
LOW = -1e30  # for a score that does not count: its weight is exactly 0


@dataclass(frozen=True, eq=False)
class Tiles:
    """What one sequence gives at one site.

    mass: (heads, rows, columns) T. count: (rows, columns) int64, pairs that may meet. area: the same, of all pairs.
    facts: (heads, rows, 4), sums over the queries of a row. queries: (rows,) int64, how many there were.
    """

    mass: Tensor
    count: Tensor
    area: Tensor
    facts: Tensor
    queries: Tensor


def blocks(tokens: int, block: int) -> int:
    """How many blocks cover so many tokens.

    >>> blocks(65, 64)
    2
    """
    return -(-tokens // block)


def sum_tiles(matrix: Tensor, block: int) -> Tensor:
    """(..., queries, keys) -> (..., rows, columns): sums over blocks; the last ones may be ragged.

    >>> sum_tiles(torch.ones(3, 2), 2).tolist()
    [[4.0], [2.0]]
    """
    return sum_rows(sum_columns(matrix, block), block)


def sum_columns(matrix: Tensor, block: int) -> Tensor:
    """(..., queries, keys) -> (..., queries, columns): sums over blocks of keys."""
    if block == 1:
        return matrix
    *lead, keys = matrix.shape
    columns = blocks(keys, block)
    if keys != columns * block:
        matrix = pad(matrix, (0, columns * block - keys))
    return matrix.view(*lead, columns, block).sum(-1)


def sum_rows(matrix: Tensor, block: int) -> Tensor:
    """(..., queries, columns) -> (..., rows, columns): sums over blocks of queries."""
    if block == 1:
        return matrix
    *lead, queries, columns = matrix.shape
    rows = blocks(queries, block)
    if queries != rows * block:
        matrix = pad(matrix, (0, 0, 0, rows * block - queries))
    return matrix.view(*lead, rows, block, columns).sum(-2)


def causal_pairs(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Bool (queries, keys), True where the key is not behind the query; the last query sees the last key.

    >>> causal_pairs(2, 3).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attention_tiles(
    query: Tensor,
    key: Tensor,
    scaling: float,
    block: int,
    *,
    allowed: Callable[[slice], Tensor],
    bias: Tensor | None = None,
    budget: int | None = None,
) -> Tiles:
    """Tile sums of one sequence, in fp32 whatever the dtype.

    Args:
        query: (heads, queries, width), any float dtype.
        key: (kv heads, keys, width); every kv head serves heads / kv heads of the queries.
        scaling: of the products.
        block: tokens on a side of a block.
        allowed: rows of queries -> bool (rows, keys), True where they may meet. A query that may see nothing gives
            no mass.
        bias: (heads or 1, queries, keys), added before the softmax.
        budget: bytes of scores in a chunk; by default what suits the device.

    Returns:
        Mass and counts; rows and columns are blocks counted from position 0.

    >>> q, pairs = torch.zeros(1, 4, 2), causal_pairs(4, 4)
    >>> attention_tiles(q, q, 1.0, 2, allowed=lambda rows: pairs[rows]).mass
    tensor([[[2.0000, 0.0000],
             [1.1667, 0.8333]]])
    """
    heads, queries, _ = query.shape
    keys = key.shape[1]
    rows, columns = blocks(queries, block), blocks(keys, block)
    mass = torch.zeros(heads, rows, columns, device=query.device)
    facts = torch.zeros(heads, rows, len(FACTS), device=query.device)
    count = torch.zeros(rows, columns, dtype=torch.long, device=query.device)
    active = torch.zeros(queries, dtype=torch.bool, device=query.device)
    for part, at, mask in chunks(query, key, block, allowed, budget):
        across = slice(0, blocks(mask.shape[1], block))
        count[at, across] = sum_tiles(mask.float(), block).long()
        active[part] = mask.any(1)
        for heads_of_key, _, scores in scores_of(query, key, scaling, bias, part, mask.shape[1]):
            weights, entropy = _softmax(scores, mask)
            mass[heads_of_key, at, across] = sum_tiles(weights, block)
            facts[heads_of_key, at] = _facts(weights, entropy, part.start, block)
    tokens_of = [lengths(tokens, block, query.device) for tokens in (queries, keys)]
    there = pad(active.long(), (0, rows * block - queries)).view(rows, block).sum(1)
    return Tiles(mass, count, tokens_of[0][:, None] * tokens_of[1], facts, there)


def chunks(
    query: Tensor, key: Tensor, block: int, allowed: Callable[[slice], Tensor], budget: int | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries in chunks of whole block rows: which they are, which rows, and whom they may see.

    The mask is bool (queries, keys) and ends with the last block of keys that any of them sees; chunks that see nothing
    are left out. Their scores, of all the heads that share a key, fill the budget of bytes.
    """
    queries, keys, group = query.shape[1], key.shape[1], query.shape[0] // key.shape[0]
    budget = budget or (CACHED if query.device.type == "cpu" else ON_DEVICE)
    step = max(1, budget // (4 * keys * group) // block) * block
    for first in range(0, queries, step):
        part = slice(first, min(first + step, queries))
        mask = allowed(part)
        seen = mask.any(0).nonzero()
        if len(seen):
            end = min(blocks(int(seen[-1]) + 1, block) * block, keys)
            yield part, slice(first // block, first // block + blocks(part.stop - first, block)), mask[:, :end]


def scores_of(
    query: Tensor, key: Tensor, scaling: float, bias: Tensor | None, part: slice, end: int
) -> Iterator[tuple[slice, int, Tensor]]:
    """Of every key head: the heads that read it, its number, and their scores (heads, queries, end) in fp32."""
    group = query.shape[0] // key.shape[0]
    for own in range(key.shape[0]):
        chosen = slice(own * group, (own + 1) * group)
        scores = (query[chosen, part].float() @ key[own, :end].float().mT).mul_(scaling)
        if bias is not None:
            scores += bias[chosen if bias.shape[0] > 1 else slice(None), part, :end].float()
        yield chosen, own, scores


def lengths(tokens: int, block: int, device: torch.device | None = None) -> Tensor:
    """How many tokens each block has: (blocks,) int64.

    >>> lengths(5, 2).tolist()
    [2, 2, 1]
    """
    return (tokens - block * torch.arange(blocks(tokens, block), device=device)).clamp(max=block)


def _softmax(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(heads, queries, keys) weights and (heads, queries) entropies in nats; rows without a key are zero."""
    partial = (~mask.all(0)).nonzero()
    if len(partial):
        behind = slice(int(partial[0]), None)  # the columns before it are seen by all
        scores[..., behind].masked_fill_(~mask[:, behind], LOW)
    lse = scores.logsumexp(-1, keepdim=True)
    surprise = lse - scores
    weights = scores.sub_(lse).exp_()
    dead = ~mask.any(1)
    if bool(dead.any()):
        weights[:, dead] = 0.0
    return weights, surprise.mul_(weights).sum(-1)


def _facts(weights: Tensor, entropy: Tensor, first: int, block: int) -> Tensor:
    """(heads, rows, facts) sums over the queries of each block row; `first` is the position of the first query."""
    heads, queries, keys = weights.shape
    i = torch.arange(first, first + queries, device=weights.device)
    apart = (i[:, None] - torch.arange(keys, device=weights.device)).abs()
    distance = (weights * apart).sum(-1)
    itself = torch.zeros_like(entropy)
    there = int((i < keys).sum())
    itself[:, :there] = weights[:, :there].diagonal(offset=first, dim1=1, dim2=2)[:, :there]
    each = torch.stack([entropy, distance, weights[..., 0], itself], dim=-1)
    rows = blocks(queries, block)
    return pad(each, (0, 0, 0, rows * block - queries)).view(heads, rows, block, len(FACTS)).sum(2)

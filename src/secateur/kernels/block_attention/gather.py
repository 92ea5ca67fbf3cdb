"""The kept blocks of every row gathered side by side, then dense attention over them: any device, with gradients.

Rows of similar length share a bucket, padded to its longest, and a bucket is one call. Copying the blocks costs time,
so this beats a mask from about 60 % sparsity on, not before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from secateur.kernels.block_attention.compiled import compiled
from secateur.kernels.block_attention.layout import BlockLayout
from secateur.kernels.block_attention.reference import masked, reference_attention

RATIO = 1.25  # the longest row of a bucket against its shortest
ENTRIES = 1 << 22  # gathered keys of a bucket, in numbers: a few megabytes stay in the cache


def gathered_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float, key_keep: Tensor | None
) -> Tensor:
    """Attention (B, Hq, Q, D) by gathering."""
    batch, heads, _, size = query.shape
    key_heads, block = key.shape[1], layout.block
    lists = compiled(layout, query.device)
    ahead = layout.offset % block
    behind = lists.rows * block - layout.queries - ahead
    after = lists.columns * block - layout.keys
    q = functional.pad(query, (0, 0, ahead, behind)) if ahead or behind else query
    k, v = (functional.pad(t, (0, 0, 0, after)) if after else t for t in (key, value))
    q = q.reshape(batch, heads * lists.rows, block, size)
    k, v = (t.reshape(batch, key_heads * lists.columns, block, size) for t in (k, v))

    rows = lists.by_row
    counts = rows.counts.expand(heads, -1).flatten().long()
    starts = rows.starts[:-1].view(lists.heads, -1).expand(heads, -1).flatten().long()
    full = rows.full.view(lists.heads, -1).expand(heads, -1).flatten().long()
    outputs, lines = [], []
    for line in buckets(counts, size * block * batch):
        longest = int(counts[line].max())
        slot = torch.arange(longest, device=query.device)
        there = slot < counts[line, None]
        column = rows.blocks[(starts[line, None] + slot).clamp(max=len(rows.blocks) - 1)].long() * there
        of_key = (line // lists.rows // (heads // key_heads))[:, None] * lists.columns + column
        shape = (batch, len(line), longest * block, size)
        mask = None
        if key_keep is not None or not bool((slot < full[line, None]).all()):
            mask = _mask(layout, line % lists.rows, column, there, key_keep)
        some_q, some_k, some_v = (
            t.index_select(1, i.flatten()).view(s)
            for t, i, s in ((q, line, (batch, len(line), block, size)), (k, of_key, shape), (v, of_key, shape))
        )
        if mask is None:
            outputs.append(functional.scaled_dot_product_attention(some_q, some_k, some_v, scale=scale))
        else:
            outputs.append(masked(some_q, some_k, some_v, mask, scale))
        lines.append(line)
    if not outputs:
        return reference_attention(query, key, value, layout, scale, key_keep)
    at = torch.full((heads * lists.rows,), sum(map(len, lines)), device=query.device)  # rows without blocks: zeros
    at[torch.cat(lines)] = torch.arange(sum(map(len, lines)), device=query.device)
    nothing = query.new_zeros(batch, 1, block, size)
    out = torch.cat([*outputs, nothing], dim=1).index_select(1, at).view(batch, heads, lists.rows * block, size)
    return out[:, :, ahead : ahead + layout.queries]


def buckets(counts: Tensor, size: int) -> list[Tensor]:
    """Which rows go together: of similar counts, and not so many that their keys, `size` numbers a block, are too many.

    Rows without blocks are in none.

    >>> [b.tolist() for b in buckets(torch.tensor([8, 2, 0, 9, 10, 2]), size=1)]
    [[4, 3, 0], [1, 5]]
    """
    order = counts.argsort(descending=True, stable=True)
    sizes = counts[order].tolist()
    found, start = [], 0
    for i, count in enumerate(sizes):
        most = max(1, ENTRIES // (sizes[start] * size)) if sizes[start] else 1
        if i > start and (count * RATIO < sizes[start] or i - start == most):
            found.append(order[start:i])
            start = i
        if count == 0:
            break
    else:
        found.append(order[start:])
    return [b for b in found if len(b)]


def _mask(layout: BlockLayout, row: Tensor, column: Tensor, there: Tensor, key_keep: Tensor | None) -> Tensor:
    """Bool (B or 1, rows, block or 1, keys gathered): what the queries of a row may see."""
    block = layout.block
    within = torch.arange(block, device=row.device)
    at_key = (column[..., None] * block + within).flatten(1)
    mask = (there.repeat_interleave(block, 1) & (at_key < layout.keys))[None, :, None]
    if layout.causal:
        at_query = (row[:, None] + layout.offset // block) * block + within
        mask = mask & (at_key[:, None] <= at_query[..., None])
    if key_keep is not None:
        mask = mask & key_keep[:, at_key.clamp(max=layout.keys - 1)][:, :, None]
    return mask

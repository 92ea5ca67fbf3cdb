"""The kept blocks of every row gathered side by side, then dense attention over them: any device, with gradients.

Rows with as many blocks share a bucket, and a bucket is one call. In causal attention only blocks on the diagonal need
a mask, and it is the same for all rows of a bucket; with padding every row has its own, which takes longer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from secateur.kernels.block_attention.compiled import compiled
from secateur.kernels.block_attention.layout import BlockLayout
from secateur.kernels.block_attention.reference import masked, reference_attention

ENTRIES = 1 << 20  # gathered keys of a bucket, in numbers: a few megabytes stay in the cache


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
    diagonal = _on_diagonal(layout)
    outputs, lines = [], []
    for line in buckets(counts, full, size * block * batch):
        count = int(counts[line[0]])
        column = rows.blocks[starts[line, None] + torch.arange(count, device=query.device)].long()
        of_key = (line // lists.rows // (heads // key_heads))[:, None] * lists.columns + column
        shape = (batch, len(line), count * block, size)
        some_q, some_k, some_v = (
            t.index_select(1, i.flatten()).view(s)
            for t, i, s in ((q, line, (batch, len(line), block, size)), (k, of_key, shape), (v, of_key, shape))
        )
        lines.append(line)
        if key_keep is None and (diagonal is not None or count == full[line[0]]):
            mask = None
            if count > full[line[0]]:  # the last block of each of these rows is the one on the diagonal
                mask = functional.pad(diagonal.to(query), (block * (count - 1), 0))  # type: ignore[union-attr]
            outputs.append(functional.scaled_dot_product_attention(some_q, some_k, some_v, attn_mask=mask, scale=scale))
        else:
            mask = _mask(layout, line % lists.rows, column, key_keep)
            outputs.append(masked(some_q, some_k, some_v, mask, scale))
    if not outputs:
        return reference_attention(query, key, value, layout, scale, key_keep)
    at = torch.full((heads * lists.rows,), sum(map(len, lines)), device=query.device)  # rows without blocks: zeros
    at[torch.cat(lines)] = torch.arange(sum(map(len, lines)), device=query.device)
    nothing = query.new_zeros(batch, 1, block, size)
    out = torch.cat([*outputs, nothing], dim=1).index_select(1, at).view(batch, heads, lists.rows * block, size)
    return out[:, :, ahead : ahead + layout.queries]


def buckets(counts: Tensor, full: Tensor, size: int) -> list[Tensor]:
    """Which rows go together: those with as many blocks, as many of them full, and not so many rows that their keys,
    `size` numbers a block, are too many. Rows without blocks are in none.

    >>> counts, full = torch.tensor([8, 2, 0, 8, 8, 2]), torch.tensor([7, 1, 0, 7, 8, 1])
    >>> [b.tolist() for b in buckets(counts, full, size=1)]
    [[1, 5], [0, 3], [4]]
    """
    kind, order = (counts * (int(counts.max()) + 1) + full).sort(stable=True)
    sizes = kind.unique_consecutive(return_counts=True)[1].tolist()
    found: list[Tensor] = []
    for line in order.split(sizes):
        count = int(counts[line[0]])
        if count:
            found += line.split(max(1, ENTRIES // (count * size)))
    return found


def _on_diagonal(layout: BlockLayout) -> Tensor | None:
    """What is added to the scores of a block on the diagonal, if such are the only blocks that are not full."""
    if not layout.causal or layout.keys < layout.offset + layout.queries:
        return None
    above = torch.ones(layout.block, layout.block, dtype=torch.bool, device=layout.keep.device).triu(1)
    return torch.zeros(above.shape, device=above.device).masked_fill(above, -torch.inf)


def _mask(layout: BlockLayout, row: Tensor, column: Tensor, key_keep: Tensor | None) -> Tensor:
    """Bool (B or 1, rows, block or 1, keys gathered): what the queries of a row may see."""
    block = layout.block
    within = torch.arange(block, device=row.device)
    at_key = (column[..., None] * block + within).flatten(1)
    mask = (at_key < layout.keys)[None, :, None]
    if layout.causal:
        at_query = (row[:, None] + layout.offset // block) * block + within
        mask = mask & (at_key[:, None] <= at_query[..., None])
    if key_keep is not None:
        mask = mask & key_keep[:, at_key.clamp(max=layout.keys - 1)][:, :, None]
    return mask

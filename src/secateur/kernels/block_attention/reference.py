"""The definition: ordinary attention under the layout's mask.

    output = softmax(scale * Q K^T + bias) V,     bias = 0 where the layout keeps an entry, -inf elsewhere

A query with nothing to attend to gives 0, and no gradient. It computes what it throws away, so it is slower than dense
attention; it works everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from secateur.kernels.block_attention.layout import BlockLayout

ENTRIES = 1 << 24  # of the mask at a time


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float, key_keep: Tensor | None
) -> Tensor:
    """Attention (B, Hq, Q, D) by masking, a slice of the queries at a time."""
    if is_dense(layout, key_keep):
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=layout.causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    heads = layout.heads * (1 if key_keep is None else len(query))
    step = max(layout.block, ENTRIES // (heads * layout.keys))
    parts = []
    for start in range(0, layout.queries, step):
        stop = min(start + step, layout.queries)
        seen = min(layout.keys, layout.offset + stop) if layout.causal else layout.keys  # no query looks further
        mask = layout.entries(start, stop)[None, :, :, :seen].to(query.device)
        if key_keep is not None:
            mask = mask & key_keep[:, None, None, :seen]
        parts.append(masked(query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], mask, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def is_dense(layout: BlockLayout, key_keep: Tensor | None) -> bool:
    """Whether this is plain attention, causal or not, which needs no mask."""
    square = (layout.offset, layout.queries) == (0, layout.keys)
    return key_keep is None and (square or not layout.causal) and layout.density() == 1


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention under a bool mask that broadcasts to (B, Hq, Q, K), with 0 for queries that see nothing."""
    dead = ~mask.any(-1, keepdim=True)
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask | dead, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.masked_fill(dead, 0)

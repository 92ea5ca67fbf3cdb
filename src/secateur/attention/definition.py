"""Attention as the model defines it, with a further mask entry by entry: what every faster way must equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .hooks import AttentionCall

ENTRIES = 2**24  # of a mask at a time


def attend(call: AttentionCall, keep: Callable[[slice], Tensor] | None = None) -> Tensor:
    """Softmax attention of one call; with `keep`, over those keys alone.

    Args:
        call: from `intercept`.
        keep: rows of queries -> bool (batch or 1, heads or 1, rows, keys), True = computed. A query that is left
            with no key gives 0.

    Returns:
        (batch, queries, heads, head size of the values).
    """
    batch, heads, queries, _ = call.query.shape
    groups = heads // call.key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) if groups > 1 else part for part in (call.key, call.value))
    if keep is None and call.attention_mask is None and call.position_bias is None:
        square = call.causal and queries == key.shape[2]
        if square or not call.causal or (queries == 1 and int(call.query_slots[0]) == int(call.key_slots[-1])):
            output = functional.scaled_dot_product_attention(
                call.query, key, value, dropout_p=call.dropout, is_causal=square, scale=call.scaling
            )
            return output.transpose(1, 2).contiguous()
    step = max(1, ENTRIES // (batch * heads * key.shape[2]))
    parts = [_rows(call, key, value, slice(at, min(at + step, queries)), keep) for at in range(0, queries, step)]
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def _rows(
    call: AttentionCall, key: Tensor, value: Tensor, rows: slice, keep: Callable[[slice], Tensor] | None
) -> Tensor:
    allowed, bias = call.allowed(rows), call.bias(rows)
    if keep is not None:
        kept = keep(rows)
        allowed = kept if allowed is None else allowed & kept
    mask, dead = bias, None
    if allowed is not None:
        dead = ~allowed.any(-1, keepdim=True)
        mask = allowed | dead  # rows of -inf would be nan, and their gradient too
        if bias is not None:
            mask = torch.where(mask, bias, torch.full((), -torch.inf, dtype=bias.dtype, device=bias.device))
    output = functional.scaled_dot_product_attention(
        call.query[:, :, rows], key, value, attn_mask=mask, dropout_p=call.dropout, scale=call.scaling
    )
    return output if dead is None else output.masked_fill(dead, 0)

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
    seen = visible(call)
    key, value = call.key[:, :, :seen], call.value[:, :, :seen]
    if queries > 1 and heads != key.shape[1]:
        key, value = (part.repeat_interleave(heads // key.shape[1], 1) for part in (key, value))
    square = call.causal and queries == seen
    plain = keep is None and call.position_bias is None and call.attention_mask is None
    if plain and (square or not call.causal or queries == 1):
        output = functional.scaled_dot_product_attention(
            call.query,
            key,
            value,
            dropout_p=call.dropout,
            is_causal=square,
            scale=call.scaling,
            enable_gqa=heads != key.shape[1],
        )
        return output.transpose(1, 2).contiguous()
    step = max(1, ENTRIES // (batch * heads * seen))
    parts = [_rows(call, key, value, slice(at, min(at + step, queries)), keep) for at in range(0, queries, step)]
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def visible(call: AttentionCall) -> int:
    """How many leading keys any query of the call may see: a static cache holds slots that are still to come."""
    keys = call.key.shape[2]
    if call.offset is None or not call.site.causal or not (call.causal or call.plain):
        return keys
    return min(keys, call.offset + call.query.shape[2])


def masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    *,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """SDPA over the keys of a bool mask, with a bias on the scores; queries without a key give 0, and no gradient.

    Args:
        query: (batch, heads, queries, head size), and key and value of as many heads.
        mask, bias: (batch or 1, heads or 1, queries, keys), or None.
        scale: of the scores.
        dropout_p: of the probabilities.
    """
    bias = None if bias is None else bias.to(query.dtype)
    if mask is None:
        return functional.scaled_dot_product_attention(query, key, value, bias, dropout_p, scale=scale)
    dead = ~mask.any(-1, keepdim=True)
    total = mask | dead  # a row of -inf would give nan, and so would its gradient
    if bias is not None:
        total = torch.where(total, bias, torch.full((), -torch.inf, dtype=bias.dtype, device=bias.device))
    output = functional.scaled_dot_product_attention(query, key, value, total, dropout_p, scale=scale)
    return output.masked_fill(dead, 0)


def _rows(
    call: AttentionCall, key: Tensor, value: Tensor, rows: slice, keep: Callable[[slice], Tensor] | None
) -> Tensor:
    seen, query = key.shape[2], call.query[:, :, rows]
    parts = call.allowed(rows), call.bias(rows), None if keep is None else keep(rows)
    allowed, bias, kept = (None if part is None else part[..., :seen] for part in parts)
    if kept is not None:
        allowed = kept if allowed is None else allowed & kept
    grouped = query.shape[1] != key.shape[1]  # one row: the heads of a group are its rows
    if grouped:
        query = pack(query, key.shape[1])
        allowed, bias = (None if part is None else pack(part, key.shape[1]) for part in (allowed, bias))
    output = masked(query, key, value, allowed, bias, scale=call.scaling, dropout_p=call.dropout)
    return output.flatten(1, 2)[:, :, None] if grouped else output


def pack(part: Tensor, groups: int) -> Tensor:
    """(batch, heads, 1, n) -> (batch, groups, heads / groups, n); what all heads share stays as it is."""
    if part.shape[1] == 1:
        return part
    return part.reshape(part.shape[0], groups, -1, part.shape[-1])

"""One decoded row under a mask: the key blocks that its heads keep are gathered, and nothing else is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .definition import masked, pack, visible
from .hooks import AttentionCall
from .site_mask import SiteMask, at_ends

WORTH = 0.4  # above this share of kept blocks, reading all of them where they lie is faster than gathering


@dataclass(frozen=True, eq=False)
class Row:
    """What one block of queries keeps; the same for every query in it.

    Args:
        place: the block of the query, and how many blocks of keys there are.
        index: int64 (kv heads, n), the keys to gather: the union of what the heads of a group keep, whole blocks; None
            for all of them.
        keep: bool (kv heads, heads of a group, n), which of those each head keeps.
    """

    place: tuple[int, int]
    index: Tensor | None
    keep: Tensor


def row_of(call: AttentionCall, mask: SiteMask, last: Row | None = None) -> Row:
    """The row of a call with one query, regular and plain; `last` itself if that still holds."""
    assert call.offset is not None
    block, groups = mask.block, call.key.shape[1]
    place = call.offset // block, -(-visible(call) // block)
    if last is not None and last.place == place:
        return last
    device = call.key.device
    kept = mask.blocks(torch.tensor([place[0]], device=device), torch.arange(place[1], device=device))[:, 0]
    kept = kept | at_ends(place[1], 0, mask.last, device)
    kept = kept.expand(call.query.shape[1], -1).reshape(groups, -1, place[1])
    union = kept.any(1)
    most = int(union.sum(1).max())
    if most > WORTH * place[1]:
        return Row(place, None, kept.repeat_interleave(block, 2))
    blocks = union.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # kept ones first, in order
    index = (blocks[..., None] * block + torch.arange(block, device=device)).flatten(1)
    keep = kept.gather(2, blocks[:, None].expand(-1, kept.shape[1], -1)).repeat_interleave(block, 2)
    return Row(place, index, keep)


def decode(call: AttentionCall, row: Row) -> Tensor:
    """Attention of one query per sequence over the row's keys.

    Returns:
        (batch, 1, heads, head size of the values).
    """
    seen, groups = visible(call), call.key.shape[1]
    if row.index is None:
        keep, key, value = row.keep[None, ..., :seen], call.key[:, :, :seen], call.value[:, :, :seen]
        if call.key_keep is not None:
            keep = keep & call.key_keep[:, None, None, :seen]
    else:
        keep = (row.keep & (row.index < seen)[:, None])[None]
        index = row.index.clamp(max=seen - 1)
        if call.key_keep is not None:
            keep = keep & call.key_keep[:, index][:, :, None]
        head = torch.arange(groups, device=index.device)[:, None]
        key, value = call.key[:, head, index], call.value[:, head, index]
    output = masked(pack(call.query, groups), key, value, keep, None, scale=call.scaling)
    return output.flatten(1, 2)[:, None]

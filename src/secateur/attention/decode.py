"""One decoded row under a mask: the key blocks that its heads keep are gathered, and nothing else is read."""

from __future__ import annotations

import torch
from torch import Tensor

from .definition import masked, pack, visible
from .hooks import AttentionCall
from .site_mask import SiteMask

WORTH = 0.7  # above this share of kept keys, reading all of them is faster


def decode(call: AttentionCall, mask: SiteMask) -> Tensor | None:
    """Attention of one query per sequence; None if too little is saved.

    The heads that read one key head share what is gathered for it: the union of their blocks.

    Args:
        call: with one query, regular and plain.
        mask: of its site, on its device.

    Returns:
        (batch, 1, heads, head size of the values).
    """
    assert call.offset is not None
    device, seen, block = call.key.device, visible(call), mask.block
    groups = call.key.shape[1]
    columns = torch.arange(-(-seen // block), device=device)
    row = mask.blocks(torch.tensor([call.offset // block], device=device), columns)[:, 0]
    row = row.expand(call.query.shape[1], -1).reshape(groups, -1, len(columns))
    union = row.any(1)
    most = int(union.sum(1).max())
    if most * block > WORTH * seen:
        return None
    blocks = union.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # kept ones first
    index = (blocks[..., None] * block + torch.arange(block, device=device)).flatten(1)
    keep = row.gather(2, blocks[:, None].expand(-1, row.shape[1], -1)).repeat_interleave(block, 2)
    keep = (keep & (index < seen)[:, None])[None]
    index = index.clamp(max=seen - 1)
    if call.key_keep is not None:
        keep = keep & call.key_keep[:, index][:, :, None]
    head = torch.arange(groups, device=device)[:, None]
    output = masked(
        pack(call.query, groups), call.key[:, head, index], call.value[:, head, index], keep, None, scale=call.scaling
    )
    return output.flatten(1, 2)[:, None]

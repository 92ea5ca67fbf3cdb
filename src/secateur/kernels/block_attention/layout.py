"""Which blocks of an attention matrix are computed, head by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Blocks of queries and keys that may meet.

    Positions are absolute: the first query stands at `offset`, the first key at 0, and blocks are counted from
    position 0 on both sides. Row r of `keep` is therefore the query block `offset // block + r`.

    Args:
        keep: bool (heads, query blocks, key blocks), True = computed; the heads of the queries, or 1 for all alike.
        block: tokens on a side of a block.
        queries, keys: lengths in tokens; the last block may be ragged.
        causal: whether a query also sees no key behind its own position.
        offset: the position of the first query.

    >>> layout = BlockLayout(torch.tensor([[[True, False], [True, True]]]), block=2, queries=3, keys=3, causal=True)
    >>> layout.entries().int().tolist()
    [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    """

    keep: torch.Tensor
    block: int
    queries: int
    keys: int
    causal: bool = False
    offset: int = 0

    def entries(self) -> torch.Tensor:
        """Bool (heads, queries, keys): the definition, entry by entry."""
        device = self.keep.device
        query = self.offset + torch.arange(self.queries, device=device)
        key = torch.arange(self.keys, device=device)
        rows = query // self.block - self.offset // self.block
        allowed = self.keep[:, rows][:, :, key // self.block]
        return allowed & (key <= query[:, None]) if self.causal else allowed

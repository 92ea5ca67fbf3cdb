"""Which blocks of an attention matrix are computed, head by head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from secateur.errors import UsageError


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

    Raises:
        UsageError: `keep` is not bool, or not as large as the lengths and the offset say.

    >>> layout = BlockLayout(torch.tensor([[[True, False], [True, True]]]), block=2, queries=3, keys=3, causal=True)
    >>> layout.entries().int().tolist()
    [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    >>> layout.density()
    1.0
    """

    keep: Tensor
    block: int
    queries: int
    keys: int
    causal: bool = False
    offset: int = 0

    def __post_init__(self) -> None:
        sizes = {"block": self.block, "queries": self.queries, "keys": self.keys}
        for name, size in sizes.items():
            if size < 1:
                raise UsageError(f"The '{name}' of a block layout must be at least 1. Got {size} instead.")
        if self.offset < 0:
            raise UsageError(f"The 'offset' of a block layout must not be negative. Got {self.offset} instead.")
        shape = blocks_of(self.block, self.queries, self.keys, self.offset)
        if self.keep.dtype != torch.bool or self.keep.dim() != 3 or tuple(self.keep.shape[1:]) != shape:
            raise UsageError(
                f"A block layout of {self.queries} queries from position {self.offset} and {self.keys} keys in blocks "
                f"of {self.block} must be bool (heads, {shape[0]}, {shape[1]}). "
                f"Got {self.keep.dtype} {tuple(self.keep.shape)} instead."
            )

    @property
    def heads(self) -> int:
        """Heads with a pattern of their own; 1 may mean that all are alike."""
        return self.keep.shape[0]

    def entries(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Bool (heads, queries, keys): the definition, entry by entry; of queries `start` to `stop` only, if given."""
        device = self.keep.device
        query = self.offset + torch.arange(start, self.queries if stop is None else stop, device=device)
        key = torch.arange(self.keys, device=device)
        rows = query // self.block - self.offset // self.block
        allowed = self.keep[:, rows][:, :, key // self.block]
        return allowed & (key <= query[:, None]) if self.causal else allowed

    def possible(self) -> Tensor:
        """Bool (query blocks, key blocks): in which blocks some query may see some key."""
        rows, columns = self._edges()
        if not self.causal:
            return torch.ones(self.keep.shape[1:], dtype=torch.bool, device=self.keep.device)
        last = (rows + self.block - 1).clamp(max=self.offset + self.queries - 1)
        return columns <= last[:, None]

    def full(self) -> Tensor:
        """Bool (query blocks, key blocks): where every query may see every key, and no key is past the end."""
        rows, columns = self._edges()
        inside = (columns + self.block <= self.keys).expand(self.keep.shape[1:])
        if not self.causal:
            return inside
        return inside & (columns + self.block - 1 <= rows.clamp(min=self.offset)[:, None])

    def density(self) -> float:
        """Share of the possible blocks that are computed: 1 minus the block sparsity."""
        return self._density

    @cached_property
    def _density(self) -> float:
        possible = self.possible()
        return ((self.keep & possible).sum() / (self.heads * possible.sum())).item()

    def coarsen(self, block: int) -> BlockLayout:
        """Larger blocks, computed where any of the blocks in them was: never less than before.

        Raises:
            UsageError: `block` is not a multiple of the present one.

        >>> layout = BlockLayout(torch.eye(4, dtype=torch.bool)[None], block=16, queries=64, keys=64)
        >>> layout.coarsen(32).keep.int().tolist(), layout.coarsen(32).density()
        ([[[1, 0], [0, 1]]], 0.5)
        """
        if block < 1 or block % self.block:
            raise UsageError(
                f"Blocks of {self.block} can be joined to a multiple of {self.block} only, not to {block}."
            )
        times = block // self.block
        rows, columns = blocks_of(block, self.queries, self.keys, self.offset)
        first = (self.offset // self.block) % times  # the blocks of a coarse row that lie before the first query
        fine = self.keep & self.possible()
        after = (rows * times - first - fine.shape[1], columns * times - fine.shape[2])
        fine = torch.nn.functional.pad(fine, (0, after[1], first, after[0]))
        keep = fine.view(self.heads, rows, times, columns, times).any(4).any(2)
        return replace(self, keep=keep, block=block)

    def _edges(self) -> tuple[Tensor, Tensor]:
        """The first position of every query block and of every key block."""
        rows = torch.arange(self.keep.shape[1], device=self.keep.device) + self.offset // self.block
        return rows * self.block, torch.arange(self.keep.shape[2], device=self.keep.device) * self.block


def blocks_of(block: int, queries: int, keys: int, offset: int = 0) -> tuple[int, int]:
    """How many query blocks and key blocks such a layout has.

    >>> blocks_of(64, queries=10, keys=300, offset=190)
    (2, 5)
    """
    return (offset + queries - 1) // block - offset // block + 1, -(-keys // block)

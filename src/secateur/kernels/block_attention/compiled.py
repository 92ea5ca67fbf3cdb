"""A layout as the lists that kernels walk: the blocks of every row, and of every column.

CSR: `starts[h * rows + r]` is where the list of row r of head h begins in `columns`; the blocks that need no mask
(full ones) come first, `full[h * rows + r]` of them. CSC is the same with rows and columns exchanged. Blocks in which
no query may see a key are in neither. `order` lists the rows of each head by falling length, so that long ones start
first.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from secateur.kernels.block_attention.layout import BlockLayout

SEGMENTS = 16  # into which a long column is divided
LONG = 4  # times the mean makes a column long


@dataclass(frozen=True, eq=False)
class Lists:
    """Blocks of every line (a row or a column) of every head. All int32.

    Args:
        starts: (heads * lines + 1), where each line's list begins; the last is how many blocks there are.
        full: (heads * lines), how many of a line's blocks, the first ones, need no mask.
        blocks: which blocks those are, as columns of a row or rows of a column.
        order: (heads, lines), the lines by falling length.
        longest: the length of the longest list.
    """

    starts: Tensor
    full: Tensor
    blocks: Tensor
    order: Tensor
    longest: int

    @property
    def counts(self) -> Tensor:
        """(heads, lines): how many blocks each list has."""
        return self.starts.diff().view_as(self.order)


@dataclass(frozen=True, eq=False)
class Items:
    """Work on the columns, the longest first. All int32.

    Args:
        list: (items, 4) key head, column, segment and slot; an item with slot -1 is a whole column.
        long: (columns in segments, 2) key head and column; number i has the slots from SEGMENTS * i.
    """

    list: Tensor
    long: Tensor


class CompiledLayout:
    """The lists of a layout on one device; columns only when asked for (the gradients of keys and values need them)."""

    def __init__(self, layout: BlockLayout, device: torch.device) -> None:
        self.heads, self.rows, self.columns = layout.keep.shape
        self._keep = (layout.keep & layout.possible()).to(device)
        self._full = layout.full().to(device)
        self._alike: dict[int, bool] = {}
        self._items: dict[tuple[int, int], Items] = {}

    @cached_property
    def by_row(self) -> Lists:
        return lists(self._keep, self._full)

    @cached_property
    def by_column(self) -> Lists:
        return lists(self._keep.transpose(1, 2), self._full.T)

    def items(self, key_heads: int, group: int) -> Items:
        """How to share out the columns when `group` query heads read each of `key_heads` key heads."""
        if (key_heads, group) not in self._items:
            self._items[key_heads, group] = items(self.by_column.counts, key_heads, group)
        return self._items[key_heads, group]

    def alike(self, group: int) -> bool:
        """Whether any `group` neighbouring heads have the same lists."""
        if self.heads == 1:
            return True
        if self.heads % group:
            return False
        if group not in self._alike:
            grouped = self._keep.view(-1, group, self.rows, self.columns)
            self._alike[group] = bool((grouped == grouped[:, :1]).all())
        return self._alike[group]


def lists(keep: Tensor, full: Tensor) -> Lists:
    """The lists of bool (heads, lines, blocks), given which blocks are full, bool (lines, blocks)."""
    heads, lines, _ = keep.shape
    head, line, block = keep.nonzero(as_tuple=True)
    of_line = head * lines + line
    partial = ~full[line, block]
    by_kind = (2 * of_line + partial).argsort(stable=True)
    counts = keep.sum(-1).flatten()
    starts = torch.zeros(heads * lines + 1, dtype=torch.int32, device=keep.device)
    starts[1:] = counts.cumsum(0)
    return Lists(
        starts=starts,
        full=(keep & full).sum(-1).flatten().int(),
        blocks=block[by_kind].int(),
        order=counts.view(heads, lines).argsort(dim=-1, descending=True, stable=True).int(),
        longest=int(counts.max()),
    )


def items(counts: Tensor, key_heads: int, group: int) -> Items:
    """Whole columns, and long ones in segments, given (heads or 1, columns) how many rows use each.

    >>> shared = items(torch.tensor([[20, 1, 1, 1, 1, 1]]), key_heads=1, group=1)
    >>> len(shared.list), shared.list[0].tolist(), shared.long.tolist()
    (21, [0, 0, 0, 0], [[0, 0]])
    """
    work = counts.expand(key_heads * group, -1).reshape(key_heads, group, -1).sum(1)
    is_long = work > LONG * work.float().mean()
    short, long = (~is_long).nonzero(), is_long.nonzero()
    whole = torch.nn.functional.pad(short, (0, 2))
    whole[:, 3] = -1
    slot = torch.arange(SEGMENTS * len(long), device=counts.device)
    parts = torch.cat([long.repeat_interleave(SEGMENTS, 0), (slot % SEGMENTS)[:, None], slot[:, None]], dim=1)
    weight = torch.cat([work[is_long].repeat_interleave(SEGMENTS) / SEGMENTS, work[~is_long].float()])
    order = weight.argsort(descending=True, stable=True)
    return Items(torch.cat([parts, whole])[order].int().contiguous(), long.int())


_compiled: weakref.WeakKeyDictionary[BlockLayout, dict[torch.device, CompiledLayout]] = weakref.WeakKeyDictionary()


def compiled(layout: BlockLayout, device: torch.device) -> CompiledLayout:
    """The lists of a layout, made once per device and kept as long as the layout lives.

    >>> layout = BlockLayout(torch.ones(1, 2, 2, dtype=torch.bool), block=2, queries=4, keys=4, causal=True)
    >>> rows = compiled(layout, torch.device("cpu")).by_row
    >>> rows.starts.tolist(), rows.blocks.tolist(), rows.full.tolist()
    ([0, 1, 3], [0, 0, 1], [0, 1])
    """
    per_device = _compiled.setdefault(layout, {})
    if device not in per_device:
        per_device[device] = CompiledLayout(layout, device)
    return per_device[device]

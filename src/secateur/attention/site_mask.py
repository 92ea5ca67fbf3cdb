"""Which blocks of one attention site are kept: a rule of the query's and the key's position.

A mask that knew the total length N would decode otherwise with a cache (where N grows) than without. With r and c the
blocks of a query and a key, counted from position 0, head h keeps

    absolute   rows[h, r, c]                                      the calibrated matrix itself
    toeplitz   offsets[h, r - c - lowest]                         a set of block distances
    hybrid     rows[h, r, c] where it reaches, else by distance

and always the blocks marked in `sinks[h, c]`, and one that every query has: its own block (r = c), in cross-attention
the first key block; with `last` also the block of each sequence's last key, where all keys are known before the first
query. A distance that was never observed is dropped. Behind the calibrated length an absolute mask is
an error, unless it was made with `extend="diagonal"`: then later rows keep the distances of the last row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InvalidParameter, UsageError, check_whole
from ..kernels.block_attention.layout import BlockLayout

MaskKind = Literal["absolute", "toeplitz", "hybrid"]
Extend = Literal["refuse", "diagonal"]


@dataclass(frozen=True, eq=False)
class SiteMask:
    """The kept blocks of one site.

    Args:
        kind: which rule holds; `rows` belong to absolute and hybrid, `offsets` to toeplitz and hybrid.
        block: tokens on a side of a block.
        causal: whether a query also sees no key behind its own position.
        rows: bool (heads, query blocks, key blocks), True = kept; heads may be 1 for all alike, here and below.
        offsets: bool (heads, distances), the distance (query block - key block) of column i being `lowest + i`.
        sinks: bool (heads, leading key blocks), kept in every row.
        lowest: the distance of the first column of `offsets`: 0 for causal sites, negative where keys behind count.
        cross: whether the keys are another sequence's: then the first key block is kept instead of the diagonal.
        extend: what an absolute mask does behind its last row.
        last: whether every query keeps the block of its sequence's last key, wherever that is; not in causal masks.

    Raises:
        UsageError: tensors that are not bool, of other sizes, or that the kind does not have.

    >>> band = SiteMask("toeplitz", 2, causal=True, offsets=torch.tensor([[True, True, False]]))
    >>> band.layout(queries=6, keys=6).keep.int().tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]
    """

    kind: MaskKind
    block: int
    causal: bool
    rows: Tensor | None = None
    offsets: Tensor | None = None
    sinks: Tensor | None = None
    lowest: int = 0
    cross: bool = False
    extend: Extend = "refuse"
    last: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(MaskKind):
            raise InvalidParameter("kind", "an attention mask", f"one of {', '.join(get_args(MaskKind))}", self.kind)
        if self.extend not in get_args(Extend):
            raise InvalidParameter("extend", "an attention mask", "'refuse' or 'diagonal'", self.extend)
        check_whole("block", "an attention mask", self.block)
        if self.causal and self.cross:
            raise UsageError("An attention mask cannot be causal and of cross-attention.")
        if self.causal and self.last:
            raise UsageError("A causal attention mask cannot keep the last key: queries before it do not see it.")
        wanted = {"rows": self.kind != "toeplitz", "offsets": self.kind != "absolute"}
        for name, dims in (("rows", 3), ("offsets", 2), ("sinks", 2)):
            tensor = getattr(self, name)
            if (tensor is not None) != wanted.get(name, tensor is not None):
                raise UsageError(f"A mask of kind {self.kind} {'has no' if tensor is not None else 'needs'} '{name}'.")
            if tensor is not None and (tensor.dtype != torch.bool or tensor.dim() != dims or not tensor.numel()):
                shape = tuple(tensor.shape)
                raise UsageError(f"'{name}' of a mask must be bool with {dims} axes. Got {tensor.dtype} of {shape}.")
        counts = {tensor.shape[0] for tensor in self.tensors().values()} - {1}
        if len(counts) > 1:
            raise UsageError(f"The tensors of one mask have different head counts: {sorted(counts)}.")

    @property
    def heads(self) -> int:
        """How many heads the tensors tell apart; 1 if all are alike."""
        return max(tensor.shape[0] for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it has, by field."""
        found = {name: getattr(self, name) for name in ("rows", "offsets", "sinks")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def blocks(self, query_blocks: Tensor, key_blocks: Tensor) -> Tensor:
        """The rule itself, without `last`, which depends on the sequence.

        Args:
            query_blocks: int64 (Q,), on any device.
            key_blocks: int64 (K,).

        Returns:
            Bool (heads, Q, K).
        """
        row, column = query_blocks[:, None], key_blocks[None, :]
        kept = (column == 0 if self.cross else row == column).expand(self.heads, row.shape[0], column.shape[1])
        distance = row - column
        if self.sinks is not None:
            kept = kept | _at(self.sinks, key_blocks)[:, None, :]
        if self.rows is None:
            kept = kept | self._by_distance(distance)
        else:
            count, width = self.rows.shape[1:]
            known = self.rows.to(row.device)[:, row.clamp(max=count - 1), column.clamp(max=width - 1)]
            reached = (row < count) & (column < width)
            if self.kind == "hybrid":
                beyond = self._by_distance(distance)
            else:  # the last row, moved along the diagonal; refused elsewhere if this was not asked for
                beyond = (row >= count) & _at(self.rows[:, -1], count - 1 - distance)
            kept = kept | torch.where(reached, known, beyond)
        return kept & (column <= row) if self.causal else kept

    def layout(self, queries: int, keys: int, offset: int = 0, device: torch.device | str | None = None) -> BlockLayout:
        """The blocks of a stretch of queries, for the kernels.

        Args:
            queries, keys: lengths in tokens; keys stand at 0, 1, 2, ...
            offset: the position of the first query.
            device: of the result; by default the mask's.

        Raises:
            UsageError: an absolute mask does not reach that far.
        """
        self._check_reach(offset + queries - 1, keys - 1)
        device = next(iter(self.tensors().values())).device if device is None else device
        rows = torch.arange(offset // self.block, (offset + queries - 1) // self.block + 1, device=device)
        columns = torch.arange(-(-keys // self.block), device=device)
        keep = self.blocks(rows, columns) | at_ends(len(columns), 0, self.last, device)
        return BlockLayout(keep, self.block, queries, keys, self.causal, offset)

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Entry by entry, for positions in any order.

        Args:
            query_positions: int64 (..., Q).
            key_positions: int64 (..., K), with the same leading axes, or some that broadcast; the highest is its
                sequence's last key.

        Returns:
            Bool (..., heads, Q, K).

        Raises:
            UsageError: an absolute mask does not reach that far.
        """
        self._check_reach(int(query_positions.max()), int(key_positions.max()))
        query, key = query_positions // self.block, key_positions // self.block
        first = int(query.min())
        device = query.device
        table = self.blocks(
            torch.arange(first, int(query.max()) + 1, device=device), torch.arange(int(key.max()) + 1, device=device)
        )
        kept = table[:, (query - first)[..., :, None], key[..., None, :]].movedim(0, -3)
        if self.last:
            kept = kept | (key == key.amax(-1, keepdim=True))[..., None, None, :]
        if self.causal:
            kept = kept & (key_positions[..., None, None, :] <= query_positions[..., None, :, None])
        return kept

    def density(self, queries: int, keys: int | None = None, *, of: Literal["pairs", "blocks"] = "pairs") -> Tensor:
        """fp64 (heads,): the share that is kept of what the dense model computes.

        Args:
            queries, keys: lengths in tokens; `keys` as `queries` if it is not given.
            of: pairs of positions, or whole blocks (what kernels do for a block that is begun).
        """
        keys = queries if keys is None else keys
        keep = self.layout(queries, keys).keep
        sizes = [_sizes(length, self.block).to(keep.device) for length in (queries, keys)]
        if of == "pairs":
            weight = sizes[0][:, None] * sizes[1][None, :]
        else:
            weight = torch.ones(keep.shape[1:], dtype=torch.float64, device=keep.device)
        if self.causal:
            weight = weight.tril(-1 if of == "pairs" else 0)
            if of == "pairs":
                side = min(keep.shape[1:])
                row, column = sizes[0][:side], sizes[1][:side]
                least = torch.minimum(row, column)
                weight[range(side), range(side)] = least * (least + 1) / 2 + (row - least) * column
        return (keep * weight).sum((1, 2)) / weight.sum()

    def _by_distance(self, distance: Tensor) -> Tensor:
        assert self.offsets is not None
        return _at(self.offsets, distance - self.lowest)

    def _check_reach(self, query: int, key: int) -> None:
        if self.kind != "absolute" or self.extend == "diagonal":
            return
        assert self.rows is not None
        for what, position, blocks in (("query", query, self.rows.shape[1]), ("key", key, self.rows.shape[2])):
            if (what == "query" or not self.causal) and position >= blocks * self.block:
                raise UsageError(
                    f"The plan was calibrated at {blocks * self.block} tokens and has an absolute mask: there is none "
                    f"for the {what} at position {position}. Calibrate at that length, take another kind, or make the "
                    "plan with extend='diagonal'."
                )


def at_ends(columns: int, sinks: int, last: bool, device: torch.device | str | None = None) -> Tensor:
    """Bool (columns,): the first blocks of keys, as many as there are sinks, and the last one if that is kept.

    >>> at_ends(4, 1, last=True).tolist()
    [True, False, False, True]
    """
    column = torch.arange(columns, device=device)
    return (column < sinks) | (last & (column == columns - 1))


def _at(marks: Tensor, index: Tensor) -> Tensor:
    """marks (heads, n) at indices of any shape; False outside 0..n-1."""
    inside = (index >= 0) & (index < marks.shape[1])
    return marks.to(index.device)[:, index.clamp(0, marks.shape[1] - 1)] & inside


def _sizes(length: int, block: int) -> Tensor:
    """fp64 (blocks,): tokens in each."""
    starts = torch.arange(0, length, block, dtype=torch.float64)
    return (length - starts).clamp(max=block)

"""Own kernels in Triton: forward, backward and split decoding, launched from here. Nothing else imports triton.

On a machine without a GPU they run in Triton's interpreter, if TRITON_INTERPRET=1 is set before Triton is imported.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from secateur.kernels.block_attention.compiled import SEGMENTS, CompiledLayout, compiled
from secateur.kernels.block_attention.layout import BlockLayout
from secateur.kernels.block_attention.triton_backward import key_gradient_kernel, query_gradient_kernel
from secateur.kernels.block_attention.triton_forward import decode_kernel, forward_kernel, merge_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PART = 64  # fewest keys that are worth a program of their own in decoding


class Tile(NamedTuple):
    """How much of the matrix a program takes at a time, and how the compiler lays it out."""

    queries: int
    keys: int
    pack: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BM": self.queries, "BN": self.keys, "PACK": self.pack}

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def padded(head_size: int) -> int:
    """The width of a tile: a power of two, 16 at least.

    >>> [padded(d) for d in (8, 36, 64, 80)]
    [16, 64, 64, 128]
    """
    return 1 << max(4, (head_size - 1).bit_length())


def packed(group: int, rows: int, most: int) -> int:
    """How many heads of a group of `group` fit in a tile of `most` rows, `rows` each: a power of two.

    >>> packed(4, 64, 128), packed(4, 16, 128), packed(3, 64, 128)
    (2, 4, 1)
    """
    pack = 1
    while group % (2 * pack) == 0 and 2 * pack * rows <= most:
        pack *= 2
    return pack


def forward_tile(block: int, head_size: int, dtype: torch.dtype, group: int = 1) -> Tile:
    """The forward kernel's tile; `group` is how many neighbouring heads share keys and lists."""
    wide, exact = padded(head_size) > 64, dtype == torch.float32
    most = 64 if exact else 128  # fp32 is multiplied without tensor cores and takes twice the room
    queries = min(block, most)
    pack = packed(group, queries, most)
    return Tile(
        queries, min(block, 32 if exact else 64), pack, 8 if wide and queries * pack == 128 else 4, 2 + (not wide)
    )


def query_gradient_tile(block: int, head_size: int, dtype: torch.dtype, group: int = 1) -> Tile:
    """The tile of the kernel that writes the gradient of the queries."""
    wide, exact = padded(head_size) > 64, dtype == torch.float32
    most = 32 if exact else 64 if wide else 128
    queries = min(block, most)
    return Tile(queries, min(block, 32 if exact else 64), packed(group, queries, most), 4, 1 if exact else 2)


def key_gradient_tile(block: int, head_size: int, dtype: torch.dtype) -> Tile:
    """The tile of the kernel that writes the gradients of keys and values."""
    side = min(block, 32 if dtype == torch.float32 else 64)
    return Tile(side, side, 1, 8 if padded(head_size) > 64 else 4, 1 if dtype == torch.float32 else 2)


def decode_tile(block: int, head_size: int, dtype: torch.dtype, group: int = 1) -> Tile:
    """The tile of one query: its heads, if they share keys and lists, in 16 rows or more."""
    pack = packed(group, 1, 64)
    return Tile(max(16, pack), min(block, 32 if dtype == torch.float32 else 64), pack, 4, 2)


def triton_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float, key_keep: Tensor | None
) -> Tensor:
    """Attention (B, Hq, Q, D) with our own kernels; with gradients where they are wanted."""
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        out: Tensor = _Attention.apply(query, key, value, layout, scale, key_keep)  # type: ignore[no-untyped-call]
        return out
    call = _Call(query, key, layout, scale, key_keep)
    return call.decode(query, key, value) if layout.queries == 1 else call.forward(query, key, value)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float, key_keep: Tensor | None
    ) -> Tensor:
        out, lse = _Call(query, key, layout, scale, key_keep).forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, lse, key_keep)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, key_keep = ctx.saved_tensors
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        delta = (out.float() * grad_out.float()).sum(-1)
        call = _Call(query, key, ctx.layout, ctx.scale, key_keep)
        grad_q = call.query_gradient(query, key, value, grad_out, lse, delta) if ctx.needs_input_grad[0] else None
        grad_k = grad_v = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_k, grad_v = call.key_gradient(query, key, value, grad_out, lse, delta)
        return grad_q, grad_k, grad_v, None, None, None


class _Call:
    """What the launches of one attention have in common."""

    def __init__(self, query: Tensor, key: Tensor, layout: BlockLayout, scale: float, key_keep: Tensor | None) -> None:
        self.batch, self.heads, _, self.size = query.shape
        self.key_heads = key.shape[1]
        self.group = self.heads // self.key_heads
        self.layout, self.dtype, self.scale = layout, query.dtype, scale
        self.lists: CompiledLayout = compiled(layout, query.device)
        self.shared = self.group if self.lists.alike(self.group) else 1
        self.keep = query if key_keep is None else key_keep.contiguous().view(torch.uint8)
        self.constants: dict[str, Any] = {
            "GROUP": self.group,
            "D": self.size,
            "DPAD": padded(self.size),
            "BLOCK": layout.block,
            "CAUSAL": layout.causal,
            "KEEP": key_keep is not None,
            "INTERPRETED": INTERPRETED,
        }

    @property
    def log_scale(self) -> float:
        return self.scale * math.log2(math.e)

    def per_head(self, lines: int) -> int:
        """How far apart the lists of two heads are."""
        return lines if self.lists.heads > 1 else 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        tile = forward_tile(self.layout.block, self.size, self.dtype, self.shared)
        rows = self.lists.by_row
        forward_kernel[(self.lists.rows * self.layout.block // tile.queries, self.heads // tile.pack, self.batch)](
            query, key, value, out, lse, self.keep, rows.starts, rows.full, rows.blocks, rows.order,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            self.heads, self.layout.queries, self.layout.keys, self.layout.offset, self.lists.rows,
            self.per_head(self.lists.rows), self.log_scale,
            **self.constants, **tile.constants, **tile.options,
        )  # fmt: skip
        return out, lse

    def decode(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tile = decode_tile(self.layout.block, self.size, self.dtype, self.shared)
        rows = self.lists.by_row
        programs = self.batch * self.heads // tile.pack
        parts = -(-2 * processors(query.device) // programs)  # two programs on every processor
        parts = max(1, min(parts, -(-rows.longest * self.layout.block // PART)))
        chunk = max(1, -(-rows.longest // parts))
        parts = max(1, -(-rows.longest // chunk))
        acc = torch.empty(self.batch, self.heads, parts, self.size, dtype=torch.float32, device=query.device)
        highest, total = torch.empty(2, self.batch, self.heads, parts, dtype=torch.float32, device=query.device)
        decode_kernel[(parts, self.heads // tile.pack, self.batch)](
            query, key, value, acc, highest, total, self.keep, rows.starts, rows.blocks,
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
            self.heads, self.layout.keys, self.layout.offset, self.per_head(self.lists.rows), chunk, self.log_scale,
            **self.constants, **tile.constants, **tile.options,
        )  # fmt: skip
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        merge_kernel[(self.batch * self.heads,)](
            acc, highest, total, out, parts,
            PARTS=triton.next_power_of_2(parts), D=self.size, DPAD=padded(self.size), enable_fp_fusion=True,
        )  # fmt: skip
        return out

    def query_gradient(
        self, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor
    ) -> Tensor:
        grad = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        tile = query_gradient_tile(self.layout.block, self.size, self.dtype, self.shared)
        rows = self.lists.by_row
        grid = (self.lists.rows * self.layout.block // tile.queries, self.heads // tile.pack, self.batch)
        query_gradient_kernel[grid](
            query, key, value, grad_out, lse, delta, grad, self.keep, rows.starts, rows.full, rows.blocks, rows.order,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3], *grad.stride()[:3],
            self.heads, self.layout.queries, self.layout.keys, self.layout.offset, self.lists.rows,
            self.per_head(self.lists.rows), self.log_scale, self.scale,
            **self.constants, **tile.constants, **tile.options,
        )  # fmt: skip
        return grad

    def key_gradient(
        self, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        columns, block = self.lists.by_column, self.layout.block
        items = self.lists.items(self.key_heads, self.group)
        slots = SEGMENTS * len(items.long)
        shape = (self.batch, self.key_heads, self.lists.columns, block, self.size)
        grad_k, grad_v = (torch.empty(shape, dtype=key.dtype, device=key.device) for _ in range(2))
        parts = torch.empty(2, self.batch, slots, block, self.size, dtype=torch.float32, device=key.device)
        tile = key_gradient_tile(block, self.size, self.dtype)
        key_gradient_kernel[(len(items.list) * block // tile.keys, self.batch)](
            query, key, value, grad_out, lse, delta, grad_k, grad_v, parts[0], parts[1], self.keep,
            columns.starts, columns.full, columns.blocks, items.list,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3],
            self.heads, self.key_heads, self.layout.queries, self.layout.keys, self.layout.offset, self.lists.columns,
            self.per_head(self.lists.columns), slots, self.log_scale, self.scale, SEGMENTS=SEGMENTS,
            **self.constants, BM=tile.queries, BN=tile.keys, **tile.options,
        )  # fmt: skip
        if slots:
            head, column = items.long.T.long()
            sums = parts.view(2, self.batch, -1, SEGMENTS, block, self.size).sum(3).to(key.dtype)
            grad_k[:, head, column], grad_v[:, head, column] = sums
        return tuple(g.flatten(2, 3)[:, :, : self.layout.keys] for g in (grad_k, grad_v))  # type: ignore[return-value]


def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; some number where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64

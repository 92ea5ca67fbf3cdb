"""PyTorch's FlexAttention on our lists: CUDA, and on CPUs inference only, where it must be compiled.

The block mask is built from the layout itself, never by `create_block_mask`, which evaluates every entry. One compiled
graph serves all layers of a model, because the function that masks inside a block is the same object every time.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur.kernels.block_attention.compiler import CannotCompile, no_compiler
from secateur.kernels.block_attention.layout import BlockLayout

SHAPES = 256  # for which the one function may be compiled


def cannot_compile() -> str | None:
    """Why FlexAttention cannot be compiled for this machine's CPU, or None."""
    if sys.platform == "darwin" or not torch.cpu._is_avx2_supported():
        return "FlexAttention is compiled for x86 processors with AVX2 on Linux and Windows only"
    return no_compiler("FlexAttention on a CPU")


def odd_tail(layout: BlockLayout) -> bool:
    """Whether a causal layout has queries past a ragged end of the keys: nothing that our mask function can say."""
    last_row = (layout.offset + layout.queries - 1) // layout.block
    return layout.causal and layout.keys % layout.block != 0 and last_row > layout.keys // layout.block


def flex_attention(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    """Attention (B, Hq, Q, D) by FlexAttention.

    Raises:
        CannotCompile: the compiler did not manage.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))):
        query, key, value = query.detach(), key.detach(), value.detach()  # on a CPU a leaf that wants one is refused
    ahead = layout.offset % layout.block  # FlexAttention counts blocks from the first query
    query = functional.pad(query, (0, 0, ahead, 0)) if ahead else query
    options = None
    if query.device.type == "cuda" and layout.block < 128:
        options = {"BLOCK_M": layout.block, "BLOCK_N": min(layout.block, 64)}
    attention = _attention()
    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, of itself
            out: Tensor = attention(
                query,
                key,
                value,
                block_mask=block_mask(layout, query.device),
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
                kernel_options=options,
            )
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise CannotCompile(f"FlexAttention could not be compiled: {reason} Use the backend 'gather'.") from error
    return out[:, :, ahead:]


@lru_cache(maxsize=1)
def _attention() -> Callable[..., Any]:
    import torch._dynamo
    from torch.nn.attention import flex_attention as module

    return torch.compile(module.flex_attention, dynamic=True, fullgraph=True)


@cache
def _mask(block: int, causal: bool) -> Callable[..., Tensor]:
    """What is allowed inside a block that is not full. Causality cuts blocks on the diagonal only; ragged ends are
    FlexAttention's own care. So no positions come in, and one function does for all lengths and offsets."""

    def on_diagonal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if block & (block - 1):
            return query % block >= key % block
        return query & (block - 1) >= key & (block - 1)  # a division an entry takes as long as the rest of the block

    def everywhere(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= 0

    return on_diagonal if causal else everywhere


_masks: weakref.WeakKeyDictionary[BlockLayout, dict[torch.device, Any]] = weakref.WeakKeyDictionary()


def block_mask(layout: BlockLayout, device: torch.device) -> Any:
    """The layout as a `BlockMask`, made once per device."""
    from torch.nn.attention.flex_attention import BlockMask

    per_device = _masks.setdefault(layout, {})
    if device not in per_device:
        keep, full = (layout.keep & layout.possible()).to(device), layout.full().to(device)
        per_device[device] = BlockMask.from_kv_blocks(
            *_listed(keep & ~full),
            *_listed(keep & full),  # of the same shapes and strides: the CPU kernel uses one's strides for both
            BLOCK_SIZE=layout.block,
            mask_mod=_mask(layout.block, layout.causal),
            seq_lengths=(layout.queries + layout.offset % layout.block, layout.keys),
        )
    return per_device[device]


def _listed(keep: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, (1, heads, rows), and which, (1, heads, rows, columns), the rest behind them."""
    indices = keep.byte().argsort(dim=-1, descending=True, stable=True)
    return keep.sum(-1).int()[None], indices.int()[None].contiguous()

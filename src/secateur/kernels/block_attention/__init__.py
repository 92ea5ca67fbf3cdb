"""Attention in which only chosen blocks of the matrix are computed.

The definition is `reference`; the others give the same numbers and skip the rest of the work:

    triton      own kernels: CUDA, with gradients
    native      own kernel in C++, compiled on first use: CPU, fp32, without gradients
    flex        PyTorch's FlexAttention on our lists: CUDA with gradients, CPU without
    gather      the kept blocks gathered, then dense attention: any device, with gradients
    reference   dense attention under a mask: anything
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

from secateur.errors import UnknownName, UsageError
from secateur.kernels.block_attention.compiler import CannotCompile
from secateur.kernels.block_attention.gather import gathered_attention
from secateur.kernels.block_attention.layout import BlockLayout, blocks_of
from secateur.kernels.block_attention.reference import is_dense, reference_attention

__all__ = ["BACKENDS", "BlockLayout", "block_attention", "blocks_of", "choose_backend", "refusal"]

BACKENDS = ("triton", "native", "flex", "gather", "reference")

LONG = 2048  # from this length on FlexAttention pays on a CPU, where compiling takes ten seconds in every process
SHORT = 256  # below this length neither our own kernel nor gathering does


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
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    chosen = choose_backend(query, key, layout, key_keep, needs_grad) if backend == "auto" else backend
    if backend != "auto" and (reason := refusal(backend, query, layout, key_keep, needs_grad)):
        raise UsageError(f"The attention backend '{backend}' cannot take this: {reason}.")
    if chosen == "triton":
        from secateur.kernels.block_attention.triton import triton_attention

        return triton_attention(query, key, value, layout, scale, key_keep)
    try:
        if chosen == "native":
            from secateur.kernels.block_attention.native import native_attention

            return native_attention(query, key, value, layout, scale, key_keep)
        if chosen == "flex":
            from secateur.kernels.block_attention.flex import flex_attention

            return flex_attention(query, key, value, layout, scale)
    except CannotCompile as error:
        if backend != "auto":
            raise
        warnings.warn(str(error), stacklevel=2)
        chosen = "gather"
    if chosen == "gather":
        return gathered_attention(query, key, value, layout, scale, key_keep)
    return reference_attention(query, key, value, layout, scale, key_keep)


def choose_backend(
    query: Tensor, key: Tensor, layout: BlockLayout, key_keep: Tensor | None = None, needs_grad: bool = False
) -> str:
    """The backend that is fastest for these tensors, of those that can take them.

    >>> layout = BlockLayout(torch.ones(1, 1, 1, dtype=torch.bool), block=64, queries=8, keys=8)
    >>> choose_backend(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), layout)
    'reference'
    """
    if is_dense(layout, key_keep):
        return "reference"
    able = [name for name in BACKENDS if refusal(name, query, layout, key_keep, needs_grad) is None]
    on_cuda, size = query.device.type == "cuda", layout.queries * layout.keys
    if "triton" in able or (not on_cuda and size < LONG * LONG):
        able = [name for name in able if name != "flex"]
    if size < SHORT * SHORT:
        able = [name for name in able if name not in ("native", "gather")]
    return able[0]


def refusal(
    backend: str, query: Tensor, layout: BlockLayout, key_keep: Tensor | None = None, needs_grad: bool = False
) -> str | None:
    """Why a backend cannot take these tensors, and what can; None where it can.

    Raises:
        UnknownName: no such backend.

    >>> layout = BlockLayout(torch.ones(1, 1, 1, dtype=torch.bool), block=64, queries=8, keys=8)
    >>> refusal("triton", torch.zeros(1, 1, 8, 8, dtype=torch.float64), layout)
    'it computes in float16, bfloat16 and float32, not torch.float64: use gather or reference'
    """
    if backend not in BACKENDS:
        raise UnknownName("attention backend", backend, (*BACKENDS, "auto"))
    if backend in ("gather", "reference"):
        return None
    on_cpu, size, otherwise = query.device.type == "cpu", query.shape[-1], ": use gather or reference"
    known = (torch.float32,) if backend == "native" else (torch.float16, torch.bfloat16, torch.float32)
    if query.dtype not in known:
        names = "float32" if backend == "native" else "float16, bfloat16 and float32"
        return f"it computes in {names}, not {query.dtype}{otherwise}"
    if backend == "triton":
        if find_spec("triton") is None:
            return f"Triton is not installed (pip install triton){otherwise}"
        if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it runs on CUDA devices, not on {query.device.type}{', unless interpreted' * on_cpu}{otherwise}"
        if layout.block < 16 or layout.block & (layout.block - 1):
            return f"its blocks are powers of two from 16 on, not {layout.block}{otherwise}"
        return f"its heads have at most 128 numbers, not {size}{otherwise}" if size > 128 else None
    if on_cpu and needs_grad:
        return f"on a CPU it has no gradients{otherwise}"
    if backend == "native":
        from secateur.kernels.block_attention.native import cannot_compile

        if not on_cpu:
            return f"it runs on CPUs, not on {query.device.type}{otherwise}"
        reason = cannot_compile()
        return reason and f"{reason}{otherwise}"
    from secateur.kernels.block_attention.flex import cannot_compile, odd_tail

    if query.device.type not in ("cpu", "cuda"):
        return f"it runs on CPU and CUDA devices, not on {query.device.type}{otherwise}"
    if key_keep is not None:
        return f"it does not take padding (key_keep){otherwise}"
    if odd_tail(layout):
        return f"the queries go past a ragged end of the keys{otherwise}"
    if layout.queries == 1:
        return f"it takes more than one query{otherwise}"
    if not on_cpu and (layout.block < 16 or layout.block & (layout.block - 1)):
        return f"on CUDA its blocks are powers of two from 16 on, not {layout.block}{otherwise}"
    if on_cpu and (reason := cannot_compile()):
        return f"{reason}{otherwise}"
    return None


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

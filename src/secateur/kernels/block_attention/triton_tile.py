"""What the kernels share: products, which tile of queries a program has, and the keys of a block.

A tile holds `BM` query positions of `PACK` neighbouring heads that share their lists and their keys.
"""

import triton
import triton.language as tl


@triton.jit
def product(a, b, INTERPRETED: tl.constexpr):
    """a @ b in fp32. The interpreter multiplies the bit patterns of bf16, so there they are widened first."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def allowed_keys(at_key, at_query, keys, keep_row, CAUSAL: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """Which (query, key) of a tile count: `at_query` and `at_key` broadcast to the tile."""
    allowed = (at_key < keys) & (at_query == at_query)
    if MASKED and CAUSAL:
        allowed = allowed & (at_key <= at_query)
    if KEEP:
        allowed = allowed & (tl.load(keep_row + at_key, mask=at_key < keys, other=0) != 0)
    return allowed


@triton.jit
def queries_of_program(order, heads_apart, offset, queries, PACK: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr):
    """Of grid (rows * BLOCK / BM, heads / PACK, B), the longest rows first: the line of the lists, and of every row of
    the tile its head, its position, its place among the given queries, and whether there is such a query."""
    head = tl.program_id(1) * PACK
    of_head_list = (head * heads_apart).to(tl.int64)
    row = tl.load(order + of_head_list + tl.program_id(0) // (BLOCK // BM))
    m = tl.arange(0, PACK * BM)
    at = (offset // BLOCK + row) * BLOCK + (tl.program_id(0) % (BLOCK // BM)) * BM + m % BM
    local = (at - offset).to(tl.int64)
    return of_head_list + row, (head + m // BM).to(tl.int64), at, local, (local >= 0) & (local < queries)


@triton.jit
def keys_of_step(
    k, v, blocks, step, keys, stride_kn, stride_vn, D: tl.constexpr, DPAD: tl.constexpr, BLOCK: tl.constexpr,
    BN: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Tiles (BN, DPAD) of keys and values, and the keys' positions: a step is BN keys of a listed block."""
    TIMES: tl.constexpr = BLOCK // BN
    at = (tl.load(blocks + step // TIMES) * BLOCK + (step % TIMES) * BN).to(tl.int64) + tl.arange(0, BN)
    d = tl.arange(0, DPAD)
    inside = d[None, :] < D
    if RAGGED:
        inside = (at < keys)[:, None] & inside
    k_tile = tl.load(k + at[:, None] * stride_kn + d[None, :], mask=inside, other=0.0)
    v_tile = tl.load(v + at[:, None] * stride_vn + d[None, :], mask=inside, other=0.0)
    return k_tile, v_tile, at

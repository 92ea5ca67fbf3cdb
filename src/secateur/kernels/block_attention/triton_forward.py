"""The forward kernels: online softmax over the listed blocks (FlashAttention, arXiv 2205.14135), and split decoding.

Scores are in base 2: s = (q . k) * scale * log2 e. `lse` is log2 of the sum of exp2(s) in every row, -inf where a row
sees nothing.
"""

import triton
import triton.language as tl

from secateur.kernels.block_attention.triton_tile import allowed_keys, keys_of_step, product, queries_of_program


@triton.jit
def attend(
    q_tile, at, k, v, keep_row, blocks, begin, end, keys, stride_kn, stride_vn, highest, total, acc, scale,
    D: tl.constexpr, DPAD: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, KEEP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The online softmax over the listed blocks from `begin` to `end`."""
    TIMES: tl.constexpr = BLOCK // BN
    for step in range(begin * TIMES, end * TIMES):
        k_tile, v_tile, at_key = keys_of_step(
            k, v, blocks, step, keys, stride_kn, stride_vn, D, DPAD, BLOCK, BN, MASKED
        )
        s = product(q_tile, tl.trans(k_tile), INTERPRETED) * scale
        if MASKED or KEEP:
            allowed = allowed_keys(at_key[None, :], at[:, None], keys, keep_row, CAUSAL, MASKED, KEEP)
            s = tl.where(allowed, s, float("-inf"))
        new = tl.maximum(highest, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + product(p.to(v_tile.dtype), v_tile, INTERPRETED)
        highest = new
    return highest, total, acc


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    key_keep,
    starts,
    full,
    blocks,
    order,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    heads,
    queries,
    keys,
    offset,
    rows,
    list_stride,
    scale,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    DPAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (rows * BLOCK / BM, heads / PACK, B). Writes out and lse."""
    head = tl.program_id(1) * PACK
    batch = tl.program_id(2).to(tl.int64)
    line, of_head, at, local, there = queries_of_program(order, list_stride, offset, queries, PACK, BLOCK, BM)
    d = tl.arange(0, DPAD)
    q_tile = tl.load(
        q + batch * stride_qb + (of_head * stride_qh + local * stride_qn)[:, None] + d[None, :],
        mask=there[:, None] & (d[None, :] < D),
        other=0.0,
    )
    k += batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    v += batch * stride_vb + (head // GROUP).to(tl.int64) * stride_vh
    keep_row = key_keep + batch * keys

    highest = tl.full([PACK * BM], float("-inf"), tl.float32)
    total = tl.zeros([PACK * BM], tl.float32)
    acc = tl.zeros([PACK * BM, DPAD], tl.float32)
    begin = tl.load(starts + line)
    middle = begin + tl.load(full + line)
    end = tl.load(starts + line + 1)
    highest, total, acc = attend(
        q_tile, at, k, v, keep_row, blocks, begin, middle, keys, stride_kn, stride_vn, highest, total, acc, scale,
        D, DPAD, BLOCK, BN, False, CAUSAL, KEEP, INTERPRETED,
    )  # fmt: skip
    highest, total, acc = attend(
        q_tile, at, k, v, keep_row, blocks, middle, end, keys, stride_kn, stride_vn, highest, total, acc, scale,
        D, DPAD, BLOCK, BN, True, CAUSAL, KEEP, INTERPRETED,
    )  # fmt: skip

    dead = total == 0.0
    acc = acc / tl.where(dead, 1.0, total)[:, None]
    tl.store(
        out + batch * stride_ob + (of_head * stride_oh + local * stride_on)[:, None] + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=there[:, None] & (d[None, :] < D),
    )
    log = tl.where(dead, float("-inf"), highest + tl.log2(tl.where(dead, 1.0, total)))
    tl.store(lse + (batch * heads + of_head) * queries + local, log, mask=there)


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    acc_parts,
    highest_parts,
    total_parts,
    key_keep,
    starts,
    blocks,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    heads,
    keys,
    offset,
    list_stride,
    chunk,
    scale,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    DPAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One query. Grid (parts, heads / PACK, B): every program walks `chunk` blocks of a list. Writes unscaled parts.

    The tile has BM >= 16 rows, of which PACK are heads: that many a tensor core wants, and memory is what takes time.
    """
    head = tl.program_id(1) * PACK
    batch = tl.program_id(2).to(tl.int64)
    line = head * list_stride
    m = tl.arange(0, BM)
    d = tl.arange(0, DPAD)
    of_head = (head + m).to(tl.int64)
    there = m < PACK
    q_tile = tl.load(
        q + batch * stride_qb + (of_head * stride_qh)[:, None] + d[None, :],
        mask=there[:, None] & (d[None, :] < D),
        other=0.0,
    )
    k += batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    v += batch * stride_vb + (head // GROUP).to(tl.int64) * stride_vh
    keep_row = key_keep + batch * keys
    at = tl.full([BM], 0, tl.int32) + offset

    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DPAD], tl.float32)
    begin = tl.load(starts + line) + tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, tl.load(starts + line + 1))
    highest, total, acc = attend(
        q_tile, at, k, v, keep_row, blocks, begin, end, keys, stride_kn, stride_vn, highest, total, acc, scale,
        D, DPAD, BLOCK, BN, True, CAUSAL, KEEP, INTERPRETED,
    )  # fmt: skip

    part = (batch * heads + of_head) * tl.num_programs(0) + tl.program_id(0)
    tl.store(acc_parts + part[:, None] * D + d[None, :], acc, mask=there[:, None] & (d[None, :] < D))
    tl.store(highest_parts + part, highest, mask=there)
    tl.store(total_parts + part, total, mask=there)


@triton.jit
def merge_kernel(
    acc_parts, highest_parts, total_parts, out, parts, PARTS: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr
):
    """Grid (B * heads): joins the parts of a query's softmax. PARTS is `parts` rounded up to a power of two."""
    line = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, PARTS)
    d = tl.arange(0, DPAD)
    highest = tl.load(highest_parts + line * parts + s, mask=s < parts, other=float("-inf"))
    total = tl.load(total_parts + line * parts + s, mask=s < parts, other=0.0)
    acc = tl.load(
        acc_parts + (line * parts + s)[:, None] * D + d[None, :],
        mask=(s < parts)[:, None] & (d[None, :] < D),
        other=0.0,
    )
    new = tl.max(highest, 0)
    weight = tl.exp2(highest - tl.where(new == float("-inf"), 0.0, new))
    total = tl.sum(total * weight, 0)
    joined = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + line * D + d, joined.to(out.dtype.element_ty), mask=d < D)

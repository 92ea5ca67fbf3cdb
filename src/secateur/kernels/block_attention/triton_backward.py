"""The backward kernels. With P = exp2(S - lse), dP = dO V^T and delta = rowsum(O * dO):

    dV = P^T dO,    dS = P * (dP - delta),    dQ = scale * dS K,    dK = scale * dS^T Q

dQ walks the blocks of a row, dK and dV those of a column. Each program owns what it writes, so the result is the same
every time. Columns that nearly all rows use (the first ones) would keep one program busy long after the others: they
are walked in segments, whose sums are added afterwards.
"""

import triton
import triton.language as tl

from secateur.kernels.block_attention.triton_tile import allowed_keys, keys_of_step, product, queries_of_program


@triton.jit
def query_gradient_steps(
    q_tile, o_tile, log, shift, at, k, v, keep_row, blocks, begin, end, keys, stride_kn, stride_vn, acc, scale,
    D: tl.constexpr, DPAD: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, KEEP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What the listed blocks from `begin` to `end` give to a tile of queries."""
    TIMES: tl.constexpr = BLOCK // BN
    for step in range(begin * TIMES, end * TIMES):
        k_tile, v_tile, at_key = keys_of_step(
            k, v, blocks, step, keys, stride_kn, stride_vn, D, DPAD, BLOCK, BN, MASKED
        )
        p = tl.exp2(product(q_tile, tl.trans(k_tile), INTERPRETED) * scale - log[:, None])
        if MASKED or KEEP:
            allowed = allowed_keys(at_key[None, :], at[:, None], keys, keep_row, CAUSAL, MASKED, KEEP)
            p = tl.where(allowed, p, 0.0)
        ds = p * (product(o_tile, tl.trans(v_tile), INTERPRETED) - shift[:, None])
        acc += product(ds.to(k_tile.dtype), k_tile, INTERPRETED)
    return acc


@triton.jit
def query_gradient_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_q,
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
    stride_gb,
    stride_gh,
    stride_gn,
    heads,
    queries,
    keys,
    offset,
    rows,
    list_stride,
    scale,
    natural_scale,
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
    """Grid (rows * BLOCK / BM, heads / PACK, B). Writes grad_q."""
    head = tl.program_id(1) * PACK
    batch = tl.program_id(2).to(tl.int64)
    line, of_head, at, local, there = queries_of_program(order, list_stride, offset, queries, PACK, BLOCK, BM)
    d = tl.arange(0, DPAD)
    inside_q = there[:, None] & (d[None, :] < D)
    q_tile = tl.load(
        q + batch * stride_qb + (of_head * stride_qh + local * stride_qn)[:, None] + d[None, :],
        mask=inside_q,
        other=0.0,
    )
    o_tile = tl.load(
        grad_out + batch * stride_ob + (of_head * stride_oh + local * stride_on)[:, None] + d[None, :],
        mask=inside_q,
        other=0.0,
    )
    one = (batch * heads + of_head) * queries + local
    log = tl.load(lse + one, mask=there, other=float("inf"))
    log = tl.where(log == float("-inf"), float("inf"), log)  # a row that saw nothing
    shift = tl.load(delta + one, mask=there, other=0.0)
    k += batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    v += batch * stride_vb + (head // GROUP).to(tl.int64) * stride_vh
    keep_row = key_keep + batch * keys

    acc = tl.zeros([PACK * BM, DPAD], tl.float32)
    begin = tl.load(starts + line)
    middle = begin + tl.load(full + line)
    end = tl.load(starts + line + 1)
    acc = query_gradient_steps(
        q_tile, o_tile, log, shift, at, k, v, keep_row, blocks, begin, middle, keys, stride_kn, stride_vn, acc, scale,
        D, DPAD, BLOCK, BN, False, CAUSAL, KEEP, INTERPRETED,
    )  # fmt: skip
    acc = query_gradient_steps(
        q_tile, o_tile, log, shift, at, k, v, keep_row, blocks, middle, end, keys, stride_kn, stride_vn, acc, scale,
        D, DPAD, BLOCK, BN, True, CAUSAL, KEEP, INTERPRETED,
    )  # fmt: skip
    tl.store(
        grad_q + batch * stride_gb + (of_head * stride_gh + local * stride_gn)[:, None] + d[None, :],
        (acc * natural_scale).to(grad_q.dtype.element_ty),
        mask=inside_q,
    )


@triton.jit
def key_gradient_step(
    q, grad_out, lse, delta, k_tile, v_tile, grad_k, grad_v, at_key, keep, first, offset, queries, stride_qn, stride_on,
    scale, D: tl.constexpr, DPAD: tl.constexpr, BM: tl.constexpr, CHECK: tl.constexpr, CAUSAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What the queries at `first`, ... give to a tile of keys."""
    d = tl.arange(0, DPAD)
    at = first + tl.arange(0, BM)
    local = (at - offset).to(tl.int64)
    there = (local >= 0) & (local < queries)
    inside = there[:, None] & (d[None, :] < D)
    q_tile = tl.load(q + local[:, None] * stride_qn + d[None, :], mask=inside, other=0.0)
    o_tile = tl.load(grad_out + local[:, None] * stride_on + d[None, :], mask=inside, other=0.0)
    log = tl.load(lse + local, mask=there, other=float("inf"))
    log = tl.where(log == float("-inf"), float("inf"), log)
    shift = tl.load(delta + local, mask=there, other=0.0)
    p = tl.exp2(product(k_tile, tl.trans(q_tile), INTERPRETED) * scale - log[None, :])
    if CHECK:
        allowed = keep[:, None] & there[None, :]
        if CAUSAL:
            allowed = allowed & (at_key[:, None] <= at[None, :])
        p = tl.where(allowed, p, 0.0)
    grad_v += product(p.to(o_tile.dtype), o_tile, INTERPRETED)
    ds = p * (product(v_tile, tl.trans(o_tile), INTERPRETED) - shift[None, :])
    grad_k += product(ds.to(q_tile.dtype), q_tile, INTERPRETED)
    return grad_k, grad_v


@triton.jit
def key_gradient_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
    parts_k,
    parts_v,
    key_keep,
    starts,
    full,
    blocks,
    items,
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
    key_heads,
    queries,
    keys,
    offset,
    columns,
    list_stride,
    slots,
    scale,
    natural_scale,
    SEGMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DPAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid (items * BLOCK / BN, B). Writes grad_k and grad_v (B, key heads, columns * BLOCK, D), or parts of them.

    An item is (key head, column, segment, slot): slot -1 for a column walked by one program, otherwise where its part
    goes in `parts` (B, slots, BLOCK, D).
    """
    item = items + (tl.program_id(0) // (BLOCK // BN)) * 4
    key_head = tl.load(item)
    column = tl.load(item + 1)
    segment = tl.load(item + 2)
    slot = tl.load(item + 3)
    batch = tl.program_id(1).to(tl.int64)
    within = (tl.program_id(0) % (BLOCK // BN)) * BN + tl.arange(0, BN)
    at_key = column * BLOCK + within
    d = tl.arange(0, DPAD)
    inside = (at_key < keys)[:, None] & (d[None, :] < D)
    wide = at_key.to(tl.int64)
    k_tile = tl.load(
        k + batch * stride_kb + key_head.to(tl.int64) * stride_kh + wide[:, None] * stride_kn + d[None, :],
        mask=inside,
        other=0.0,
    )
    v_tile = tl.load(
        v + batch * stride_vb + key_head.to(tl.int64) * stride_vh + wide[:, None] * stride_vn + d[None, :],
        mask=inside,
        other=0.0,
    )
    keep = at_key < keys
    if KEEP:
        keep = keep & (tl.load(key_keep + batch * keys + at_key, mask=keep, other=0) != 0)
    sum_k = tl.zeros([BN, DPAD], tl.float32)
    sum_v = tl.zeros([BN, DPAD], tl.float32)
    TIMES: tl.constexpr = BLOCK // BM
    for g in range(GROUP):
        head = (key_head * GROUP + g).to(tl.int64)
        line = head * list_stride + column
        begin = tl.load(starts + line)
        middle = begin + tl.load(full + line)
        end = tl.load(starts + line + 1)
        if slot >= 0:
            length = end - begin
            end = begin + (length * (segment + 1)) // SEGMENTS
            begin = begin + (length * segment) // SEGMENTS
            middle = tl.minimum(tl.maximum(middle, begin), end)
        of_q = q + batch * stride_qb + head * stride_qh
        of_o = grad_out + batch * stride_ob + head * stride_oh
        of_lse = lse + (batch * heads + head) * queries
        of_delta = delta + (batch * heads + head) * queries
        for step in range(begin * TIMES, middle * TIMES):
            first = (offset // BLOCK + tl.load(blocks + step // TIMES)) * BLOCK + (step % TIMES) * BM
            sum_k, sum_v = key_gradient_step(
                of_q, of_o, of_lse, of_delta, k_tile, v_tile, sum_k, sum_v, at_key, keep, first, offset, queries,
                stride_qn, stride_on, scale, D, DPAD, BM, KEEP, False, INTERPRETED,
            )  # fmt: skip
        for step in range(middle * TIMES, end * TIMES):
            first = (offset // BLOCK + tl.load(blocks + step // TIMES)) * BLOCK + (step % TIMES) * BM
            sum_k, sum_v = key_gradient_step(
                of_q, of_o, of_lse, of_delta, k_tile, v_tile, sum_k, sum_v, at_key, keep, first, offset, queries,
                stride_qn, stride_on, scale, D, DPAD, BM, True, CAUSAL, INTERPRETED,
            )  # fmt: skip
    sum_k *= natural_scale
    if slot >= 0:
        to = ((batch * slots + slot) * BLOCK + within)[:, None] * D + d[None, :]
        tl.store(parts_k + to, sum_k, mask=inside)
        tl.store(parts_v + to, sum_v, mask=inside)
    else:
        to = ((batch * key_heads + key_head) * columns * BLOCK + wide)[:, None] * D + d[None, :]
        tl.store(grad_k + to, sum_k.to(grad_k.dtype.element_ty), mask=inside)
        tl.store(grad_v + to, sum_v.to(grad_v.dtype.element_ty), mask=inside)

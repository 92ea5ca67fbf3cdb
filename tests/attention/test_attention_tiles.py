"""Sums over tiles against the whole matrix, entry by entry."""

import math

import pytest
import torch

from secateur.attention.tiles import FACTS, attention_tiles, causal_pairs, sum_tiles


def whole(query, key, scaling, allowed, bias=None):
    """(heads, queries, keys) by the definition, in fp64."""
    group = query.shape[0] // key.shape[0]
    scores = query.double() @ key.double().repeat_interleave(group, 0).mT * scaling
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~allowed, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def naive_tiles(matrix, block):
    heads, queries, keys = matrix.shape
    rows, columns = math.ceil(queries / block), math.ceil(keys / block)
    found = torch.zeros(heads, rows, columns, dtype=matrix.dtype)
    for i in range(queries):
        for j in range(keys):
            found[:, i // block, j // block] += matrix[:, i, j]
    return found


SHAPES = [(4, 2, 13, 13, 4), (4, 4, 12, 20, 5), (3, 1, 16, 16, 8), (2, 2, 9, 6, 1)]


@pytest.mark.parametrize(("heads", "kv", "queries", "keys", "block"), SHAPES)
@pytest.mark.parametrize("kind", ["causal", "full", "window", "bias", "dead row"])
@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_tiles_are_sums_of_the_whole_matrix(heads, kv, queries, keys, block, kind, budget):
    query, key = torch.randn(heads, queries, 8), torch.randn(kv, keys, 8)
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    options = {}
    if kind in ("causal", "window", "dead row"):
        allowed = causal_pairs(queries, max(keys, queries))[:, :keys]
    if kind == "window":
        allowed = allowed & ~allowed.tril(-4)
    if kind == "dead row":
        allowed[2] = False
    if kind == "bias":
        options["bias"] = torch.randn(1 if block == 4 else heads, queries, keys)
    found = attention_tiles(query, key, 0.7, block, allowed=lambda rows: allowed[rows], budget=budget, **options)
    matrix = whole(query, key, 0.7, allowed, **options)
    torch.testing.assert_close(found.mass.double(), naive_tiles(matrix, block), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.count, naive_tiles(allowed[None].long(), block)[0])
    assert found.area.sum() == queries * keys
    each = torch.zeros(heads, found.mass.shape[1], len(FACTS), dtype=torch.float64)
    for i in range(queries):
        row = matrix[:, i]
        each[:, i // block, 0] -= torch.special.xlogy(row, row).sum(-1)
        each[:, i // block, 1] += (row * (i - torch.arange(keys)).abs()).sum(-1)
        each[:, i // block, 2] += row[:, 0]
        each[:, i // block, 3] += row[:, i] if i < keys else 0
    torch.testing.assert_close(found.facts.double(), each, rtol=1e-4, atol=1e-4)
    assert found.queries.sum() == allowed.any(1).sum()


def test_half_precision_is_summed_in_fp32():
    query, key = torch.randn(2, 64, 8).half(), torch.randn(1, 64, 8).half()
    allowed = causal_pairs(64, 64)
    found = attention_tiles(query, key, 0.5, 8, allowed=lambda rows: allowed[rows])
    assert found.mass.dtype == torch.float32
    torch.testing.assert_close(
        found.mass.double(), naive_tiles(whole(query, key, 0.5, allowed), 8), rtol=1e-5, atol=1e-5
    )


def test_ragged_sums():
    matrix = torch.randn(2, 7, 5)
    torch.testing.assert_close(sum_tiles(matrix, 3), naive_tiles(matrix, 3))
    assert sum_tiles(matrix, 1) is matrix

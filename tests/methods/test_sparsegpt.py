"""SparseGPT beyond its definition (see contract/test_definition.py): odd blocks, dead inputs, shared factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import naive
from secateur.masks import NM, Unstructured
from secateur.methods import LayerView
from secateur.methods.sparsegpt import SparseGPT
from secateur.statistics import Bundle, Gram


def view(w: Tensor, bundle: Bundle) -> LayerView:
    return LayerView("layer", w.clone(), bundle)


def seen(x: Tensor) -> Bundle:
    bundle = Bundle((Gram,))
    bundle.update(x)
    return bundle


def problem(columns: int) -> tuple[Tensor, Tensor]:
    mix = torch.randn(columns, columns, dtype=torch.float64)
    return torch.randn(6, columns, dtype=torch.float64), torch.randn(3 * columns, columns, dtype=torch.float64) @ mix


@pytest.mark.parametrize(("n", "m", "blocksize"), [(2, 4, 10), (2, 4, 3), (3, 6, 128), (20, 48, 16), (2, 4, 1)])
def test_groups_are_never_cut_by_a_block(n: int, m: int, blocksize: int) -> None:
    w, x = problem(96)
    layer = view(w, seen(x))
    keep = SparseGPT(blocksize=blocksize).prune_layer(layer, NM(n, m), 1 - n / m)
    weight, expected = naive.sparsegpt(w, x, f"{n}:{m}", 1 - n / m, blocksize=96)
    assert torch.equal(keep, expected)
    torch.testing.assert_close(layer.weight, weight)


@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(3, 4)], ids=str)
def test_a_dead_input_goes_even_before_a_zero_weight(pattern: Unstructured | NM) -> None:
    w, x = problem(4)
    x[:, 3] = 0
    w[:, 0] = 0
    keep = SparseGPT().prune_layer(view(w, seen(x)), pattern, 0.25)
    assert keep.all(0).tolist() == [True, True, True, False]


def test_layers_share_a_factor_only_under_one_damping() -> None:
    w, x = problem(12)
    shared = seen(x)
    for damping in (0.01, 1.0, 0.01):
        together, alone = view(w, shared), view(w, seen(x))
        for layer in (together, alone):
            SparseGPT(damping).prune_layer(layer, Unstructured("row"), 0.5)
        assert torch.equal(together.weight, alone.weight)
    assert sorted(shared[Gram].factors) == [0.01, 1.0]

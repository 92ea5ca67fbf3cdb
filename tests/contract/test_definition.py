"""Our methods against the published definitions, written independently in tests/naive.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import naive
from secateur.factor import inverse_factor
from secateur.masks import NM, Unstructured, parse_pattern
from secateur.methods import LayerView, Method, make_method
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.statistics import Bundle

PATTERNS = ["row", "layer", "column", "2:4", "1:4", "6:8"]


def problem(rows: int = 24, columns: int = 32, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W (rows, columns) and correlated inputs X (tokens, columns), fp64."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ (mix + 3 * torch.eye(columns))
    return w, x * torch.linspace(0.2, 3, columns, dtype=torch.float64)


def view(w: Tensor, x: Tensor, method: Method) -> LayerView:
    bundle = Bundle(method.needs)
    for part in x.split(64):
        bundle.update(part)
    return LayerView("layer", w.clone(), bundle)


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.77])
@pytest.mark.parametrize("per", PATTERNS)
@pytest.mark.parametrize("name", sorted(naive.SCORES))
def test_scores_choose_as_defined(name: str, per: str, sparsity: float) -> None:
    w, x = problem()
    method, pattern = make_method(name), parse_pattern(per)
    layer = view(w, x, method)
    share = pattern.sparsity if isinstance(pattern, NM) else sparsity
    keep = method.prune_layer(layer, pattern, share)
    expected = naive.keep_from_score(naive.SCORES[name](w, x), per, share)
    assert torch.equal(keep, expected)
    assert torch.equal(layer.weight, w * expected)


@pytest.mark.parametrize("name", sorted(naive.NATIVE))
def test_native_group_is_the_papers(name: str) -> None:
    assert make_method(name).native == Unstructured(naive.NATIVE[name])


@pytest.mark.parametrize("blocksize", [7, 16, 128])
@pytest.mark.parametrize("per", PATTERNS)
def test_sparsegpt_is_optimal_brain_surgeon(per: str, blocksize: int) -> None:
    w, x = problem(rows=20, columns=80)
    pattern = parse_pattern(per)
    if isinstance(pattern, NM):
        blocksize = blocksize // pattern.m * pattern.m or pattern.m
    method = SparseGPT(blocksize=blocksize)
    layer = view(w, x, method)
    share = pattern.sparsity if isinstance(pattern, NM) else 0.6
    keep = method.prune_layer(layer, pattern, share)
    weight, expected = naive.sparsegpt(w, x, per, share, blocksize)
    assert torch.equal(keep, expected)
    torch.testing.assert_close(layer.weight, weight, rtol=1e-9, atol=1e-9)


def test_sparsegpt_ranks_dead_inputs_first_and_within_the_count() -> None:
    w, x = problem(rows=8, columns=16)
    x[:, [3, 10]] = 0
    w[:, [3, 10]] = 100.0
    method = SparseGPT()
    for per in ("row", "layer", "2:4"):
        layer, pattern = view(w, x, method), parse_pattern(per)
        keep = method.prune_layer(layer, pattern, 0.5)
        assert not keep[:, [3, 10]].any()
        assert int((~keep).sum()) == w.numel() // 2
        weight, expected = naive.sparsegpt(w, x, per, 0.5)
        assert torch.equal(keep, expected)
        torch.testing.assert_close(layer.weight, weight, rtol=1e-9, atol=1e-9)


def test_sparsegpt_with_a_plain_gram_is_magnitude_and_changes_no_kept_weight() -> None:
    w, _ = problem(rows=12, columns=256)
    x = torch.eye(256, dtype=torch.float64) * 3
    method = SparseGPT()
    layer = view(w, x, method)
    keep = method.prune_layer(layer, Unstructured("layer"), 0.5)
    halves = [naive.keep_from_score(w[:, i : i + 128].abs(), "layer", 0.5) for i in (0, 128)]
    assert torch.equal(keep, torch.cat(halves, dim=1))
    torch.testing.assert_close(layer.weight, w * keep)


def test_sparsegpt_beats_dropping_on_average() -> None:
    """Not a theorem for one draw; the mean over many draws at 64 columns with damping is."""
    ratios = []
    for seed in range(12):
        w, x = problem(rows=16, columns=64, seed=seed)
        method = SparseGPT()
        layer = view(w, x, method)
        keep = method.prune_layer(layer, Unstructured("row"), 0.5)
        error = torch.linalg.norm(x @ (layer.weight - w).T) ** 2
        ratios.append(float(error / torch.linalg.norm(x @ (w * keep - w).T) ** 2))
    assert sum(ratios) / len(ratios) < 0.9


def test_factor_diagonal_is_the_conditional_inverse() -> None:
    _, x = problem()
    gram = x.T @ x / len(x)
    factor = inverse_factor(gram, damping=0.01)
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(h))
    for i in (0, 7, 31):
        torch.testing.assert_close(factor.upper[i, i] ** 2, torch.linalg.inv(h[i:, i:])[0, 0])


def test_factor_of_a_matrix_that_is_not_positive_definite() -> None:
    broken = torch.diag(torch.tensor([1.0, -0.05, 1.0]))
    retried = inverse_factor(broken, damping=0.01)
    assert "damping raised from 0.01 to 0.1" in retried.note
    hopeless = inverse_factor(torch.tensor([[1.0, 99.0], [99.0, 1.0]]), damping=0.01)
    assert "only its diagonal was used" in hopeless.note
    assert torch.equal(hopeless.upper, torch.diag(hopeless.upper.diagonal()))
    assert torch.isfinite(hopeless.upper).all()


def test_sparsegpt_says_when_it_had_to_damp() -> None:
    w, x = problem(rows=4, columns=8)
    method = SparseGPT(damping=0.0)
    x[:, 1] = x[:, 0]  # collinear: singular without damping
    layer = view(w, x, method)
    method.prune_layer(layer, Unstructured("row"), 0.5)
    assert torch.isfinite(layer.weight).all()
    rank_deficient = view(w, x[:3], method)
    method.prune_layer(rank_deficient, Unstructured("row"), 0.5)
    assert "not positive definite" in rank_deficient.warnings[0]
    assert "3 tokens" in rank_deficient.warnings[0]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_wanda_variant_is_one_share_for_all_rows(sparsity: float) -> None:
    w, x = problem()
    w[0] *= torch.logspace(-3, 1, w.shape[1], dtype=w.dtype)  # a row that can lose more weights
    method = Wanda(variant=True)
    keep = method.prune_layer(view(w, x, method), method.native, sparsity)
    assert int((~keep).sum()) == round(w.numel() * sparsity)
    assert len((~keep).sum(1).unique()) > 1
    low, high = 0.0, 1.0
    for _ in range(80):  # the paper's bisection, to the end
        alpha = (low + high) / 2
        expected = naive.wanda_variant_alpha(w, x, alpha)
        low, high = (alpha, high) if int((~expected).sum()) < int((~keep).sum()) else (low, alpha)
    assert torch.equal(keep, naive.wanda_variant_alpha(w, x, high))


def test_wanda_with_equal_inputs_is_magnitude_per_row() -> None:
    w, _ = problem()
    x = torch.ones(5, w.shape[1], dtype=torch.float64)
    wanda, magnitude = Wanda(), make_method("magnitude")
    for pattern in (Unstructured("row"), NM(2, 4)):
        assert torch.equal(
            wanda.prune_layer(view(w, x, wanda), pattern, 0.5),
            magnitude.prune_layer(view(w, x, magnitude), pattern, 0.5),
        )


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_per_column_every_method_is_magnitude(name: str) -> None:
    """Their scores rescale a column as a whole. SparseGPT's later columns have been corrected by then: block 1 only."""
    w, x = problem()
    keep = make_method(name).prune_layer(view(w, x, make_method(name)), Unstructured("column"), 0.5)
    assert torch.equal(keep, naive.keep_from_score(w.abs(), "column", 0.5))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("per", ["row", "2:4"])
def test_permuting_rows_permutes_the_mask(name: str, per: str) -> None:
    w, x = problem()
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(1))
    method, pattern = make_method(name), parse_pattern(per)
    plain = method.prune_layer(view(w, x, method), pattern, 0.5)
    assert torch.equal(method.prune_layer(view(w[order], x, method), pattern, 0.5), plain[order])

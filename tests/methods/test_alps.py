"""ALPS against its algorithms written plainly, row loops and inverses included."""

from __future__ import annotations

import pytest
import torch
from test_definition import problem, view
from torch import Tensor

import naive
from secateur.errors import InvalidParameter, NumericalFailure
from secateur.factor import spectrum
from secateur.masks import NM, Unstructured, parse_pattern
from secateur.methods import LayerView
from secateur.methods.alps import ALPS
from secateur.methods.sparsegpt import SparseGPT
from secateur.statistics import Bundle

SIZE = {"rows": 12, "columns": 24, "tokens": 300}


def plain_alps(w0: Tensor, x: Tensor, per: str, sparsity: float, damping: float, steps: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 with an inverse in each step, then the exact least squares of every row on its support."""
    h = x.T @ x / len(x)
    unit = h.diagonal().sqrt()
    h = h / unit / unit[:, None] + damping * torch.eye(len(h), dtype=h.dtype)
    target = w0 * unit
    z, dual, pull, before = target.clone(), torch.zeros_like(target), 0.1, None
    for step in range(1, steps + 1):
        inverse = torch.linalg.inv(h + pull * torch.eye(len(h), dtype=h.dtype))
        w = (target @ h + pull * z - pull * dual) @ inverse
        keep = naive.keep_from_score((w + dual).abs(), per, sparsity)
        z = (w + dual) * keep
        dual = dual + w - z
        if step % 3 == 0:
            moved = 1.0 if before is None else int((keep & ~before).sum()) / int(keep.sum())
            before = keep
            if moved == 0:
                break
            growth = 1.3 if moved >= 0.1 else 1.2 if moved >= 0.005 else 1.1
            pull, dual = pull * growth, dual / growth
    fitted = torch.zeros_like(z)
    for row in range(len(z)):
        on = keep[row]
        fitted[row, on] = torch.linalg.solve(h[on][:, on], (h @ target[row])[on])
    return fitted / unit, keep


@pytest.mark.parametrize("per", ["row", "layer", "column", "2:4", "1:4"])
def test_it_is_the_paper(per: str) -> None:
    w, x = problem(**SIZE)
    pattern = parse_pattern(per)
    share = pattern.sparsity if isinstance(pattern, NM) else 0.6
    method = ALPS(damping=0.02, refit=200)  # enough steps for the exact optimum
    layer = view(w, x, method)
    keep = method.prune_layer(layer, pattern, share)
    expected, mask = plain_alps(w, x, per, share, 0.02, method.iterations)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-6, atol=1e-6)


def test_it_beats_sparsegpt_on_average() -> None:
    ratios = []
    for seed in range(8):
        w, x = problem(rows=16, columns=64, tokens=300, seed=seed)
        errors = []
        for method in (ALPS(), SparseGPT()):
            layer = view(w, x, method)
            method.prune_layer(layer, Unstructured("row"), 0.6)
            errors.append(float(torch.linalg.norm(x @ (layer.weight - w).T) ** 2))
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.9


def test_dead_inputs_go_first_and_do_no_harm() -> None:
    w, x = problem(**SIZE)
    x[:, [3, 10]] = 0
    w[:, [3, 10]] = 100.0
    for per in ("row", "2:4"):
        layer = view(w, x, ALPS())
        keep = ALPS().prune_layer(layer, parse_pattern(per), 0.5)
        assert not keep[:, [3, 10]].any()
        assert torch.isfinite(layer.weight).all()


def test_layers_that_read_one_input_share_its_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = problem(**SIZE)
    method, calls = ALPS(), []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda h: calls.append(1) or real(h))
    bundle = Bundle(method.needs)
    bundle.update(x)
    for _ in range(2):
        method.prune_layer(LayerView("q", w.clone(), bundle), Unstructured("row"), 0.5)
    assert len(calls) == 1


def test_a_matrix_that_is_not_finite() -> None:
    with pytest.raises(NumericalFailure, match=r"of shape \(2, 2\) is not finite"):
        spectrum(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


@pytest.mark.parametrize(("name", "value"), [("iterations", 0), ("refit", -1), ("damping", -0.1), ("pull", 0.0)])
def test_bad_options(name: str, value: float) -> None:
    with pytest.raises(InvalidParameter, match=name):
        ALPS(**{name: value})

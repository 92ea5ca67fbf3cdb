"""A layer to refine, and what least squares says about it, written plainly."""

from __future__ import annotations

import torch
from torch import Tensor

import naive
from secateur.statistics import Bundle, Gram
from secateur.view import LayerView


def problem(rows: int = 6, columns: int = 24, tokens: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W0 (rows, columns) and strongly correlated inputs X (tokens, columns), fp64."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ (mix + 3 * torch.eye(columns))
    return w, x * torch.linspace(0.2, 3, columns, dtype=torch.float64)


def pruned(w: Tensor, x: Tensor, how: str, per: str, sparsity: float = 0.5) -> tuple[LayerView, Tensor]:
    """The layer after magnitude pruning ("magnitude") or SparseGPT ("sparsegpt"), and its keep mask."""
    if how == "sparsegpt":
        weight, keep = naive.sparsegpt(w, x, per, sparsity)
    else:
        keep = naive.keep_from_score(naive.SCORES[how](w, x), per, sparsity)
        weight = w * keep
    return LayerView("layer", weight.clone(), seen(x)), keep


def seen(x: Tensor) -> Bundle:
    bundle = Bundle((Gram,))
    bundle.update(x)
    return bundle


def output_error(w: Tensor, w0: Tensor, x: Tensor) -> Tensor:
    """(out,) mean square of each output's error."""
    return (x @ (w - w0).T).square().mean(0)


def best_fit(w0: Tensor, x: Tensor, keep: Tensor, ridge: float = 0.0) -> Tensor:
    """The exact optimum, row by row: w_S = (H_SS)^-1 (H w0)_S."""
    h = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    best = torch.zeros_like(w0)
    for row, kept in enumerate(keep):
        s = kept.nonzero().flatten()
        best[row, s] = torch.linalg.solve(h[s][:, s], (h @ w0[row])[s])
    return best

"""The published definitions, written plainly and independently of the package.

W: (out, in), X: (tokens, in). Every function returns a keep mask, True = stays; sparsegpt its weights too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_from_score(score: Tensor, per: str, sparsity: float) -> Tensor:
    """Sort, and drop the first round(count * sparsity) of every comparison group; ties by position."""
    keep = torch.ones_like(score, dtype=torch.bool)
    if ":" in per:
        n, m = map(int, per.split(":"))
        for row in range(score.shape[0]):
            for start in range(0, score.shape[1], m):
                group = score[row, start : start + m].tolist()
                for i in sorted(range(m), key=lambda i: group[i])[: m - n]:
                    keep[row, start + i] = False
        return keep
    if per == "layer":
        flat = keep_from_score(score.reshape(1, -1), "row", sparsity)
        return flat.reshape(score.shape)
    if per == "column":
        return keep_from_score(score.T, "row", sparsity).T
    for row in range(score.shape[0]):
        order = torch.argsort(score[row], stable=True)
        keep[row, order[: round(score.shape[1] * sparsity)]] = False
    return keep


def magnitude(w: Tensor, x: Tensor) -> Tensor:
    return w.abs()


def wanda(w: Tensor, x: Tensor) -> Tensor:
    norm = torch.tensor([float(torch.linalg.norm(x[:, j])) for j in range(x.shape[1])], dtype=w.dtype)
    return w.abs() * norm


def ria(w: Tensor, x: Tensor, power: float = 0.5) -> Tensor:
    size = w.abs()
    share = torch.zeros_like(size)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            share[i, j] = size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()
    return share * torch.linalg.norm(x, dim=0) ** power


SCORES = {"magnitude": magnitude, "wanda": wanda, "ria": ria}
NATIVE = {"magnitude": "layer", "wanda": "row", "ria": "layer", "sparsegpt": "layer"}


def sparsegpt(
    w: Tensor, x: Tensor, per: str, sparsity: float, blocksize: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, one column after the other, with an explicit inverse at every column."""
    w = w.clone()
    rows, columns = w.shape
    h = 2 * x.T @ x / len(x)
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean()
    h[dead, dead] = mean
    h = h + damping * mean * torch.eye(columns, dtype=h.dtype)
    keep = torch.ones_like(w, dtype=torch.bool)
    inverse = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        saliency = torch.stack([w[:, j] ** 2 / inverse[j][0, 0] for j in range(start, end)], dim=1)
        saliency[:, dead[start:end]] = -1
        if per == "layer":
            count = round(end * rows * sparsity) - round(start * rows * sparsity)
            order = torch.argsort(saliency.flatten(), stable=True)[:count]
            block = torch.ones(saliency.numel(), dtype=torch.bool)
            block[order] = False
            keep[:, start:end] = block.view(saliency.shape)
        elif per == "row":
            count = round(end * sparsity) - round(start * sparsity)
            for row in range(rows):
                keep[row, start + torch.argsort(saliency[row], stable=True)[:count]] = False
        elif per == "column":
            keep[:, start:end] = keep_from_score(saliency, "column", sparsity)
        for j in range(start, end):
            if ":" in per and j % int(per.split(":")[1]) == 0:
                m = int(per.split(":")[1])
                now = torch.stack([w[:, k] ** 2 / inverse[k][0, 0] for k in range(j, j + m)], dim=1)
                now[:, dead[j : j + m]] = -1
                keep[:, j : j + m] = keep_from_score(now, per, sparsity)
            error = torch.where(keep[:, j], 0.0, w[:, j]) / inverse[j][0, 0]
            w[:, j:] -= error[:, None] * inverse[j][0][None]
    return w * keep, keep


def sparsegpt_as_published(
    w: Tensor, x: Tensor, sparsity: float, blocksize: int = 128, damping: float = 0.01
) -> Tensor:
    """Algorithm 1 of the paper, unstructured, in its own three factorisation steps; the new weights."""
    w = w.clone()
    rows, columns = w.shape
    h = 2 * x.T @ x / len(x)
    h += damping * h.diagonal().mean() * torch.eye(columns, dtype=h.dtype)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        saliency = w[:, start:end] ** 2 / u.diagonal()[start:end] ** 2
        count = round(end * rows * sparsity) - round(start * rows * sparsity)
        drop = torch.zeros(saliency.numel(), dtype=torch.bool)
        drop[torch.argsort(saliency.flatten(), stable=True)[:count]] = True
        drop = drop.view(saliency.shape)
        errors = torch.zeros_like(saliency)
        for j in range(start, end):
            gone = torch.where(drop[:, j - start], w[:, j], 0.0)
            errors[:, j - start] = gone / u[j, j]
            w[:, j:end] -= errors[:, j - start, None] * u[j, j:end]
        w[:, start:end][drop] = 0
        w[:, end:] -= errors @ u[start:end, end:]
    return w


def wanda_variant_alpha(w: Tensor, x: Tensor, alpha: float) -> Tensor:
    """The appendix variant for a given alpha: every row drops its longest prefix of ascending scores within alpha."""
    score = wanda(w, x)
    keep = torch.ones_like(w, dtype=torch.bool)
    for row in range(w.shape[0]):
        order = torch.argsort(score[row], stable=True)
        total, gone = float(score[row].sum()), 0.0
        for j in order.tolist():
            gone += float(score[row, j])
            if gone > alpha * total:
                break
            keep[row, j] = False
    return keep

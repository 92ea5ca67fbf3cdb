"""Masked least squares: the kept weights of every row that give the layer's outputs best, by conjugate gradients.

For every row on its own, minimise over the kept entries of d = w - w0, the other entries staying what they are,

    d^T (H + diag(ridge)) d        H: (in, in) second moments of the inputs, here in units in which its diagonal is 1

Hestenes and Stiefel 1952, J. Res. NBS 49, section 3; on a unit diagonal this is Jacobi preconditioning (Saad 2003,
section 9.2). All rows go together: one product (rows, in) x (in, in) a step. The error falls with every step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fit_kept(
    h: Tensor, change: Tensor, keep: Tensor, ridge: Tensor, *, iterations: int, tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Improve `change`, (rows, in) d, in place where `keep`.

    Args:
        h: (in, in) H + diag(ridge).
        keep: (rows, in) bool, the entries that may move.
        ridge: (in,), left out of the errors that are returned.
        iterations: at most this many steps.
        tolerance: a row stops once its residual is this share of the first.

    Returns:
        The rows' output errors d^T H d before and after, (rows, 1). After is inf where rounding leaves open whether it
        fell: such a row should keep what it had.

    >>> h, keep = torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([[True, False]])
    >>> change = torch.tensor([[0.0, -2.0]])
    >>> fit_kept(h, change, keep, torch.zeros(2), iterations=3)[1], change
    (tensor([[3.]]), tensor([[ 1., -2.]]))
    """
    rounding = 4 * torch.finfo(h.dtype).eps * len(h) ** 0.5  # curvatures of H below it are no more than that
    product = change @ h
    before = _dot(change, product) - _dot(change * ridge, change)
    residual = product.neg().mul_(keep)
    step = residual.clone()
    square = _dot(residual, residual)
    enough = square * tolerance**2
    for _ in range(iterations):
        if bool((square <= enough).all()):
            break
        torch.mm(step, h, out=product)
        curvature = _dot(step, product)
        firm = curvature > rounding * _dot(step, step)
        length = torch.where(firm & (square > enough), square / curvature, 0.0)
        change.addcmul_(step, length)
        residual.addcmul_(product.mul_(keep), length, value=-1)
        previous, square = square, _dot(residual, residual)
        step.mul_(torch.where(previous > 0, square / previous, 0.0)).add_(residual)
    torch.mm(change, h, out=product)
    after = _dot(change, product) - _dot(change * ridge, change)
    sure = after + rounding * _dot(change, change) <= before
    return before, torch.where(sure, after, torch.inf)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(rows, n), (rows, n) -> (rows, 1)."""
    dot: Tensor = torch.linalg.vecdot(a, b)
    return dot[:, None]

"""What solvers take a second-moment matrix apart into: SparseGPT a triangular factor, ALPS eigenvectors.

H: (in, in) symmetric.  U: upper triangular with H^-1 = U^T U, so that U_ii^2 is the i-th diagonal entry of the
inverse of H restricted to the inputs i, i+1, ...
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import NumericalFailure


@dataclass(frozen=True)
class InverseFactor:
    """`upper` is U; `dead` marks inputs that were always zero; `note` says what had to be done, or is empty."""

    upper: Tensor
    dead: Tensor
    note: str = ""


def inverse_factor(gram: Tensor, damping: float = 0.01, retries: int = 3) -> InverseFactor:
    """U for H = gram + damping * mean(diag(gram)) * I.

    A matrix that is not positive definite is tried again with ten times the damping, `retries` times; then the
    off-diagonal entries are dropped.

    Args:
        gram: (in, in) second-moment matrix; not changed.
        damping: share of the mean of the diagonal that is added to it.

    Source:
        Frantar and Alistarh 2023, arXiv:2301.00774, section 3. One factorisation of the reversed matrix and one
        triangular inverse stand for its three steps; the factor is the same, since it is unique.

    >>> factor = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), damping=0.0)
    >>> (factor.upper.T @ factor.upper).inverse().round(decimals=3).tolist()
    [[2.0, 1.0], [1.0, 2.0]]
    """
    dead = gram.diagonal() == 0
    h = gram.clone()
    diagonal = h.diagonal()
    step = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal[dead] = step  # the references put 1 here and into the mean, so that the scale of X would matter
    added = 0.0
    for attempt in range(retries + 1):
        wanted = damping * 10**attempt
        diagonal += (wanted - added) * step
        added = wanted
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            upper = _invert_upper(lower.flip(0, 1))
            note = f"not positive definite; damping raised from {damping:g} to {wanted:g}" if attempt else ""
            return InverseFactor(upper, dead, note)
    note = f"not positive definite even with damping {added:g}; only its diagonal was used"
    return InverseFactor(torch.diag(diagonal.clamp(min=torch.finfo(h.dtype).tiny).rsqrt()), dead, note)


def _invert_upper(u: Tensor) -> Tensor:
    """Half by half, so that nearly all of it is products of matrices: twice as fast as one triangular solve."""
    n = len(u)
    if n <= 192:
        small: Tensor = torch.linalg.solve_triangular(u, torch.eye(n, dtype=u.dtype, device=u.device), upper=True)
        return small
    half = n // 2
    inverse = torch.zeros_like(u)
    inverse[:half, :half] = first = _invert_upper(u[:half, :half])
    inverse[half:, half:] = last = _invert_upper(u[half:, half:])
    inverse[:half, half:] = -(first @ (u[:half, half:] @ last))
    return inverse


@dataclass(frozen=True)
class Spectrum:
    """diag(rms)^-1 H diag(rms)^-1 = vectors diag(values) vectors^T, values >= 0; where `dead`, 1 divides."""

    rms: Tensor
    dead: Tensor
    values: Tensor
    vectors: Tensor


def spectrum(gram: Tensor) -> Spectrum:
    """Eigenvalues and eigenvectors of H = `gram`, (in, in), in units in which every input has power one.

    Raises:
        NumericalFailure: `gram` is not finite.

    >>> spectrum(torch.tensor([[4.0, 2.0], [2.0, 4.0]])).values.round(decimals=3).tolist()
    [0.5, 1.5]
    """
    if not bool(torch.isfinite(gram).all()):
        raise NumericalFailure(f"a second-moment matrix of shape {tuple(gram.shape)} is not finite")
    rms = gram.diagonal().sqrt()
    dead = rms == 0
    values, vectors = torch.linalg.eigh(scaled(gram, rms))
    return Spectrum(rms, dead, values.clamp_(min=0), vectors)


def scaled(gram: Tensor, rms: Tensor) -> Tensor:
    """`gram`, (in, in), in units of `rms`, (in,); rows and columns of dead inputs are 0."""
    unit = rms.where(rms > 0, 1.0)
    return gram / unit / unit[:, None]

"""alpha: blocks with heavy-tailed spectra keep more.

Lu et al. 2024 (NeurIPS), AlphaPruning, arXiv:2410.10912. A well-trained matrix W has a heavy-tailed density of the
eigenvalues l_1 <= ... <= l_n of W^T W. Its exponent by Hill's estimator over the k largest eigenvalues,

    alpha = 1 + k / sum_{i > n - k} ln(l_i / l_{n-k})

averaged over the layers of block b, gives with a = (alpha_b - min alpha) / (max alpha - min alpha)

    s_b = eta * target * (1 - epsilon + 2 * epsilon * a)

eta: the factor that meets the budget. The tail begins at the peak of the density of ln l (the fullest of 100 bins, as
the paper's default; its code then tries thresholds around the peak, which is left out here) or at the median.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.allocation.contract import NOTHING, Allocation, Evidence, by_block, spread
from secateur.errors import InvalidParameter
from secateur.models.layers import Layer

BINS = 100


@dataclass(frozen=True)
class Alpha(Allocation):
    """blocks whose matrices have heavy-tailed spectra keep more (one sparsity a block); needs no data

    Attributes:
        epsilon: how far a block's share of the target may lie from 1; the paper has 0.3 for Wanda, 0.2 for SparseGPT,
            0.5 for magnitude.
        tail: where the tail of the spectrum begins: at its "peak" or its "median".

    >>> Alpha(epsilon=0.1).tail
    'peak'
    """

    epsilon: float = 0.3
    tail: Literal["peak", "median"] = "peak"

    source = "Lu et al. 2024, arXiv:2410.10912"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise InvalidParameter("epsilon", "alpha", "a number in [0, 1)", self.epsilon)
        if self.tail not in ("peak", "median"):
            raise InvalidParameter("tail", "alpha", "'peak' or 'median'", self.tail)

    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, evidence: Evidence = NOTHING
    ) -> dict[Layer, float]:
        target, blocks = self.given(sparsity), by_block(layers)
        alphas = []
        for i, inside in enumerate(blocks):
            alphas.append(self.exponent(inside))
            evidence.progress(i + 1, len(blocks), f"spectra of {inside[0].block}")
        known = [a for a in alphas if math.isfinite(a)] or [0.0]
        low, width = min(known), max(known) - min(known)
        middle = sum(known) / len(known)
        shares = [
            1 - self.epsilon + 2 * self.epsilon * ((a if math.isfinite(a) else middle) - low) / width if width else 1.0
            for a in alphas
        ]
        sizes = [sum(layer.weight.numel() for layer in inside) for inside in blocks]
        mean = sum(share * n for share, n in zip(shares, sizes, strict=True)) / sum(sizes)
        return spread(blocks, [target * share / mean for share in shares], target)

    def exponent(self, layers: Sequence[Layer]) -> float:
        """Mean exponent of a block's layers; not a number where no layer has a tail."""
        shapes: dict[tuple[int, int], list[Layer]] = {}
        for layer in layers:  # experts of one shape go through one call
            shapes.setdefault(layer.shape, []).append(layer)
        found = [hill(values, self.tail) for alike in shapes.values() for values in spectra(alike)]
        known = [a for a in found if math.isfinite(a)]
        return sum(known) / len(known) if known else math.nan


def spectra(layers: Sequence[Layer]) -> Tensor:
    """(layers, min(out, in)) eigenvalues of W^T W, ascending, of layers of one shape; fp32 at least.

    They are those of the smaller of W^T W and W W^T, besides zeros.
    """
    weight = torch.stack([layer.weight for layer in layers])
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    wide = weight.shape[1] <= weight.shape[2]
    eigenvalues: Tensor = torch.linalg.eigvalsh(weight @ weight.mT if wide else weight.mT @ weight)
    return eigenvalues


def hill(eigenvalues: Tensor, tail: str = "peak") -> float:
    """The exponent alpha of a spectrum (n,), ascending; not a number where the tail is empty or flat.

    Eigenvalues below n * eps times the largest are rounding, and left out.

    >>> round(hill(torch.tensor([1.0, 1.0, math.e, math.e]), "median"), 4)  # k = 2, both at ln = 1
    2.0
    """
    values = eigenvalues.double()
    values = values[values > len(values) * torch.finfo(eigenvalues.dtype).eps * float(values[-1])].log()
    if len(values) < 2:
        return math.nan
    if tail == "peak":
        low, high = float(values[0]), float(values[-1])
        place = ((values - low) / (high - low) * BINS).long().clamp_(max=BINS - 1) if high > low else None
        if place is None:
            return math.nan
        threshold = low + (high - low) * int(place.bincount(minlength=BINS).argmax()) / BINS
        values = values[values >= threshold]
    else:
        threshold = float(values[len(values) - len(values) // 2 - 1])
        values = values[-(len(values) // 2) :]
    total = float((values - threshold).sum())
    return 1 + len(values) / total if total > 0 else math.nan

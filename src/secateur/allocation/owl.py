"""owl: blocks with more outlying scores keep more.

Yin et al. 2024 (ICML), arXiv:2310.05175. With the scores A_ij = |W_ij| * ||X_j|| of all layers of block b:

    D_b = share of A above M * mean(A),  scaled over the blocks to [0, 2 lambda]
    s_b = target - D_b + mean(D)

W: (out, in) weight.  X: (tokens, in) inputs in the dense model.  lambda: `bound`.  M: `outlier`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.allocation.contract import NOTHING, Allocation, Evidence, by_block, spread
from secateur.errors import InvalidParameter
from secateur.models.layers import Layer
from secateur.statistics import SecondMoment


@dataclass(frozen=True)
class Owl(Allocation):
    """blocks with more outlying scores keep more (one sparsity a block)

    Attributes:
        bound: how far a block's sparsity may lie from the target (lambda in the paper).
        outlier: how many times the mean score an outlier is (M in the paper).

    >>> Owl(bound=0.04).outlier
    5.0
    """

    bound: float = 0.08
    outlier: float = 5.0

    needs = (SecondMoment,)
    source = "Yin et al. 2024, arXiv:2310.05175"

    def __post_init__(self) -> None:
        if not 0 <= self.bound < 0.5:
            raise InvalidParameter("bound", "owl", "a number in [0, 0.5)", self.bound)
        if not 1 <= self.outlier < math.inf:
            raise InvalidParameter("outlier", "owl", "a number >= 1", self.outlier)

    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, evidence: Evidence = NOTHING
    ) -> dict[Layer, float]:
        target, blocks = self.given(sparsity), by_block(layers)
        ratio = torch.tensor([self.outlier_ratio(inside, evidence.seen) for inside in blocks], dtype=torch.float64)
        width = float(ratio.max() - ratio.min())
        scaled = (ratio - ratio.min()) / width * 2 * self.bound if width else torch.zeros_like(ratio)
        return spread(blocks, [target - float(d) for d in scaled], target)

    def outlier_ratio(self, layers: Sequence[Layer], seen: Mapping[Layer, SecondMoment]) -> float:
        """Share of a block's scores that exceed `outlier` times their mean."""
        scores = [wanda_score(layer.weight, seen.get(layer)) for layer in layers]
        count = sum(score.numel() for score in scores)
        limit = self.outlier * sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
        return sum(int((score > limit).sum()) for score in scores) / count


def wanda_score(weight: Tensor, seen: SecondMoment | None) -> Tensor:
    """(out, in) |W_ij| * ||X_j||, or |W_ij| alone where no token was seen; fp32 at least."""
    size = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
    return size * seen.rms.to(size.dtype) if seen is not None and seen.tokens else size

"""Which scores stay: lowest first until a budget is spent, or by the paper's percentile.

A candidate is a tile, or a diagonal of tiles: its weight is how many tiles it is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from secateur.errors import NumericalFailure


def drop_lowest(score: Tensor, weight: Tensor, forced: Tensor, drop: int) -> Tensor:
    """Let the lowest candidates go until tiles of about `drop` are gone.

    With weights of 1 exactly `drop` go. With others the last candidate goes only where that comes nearer. Among equal
    scores the earlier position goes first. What is forced never goes, and may leave the budget unspent.

    Args:
        score: (n,) finite, higher = keep.
        weight: (n,) int64 >= 0, tiles.
        forced: (n,) bool, True = stays whatever its score.
        drop: tiles.

    Returns:
        (n,) bool, True = stays.

    >>> three = torch.ones(3, dtype=torch.long)
    >>> drop_lowest(torch.tensor([2.0, 1.0, 1.0]), three, three < 0, 1).tolist()
    [True, False, True]
    """
    check_finite(score)
    free = (~forced).nonzero().flatten()
    order = free[score[free].sort(stable=True).indices]
    gone = weight[order].cumsum(0)
    number = int(torch.searchsorted(gone, drop, right=True))
    if number < len(order):
        before = int(gone[number - 1]) if number else 0
        number += int(gone[number]) - drop < drop - before
    keep = torch.ones_like(forced)
    keep[order[:number]] = False
    return keep


def above_percentile(score: Tensor, others: int, share: float) -> Tensor:
    """The paper's rule: keep what is greater than the percentile of all scores and of `others` zeros.

    Args:
        score: (n,) scores of the pairs or tiles that may meet.
        others: how many may not; they count with score 0.
        share: p in [0, 1). The percentile is one of the scores, the nearest.

    Returns:
        (n,) bool, True = stays. Everything equal to the percentile goes, so more than a share p may.

    Source:
        Rugina et al. 2020, arXiv:2012.02030; the released code, mem_transformer.py.

    >>> above_percentile(torch.tensor([1.0, 2.0, 3.0]), 1, 0.3).tolist()
    [False, True, True]
    """
    check_finite(score)
    everything = torch.cat([score.new_zeros(others), score]).cpu().numpy()
    return score > float(np.percentile(everything, 100 * share, method="nearest"))


def check_finite(score: Tensor) -> None:
    """Raise unless all scores are numbers."""
    if not torch.isfinite(score.sum(dtype=torch.float64)):
        raise NumericalFailure(
            f"{int((~torch.isfinite(score)).sum())} of {score.numel()} attention scores are not finite"
        )

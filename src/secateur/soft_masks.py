"""How many weights each row loses, as something that can be learnt while the total stays what it is.

A unit is a row, or a whole layer whose rows all lose the same share. Each has a logit; a constant that is added to all
of them keeps the weights lost together at the budget:

    a_u = sigmoid(logit(target_u) + theta_u + c),   c such that  sum_u size_u a_u = sum_u size_u target_u

So theta = 0 is the target itself, and every share in (0, 1) can be reached. A row drops the first a_u * columns of its
ranking. Its mask has no slope, so one is lent to it: the share is taken as evenly spread over a window around a_u (the
candidates, all equally likely), and the weight at rank r then stays with probability P_r, which falls from 1 to 0
across the window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.errors import NumericalFailure


def ranks(score: Tensor) -> Tensor:
    """(out, in) -> the place of every entry in its row, 0 = lowest, ties by position; int32.

    >>> ranks(torch.tensor([[3.0, 1.0, 1.0]])).tolist()
    [[2, 0, 1]]
    """
    if not torch.isfinite(score).all():
        bad = int((~torch.isfinite(score)).sum())
        raise NumericalFailure(f"{bad} of {score.numel()} scores of shape {tuple(score.shape)} are not finite numbers")
    order = score.argsort(dim=1, stable=True)
    places = torch.arange(score.shape[1], dtype=torch.int32, device=score.device).expand_as(score)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places)


def slope(pull: Tensor, rank: Tensor, share: Tensor, width: float) -> Tensor:
    """Derivative of a loss by the shares of a layer, through the soft masks.

    Args:
        pull: (out, in) derivative of the loss by every entry of the mask.
        rank: (out, in) places as `ranks` gives them.
        share: (out,), or (1,) for all rows.
        width: of the window, as a share of the row; narrower next to 0 and 1, so that it stays inside and centred, and
            never under one weight.

    Returns:
        As `share`: minus the mean of `pull` over the window, times the number of weights.

    >>> slope(torch.ones(1, 10), torch.arange(10)[None], torch.tensor([0.5]), 0.2).tolist()
    [-10.0]
    """
    columns = rank.shape[1]
    span = (torch.minimum(share, 1 - share) * 2).clamp(max=width).mul(columns).clamp(min=1.0).to(pull.dtype)[:, None]
    centre = (share * columns).to(pull.dtype)[:, None] - 0.5
    inside = (rank - centre).abs_().neg_().add_((span + 1) / 2).clamp_(0, 1)  # how much of [r, r + 1] is in the window
    by_row = -(inside.mul_(pull).sum(1) / span[:, 0]) * columns
    return by_row if len(share) > 1 else by_row.sum(0, keepdim=True)


class Shares:
    """The shares of a block's units; `theta` (units,) is what is learnt, in fp64.

    Args:
        weights: (out, in) of every layer; only their shapes and their device count.
        targets: sparsity of every layer at theta = 0; together they are the budget.
        per_row: whether each row is a unit, or each layer.

    >>> shares = Shares([torch.ones(2, 4), torch.ones(1, 8)], [0.5, 0.5], per_row=True)
    >>> shares.theta[0] = -1.0
    >>> [[round(a, 3) for a in layer.tolist()] for layer in shares.now()], [c.tolist() for c in shares.counts()]
    ([[0.319, 0.56], [0.56]], [[1, 2], [5]])
    """

    def __init__(self, weights: Sequence[Tensor], targets: Sequence[float], *, per_row: bool) -> None:
        shapes, device = [(len(weight), weight.shape[1]) for weight in weights], weights[0].device
        self.units = [rows if per_row else 1 for rows, _ in shapes]
        self.columns = [columns for _, columns in shapes]
        sizes = [columns if per_row else rows * columns for rows, columns in shapes]
        self.size = self._spread(sizes).double().to(device)
        self.start = torch.logit(self._spread(targets).double()).to(device)
        self.budget = round(sum(t * rows * columns for t, (rows, columns) in zip(targets, shapes, strict=True)))
        self.theta = torch.zeros_like(self.start)

    def _spread(self, values: Sequence[float]) -> Tensor:
        return torch.cat(
            [torch.full((n,), float(v), dtype=torch.float64) for n, v in zip(self.units, values, strict=True)]
        )

    def now(self) -> list[Tensor]:
        """(units,) of every layer, fp64."""
        return list(self._all().split(self.units))

    def _all(self) -> Tensor:
        logit = self.start + self.theta
        low, high = -100.0, 100.0
        for _ in range(70):  # bisection to the last bits; the total grows with c
            c = (low + high) / 2
            low, high = (c, high) if float(self.size @ torch.sigmoid(logit + c)) < self.budget else (low, c)
        return torch.sigmoid(logit + high)

    def gradient(self, by_share: Sequence[Tensor]) -> Tensor:
        """Derivative of a loss by theta, from those by the shares; what the constant c takes back is in it."""
        share, by = self._all(), torch.cat([part.double() for part in by_share])
        bend = share * (1 - share)
        total = self.size @ bend
        price = (by @ bend) / total if total > 0 else 0.0  # of one more weight dropped anywhere
        return bend * (by - price * self.size)

    def counts(self) -> list[Tensor]:
        """Whole numbers of weights that every row of a layer drops: (rows,) or (1,) for all of them, int64.

        With rows as units they add up to the budget exactly. With layers as units a step is one weight in every row
        of a layer, so the total is within half the smallest number of rows.
        """
        columns = self._spread(self.columns).to(self.size.device)
        step = self.size / columns  # weights lost when a unit's rows lose one each
        exact = self._all() * columns
        whole = exact.add(1e-9).floor()
        order = (exact - whole).mul(1e6).round().argsort(descending=True, stable=True).tolist()
        count, steps, limits = whole.tolist(), step.tolist(), columns.tolist()
        left = self.budget - sum(c * s for c, s in zip(count, steps, strict=True))
        while order:
            before = left
            for u in order:  # the largest remainders first
                if abs(left - steps[u]) < abs(left) and count[u] < limits[u]:
                    count[u] += 1
                    left -= steps[u]
                elif left < 0 and abs(left + steps[u]) < abs(left) and count[u] > 0:
                    count[u] -= 1
                    left += steps[u]
            if left == before:
                break
        return list(torch.tensor(count, dtype=torch.int64, device=self.size.device).split(self.units))

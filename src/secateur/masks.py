"""Scores to keep masks: which weights stay, with exact counts.

A score is (out, in), higher = keep. A keep mask has the same shape, True = stays.
Exactly `round(count * sparsity)` entries of every comparison group go; among equal scores those at the
earlier position go first, on every machine. Widths that a pattern cannot divide are an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from secateur.errors import InvalidParameter, NumericalFailure, UnknownName, UsageError

Per = Literal["row", "layer", "column", "model"]


def check_sparsity(sparsity: float, owner: str = "prune") -> float:
    """`sparsity` as a float when it lies in [0, 1), an error otherwise.

    >>> check_sparsity(0.5)
    0.5
    """
    number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if not number or not math.isfinite(sparsity) or not 0 <= sparsity < 1:
        raise InvalidParameter("sparsity", owner, "a number in [0, 1), the share of weights removed", sparsity)
    return float(sparsity)


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go; scores are compared within a row, the layer, a column, or all layers of the model.

    >>> Unstructured("row").keep(torch.tensor([[1.0, 3.0, 2.0, 4.0]]), 0.5)
    tensor([[False,  True, False,  True]])
    """

    per: Per = "row"

    def __post_init__(self) -> None:
        if self.per not in get_args(Per):
            raise InvalidParameter("per", "Unstructured", f"one of {', '.join(get_args(Per))}", self.per)

    def __str__(self) -> str:
        return f"unstructured per {self.per}"

    def check(self, width: int, where: str) -> None:
        """Every width is fine."""

    def keep(self, score: Tensor, sparsity: float) -> Tensor:
        """Keep mask of one layer.

        Args:
            score: (out, in), finite, higher = keep.
            sparsity: share of every comparison group that goes, in [0, 1).

        Returns:
            (out, in) bool. For per="model" the layer is the whole model: see `keep_model`.

        Raises:
            NumericalFailure: a score is not finite.
        """
        if self.per == "row":
            return keep_highest(score, drop_count(score.shape[1], sparsity))
        if self.per == "column":
            return keep_highest(score.t().contiguous(), drop_count(score.shape[0], sparsity)).t()
        return keep_highest(score.reshape(1, -1), drop_count(score.numel(), sparsity)).view(score.shape)

    def keep_part(self, score: Tensor, sparsity: float, start: int) -> Tensor:
        """Keep mask of some consecutive columns of a layer, chosen among themselves.

        Counts are those of the columns up to the end less those up to `start`, so that the parts of a layer add
        up to exactly what `keep` would drop.

        Args:
            score: (out, columns) scores of the columns from `start` on.

        >>> [int((~Unstructured("row").keep_part(torch.rand(1, 3), 0.5, start)).sum()) for start in (0, 3)]
        [2, 1]
        """
        rows, columns = score.shape
        if self.per == "column":
            return self.keep(score, sparsity)
        unit = 1 if self.per == "row" else rows
        drop = drop_count((start + columns) * unit, sparsity) - drop_count(start * unit, sparsity)
        groups = score.contiguous() if self.per == "row" else score.reshape(1, -1)
        return keep_highest(groups, drop).view(rows, columns)


@dataclass(frozen=True)
class NM:
    """n of every m consecutive inputs of a row are kept, so the sparsity is 1 - n/m.

    >>> NM(2, 4).keep(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 0.5)
    tensor([[ True, False,  True, False]])
    >>> NM(1, 4).sparsity
    0.75
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 0 < self.n <= self.m):
            raise InvalidParameter("n:m", "NM", "two integers with 0 < n <= m, n kept of m", f"{self.n}:{self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Share of weights removed."""
        return 1 - self.n / self.m

    def check(self, width: int, where: str) -> None:
        """Raise `UsageError` unless `width` inputs divide into groups of m."""
        if width % self.m:
            raise UsageError(
                f"{self} needs a number of inputs divisible by {self.m}; {where} has {width}. "
                f"Leave it out with --exclude, or choose another pattern."
            )

    def keep(self, score: Tensor, sparsity: float | None = None) -> Tensor:
        """(out, in) bool, exactly n True in every m consecutive inputs; n and m fix the sparsity."""
        _check_finite(score)
        self.check(score.shape[-1], f"a score of shape {tuple(score.shape)}")
        groups = score.reshape(-1, self.m)
        if self.m > 16:
            order = groups.argsort(dim=1, stable=True)
            rank = torch.empty_like(order).scatter_(
                1, order, torch.arange(self.m, device=order.device).expand_as(order)
            )
            return (rank >= self.m - self.n).view(score.shape)
        columns = groups.t().contiguous()  # (m, groups): every comparison runs over contiguous memory
        rank = torch.zeros(columns.shape, dtype=torch.uint8, device=score.device)
        for i in range(1, self.m):
            for j in range(i):
                later_wins = columns[i] >= columns[j]  # a tie goes to the later position
                rank[i] += later_wins
                rank[j] += ~later_wins
        return (rank >= self.m - self.n).t().reshape(score.shape)


Pattern = Unstructured | NM

PATTERNS: dict[str, str] = {
    "row": "unstructured, scores compared within each output row",
    "layer": "unstructured, scores compared over the whole layer",
    "column": "unstructured, scores compared within each input column",
    "model": "unstructured, scores compared over all pruned layers at once",
    "n:m": "n of every m consecutive inputs are kept: 2:4, 4:8, 1:4, 6:8, any n and m",
}


def parse_pattern(text: str) -> Pattern:
    """The pattern that a command-line word names.

    >>> parse_pattern("2:4"), parse_pattern("layer")
    (NM(n=2, m=4), Unstructured(per='layer'))
    """
    if text in get_args(Per):
        return Unstructured(text)  # type: ignore[arg-type]  # just checked
    n, colon, m = text.partition(":")
    if colon and n.isdecimal() and m.isdecimal():
        return NM(int(n), int(m))
    raise UnknownName("pattern", text, PATTERNS)


def keep_model(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Keep masks of many layers whose scores are compared with each other.

    Args:
        scores: one (out, in) tensor a layer; equal scores go in this order of layers, then by position.
        sparsity: share of all entries together that goes, in [0, 1).

    Returns:
        One bool mask a layer; together they drop exactly `round(total * sparsity)` entries.

    >>> [k.tolist() for k in keep_model([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])], 0.5)]
    [[[False, False]], [[True, True]]]
    """
    flat = torch.cat([score.reshape(-1) for score in scores])
    keep = keep_highest(flat[None], drop_count(flat.numel(), sparsity))[0]
    parts = keep.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def zero_dropped_(weight: Tensor, keep: Tensor) -> Tensor:
    """Zero in place what is not kept. Finite weights only; adding 0 turns -0 into 0.

    >>> zero_dropped_(torch.tensor([-1.0, 2.0]), torch.tensor([False, True]))
    tensor([0., 2.])
    """
    return weight.mul_(keep).add_(0.0)  # several times faster than masked_fill_ on the CPU


def drop_count(count: int, sparsity: float) -> int:
    """How many of `count` entries go: the nearest whole number, a half to the even one.

    >>> drop_count(576, 0.5), drop_count(10, 0.33)
    (288, 3)
    """
    return round(count * sparsity)


def keep_highest(score: Tensor, drop: int) -> Tensor:
    """(groups, n) scores -> (groups, n) bool; exactly the `drop` lowest of every group are False.

    >>> keep_highest(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), 2).tolist()
    [[False, True, True, False]]
    """
    n = score.shape[1]
    _check_finite(score)
    if drop == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if drop == n:
        return torch.zeros_like(score, dtype=torch.bool)
    limit = _kth_smallest(score, drop)  # the highest score that goes
    keep = score > limit
    surplus = (n - drop) - keep.count_nonzero(dim=1)  # equal to the limit, yet they must stay
    tied = surplus.nonzero().flatten()
    if tied.numel():
        equal = score[tied] == limit[tied]
        from_the_end = equal.flip(1).cumsum(1).flip(1)
        keep[tied] |= equal & (from_the_end <= surplus[tied, None])
    return keep


def _kth_smallest(score: Tensor, k: int) -> Tensor:
    """(groups, n), 1 <= k <= n -> (groups, 1). On the CPU numpy's vectorised partition is the fast one.

    One thread is faster than two here: torch's workers still spin when numpy's would start (docs/LOG.md).
    """
    if score.device.type != "cpu" or score.dtype not in (torch.float32, torch.float64):
        return score.kthvalue(k, dim=1, keepdim=True).values
    array = score.detach().numpy()
    return torch.from_numpy(np.partition(array, k - 1, axis=1)[:, k - 1 : k].copy())


def _check_finite(score: Tensor) -> None:
    if torch.isfinite(score.sum()):
        return
    bad = int((~torch.isfinite(score)).sum())
    if bad:  # otherwise only the sum was too large
        raise NumericalFailure(f"{bad} of {score.numel()} scores of shape {tuple(score.shape)} are not finite numbers")

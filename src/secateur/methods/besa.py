"""besa: learn how many weights each row, or each layer, of a block loses, by what the block then gives.

Xu et al. 2024 (ICLR), arXiv:2402.16880. The weights of a row are ranked once; the share a of them that goes is learnt,
with a straight-through estimator for the mask:

    S_ij = |W_ij| * ||X_j||_2                             Wanda's score (or |W_ij|)
    M_ij = 1[rank of S_ij in row i >= a_i * columns]      dM/da_i: that of a soft mask, see soft_masks
    L    = mean_c (sum_t (Y - Y')_tc^2 / sum_t Y_tc^2)    Y, Y': (tokens, width) of the block, dense and masked

The paper pulls a block to its sparsity with a penalty; here its total is held at every step (soft_masks.Shares).
"""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import InvalidParameter
from secateur.masks import Pattern, Unstructured, zero_dropped_
from secateur.methods import BlockView, LayerView, Method
from secateur.soft_masks import Shares, ranks, slope
from secateur.statistics import SecondMoment

_OFF = "per row, a block is within half its smallest layer's number of rows of its budget"


@dataclass(frozen=True)
class BESA(Method):
    """Blockwise learned sparsity: per "layer" every row finds its own share, per "row" every layer one for its rows.

    Attributes:
        steps: gradient steps a block. 0 leaves all shares at their targets.
        sequences: calibration sequences that a step reads; batches are made no larger than divides them.
        lr: Adam's step on the logits of the shares; it falls to 0 over the steps.
        width: how wide the soft mask's slope is, as a share of the row.
        metric: what ranks the weights of a row, "wanda" or "magnitude".
    """

    steps: int = 16
    sequences: int = 4
    lr: float = 0.1
    width: float = 0.1
    metric: Literal["wanda", "magnitude"] = "wanda"

    needs = (SecondMoment,)
    source = "Xu et al. 2024, ICLR, arXiv:2402.16880"
    patterns = ("row", "layer")
    why = "it learns how many weights each row or layer loses"

    def __post_init__(self) -> None:
        for name, value, lowest in (("steps", self.steps, 0), ("sequences", self.sequences, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise InvalidParameter(name, "besa", f"a whole number >= {lowest}", value)
        if not 0 < self.lr < math.inf:
            raise InvalidParameter("lr", "besa", "a finite number > 0", self.lr)
        if not 0 < self.width <= 1:
            raise InvalidParameter("width", "besa", "a number in (0, 1]", self.width)
        if self.metric not in ("wanda", "magnitude"):
            raise InvalidParameter("metric", "besa", "'wanda' or 'magnitude'", self.metric)

    @property
    def native(self) -> Pattern:
        return Unstructured("layer")

    def together(self, batch_size: int) -> int:
        return math.gcd(batch_size, self.sequences)

    def prune_block(self, block: BlockView, pattern: Pattern) -> list[Tensor]:
        ranking = [ranks(self._score(layer)) for layer in block.layers]
        shares = Shares([layer.weight for layer in block.layers], block.targets, per_row=pattern == self.native)
        self._learn(block, ranking, shares)
        keeps = [r >= count[:, None] for r, count in zip(ranking, shares.counts(), strict=True)]
        for layer, keep in zip(block.layers, keeps, strict=True):
            zero_dropped_(layer.weight, keep)
        if sum(int((~keep).sum()) for keep in keeps) != shares.budget:
            block.layers[0].warnings.append(_OFF)
        return keeps

    def _score(self, layer: LayerView) -> Tensor:
        size = layer.weight.abs()
        return size if self.metric == "magnitude" else size.mul_(layer[SecondMoment].rms.to(size.dtype))

    def _learn(self, block: BlockView, ranking: list[Tensor], shares: Shares) -> None:
        dense, unit = [layer.weight for layer in block.layers], 0.0
        adam = torch.optim.Adam([shares.theta], lr=self.lr, eps=1e-2)  # gradients in units of the first one's size
        for step, calls in enumerate(islice(block.turns(self.sequences), self.steps if shares.budget else 0)):
            now = shares.now()
            masked = [w * (r >= (a * r.shape[1]).round()[:, None]) for w, r, a in zip(dense, ranking, now, strict=True)]
            pull = block.error_gradient(masked, calls)
            by_mask = [w * g for w, g in zip(dense, pull, strict=True)]  # straight through: M scales W
            gradient = shares.gradient([slope(*x, self.width) for x in zip(by_mask, ranking, now, strict=True)])
            unit = unit or float(gradient.square().mean().sqrt())
            if not unit:
                return block.warn("its layers stay at their targets: no gradient reaches them")
            shares.theta.grad = gradient / unit
            adam.param_groups[0]["lr"] = self.lr * (1 - step / self.steps)
            adam.step()

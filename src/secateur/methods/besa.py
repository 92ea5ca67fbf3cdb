"""besa: learn how many weights each row, or each layer, of a block loses, by what the block then gives.

Xu et al. 2024 (ICLR), arXiv:2402.16880. Each row's weights are ranked once by a score S; what is learnt is the
share a of a row that goes, under the straight-through estimator:

    S_ij = |W_ij| * ||X_j||_2                            Wanda's score, or |W_ij|
    M_ij = 1[rank of S_ij in its row >= a_i * columns]    dM/da: as a soft mask's, see soft_masks
    L    = mean_c  sum_t (Y - Y')_tc^2 / sum_t Y_tc^2    Y, Y': (tokens, width) of the block, dense and masked

The paper adds a penalty that holds the block near its sparsity. Here its budget is met at every step, so that there is
nothing to weigh against the loss: a constant added to all logits, and one whole number of weights in the end.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.blocks import BlockCall
from secateur.errors import InvalidParameter
from secateur.masks import Pattern, Unstructured, zero_dropped_
from secateur.methods import BlockView, LayerView, Method
from secateur.soft_masks import Shares, ranks, slope
from secateur.statistics import SecondMoment


@dataclass(frozen=True)
class BESA(Method):
    """Blockwise learned sparsity. Per "layer" every row has its own share (the default), per "row" every layer has.

    Attributes:
        steps: gradient steps a block; 0 leaves every layer at its target, which is Wanda.
        sequences: calibration sequences a step; the batch size is lowered to a divisor of it.
        lr: of Adam, on the logits of the shares; it falls to zero over the steps.
        width: of the soft mask's window, as a share of the row.
        metric: what ranks the weights of a row: "wanda" or "magnitude".
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

    @property
    def native(self) -> Pattern:
        return Unstructured("layer")

    def together(self, batch_size: int) -> int:
        return math.gcd(batch_size, self.sequences)

    def prune_block(self, block: BlockView, pattern: Pattern) -> list[Tensor]:
        rank = [ranks(self._score(layer)) for layer in block.layers]
        per_row = pattern == Unstructured("layer")
        targets = [min(target, 1.0) for target in block.targets]
        shares = Shares([(len(r), r.shape[1]) for r in rank], targets, per_row=per_row, device=rank[0].device)
        self._learn(block, rank, shares)
        keeps = [r >= count[:, None] for r, count in zip(rank, shares.counts(), strict=True)]
        for layer, keep in zip(block.layers, keeps, strict=True):
            zero_dropped_(layer.weight, keep)
        return keeps

    def _score(self, layer: LayerView) -> Tensor:
        size = layer.weight.abs()
        return size if self.metric == "magnitude" else size * layer[SecondMoment].rms.to(size.dtype)

    def _learn(self, block: BlockView, rank: list[Tensor], shares: Shares) -> None:
        energy = torch.stack([call.dense.double().square().sum(0) for call in block.calls]).sum(0)  # (width,)
        mean = energy / sum(len(call.dense) for call in block.calls)
        adam = torch.optim.Adam([shares.theta], lr=self.lr, eps=1e-2)
        for step, calls in zip(range(self.steps), self._turns(block.calls)):
            now = shares.now()
            weights = [
                zero_dropped_(x.weight.clone(), r >= (a * r.shape[1]).round()[:, None])
                for x, r, a in zip(block.layers, rank, now, strict=True)
            ]
            pull = self._pull(block, calls, weights, mean)
            by = [
                slope(g.mul_(x.weight), r, a, self.width)
                for g, x, r, a in zip(pull, block.layers, rank, now, strict=True)
            ]
            gradient = shares.gradient(by)
            if step == 0:
                unit = gradient.square().mean().sqrt()
            shares.theta.grad = gradient / unit
            adam.param_groups[0]["lr"] = self.lr * (1 - step / self.steps)
            adam.step()

    def _pull(self, block: BlockView, calls: list[BlockCall], weights: list[Tensor], mean: Tensor) -> list[Tensor]:
        """dL/dW of the masked block on some batches."""
        total = [torch.zeros_like(w) for w in weights]
        tokens = sum(len(call.dense) for call in calls)
        for call in calls:
            leaves = [w.requires_grad_() for w in weights]
            with torch.enable_grad(), block.using(leaves):
                error = (call.run() - call.dense).to(leaves[0].dtype)
                loss = (error.square().sum(0) / mean.to(error.dtype)).mean() / tokens
                print(block.name, float(loss)*tokens/len(call.dense)) if VERBOSE else 0
                for sum_, g in zip(total, torch.autograd.grad(loss, leaves, allow_unused=True)):
                    if g is not None:
                        sum_.add_(g)
        return total

    def _turns(self, calls: list[BlockCall]) -> Iterator[list[BlockCall]]:
        """Without end, batches of at least `sequences` sequences together, in order."""
        turn: list[BlockCall] = []
        while True:
            for call in calls:
                turn.append(call)
                if sum(c.sequences for c in turn) >= self.sequences:
                    yield turn
                    turn = []
            if turn:
                yield turn
                turn = []
VERBOSE = False

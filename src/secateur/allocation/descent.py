"""descent: the sparsities at which the model's predictions change least, found by following their gradient.

Weights are dropped by their Wanda scores, S_ij = |W_ij| * ||X_j||, within each row. With the sparsities s of the
blocks (or layers) the model predicts Q(s), and the dense one P. Minimise

    KL(P, Q(s))  with  sum_b n_b s_b = target * sum_b n_b,  |s_b - target| <= bound

n_b: weights of block b. One backward pass gives every slope at once: lowering s_b puts the next weights back, so

    dKL / ds_b  =  - 1 / (2 delta) * sum of (dKL / dW_ij) * W_ij

over the weights that are kept at s_b - delta and gone at s_b + delta.
A step goes against the slope per weight, at most `stride` in a block, less from step to step; the best point seen
counts. Searched allocations in the field (EvoPress, Sieberling et al. 2025, arXiv:2410.14649) draw random changes and
measure each; slopes find a good one in far fewer passes, and the objective is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.allocation.contract import NOTHING, Allocation, Evidence, by_block, meet_budget
from secateur.allocation.trial import on_trial
from secateur.errors import InvalidParameter, check_whole
from secateur.models.layers import Layer
from secateur.statistics import SecondMoment

DELTA = 0.02


@dataclass(frozen=True)
class Descent(Allocation):
    """searched: gradient descent of the predictions' divergence from the dense model's

    It holds a second copy of the pruned weights and the activations of one window for a backward pass.

    Attributes:
        steps: forward and backward passes over `tokens`.
        tokens: of the calibration set that are looked at, in windows of at most 256.
        bound: how far a sparsity may lie from the target.
        stride: how far the first step moves the block with the steepest slope.
        per: one sparsity a "block" or a "layer".

    >>> Descent(steps=4).bound
    0.15
    """

    steps: int = 8
    tokens: int = 2048
    bound: float = 0.15
    stride: float = 0.04
    per: Literal["block", "layer"] = "block"

    needs = (SecondMoment,)
    source = "this project; the objective of Sieberling et al. 2025, arXiv:2410.14649"

    def __post_init__(self) -> None:
        for name in ("steps", "tokens"):
            check_whole(name, "descent", getattr(self, name))
        for name in ("bound", "stride"):
            if not 0 < getattr(self, name) < 0.5:
                raise InvalidParameter(name, "descent", "a number in (0, 0.5)", getattr(self, name))
        if self.per not in ("block", "layer"):
            raise InvalidParameter("per", "descent", "'block' or 'layer'", self.per)

    def work(self, tokens: int) -> float:
        return (3 * self.steps + 2) * min(1.0, self.tokens / max(tokens, 1))

    def memory(self, layers: Sequence[Layer]) -> int:
        return sum(layer.weight.numel() * (layer.weight.element_size() + 1) for layer in layers)

    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, evidence: Evidence = NOTHING
    ) -> dict[Layer, float]:
        target = self.given(sparsity)
        groups = by_block(layers) if self.per == "block" else [[layer] for layer in layers]
        sizes = [sum(layer.weight.numel() for layer in inside) for inside in groups]
        point = [target] * len(groups)
        if len(groups) == 1 or not target:
            return dict.fromkeys(layers, target)
        best, lowest = point, float("inf")
        with on_trial(layers, evidence, self.tokens) as trial:
            for step in range(self.steps + 1):
                given = {layer: s for inside, s in zip(groups, point, strict=True) for layer in inside}
                last = step == self.steps
                loss, slopes = trial.measure(given, 0.0 if last else DELTA)
                evidence.progress(step + 1, self.steps + 1, f"searching sparsities, divergence {loss:.4f}")
                if loss < lowest:
                    best, lowest = point, loss
                if not last:
                    per_weight = [sum(slopes[x] for x in inside) / n for inside, n in zip(groups, sizes, strict=True)]
                    stride = self.stride * (1 - step / self.steps)
                    point = self._step(point, per_weight, sizes, target, stride)
        return {layer: s for inside, s in zip(groups, best, strict=True) for layer in inside}

    def _step(
        self, point: list[float], slopes: list[float], sizes: list[int], target: float, stride: float
    ) -> list[float]:
        """Against the slopes, inside the box around the target, on the budget."""
        total = sum(sizes)
        mean = sum(slope * n for slope, n in zip(slopes, sizes, strict=True)) / total
        steepest = max(abs(slope - mean) for slope in slopes) or 1.0
        wanted = [s - stride * (slope - mean) / steepest for s, slope in zip(point, slopes, strict=True)]
        for _ in range(50):  # onto the budget and into the box, in turns
            wanted = [min(max(s, target - self.bound), target + self.bound) for s in wanted]
            wanted = meet_budget(wanted, sizes, target)
        return wanted

"""alps: choose the mask and the kept weights together, by alternating between the outputs and the pattern.

Meng et al. 2024, arXiv:2406.07831, algorithms 1 and 2. For every layer, minimise ||W X^T - W0 X^T||^2 with few weights
kept, in units in which every input has power one, H = X^T X / tokens + damping * I = Q diag(l) Q^T:

    W = W0 + (Z - U - W0) Q diag(r / (l + r)) Q^T       fits the outputs, pulled towards Z with strength r
    Z = keep * (W + U)                                  keep: the largest entries of W + U, as many as the pattern says
    U = W + U - Z                                       what Z lacks; it is 0 where Z is not

from Z = W0, U = 0. The pull r grows, the faster the more the mask still moves, until the mask rests. Conjugate
gradients can then fit the kept weights (algorithm 2, `refit`). W0: (out, in).  X: (tokens, in).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import InvalidParameter
from secateur.factor import scaled
from secateur.least_squares import fit_kept
from secateur.masks import Pattern
from secateur.methods import LayerView, Method
from secateur.statistics import Gram

_CHECK = 3  # steps between two looks at the mask
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # from this share of newly kept weights on, r grows by this factor


@dataclass(frozen=True)
class ALPS(Method):
    """Alternating directions (ADMM) on the l0-constrained layer problem.

    Attributes:
        iterations: at most this many steps; the mask usually rests after 30 to 50.
        refit: steps of conjugate gradients on the kept weights (algorithm 2); once the mask rests they change little.
        damping: what is added to the diagonal of H, whose entries are 1.
        pull: r at the start, rho in the paper.
    """

    iterations: int = 300
    refit: int = 0
    damping: float = 0.03
    pull: float = 0.1

    needs = (Gram,)
    source = "Meng et al. 2024, arXiv:2406.07831"

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("refit", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise InvalidParameter(name, "alps", f"a whole number >= {least}", getattr(self, name))
        if not 0 <= self.damping < float("inf"):
            raise InvalidParameter("damping", "alps", "a finite number >= 0", self.damping)
        if not 0 < self.pull < float("inf"):
            raise InvalidParameter("pull", "alps", "a finite number > 0", self.pull)

    def score(self, layer: LayerView) -> Tensor:
        seen = layer[Gram].spectrum
        return _size(layer.weight * seen.rms, seen.dead)  # what the first mask is chosen by

    def prune_layer(self, layer: LayerView, pattern: Pattern, sparsity: float) -> Tensor:
        seen = layer[Gram].spectrum
        w0 = layer.weight * seen.rms
        energy, pull = seen.values + self.damping, self.pull
        z, u, seen_keep = w0, torch.zeros_like(w0), None
        for step in range(1, self.iterations + 1):
            w = ((z - u).sub_(w0) @ seen.vectors).mul_(pull / (energy + pull)) @ seen.vectors.t()
            u = w.add_(w0).add_(u)
            keep = pattern.keep(_size(u, seen.dead), sparsity)
            z = u * keep
            u.sub_(z)
            if step % _CHECK == 0:
                moved = 1.0 if seen_keep is None else float((keep & ~seen_keep).sum() / keep.sum().clamp(min=1))
                if not moved:
                    break
                seen_keep = keep
                growth = next(growth for share, growth in _GROWTH if moved >= share)
                pull *= growth
                u /= growth
        change = z.sub_(w0)
        if self.refit:
            h, fitted = scaled(layer[Gram].mean, seen.rms), change.clone()
            h.diagonal().add_(self.damping)
            _, after = fit_kept(h, fitted, keep, torch.zeros_like(seen.rms), iterations=self.refit)
            change = torch.where(torch.isfinite(after), fitted, change)
        change.div_(seen.rms.where(~seen.dead, torch.inf))  # a dead input has no say: its kept weights stay
        layer.weight.add_(change).mul_(keep).add_(0.0)
        return keep


def _size(w: Tensor, dead: Tensor) -> Tensor:
    """|w|, (out, in); dead inputs are the first to go."""
    return w.abs().masked_fill_(dead, -1.0)

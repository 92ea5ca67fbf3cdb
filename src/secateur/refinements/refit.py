"""refit: other values for the kept weights, by least squares on the layer's outputs; the mask stays.

For every row on its own, minimise over the kept entries of w (the dropped ones are 0):

    (w - w0)^T H (w - w0)        H = X^T X / tokens + damping * mean(diag) * I

W0: (out, in) dense weight.  X: (tokens, in) inputs.  The optimum is w_S = (H_SS)^-1 (H w0)_S, S the kept inputs.
Conjugate gradients on the kept entries (`least_squares.fit_kept`), in coordinates that give H a unit diagonal, from the
weights that the method left: the error falls with every iteration.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import InvalidParameter, check_whole
from secateur.least_squares import fit_kept
from secateur.masks import Pattern
from secateur.refinements import Refined, Refinement
from secateur.statistics import Gram
from secateur.view import LayerView

_ROWS = 512  # solved at once: a few arrays of this many rows stay near the processor


@dataclass(frozen=True)
class Refit(Refinement):
    """Masked least squares.

    Attributes:
        iterations: at most this many steps.
        damping: share of the mean diagonal of H that is added to it: pulls the weights towards the dense ones.
        tolerance: a row stops once its residual is this share of the first; 0 makes every step.

    >>> from secateur.masks import Unstructured
    >>> from secateur.statistics import Bundle
    >>> inputs = Bundle((Gram,))
    >>> inputs.update(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))  # the second input always equals the first
    >>> layer = LayerView("q", torch.tensor([[2.0, 0.0]]), inputs)
    >>> _ = Refit().refine(layer, torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False]]), Unstructured("row"))
    >>> layer.weight  # so the first weight takes over what the second did
    tensor([[3., 0.]])
    """

    iterations: int = 12
    damping: float = 0.0
    tolerance: float = 1e-3

    source = "Hestenes and Stiefel 1952, J. Res. NBS 49; the idea in ALPS, Meng et al. 2024, arXiv:2406.07831"

    def __post_init__(self) -> None:
        check_whole("iterations", "refit", self.iterations)
        for name in ("damping", "tolerance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidParameter(name, "refit", "a finite number >= 0", getattr(self, name))

    def refine(self, layer: LayerView, dense: Tensor, keep: Tensor, pattern: Pattern) -> Refined:
        h = layer[Gram].mean
        diagonal = h.diagonal()
        ridge = self.damping * diagonal.mean()
        unit = (diagonal + ridge).sqrt()
        unit = unit.where(unit > 0, 1.0)  # a dead input has no say in the error: its weights stay
        diagonal.add_(ridge)
        h.div_(unit).div_(unit[:, None])
        ridge = ridge / unit.square()
        errors = []
        for start in range(0, len(dense), _ROWS):
            rows = slice(start, start + _ROWS)
            old = layer.weight[rows]
            change = (old - dense[rows]).mul_(unit)
            before, after = fit_kept(
                h, change, keep[rows], ridge, iterations=self.iterations, tolerance=self.tolerance
            )  # fmt: skip
            new = change.div_(unit).add_(dense[rows]).mul_(keep[rows])
            old.copy_(torch.where(after <= before, new, old))
            errors.append([error[:, 0].clamp(min=0) for error in (before, torch.minimum(before, after))])
        return Refined(keep, *map(torch.cat, zip(*errors, strict=True)))

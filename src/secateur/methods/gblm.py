"""gblm: Wanda's score plus how much the dense model's loss depends on the weight.

Das et al. 2023, arXiv:2311.04902, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models":

    S_ij = |W_ij| * ||X_j||_2 + alpha * |W_ij| * G_ij

W: (out, in) weight.  X: (tokens, in) inputs.  G: gradients of the loss of single sequences, put together over the
calibration set.  Compared within an output row.

    reduction   ||X_j||                       G (l1)            G (l2)
    mean        root mean square per token    mean_s |g_s|      sqrt(mean_s g_s^2)
    sum         per sequence, sqrt(tokens)    sum_s |g_s|       sqrt(sum_s g_s^2)      as released, alpha = 100

With `sum` the balance of the two terms shifts with the number and the length of the sequences; with `mean` it does not.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from secateur.errors import InvalidParameter
from secateur.gradients import Checkpointing, GradientRequest
from secateur.methods import LayerView, Method
from secateur.statistics import Norm, SecondMoment

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class GBLM(Method):
    """Gradients and activations.

    Attributes:
        alpha: weight of the gradient term, in units of the other's.
        norm: how the gradients of the sequences are put together, l1 or l2.
        reduction: mean, or sum as in the released code (then with --gblm.alpha 100).
        checkpointing: auto, always or never: run each block again in the backward pass, to hold less at once.

    >>> import torch
    >>> from secateur.statistics import Gradient
    >>> from secateur.statistics import Bundle
    >>> inputs = Bundle(GBLM.needs)
    >>> inputs.update(torch.tensor([[1.0, 2.0]]))
    >>> seen = Gradient("l1", 2, torch.tensor([[0.2, 0.0]]))
    >>> GBLM(alpha=100.0).score(LayerView("q", torch.tensor([[-3.0, 1.0]]), inputs, seen))
    tensor([[33.,  2.]])
    """

    alpha: float = 100.0
    norm: Norm = "l1"
    reduction: Reduction = "mean"
    checkpointing: Checkpointing = "auto"

    needs = (SecondMoment,)
    source = "Das et al. 2023, arXiv:2311.04902"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise InvalidParameter("alpha", "gblm", "a finite number >= 0", self.alpha)
        if self.reduction not in get_args(Reduction):
            raise InvalidParameter("reduction", "gblm", "mean or sum", self.reduction)
        GradientRequest(self.norm, self.checkpointing)  # checks them

    @property
    def gradients(self) -> GradientRequest:
        return GradientRequest(self.norm, self.checkpointing)

    def score(self, layer: LayerView) -> Tensor:
        gradient, moment = layer.gradient, layer[SecondMoment]
        assert gradient is not None
        size, g = moment.rms.to(layer.weight.dtype), gradient.mean
        if self.reduction == "sum":
            size, g = size * (moment.tokens / gradient.samples) ** 0.5, gradient.total
        return layer.weight.abs().mul_(size + self.alpha * g)

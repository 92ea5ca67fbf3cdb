"""gradient: drop the weights whose removal changes the loss least, to first order.

    S_ij = |W_ij| * G_ij        G: mean |dL/dW_ij| over sequences (l1), or its root mean square (l2)

W: (out, in) weight.  L: the dense model's loss on the calibration text.  The gradient-only score of Das et al.
2023, arXiv:2311.04902; with l2 its square is the empirical Fisher saliency.  Compared within an output row.
"""

from dataclasses import dataclass

from torch import Tensor

from secateur.gradients import Checkpointing, GradientRequest
from secateur.methods import LayerView, Method
from secateur.statistics import Norm


@dataclass(frozen=True)
class GradientOnly(Method):
    """First-order saliency; no activations.

    Attributes:
        norm: how the gradients of the sequences are put together, l1 or l2.
        checkpointing: auto, always or never: run each block again in the backward pass, to hold less at once.

    >>> import torch
    >>> from secateur.statistics import Gradient
    >>> seen = Gradient("l1", 2, torch.tensor([[2.0, 8.0]]))
    >>> GradientOnly().score(LayerView("q", torch.tensor([[-3.0, 1.0]]), gradient=seen))
    tensor([[3., 4.]])
    """

    norm: Norm = "l1"
    checkpointing: Checkpointing = "auto"

    source = "Das et al. 2023, arXiv:2311.04902"

    def __post_init__(self) -> None:
        GradientRequest(self.norm, self.checkpointing)  # checks them

    @property
    def gradients(self) -> GradientRequest:
        return GradientRequest(self.norm, self.checkpointing)

    def score(self, layer: LayerView) -> Tensor:
        assert layer.gradient is not None
        return layer.weight.abs().mul_(layer.gradient.mean)

"""ria: relative importance of a weight in its row and column, times the size of its input.

Zhang et al. 2024 (ICLR), "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models":

    S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2^a

W: (out, in) weight.  X: (tokens, in) inputs.  a: `power`.  Compared over the whole layer.
"""

from dataclasses import dataclass

from torch import Tensor

from secateur.errors import InvalidParameter
from secateur.masks import Pattern, Unstructured
from secateur.methods import LayerView, Method
from secateur.statistics import SecondMoment


@dataclass(frozen=True)
class RIA(Method):
    """Relative importance and activations.

    Attributes:
        power: exponent a of the input norm; 0.5 in the paper, 0 leaves the inputs out.

    >>> import torch
    >>> from secateur.statistics import Bundle
    >>> inputs = Bundle(RIA.needs)
    >>> inputs.update(torch.ones(3, 2))
    >>> RIA().score(LayerView("q", torch.tensor([[1.0, 3.0], [3.0, 1.0]]), inputs)).tolist()
    [[0.5, 1.5], [1.5, 0.5]]
    """

    power: float = 0.5

    needs = (SecondMoment,)
    source = "Zhang et al. 2024, ICLR, openreview Tr0lPx9woF"

    def __post_init__(self) -> None:
        if not 0 <= self.power < float("inf"):
            raise InvalidParameter("power", "ria", "a finite number >= 0", self.power)

    @property
    def native(self) -> Pattern:
        return Unstructured("layer")

    def score(self, layer: LayerView) -> Tensor:
        size = layer.weight.abs()
        column, row = size.sum(0, keepdim=True), size.sum(1, keepdim=True)
        relative = size / column.where(column > 0, 1.0) + size / row.where(row > 0, 1.0)
        rms = layer[SecondMoment].rms.to(layer.weight.dtype)
        return relative * rms**self.power

"""magnitude: drop the smallest weights.

    S_ij = |W_ij|

W: (out, in) weight. Compared over the whole layer, as the Wanda paper's baseline does; needs no data.
"""

from dataclasses import dataclass

from torch import Tensor

from secateur.masks import Pattern, Unstructured
from secateur.methods import LayerView, Method


@dataclass(frozen=True)
class Magnitude(Method):
    """The classical baseline.

    >>> import torch
    >>> Magnitude().score(LayerView("q", torch.tensor([[-2.0, 1.0]]))).tolist()
    [[2.0, 1.0]]
    """

    source = "Han et al. 2015, arXiv:1506.02626"

    @property
    def native(self) -> Pattern:
        return Unstructured("layer")

    def score(self, layer: LayerView) -> Tensor:
        return layer.weight.abs()

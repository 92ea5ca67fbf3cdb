"""wanda: drop the weights that move their output least, given how large each input is.

Sun et al. 2023, arXiv:2306.11695, eq. 1:

    S_ij = |W_ij| * ||X_j||_2

W: (out, in) weight.  X: (tokens, in) inputs seen in calibration.  Compared within an output row.
The column norm is taken per token (root mean square): one factor for the whole layer, so the choice is the paper's.
"""

from dataclasses import dataclass

from torch import Tensor

from secateur.masks import Pattern, Unstructured
from secateur.methods import LayerView, Method
from secateur.statistics import SecondMoment


@dataclass(frozen=True)
class Wanda(Method):
    """Weights times input norms.

    Attributes:
        variant: the paper's appendix variant: every row drops the longest prefix of its ascending scores whose sum
            stays within one share alpha of the row's total, so rows lose different numbers of weights. The paper
            bisects alpha; here the entries are ranked by the share at which they would go, which meets the
            sparsity exactly. Compared over the layer.

    >>> import torch
    >>> from secateur.statistics import Bundle
    >>> inputs = Bundle(Wanda.needs)
    >>> inputs.update(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> Wanda().prune_layer(LayerView("q", torch.tensor([[1.0, 2.0]]), inputs), Wanda().native, 0.5)
    tensor([[ True, False]])
    """

    variant: bool = False

    needs = (SecondMoment,)
    source = "Sun et al. 2023, arXiv:2306.11695"

    @property
    def native(self) -> Pattern:
        return Unstructured("layer" if self.variant else "row")

    def score(self, layer: LayerView) -> Tensor:
        rms = layer[SecondMoment].rms.to(layer.weight.dtype)
        score = layer.weight.abs().mul_(rms)  # eq. 1
        return _share_of_row(score) if self.variant else score


def _share_of_row(score: Tensor) -> Tensor:
    """(out, in) -> the share of the row's total that has gone once this entry, the next smallest, goes too."""
    ascending, order = score.sort(dim=1, stable=True)
    cumulative = ascending.double().cumsum(dim=1)
    total = cumulative[:, -1:]
    share = (cumulative / total.where(total > 0, 1.0)).to(score.dtype)
    return share.new_empty(score.shape).scatter_(1, order, share)

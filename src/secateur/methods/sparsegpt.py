"""sparsegpt: drop weights column by column and let the later columns make up for each loss.

Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1. For every layer, minimise ||W X^T - W' X^T||^2:

    H = X^T X / tokens + damping * mean(diag) * I        H^-1 = U^T U, U upper triangular
    S_ij = W_ij^2 / U_jj^2                               the optimal-brain-surgeon saliency at column j
    e_j = W_:j / U_jj where dropped, 0 elsewhere         W_:k -= e_j U_jk  for k > j

W: (out, in).  X: (tokens, in).  The mask is chosen block of columns by block of columns, on weights that the
earlier blocks have already corrected: a comparison group never reaches across a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import InvalidParameter
from secateur.factor import InverseFactor, inverse_factor
from secateur.masks import NM, Pattern, Unstructured, zero_dropped_
from secateur.methods import LayerView, Method
from secateur.statistics import Gram

_STRIP = 32  # columns whose mutual corrections are made one by one; later ones get theirs in one product


@dataclass(frozen=True)
class SparseGPT(Method):
    """One-shot pruning with error correction.

    Attributes:
        damping: share of the mean diagonal of H that is added to it.
        blocksize: columns for which the mask is chosen at once; the paper's comparison group is all their rows.
    """

    damping: float = 0.01
    blocksize: int = 128

    needs = (Gram,)
    source = "Frantar and Alistarh 2023, arXiv:2301.00774"

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise InvalidParameter("damping", "sparsegpt", "a finite number >= 0", self.damping)
        if self.blocksize < 1:
            raise InvalidParameter("blocksize", "sparsegpt", "a whole number >= 1", self.blocksize)

    @property
    def native(self) -> Pattern:
        return Unstructured("layer")

    def score(self, layer: LayerView) -> Tensor:
        factor = self._factor(layer)
        return _saliency(layer.weight.t(), factor.upper.diagonal(), factor.dead).t().contiguous()

    def prune_layer(self, layer: LayerView, pattern: Pattern, sparsity: float) -> Tensor:
        factor = self._factor(layer)
        u, diagonal = factor.upper, factor.upper.diagonal()
        w = layer.weight.t().contiguous()  # (in, out): a column of the layer is contiguous
        keep = torch.empty(w.shape, dtype=torch.bool, device=w.device)
        m = pattern.m if isinstance(pattern, NM) else 1
        block, strip = (max(size // m, 1) * m for size in (self.blocksize, _STRIP))
        for start in range(0, len(w), block):
            end = min(start + block, len(w))
            lost = torch.zeros_like(w[start:end])  # e
            if isinstance(pattern, Unstructured):
                saliency = _saliency(w[start:end], diagonal[start:end], factor.dead[start:end])
                keep[start:end] = pattern.keep_part(saliency.t(), sparsity, start).t()
            for left in range(start, end, strip):
                right = min(left + strip, end)
                for j in range(left, right):
                    if isinstance(pattern, NM) and j % m == 0:
                        group = slice(j, j + m)
                        saliency = _saliency(w[group], diagonal[group], factor.dead[group])
                        keep[group] = pattern.keep(saliency.t().contiguous()).t()
                    torch.mul(w[j], ~keep[j], out=lost[j - start]).div_(u[j, j])
                    w[j + 1 : right].addr_(u[j, j + 1 : right], lost[j - start], alpha=-1)
                w[right:end].addmm_(u[left:right, right:end].t(), lost[left - start : right - start], alpha=-1)
            w[end:].addmm_(u[start:end, end:].t(), lost, alpha=-1)
        layer.weight.copy_(zero_dropped_(w, keep).t())
        return keep.t()

    def _factor(self, layer: LayerView) -> InverseFactor:
        """One factorisation for all layers that read the same input."""
        gram = layer[Gram]
        if self.damping not in gram.factors:
            gram.factors[self.damping] = inverse_factor(gram.mean, self.damping)
            if note := gram.factors[self.damping].note:
                layer.warn(f"the second-moment matrix of its inputs ({gram.tokens} tokens) is {note}")
        return gram.factors[self.damping]


def _saliency(w: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """(columns, out) -> S^T; dead columns are the first to go."""
    return (w / diagonal[:, None]).square_().masked_fill_(dead[:, None], -1.0)

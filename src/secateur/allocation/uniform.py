"""uniform: every layer loses the same share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.allocation.contract import NOTHING, Allocation, Evidence
from secateur.models.layers import Layer


@dataclass(frozen=True)
class Uniform(Allocation):
    """the same sparsity for every layer

    >>> list(Uniform().allocate([Layer("q_proj", "0", "attention", ())], 0.5).values())
    [0.5]
    """

    source = "the default of every method's paper"

    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, evidence: Evidence = NOTHING
    ) -> dict[Layer, float]:
        return dict.fromkeys(layers, self.given(sparsity))

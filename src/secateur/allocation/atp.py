"""atp: sparsities in arithmetic progression, early blocks spared.

Huang et al. 2025 (ICML), "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical
Perspective" (ATP). Errors of early blocks are carried through all later ones, so with L blocks

    s_i = target + step * (i - (L - 1) / 2),   i = 0 ... L - 1

and a shift where blocks differ in size. An encoder-decoder is one progression, the encoder first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.allocation.contract import NOTHING, Allocation, Evidence, by_block, spread
from secateur.errors import InvalidParameter
from secateur.models.layers import Layer


@dataclass(frozen=True)
class Atp(Allocation):
    """every block loses `step` more than the one before it

    Attributes:
        step: how much, in sparsity; below 0, late blocks are spared instead. The paper tries a small grid.

    >>> import torch
    >>> given = Atp(0.1).allocate([Layer(n, n, "mlp", (torch.nn.Linear(2, 2),)) for n in "ab"], 0.5)
    >>> [round(s, 3) for s in given.values()]
    [0.45, 0.55]
    """

    step: float = 0.005

    source = "Huang et al. 2025, ICML (ATP)"

    def __post_init__(self) -> None:
        if not -0.5 < self.step < 0.5:
            raise InvalidParameter("step", "atp", "a number in (-0.5, 0.5)", self.step)

    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, evidence: Evidence = NOTHING
    ) -> dict[Layer, float]:
        target, blocks = self.given(sparsity), by_block(layers)
        middle = (len(blocks) - 1) / 2
        return spread(blocks, [target + self.step * (i - middle) for i in range(len(blocks))], target)

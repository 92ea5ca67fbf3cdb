"""A layer as methods and refinements see it: a wide copy of its weight, and what its inputs were."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.statistics import Bundle, Gradient, S


@dataclass
class LayerView:
    """A layer as a method sees it.

    `weight` is (out, in) in fp32 (fp64 for fp64 models), free to be changed. `view[Gram]` gives a statistic of
    the layer's inputs, `gradient` is there for methods that ask for it. `warn` records what the user should know.
    """

    name: str
    weight: Tensor
    statistics: Bundle = field(default_factory=Bundle)
    gradient: Gradient | None = None
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, kind: type[S]) -> S:
        return self.statistics[kind]

    def warn(self, text: str) -> None:
        """Put `text` into the result, with the layer's name."""
        self.warnings.append(f"{self.name}: {text}")


def widened(weight: Tensor, *, copy: bool = False) -> Tensor:
    """(out, in) in fp32 or wider, contiguous; `copy` asks for memory of its own.

    >>> widened(torch.ones(1, 2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=copy)
    return wide.contiguous()

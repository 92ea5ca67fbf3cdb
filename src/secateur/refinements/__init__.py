"""What a refinement is, and where refinements are found.

A refinement takes what any method has made of a layer and brings the layer's outputs closer to the dense ones: by
other values for the kept weights, or by other kept weights. It never changes how many weights each row, or each
group of n:m, keeps. It is one file in this folder: a frozen dataclass whose fields are its options. A package
outside registers its class under the entry-point group `secateur.refinements`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from torch import Tensor

from secateur.masks import Pattern
from secateur.registry import Named, find_kinds, make_kind
from secateur.statistics import Gram, Statistic
from secateur.view import LayerView


@dataclass(frozen=True)
class Refined:
    """What a refinement made of a layer, besides the weights it wrote.

    `keep` is the (out, in) mask. `before` and `after` are (out,): each row's output error E[((w - w0)^T x)^2] over the
    calibration inputs, w0 the dense row; `after` is nowhere above `before`.
    """

    keep: Tensor
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Refinement(Named, ABC):
    """The contract: `refine` changes `layer.weight` in place, and no row's output error rises."""

    needs: ClassVar[tuple[type[Statistic], ...]] = (Gram,)
    source: ClassVar[str] = ""

    def check(self, pattern: Pattern) -> None:
        """Raise `UsageError` for a pattern whose counts could not be kept."""

    @abstractmethod
    def refine(self, layer: LayerView, dense: Tensor, keep: Tensor, pattern: Pattern) -> Refined:
        """Write better weights into `layer.weight`; return the keep mask and the errors.

        Args:
            layer: its weight is the method's, zero where dropped; it has the statistics that `needs` names.
            dense: (out, in) the weight before pruning, in the dtype of `layer.weight`; not to be changed.
            keep: (out, in) bool, True = stays; not to be changed.
            pattern: what `keep` obeys, and the returned mask must obey.
        """


@cache
def find_refinements() -> dict[str, type[Refinement]]:
    """Every refinement by name: the files of this folder, then entry points.

    >>> sorted(find_refinements())
    ['refit', 'swap']
    """
    return find_kinds(__name__, __path__, Refinement, "refinement")  # type: ignore[type-abstract]


def make_refinement(name: str, **options: object) -> Refinement:
    """The refinement of that name with these options.

    >>> make_refinement("refit", iterations=3).iterations
    3
    """
    return make_kind(find_refinements(), "refinement", name, options)

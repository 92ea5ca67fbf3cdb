"""What a pruning method is, and where methods are found.

A method is one file in this folder: a frozen dataclass whose fields are its options. It names the statistics
it needs and overrides `score` or, when it changes weights as well, `prune_layer`. A package outside registers
its class under the entry-point group `secateur.methods`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from torch import Tensor

from secateur.errors import UsageError
from secateur.gradients import GradientRequest
from secateur.masks import Pattern, Unstructured, zero_dropped_
from secateur.registry import Named, find_kinds, make_kind
from secateur.statistics import Statistic
from secateur.view import LayerView as LayerView  # methods take it from here


@dataclass(frozen=True)
class Method(Named):
    """The contract. Override exactly one of `score` and `prune_layer`; a solver may give a `score` besides,
    which then ranks weights across layers for per="model"."""

    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    source: ClassVar[str] = ""

    @property
    def native(self) -> Pattern:
        """The comparison group of the method's paper."""
        return Unstructured("row")

    def score(self, layer: LayerView) -> Tensor:
        """(out, in), finite, higher = keep."""
        raise UsageError(f"{self.name()} has no score; it cannot compare weights across layers")

    def prune_layer(self, layer: LayerView, pattern: Pattern, sparsity: float) -> Tensor:
        """Write the new weight into `layer.weight`; return the keep mask, (out, in) bool."""
        keep = pattern.keep(self.score(layer), sparsity)
        zero_dropped_(layer.weight, keep)
        return keep

    @property
    def gradients(self) -> GradientRequest | None:
        """What the method wants to know of the dense model's gradients; None: nothing, no backward pass."""
        return None

    @property
    def solves(self) -> bool:
        """Whether the method changes the weights it keeps."""
        return type(self).prune_layer is not Method.prune_layer


@cache
def find_methods() -> dict[str, type[Method]]:
    """Every method by name: the files of this folder, then entry points.

    >>> sorted(find_methods())
    ['gblm', 'gradient', 'magnitude', 'ria', 'sparsegpt', 'wanda']
    """
    return find_kinds(__name__, __path__, Method, "method")


def make_method(name: str, **options: object) -> Method:
    """The method of that name with these options.

    >>> make_method("wanda", variant=True)
    Wanda(variant=True)
    """
    return make_kind(find_methods(), "method", name, options)

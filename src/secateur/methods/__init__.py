"""What a pruning method is, and where methods are found.

A method is one file in this folder: a frozen dataclass whose fields are its options. It names the statistics
it needs and overrides `score` or, when it changes weights as well, `prune_layer`. A package outside registers
its class under the entry-point group `secateur.methods`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import ClassVar

from torch import Tensor

from secateur.errors import UnknownName, UsageError
from secateur.gradients import Gradient, GradientRequest
from secateur.masks import Pattern, Unstructured, zero_dropped_
from secateur.statistics import Bundle, S, Statistic


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


@dataclass(frozen=True)
class Method:
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

    @classmethod
    def name(cls) -> str:
        """The name of the file, or of the entry point's last module."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def summary(cls) -> str:
        """The first line of the file's docstring, after the name."""
        first = (sys.modules[cls.__module__].__doc__ or cls.__name__).strip().splitlines()[0]
        return first.partition(": ")[2] or first


@cache
def find_methods() -> dict[str, type[Method]]:
    """Every method by name: the files of this folder, then entry points.

    >>> sorted(find_methods())
    ['gblm', 'gradient', 'magnitude', 'ria', 'sparsegpt', 'wanda']
    """
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, Method) and item.__module__ == module.__name__:
                found[info.name] = item
    for point in entry_points(group="secateur.methods"):
        if point.name in found:
            raise UsageError(f"{point.value} registers the method '{point.name}', which exists already")
        found[point.name] = point.load()
    return found


def make_method(name: str, **options: object) -> Method:
    """The method of that name with these options.

    >>> make_method("wanda", variant=True)
    Wanda(variant=True)
    """
    methods = find_methods()
    if name not in methods:
        raise UnknownName("method", name, methods)
    known = methods[name].__dataclass_fields__
    for option in options:
        if option not in known:
            raise UnknownName(f"option of {name}", option, known)
    return methods[name](**options)

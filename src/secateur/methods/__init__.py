"""What a pruning method is, and where methods are found.

A method is one file in this folder: a frozen dataclass whose fields are its options. It names the statistics
it needs and overrides `score`; or `prune_layer`, when it changes weights as well; or `prune_block`, when what the
whole block gives decides. A package outside registers its class under the entry-point group `secateur.methods`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import entry_points
from typing import ClassVar

import torch
from torch import Tensor

from secateur.blocks import BlockCall
from secateur.errors import NumericalFailure, UnknownName, UsageError
from secateur.masks import NM, PATTERNS, Pattern, Unstructured, zero_dropped_
from secateur.statistics import Bundle, S, Statistic


@dataclass
class LayerView:
    """A layer as a method sees it.

    `weight` is (out, in) in fp32 (fp64 for fp64 models), free to be changed. `view[Gram]` gives a statistic of
    the layer's inputs. `warn` records what the user should know.
    """

    name: str
    weight: Tensor
    statistics: Bundle = field(default_factory=Bundle)
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, kind: type[S]) -> S:
        return self.statistics[kind]

    def warn(self, text: str) -> None:
        """Put `text` into the result, with the layer's name."""
        self.warnings.append(f"{self.name}: {text}")


@dataclass
class BlockView:
    """A block as a method sees it, while every batch waits there and nothing in it has been pruned.

    `layers` are those that a token reached, `targets` their sparsities: together they are the block's budget, which
    the method may share out in another way. `calls` has one entry a batch: `call.dense` is what the block gave,
    `call.run()` what it gives now. Inside `using(weights)`, one (out, in) tensor a layer, the block runs with these,
    and gradients reach them.
    """

    name: str
    layers: list[LayerView]
    targets: list[float]
    calls: list[BlockCall]
    using: Callable[[Sequence[Tensor]], AbstractContextManager[None]]

    @cached_property
    def energy(self) -> Tensor:
        """(width,) mean square of each channel of the dense output, over all tokens; fp64."""
        tokens = sum(len(call.dense) for call in self.calls)
        return torch.stack([call.dense.double().square().sum(0) for call in self.calls]).sum(0) / max(tokens, 1)

    def turns(self, sequences: int) -> Iterator[list[BlockCall]]:
        """Batches of `sequences` sequences together, or just over, in order and round and round without end."""
        while True:
            turn: list[BlockCall] = []
            for call in self.calls:
                turn.append(call)
                if sum(one.sequences for one in turn) >= sequences:
                    yield turn
                    turn = []
            if turn:
                yield turn

    def error_gradient(self, weights: Sequence[Tensor], calls: Sequence[BlockCall]) -> list[Tensor]:
        """How the block's error on some batches changes with the weights that it runs with.

        The error is sum_t sum_c (Y - Y')_tc^2 / energy_c, over tokens t and the channels c of the block's output.

        Args:
            weights: one (out, in) tensor a layer; they come back asking for no gradient.
            calls: some of `calls`.

        Returns:
            The derivative by each of `weights`; zero where no gradient reaches.

        Raises:
            NumericalFailure: it is not finite.
        """
        total = [torch.zeros_like(weight) for weight in weights]
        price = self.energy.where(self.energy > 0, 1.0).reciprocal()
        for call in calls:
            leaves = [weight.detach().requires_grad_() for weight in weights]
            with torch.enable_grad(), self.using(leaves):
                error = (call.run() - call.dense).to(leaves[0].dtype)
                loss = (error.square() * price.to(error.dtype)).sum()
                parts = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else []
            for whole, part in zip(total, parts, strict=False):
                if part is not None:
                    whole.add_(part)
        if not all(torch.isfinite(whole.sum()) for whole in total):
            raise NumericalFailure(f"the error of {self.name} has a gradient that is not finite")
        return total

    def warn(self, text: str) -> None:
        """Put `text` into the result, with the block's name."""
        self.layers[0].warnings.append(f"{self.name}: {text}")


@dataclass(frozen=True)
class Method:
    """The contract. Override exactly one of `score`, `prune_layer` and `prune_block`; a `prune_layer` may have a
    `score` beside it, which then ranks weights across layers for per="model".

    `patterns` has the words of the patterns that the method can follow (see `secateur.masks.PATTERNS`), and `why`
    what stands against the others."""

    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    source: ClassVar[str] = ""
    patterns: ClassVar[tuple[str, ...]] = tuple(PATTERNS)
    why: ClassVar[str] = ""

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

    def prune_block(self, block: BlockView, pattern: Pattern) -> list[Tensor]:
        """Write the new weight into every `block.layers[i].weight`; return the keep masks, (out, in) bool each.

        Gradients are off; `torch.enable_grad()` turns them on. The result may not depend on how the calibration set is
        cut into batches, up to rounding: see `together`. A method that overrides this runs in the `block` schedule.
        """
        raise UsageError(f"{self.name()} prunes layer by layer")

    def together(self, batch_size: int) -> int:
        """How many sequences may run together where the user allows `batch_size`."""
        return batch_size

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise `UsageError` for a pattern that the method cannot follow."""
        word = "n:m" if isinstance(pattern, NM) else pattern.per
        if word not in self.patterns:
            raise UsageError(
                f"{self.name()} cannot follow the pattern {pattern}: {self.why}; "
                f"its patterns are {', '.join(self.patterns)}"
            )

    @property
    def blockwise(self) -> bool:
        """Whether the method sees a whole block at once, and shares its budget out itself."""
        return type(self).prune_block is not Method.prune_block

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
    ['besa', 'magnitude', 'ria', 'sparsegpt', 'wanda']
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

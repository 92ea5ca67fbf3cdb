"""What a pruning method is, and where methods are found.

A method is one file in this folder: a frozen dataclass whose fields are its options. It names the statistics
it needs and overrides `score`; or `prune_layer`, when it changes weights as well; or `prune_block`, when what the
whole block gives decides. A package outside registers its class under the entry-point group `secateur.methods`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from torch import Tensor

from secateur.errors import UsageError
from secateur.gradients import GradientRequest
from secateur.masks import NM, PATTERNS, Pattern, Unstructured, zero_dropped_
from secateur.registry import Named, find_kinds, make_kind
from secateur.statistics import Statistic
from secateur.view import BlockView as BlockView  # methods take them from here
from secateur.view import LayerView as LayerView


@dataclass(frozen=True)
class Method(Named):
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
    def gradients(self) -> GradientRequest | None:
        """What the method wants to know of the dense model's gradients; None: nothing, no backward pass."""
        return None

    @property
    def reads(self) -> bool:
        """Whether the method needs calibration data."""
        return bool(self.needs or self.gradients)

    @property
    def solves(self) -> bool:
        """Whether the method changes the weights it keeps."""
        return type(self).prune_layer is not Method.prune_layer


@cache
def find_methods() -> dict[str, type[Method]]:
    """Every method by name: the files of this folder, then entry points.

    >>> sorted(find_methods())
    ['alps', 'besa', 'gblm', 'gradient', 'magnitude', 'ria', 'sparsegpt', 'wanda']
    """
    return find_kinds(__name__, __path__, Method, "method")


def make_method(name: str, **options: object) -> Method:
    """The method of that name with these options.

    >>> make_method("wanda", variant=True)
    Wanda(variant=True)
    """
    return make_kind(find_methods(), "method", name, options)

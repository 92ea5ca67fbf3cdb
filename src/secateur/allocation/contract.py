"""What an allocation is, what it may look at, and how a budget is met exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.masks import check_sparsity
from secateur.models.layers import Layer
from secateur.progress import Progress, silent
from secateur.statistics import SecondMoment, Statistic

HIGHEST = 0.99  # no layer is emptied by an allocation


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an allocation may look at.

    Attributes:
        seen: the statistics of the dense model's inputs, where the allocation `needs` some.
        model: the dense model. Whoever changes it puts back every bit.
        batches: the calibration set, as keyword arguments of the model; empty where nothing needs data.
        progress: told how far a long search is.

    >>> Evidence().batches
    ()
    """

    seen: Mapping[Layer, SecondMoment] = field(default_factory=dict)
    model: nn.Module | None = None
    batches: Sequence[Mapping[str, Tensor]] = ()
    progress: Progress = silent


NOTHING = Evidence()


@dataclass(frozen=True)
class Allocation(ABC):
    """The contract: `allocate` gives every layer its sparsity. `needs` asks for one pass of the dense model."""

    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    source: ClassVar[str] = ""

    @abstractmethod
    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, evidence: Evidence = NOTHING
    ) -> dict[Layer, float]:
        """One sparsity in [0, 1) for each of `layers`; the mean over their weights is `sparsity`."""

    def check(self, layers: Sequence[Layer], sparsity: float | None) -> None:
        """Refuse what cannot be met, before anything is looked at.

        Raises:
            UsageError: no sparsity where one is needed, or an option that fits no layer.
        """
        self.given(sparsity)

    def given(self, sparsity: float | None) -> float:
        """The target; an error where there is none."""
        if sparsity is None:
            raise UsageError(
                f"the {self.name()} allocation needs a sparsity: give --sparsity, or a pattern such as 2:4"
            )
        return check_sparsity(sparsity)

    def work(self, tokens: int) -> float:
        """What it runs besides the pass for `needs`, in forward passes of the `tokens` of calibration."""
        return 0.0

    def memory(self, layers: Sequence[Layer]) -> int:
        """Bytes it holds besides the model, activations left out, for estimates."""
        return 0

    @classmethod
    def name(cls) -> str:
        """The word for it on the command line and in recipes."""
        return cls.__name__.lower()

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]


def by_block(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers of every block, blocks in the order of the model.

    >>> [len(inside) for inside in by_block([Layer("q", "0", "mlp", ()), Layer("k", "0", "mlp", ())])]
    [2]
    """
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer)
    return list(blocks.values())


def spread(groups: Sequence[Sequence[Layer]], wanted: Sequence[float], target: float) -> dict[Layer, float]:
    """One sparsity for all layers of a group: `wanted` shifted until the budget is met."""
    sizes = [sum(layer.weight.numel() for layer in inside) for inside in groups]
    met = meet_budget(wanted, sizes, target)
    return {layer: s for inside, s in zip(groups, met, strict=True) for layer in inside}


def meet_budget(wanted: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
    """Shift `wanted` sparsities by one constant, within [0, 0.99], until the weighted mean is `target`.

    >>> [round(s, 3) for s in meet_budget([0.4, 0.8], [1, 1], 0.5)]
    [0.3, 0.7]
    """
    total = sum(sizes)
    low, high = -max(wanted), HIGHEST - min(wanted)  # from all at 0 to all at the highest
    for _ in range(100):  # bisection to the last bit of a double
        shift = (low + high) / 2
        mean = sum(min(max(s + shift, 0.0), HIGHEST) * n for s, n in zip(wanted, sizes, strict=True)) / total
        low, high = (shift, high) if mean < target else (low, shift)
    shift = (low + high) / 2
    if target > HIGHEST:
        return [target] * len(wanted)
    return [min(max(s + shift, 0.0), HIGHEST) for s in wanted]

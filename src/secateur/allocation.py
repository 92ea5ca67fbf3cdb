"""How one target sparsity becomes one per layer, with an exact budget.

The budget is counted in weights: sum of sparsity * size over the layers equals target * total size.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from secateur.errors import InvalidParameter, LoadFailure, UsageError
from secateur.masks import check_sparsity
from secateur.models.layers import Layer, matches
from secateur.statistics import SecondMoment, Statistic

HIGHEST = 0.99  # no layer is emptied by an allocation


@dataclass(frozen=True)
class Allocation(ABC):
    """The contract: `allocate` gives every layer its sparsity. `needs` asks for one pass of the dense model."""

    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    source: ClassVar[str] = ""

    @abstractmethod
    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, seen: Mapping[Layer, SecondMoment]
    ) -> dict[Layer, float]:
        """One sparsity in [0, 1) for each of `layers`; `seen` has the statistics asked for."""

    @classmethod
    def name(cls) -> str:
        """The word for it on the command line and in recipes."""
        return cls.__name__.lower()

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class Uniform(Allocation):
    """the same sparsity for every layer

    >>> list(Uniform().allocate([Layer("q_proj", "0", "attention", ())], 0.5, {}).values())
    [0.5]
    """

    source = "the default of every method's paper"

    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, seen: Mapping[Layer, SecondMoment]
    ) -> dict[Layer, float]:
        return dict.fromkeys(layers, check_sparsity(_given(sparsity, self)))


@dataclass(frozen=True)
class Owl(Allocation):
    """blocks with more outlying scores keep more (one sparsity a block)

    With A_ij = |W_ij| * ||X_j|| over a block, D = share of A above `outlier` times its mean; D is scaled to
    [0, 2 * bound] over the blocks and shifted so that the budget is met: a block keeps 1 - sparsity + D - mean(D).

    Attributes:
        bound: how far a block's sparsity may lie from the target (lambda in the paper).
        outlier: how many times the mean score an outlier is (M in the paper).

    >>> Owl(bound=0.04).outlier
    5.0
    """

    bound: float = 0.08
    outlier: float = 5.0

    needs = (SecondMoment,)
    source = "Yin et al. 2024, arXiv:2310.05175"

    def __post_init__(self) -> None:
        if not 0 <= self.bound < 0.5:
            raise InvalidParameter("bound", "owl", "a number in [0, 0.5)", self.bound)
        if not 1 <= self.outlier < math.inf:
            raise InvalidParameter("outlier", "owl", "a number >= 1", self.outlier)

    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, seen: Mapping[Layer, SecondMoment]
    ) -> dict[Layer, float]:
        target = check_sparsity(_given(sparsity, self))
        blocks: dict[str, list[Layer]] = {}
        for layer in layers:
            blocks.setdefault(layer.block, []).append(layer)
        ratio = torch.tensor([self.outlier_ratio(inside, seen) for inside in blocks.values()], dtype=torch.float64)
        spread = float(ratio.max() - ratio.min())
        scaled = (ratio - ratio.min()) / spread * 2 * self.bound if spread else torch.zeros_like(ratio)
        sizes = [sum(layer.weight.numel() for layer in inside) for inside in blocks.values()]
        per_block = meet_budget([target - float(d) for d in scaled], sizes, target)
        return {layer: s for inside, s in zip(blocks.values(), per_block, strict=True) for layer in inside}

    def outlier_ratio(self, layers: Sequence[Layer], seen: Mapping[Layer, SecondMoment]) -> float:
        """Share of a block's scores that exceed `outlier` times their mean."""
        scores = [_score(layer, seen) for layer in layers]
        count = sum(score.numel() for score in scores)
        limit = self.outlier * sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
        return sum(int((score > limit).sum()) for score in scores) / count


@dataclass(frozen=True)
class Table(Allocation):
    """a JSON file {layer-name pattern: sparsity}; the first pattern that matches a layer counts

    Attributes:
        entries: a mapping, or pairs, of a pattern over layer names (as for --include) and a sparsity. Layers that no
            pattern matches get the general sparsity.

    >>> Table({"q_proj": 0.3}).pairs
    (('q_proj', 0.3),)
    """

    entries: tuple[tuple[str, float], ...] | Mapping[str, float] = ()

    source = "yours"

    def __post_init__(self) -> None:
        for pattern, sparsity in self.pairs:
            check_sparsity(sparsity, f"allocation entry '{pattern}'")

    @property
    def pairs(self) -> tuple[tuple[str, float], ...]:
        """The entries in order."""
        return tuple(dict(self.entries).items())

    @classmethod
    def read(cls, path: str | Path) -> Table:
        """From a JSON file.

        Raises:
            LoadFailure: there is no such file, or it is not a JSON object.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadFailure(f"the allocation table {path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise LoadFailure(f"the allocation table {path} must be an object {{layer-name pattern: sparsity}}")
        return cls(tuple(content.items()))

    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, seen: Mapping[Layer, SecondMoment]
    ) -> dict[Layer, float]:
        names = [layer.name for layer in layers]
        for pattern, _ in self.pairs:
            if not any(matches(pattern, name) for name in names):
                raise UsageError(
                    f"the allocation pattern '{pattern}' matches none of {len(names)} layers ({names[0]}, ...)"
                )
        table: dict[Layer, float] = {}
        for layer in layers:
            match = next((s for pattern, s in self.pairs if matches(pattern, layer.name)), sparsity)
            if match is None:
                raise UsageError(
                    f"the allocation table names no sparsity for {layer.name}; add one, or give --sparsity"
                )
            table[layer] = check_sparsity(match)
        return table


ALLOCATIONS: dict[str, type[Allocation]] = {kind.name(): kind for kind in (Uniform, Owl, Table)}


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


def _score(layer: Layer, seen: Mapping[Layer, SecondMoment]) -> torch.Tensor:
    size = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32)).abs()
    reached = layer in seen and seen[layer].tokens
    return size * seen[layer].rms.to(size.dtype) if reached else size


def _given(sparsity: float | None, allocation: Allocation) -> float:
    if sparsity is None:
        raise UsageError(
            f"the {allocation.name()} allocation needs a sparsity: give --sparsity, or a pattern such as 2:4"
        )
    return sparsity

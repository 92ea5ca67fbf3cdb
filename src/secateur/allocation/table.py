"""table: sparsities of your own, in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.allocation.contract import NOTHING, Allocation, Evidence
from secateur.errors import LoadFailure, UsageError
from secateur.masks import check_sparsity
from secateur.models.layers import Layer, matches


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

    def check(self, layers: Sequence[Layer], sparsity: float | None) -> None:
        self.allocate(layers, sparsity)

    def allocate(
        self, layers: Sequence[Layer], sparsity: float | None, evidence: Evidence = NOTHING
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

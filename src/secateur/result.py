"""What a pruning run says about itself: everything needed to judge the cut, and to make it again."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class OutputError:
    """E|(W - W0) x|^2 / E|W0 x|^2 of a layer over its calibration inputs x, W0 dense; before and after refinement."""

    before: float
    after: float


@dataclass(frozen=True)
class PrunedLayer:
    """One layer after the cut. `sparsity` is the share of its weights removed, `tokens` what it saw (None: no data)."""

    name: str
    block: str
    kind: str
    shape: tuple[int, int]
    target: float
    sparsity: float
    tokens: int | None
    output_error: OutputError | None = None  # only of refined layers


@dataclass(frozen=True)
class Coverage:
    """What the engine saw of the region that was asked for. `share` counts weights with two or more dimensions."""

    share: float
    unseen: dict[str, int] = field(default_factory=dict)  # parameters that no layer stands for -> weights
    uncalled: tuple[str, ...] = ()  # layers whose weight is used, if at all, without a call


@dataclass(frozen=True)
class PruneResult:
    """The record of one run.

    `sparsity_layers` is the share of the pruned layers' weights removed, `sparsity_model` that of all parameters.
    `seconds` has wall times; `peak_memory_bytes` the highest memory of the process (or device) during the run.
    """

    method: dict[str, Any]
    pattern: str
    schedule: str
    allocation: dict[str, Any]
    target: float | None
    sparsity_layers: float
    sparsity_model: float
    layers: tuple[PrunedLayer, ...]
    calibration: Mapping[str, Any] | None
    coverage: Coverage
    passes: int
    seconds: dict[str, float]
    peak_memory_bytes: int
    device: str
    dtype: str
    warnings: tuple[str, ...]
    refine: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        record = asdict(self)
        record["sparsity"] = {"layers": record.pop("sparsity_layers"), "model": record.pop("sparsity_model")}
        record["versions"] = versions()
        return record

    def __str__(self) -> str:
        """
        >>> print(PruneResult({"name": "wanda"}, "2:4", "sequential", {"name": "uniform"}, 0.5, 0.5, 0.39, (), None,
        ...     Coverage(1.0), 1, {"total": 2.0}, 10**9, "cpu", "bfloat16", ()))
        wanda 2:4: 50.00 % of 0 layers, 39.00 % of all parameters, in 2.0 s, peak 1.00 GB
        """
        return (
            f"{self.method['name']} {self.pattern}: {self.sparsity_layers:.2%} of {len(self.layers)} layers, "
            f"{self.sparsity_model:.2%} of all parameters, in {self.seconds['total']:.1f} s, "
            f"peak {self.peak_memory_bytes / 1e9:.2f} GB"
        ).replace("%", " %")


def versions() -> dict[str, str]:
    """Of everything that can change a number."""
    packages = ("secateur", "torch", "transformers", "numpy")
    return {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "machine": platform.platform(),
    }

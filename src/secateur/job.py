"""A pruning request, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from secateur.allocation import Allocation, Uniform
from secateur.errors import InvalidParameter, LowCoverage, UnknownName, UsageError
from secateur.inputs import Data
from secateur.masks import NM, Pattern, Unstructured, check_sparsity
from secateur.methods import Method
from secateur.models.layers import Found, Layer, check_untied, find, select
from secateur.result import Coverage
from secateur.scout import Scouted
from secateur.walk import SCHEDULES, Schedule

LOWEST_COVERAGE = 0.9
Uncalled = Literal["dense", "magnitude"]


@dataclass(frozen=True)
class Job:
    """A checked request: what will be done to which layers."""

    method: Method
    pattern: Pattern
    sparsity: float | None
    allocation: Allocation
    schedule: Schedule
    uncalled: Uncalled
    found: Found
    layers: tuple[Layer, ...]
    unseen: dict[str, int]

    @property
    def globally(self) -> bool:
        """Whether weights of different layers are compared with each other."""
        return isinstance(self.pattern, Unstructured) and self.pattern.per == "model"

    @property
    def needs_data(self) -> bool:
        return bool(self.method.needs or self.allocation.needs)

    def check_data(self, data: Data | None) -> Data:
        """`data` itself; an error when there is none."""
        if data is None:
            who = self.method.name() if self.method.needs else f"the {self.allocation.name()} allocation"
            raise UsageError(f"{who} needs calibration data: pass ids, or name a text with --calibration")
        return data


def check_job(
    model: nn.Module,
    method: Method,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    allocation: Allocation | None = None,
    schedule: Schedule | None = None,
    include: Sequence[str] = ("all",),
    exclude: Sequence[str] = (),
    uncalled: Uncalled = "dense",
) -> Job:
    """Everything that can be refused before anything is touched."""
    allocation = allocation or Uniform()
    pattern = pattern or method.native
    if uncalled not in ("dense", "magnitude"):
        raise InvalidParameter("uncalled", "prune", "'dense' or 'magnitude'", uncalled)
    if sparsity is not None:
        sparsity = check_sparsity(sparsity)
    if isinstance(pattern, NM):
        if sparsity is not None and abs(sparsity - pattern.sparsity) > 1e-9:
            raise UsageError(f"the pattern {pattern} fixes the sparsity at {pattern.sparsity:g}; leave --sparsity out")
        if not isinstance(allocation, Uniform):
            raise UsageError(
                f"the pattern {pattern} fixes every layer's sparsity; the {allocation.name()} allocation cannot"
            )
        sparsity = pattern.sparsity
    method.check_pattern(pattern)
    if method.blockwise and schedule not in (None, "block"):
        raise UsageError(f"{method.name()} prunes a block at once, in the block schedule; it cannot use {schedule}")
    found = find(model)
    layers, unseen = select(found, include, exclude)
    check_untied(model, layers)
    for layer in layers:
        pattern.check(layer.shape[1], layer.name)
    job = Job(
        method, pattern, sparsity, allocation, schedule or ("block" if method.blockwise else "sequential"), uncalled,
        found, tuple(layers), unseen,
    )  # fmt: skip
    if job.schedule not in SCHEDULES:
        raise UnknownName("schedule", job.schedule, SCHEDULES)
    if job.globally:
        if not isinstance(allocation, Uniform):
            raise UsageError(
                f"per model, the scores decide each layer's sparsity; the {allocation.name()} allocation cannot"
            )
        check_sparsity(sparsity if sparsity is not None else float("nan"))
        if method.needs and not method.solves and schedule not in (None, "oneshot"):
            raise UsageError(
                f"per model, all scores are compared at once, so they come from one dense pass: "
                f"use the oneshot schedule, not {schedule}"
            )
        if not method.solves:
            job = replace(job, schedule="oneshot")
    elif sparsity is None or not allocation.needs:
        allocation.allocate(layers, sparsity, {})  # says what is missing, and which pattern fits nowhere
    return job


def coverage_of(job: Job, scouted: Scouted | None) -> Coverage:
    """How much of the region asked for the engine sees, and which layers are called if someone looked ahead.

    Raises:
        LowCoverage: under 90 %.
    """
    silent_layers = scouted.uncalled if scouted else []
    missed = sum(layer.weight.numel() for layer in silent_layers) if job.uncalled == "dense" else 0
    seen = sum(layer.weight.numel() for layer in job.layers)
    share = (seen - missed) / (seen + sum(job.unseen.values()))
    coverage = Coverage(share, dict(job.unseen), tuple(layer.name for layer in silent_layers))
    if share < LOWEST_COVERAGE:
        names = [*coverage.uncalled, *sorted(coverage.unseen, key=lambda name: -coverage.unseen[name])]
        raise LowCoverage(
            f"only {share:.1%} of the weights asked for are in layers that the engine sees; not seen: "
            f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}. Leave them out with --exclude if that is meant"
        )
    return coverage

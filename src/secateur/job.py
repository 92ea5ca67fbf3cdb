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
from secateur.refinements import Refinement
from secateur.result import Coverage
from secateur.scout import Scouted
from secateur.statistics import Gram, Statistic
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
    refine: tuple[Refinement, ...] = ()

    @property
    def globally(self) -> bool:
        """Whether weights of different layers are compared with each other."""
        return isinstance(self.pattern, Unstructured) and self.pattern.per == "model"

    @property
    def compares_first(self) -> bool:
        """Whether all scores are compared in a walk of their own, before the one that changes weights."""
        return self.globally and (self.method.solves or bool(self.refine))

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """What the walk that changes weights collects: the method's statistics, unless its mask is known by then, and
        those of refinements and of the errors that are recorded with them."""
        method: tuple[type[Statistic], ...] = (
            () if self.compares_first and not self.method.solves else self.method.needs
        )
        needs = dict.fromkeys(method)
        for one in self.refine:
            needs |= dict.fromkeys((Gram, *one.needs))
        return tuple(needs)

    @property
    def needs_data(self) -> bool:
        return bool(self.method.reads or self.allocation.needs or self.needs)

    def check_data(self, data: Data | None) -> Data:
        """`data` itself; an error when there is none."""
        if data is None:
            who = f"the {self.allocation.name()} allocation" if self.allocation.needs else ""
            who = self.method.name() if self.method.reads else who or self.refine[0].name()
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
    refine: Sequence[Refinement] = (),
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
    for one in refine:
        if not isinstance(one, Refinement):
            raise InvalidParameter("refine", "prune", "a sequence of refinements, as (Swap(), Refit())", one)
        one.check(pattern)
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
        found, tuple(layers), unseen, tuple(refine),
    )  # fmt: skip
    if job.schedule not in SCHEDULES:
        raise UnknownName("schedule", job.schedule, SCHEDULES)
    if job.globally:
        if not isinstance(allocation, Uniform):
            raise UsageError(
                f"per model, the scores decide each layer's sparsity; the {allocation.name()} allocation cannot"
            )
        check_sparsity(sparsity if sparsity is not None else float("nan"))
        if method.needs and not job.compares_first and schedule not in (None, "oneshot"):
            raise UsageError(
                f"per model, all scores are compared at once, so they come from one dense pass: "
                f"use the oneshot schedule, not {schedule}"
            )
        if not job.compares_first:
            job = replace(job, schedule="oneshot")
    else:
        allocation.check(layers, sparsity)
    return job


def coverage_of(job: Job, scouted: Scouted | None) -> Coverage:
    """How much of the region asked for the engine sees, and which layers are called if someone looked ahead.

    Raises:
        LowCoverage: under 90 %.
    """
    silent_layers = scouted.uncalled if scouted else []
    missed = sum(layer.weight.numel() for layer in silent_layers) if job.uncalled == "dense" and job.method.needs else 0
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

"""What a pruning run would do and cost: `--dry-run`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from secateur.allocation import Allocation
from secateur.blocks import BlockCall
from secateur.gradients import collect_gradients
from secateur.inputs import Data, batches_of
from secateur.job import Job, Uncalled, check_job, coverage_of
from secateur.masks import NM, Pattern
from secateur.methods import BlockView, Method
from secateur.models.layers import Layer
from secateur.models.substitute import running_with
from secateur.refinements import Refinement
from secateur.result import Coverage
from secateur.scout import Batch, Scouted, scout
from secateur.statistics import Bundle, Gradient
from secateur.view import LayerView, widened
from secateur.walk import Arrival, Schedule, evaluating, walk


@dataclass(frozen=True)
class Plan:
    """The request, what was found, and estimates: seconds from one sequence and one block, memory from shapes."""

    method: dict[str, Any]
    pattern: str
    schedule: str
    allocation: dict[str, Any]
    target: float | None
    blocks: int
    layers: dict[str, int]  # kind -> number
    weights: int  # in those layers
    parameters: int  # of the whole model
    coverage: Coverage
    passes: int
    tokens: int
    estimated_seconds: float
    estimated_memory_bytes: int
    refine: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def plan(
    model: nn.Module,
    method: Method,
    calibration: Data | tuple[int, int] | None = None,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    allocation: Allocation | None = None,
    schedule: Schedule | None = None,
    include: Sequence[str] = ("all",),
    exclude: Sequence[str] = (),
    batch_size: int = 1,
    uncalled: Uncalled = "dense",
    refine: Sequence[Refinement] = (),
) -> Plan:
    """Check a request and estimate its cost; the model is not changed.

    Args:
        calibration: as for `prune`, or just its shape (n, seqlen).

    Raises:
        The errors that `prune` would raise before it touches anything.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from secateur.methods.wanda import Wanda
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, vocab_size=20))
    >>> planned = plan(model, Wanda(), (2, 8), sparsity=0.5)
    >>> planned.layers, planned.passes, planned.tokens
    ({'attention': 4, 'mlp': 3}, 1, 16)
    """
    job = check_job(
        model, method, sparsity=sparsity, pattern=pattern, allocation=allocation, schedule=schedule,
        include=include, exclude=exclude, uncalled=uncalled, refine=refine,
    )  # fmt: skip
    if isinstance(calibration, tuple):
        calibration = torch.zeros(calibration, dtype=torch.long)
    batches: list[Batch] = []
    if job.needs_data:
        batches = batches_of(model, job.check_data(calibration), batch_size, method.together)
    tokens = sum(value.numel() for batch in batches for name, value in batch.items() if name.endswith("input_ids"))
    with evaluating(model):
        scouted = scout(model, batches[0], job.layers) if batches else None
        coverage = coverage_of(job, scouted)
        passes = _passes(job, scouted)
        seconds = _seconds(model, job, batches, passes)
    return Plan(
        method={"name": method.name(), **asdict(method)},
        pattern=str(job.pattern),
        schedule=job.schedule if job.needs_data else "none",
        allocation={"name": job.allocation.name(), **asdict(job.allocation)},
        target=job.sparsity,
        blocks=len(job.found.blocks),
        layers=dict(Counter(layer.kind for layer in job.layers)),
        weights=sum(layer.weight.numel() for layer in job.layers),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        coverage=coverage,
        passes=passes,
        tokens=tokens,
        estimated_seconds=seconds,
        estimated_memory_bytes=_memory(model, job, tokens),
        refine=tuple({"name": one.name(), **asdict(one)} for one in job.refine),
    )


def _passes(job: Job, scouted: Scouted | None) -> int:
    passes = bool(job.allocation.needs) + bool(job.method.gradients)
    passes += job.compares_first and bool(job.method.needs)
    if job.needs:
        passes += 2 if job.schedule == "block" else 1
        if scouted and job.schedule != "oneshot":  # a weight with several places is seen at all of them first
            passes += any(calls > 1 for calls in scouted.calls.values())
    return passes


def _seconds(model: nn.Module, job: Job, batches: Sequence[Batch], passes: int) -> float:
    """One batch through the model, its statistics and selection timed on the first block and scaled up."""
    first = [layer for layer in job.layers if layer.block == job.layers[0].block]
    scale = sum(x.weight.numel() for x in job.layers) / sum(x.weight.numel() for x in first)
    select = 0.0
    gradients: dict[Layer, Gradient] = {}

    pattern = job.method.native if job.globally else job.pattern
    target = pattern.sparsity if isinstance(pattern, NM) else job.sparsity or 0.5

    def view(arrival: Arrival) -> LayerView:
        assert isinstance(arrival.seen, Bundle)
        wide = widened(arrival.layer.weight, copy=True)
        return LayerView(arrival.layer.name, wide, arrival.seen, gradients.get(arrival.layer))

    def time_selection(arrivals: list[Arrival]) -> None:
        nonlocal select
        for layer in map(view, arrivals):
            dense = layer.weight.clone()
            started = time.perf_counter()
            keep = job.method.prune_layer(layer, pattern, target)
            for refinement in job.refine:
                keep = refinement.refine(layer, dense, keep, pattern).keep
            select += time.perf_counter() - started

    def time_block(arrivals: list[Arrival], calls: list[BlockCall]) -> None:
        nonlocal select
        views, layers = [view(arrival) for arrival in arrivals], [arrival.layer for arrival in arrivals]
        name, using = layers[0].block, running_with(job.found.blocks[layers[0].block], layers)
        calls = calls * len(batches)  # the one at hand stands for all
        block = BlockView(name, views, [target] * len(views), calls, using)
        started = time.perf_counter()
        job.method.prune_block(block, pattern)
        select += time.perf_counter() - started

    if not batches:
        return 0.0
    backward = 0.0
    if job.method.gradients:
        started = time.perf_counter()
        one = {name: value[:1] for name, value in batches[0].items()}
        found = collect_gradients(model, [one], first, job.method.gradients, blocks=job.found.blocks.values())
        gradients.update(found)
        backward = (time.perf_counter() - started) * sum(len(next(iter(batch.values()))) for batch in batches)
    needs = tuple(dict.fromkeys((*job.method.needs, *job.needs)))
    timed = walk(
        model, batches[:1], first, blocks=job.found.blocks, collector=lambda: Bundle(needs),
        visit=time_selection, visit_block=time_block if job.method.blockwise else None,
        schedule="block" if job.method.blockwise else "oneshot",
    )  # fmt: skip
    once = timed.forward_seconds / timed.passes
    reading = (passes - bool(job.method.gradients)) * len(batches) * (once + scale * timed.collect_seconds)
    tokens = sum(value.numel() for batch in batches for name, value in batch.items() if name.endswith("input_ids"))
    search = job.allocation.work(tokens) * len(batches) * once
    return reading + backward + scale * select + search


def _memory(model: nn.Module, job: Job, tokens: int) -> int:
    """Model, what paused batches hold, statistics, and one layer at work."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    width = min(layer.shape[1] for layer in job.layers)
    held = {"sequential": 5, "block": 2, "oneshot": 0}[job.schedule]
    activations = held * tokens * width * job.layers[0].weight.element_size()
    sizes = [sum(kind.bytes_for(layer.shape[1]) for kind in job.needs) for layer in job.layers]
    statistics = max(sizes, default=0) if job.schedule == "sequential" else sum(sizes)
    if job.schedule == "block":
        statistics = max(
            sum(s for s, x in zip(sizes, job.layers, strict=True) if x.block == b) for b in job.found.blocks
        )
    work = (6 if job.refine else 3) * 4 * max(layer.weight.numel() for layer in job.layers)
    if job.method.blockwise:  # the dense output, and five fp32 copies of a block: its weights, ranks, and gradients
        activations = activations * 3 // 2
        work = 5 * 4 * max(sum(x.weight.numel() for x in job.layers if x.block == b) for b in job.found.blocks)
    if job.method.gradients:  # their sums
        work += 4 * sum(layer.weight.numel() for layer in job.layers)
    return weights + max(activations + statistics + work, job.allocation.memory(job.layers))

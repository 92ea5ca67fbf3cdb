"""The paused forward pass: the model's own forward pass is the schedule.

Every calibration batch runs through the unmodified model as a coroutine (greenlet) and pauses just before a
watched layer. When all batches have arrived there, the layer's inputs from the whole calibration set are at
hand: a visitor may change the weight, and the batches go on through the changed weight. So a model is pruned
layer by layer, each layer seeing exactly the inputs it will see in the pruned model, in one forward pass.

Three schedules:
    sequential  as above
    block       pause at a block, run it as it is to collect statistics, let the visitor change all its
                layers, run it again; two passes. The schedule of the Wanda and SparseGPT papers.
    oneshot     all statistics in one pass of the model as it is, then the visitor sees every layer at once

This file knows nothing of any pruning method or architecture: it moves batches, collectors and layers.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from secateur.blocks import BlockCall
from secateur.coroutines import Lane
from secateur.errors import RunFailure, UsageError
from secateur.memory import give_back
from secateur.models.layers import Layer
from secateur.models.taps import replaced_forward, tapped
from secateur.progress import Progress, silent
from secateur.scout import Batch, Recent, Scouted, run, scout

Schedule = Literal["sequential", "block", "oneshot"]
SCHEDULES: dict[str, str] = {
    "sequential": "each layer sees the inputs it will see in the pruned model; one pass",
    "block": "statistics of a dense block behind pruned blocks, as in the papers; two passes",
    "oneshot": "statistics of the dense model, then everything is pruned; one pass",
}


class Collector(Protocol):
    """What gathers a layer's inputs. `tokens` counts those seen."""

    tokens: int

    def update(self, x: Tensor) -> None:
        """Add inputs x: (tokens, in)."""


@dataclass
class Arrival:
    """A layer whose inputs from all batches have been collected. Layers that read one tensor share `seen`."""

    layer: Layer
    seen: Collector


@dataclass
class Walked:
    """What the walk observed. Seconds are wall time."""

    passes: int = 0
    forward_seconds: float = 0.0
    collect_seconds: float = 0.0
    visit_seconds: float = 0.0
    unvisited: list[Layer] = field(default_factory=list)  # never called, or an expert without a token
    repeated: list[Layer] = field(default_factory=list)  # called more than once in a pass
    late: dict[str, int] = field(default_factory=dict)  # calls that came after the visit
    unmasked: list[str] = field(default_factory=list)  # layers whose padding could not be told apart


def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[Layer],
    *,
    blocks: Mapping[str, nn.Module],
    collector: Callable[[], Collector],
    visit: Callable[[list[Arrival]], None],
    schedule: Schedule = "sequential",
    visit_block: Callable[[list[Arrival], list[BlockCall]], None] | None = None,
    progress: Progress = silent,
    scouted: Scouted | None = None,
) -> Walked:
    """Bring every layer's inputs to `visit`, which may change weights in place.

    Args:
        model: any model; it should be in eval mode. Gradients are off during the walk.
        batches: the calibration set in micro-batches; how it is cut changes nothing but rounding and memory.
        layers: the layers to visit.
        blocks: the modules that the `block` schedule pauses at, by the names that layers carry.
        collector: makes an empty collector for one input.
        visit: called with one arrival (sequential), a block's (block), or all (oneshot), in call order.
        schedule: see the head of this file.
        visit_block: called instead of `visit` by the `block` schedule, with the block's arrivals and one call a batch
            that waits there: what the block gave as it was, and a way to run it again.
        scouted: what a look ahead at these layers showed; None looks now.

    Returns:
        What was seen and what was not. Layers in `unvisited` were never given to `visit`.

    Raises:
        Whatever the model or `visit` raises; then all hooks are gone and all batches have ended.
    """
    if not batches:
        raise UsageError("the walk needs at least one batch of calibration data")
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it would go on using a weight as it was before the visit
    try:
        with torch.inference_mode(False), torch.no_grad():
            return _Walk(model, batches, layers, blocks, collector, visit, visit_block, progress, scouted).run(schedule)
    finally:
        torch.set_autocast_cache_enabled(cache)


class _Walk:
    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        layers: Sequence[Layer],
        blocks: Mapping[str, nn.Module],
        collector: Callable[[], Collector],
        visit: Callable[[list[Arrival]], None],
        visit_block: Callable[[list[Arrival], list[BlockCall]], None] | None,
        progress: Progress,
        scouted: Scouted | None,
    ) -> None:
        self.model, self.batches, self.blocks = model, batches, blocks
        self.collector, self.visitor, self.block_visitor, self.progress = collector, visit, visit_block, progress
        self.report = Walked()
        self.scouted = scouted or scout(model, batches[0], layers)
        self.layers = list(layers)
        self.report.repeated = [layer for layer in self.layers if self.scouted.calls[layer] > 1]
        self.visited: set[Layer] = set()
        self.gathered: dict[Layer, Collector] = {}  # complete, waiting for a visit
        self.work_done, self.work = 0, 0
        self.block = ""  # the one whose layers are being visited

    def run(self, schedule: Schedule) -> Walked:
        started = time.perf_counter()
        per_pass = len(self.layers) * len(self.batches)
        repeated = self.report.repeated if schedule != "oneshot" else []
        self.work = per_pass * (2 if schedule == "block" else 1) + len(repeated) * len(self.batches)
        if repeated:  # every place that uses the weight must be seen before it changes
            self.gathered.update(self._observe(repeated))
        if schedule == "oneshot":
            self._oneshot()
        elif schedule == "block":
            self._lanes(self._block_schedule)
        else:
            self._lanes(self._sequential_schedule)
        self.report.unvisited = [layer for layer in self.layers if layer not in self.visited]
        total = time.perf_counter() - started
        self.report.forward_seconds = total - self.report.collect_seconds - self.report.visit_seconds
        self.progress(self.work, self.work, "done")
        return self.report

    # one pass in which nothing changes

    def _oneshot(self) -> None:
        self.gathered.update(self._observe(self.layers))
        seen = [layer for layer in self.layers if layer in self.gathered and self.gathered[layer].tokens]
        self._visit(seen)

    def _observe(self, layers: Sequence[Layer]) -> dict[Layer, Collector]:
        watcher = _Watcher(self, layers)
        with tapped(layers, watcher.arrive):
            for batch in self.batches:
                watcher.start(batch)
                run(self.model, batch)
        self.report.passes += 1
        return watcher.collectors

    # all batches side by side, each paused where it waits

    def _lanes(self, schedule: Callable[[list[Lane]], None]) -> None:
        lanes = [Lane(batch, partial(run, self.model, batch)) for batch in self.batches]
        try:
            schedule(lanes)
        finally:
            for lane in lanes:
                lane.end()
        self.report.passes += 1

    def _sequential_schedule(self, lanes: list[Lane]) -> None:
        def arrive(layer: Layer, x: Tensor, rows: Tensor | None) -> None:
            if layer not in self.visited:
                Lane.current().pause(layer, x, rows)
            elif self.scouted.calls[layer] <= 1:
                self.report.late[layer.name] = self.report.late.get(layer.name, 0) + 1

        before: _Reading | None = None
        with tapped(self.layers, arrive):
            for lane in lanes:
                lane.resume()
            while waiting := [lane for lane in lanes if lane.place is not None]:
                layer = min((lane.place for lane in waiting), key=lambda place: self.scouted.order[place])
                here = [lane for lane in waiting if lane.place is layer]
                if layer not in self.gathered:
                    if before is None or not before.same(here):
                        before = _Reading(here, self._collect(here))
                    self.gathered[layer] = before.seen
                if self.gathered[layer].tokens:
                    self._visit([layer])
                else:  # nothing but padding
                    del self.gathered[layer]
                for lane in here:
                    lane.resume()
                    self._advance(layer.name)

    def _block_schedule(self, lanes: list[Lane]) -> None:
        inside: dict[str, list[Layer]] = {}
        for layer in self.layers:
            inside.setdefault(layer.block, []).append(layer)
        watcher = _Watcher(self, [layer for layer in self.layers if layer not in self.gathered], within_block=True)
        done: set[str] = set()
        calls: dict[Lane, BlockCall] = {}

        def paused(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if name not in done:
                lane = Lane.current()
                watcher.start(lane.batch)
                watcher.active = True
                output = forward(*args, **kwargs)
                watcher.active = False
                if self.block_visitor:
                    select = partial(self._output_tokens, name, lane.batch)
                    calls[lane] = BlockCall(name, lane, forward, args, kwargs, output, select)
                del output
                lane.pause(name)
            return forward(*args, **kwargs)

        with tapped(self.layers, watcher.arrive), ExitStack() as undo:
            watcher.active = False
            for block, name in {
                self.blocks[name]: name for name in reversed(inside)
            }.items():  # each once, by its first name
                undo.enter_context(replaced_forward(block, partial(paused, name, block.forward)))
            first = {name: min(self.scouted.order[layer] for layer in inside[name]) for name in inside}
            for lane in lanes:
                lane.resume()
            while waiting := [lane for lane in lanes if lane.place is not None]:
                name = min((lane.place for lane in waiting), key=lambda place: first[place])
                self.gathered.update({k: c for k, c in watcher.collectors.items() if k.block == name})
                watcher.collectors = {k: c for k, c in watcher.collectors.items() if k.block != name}
                ready = [layer for layer in inside[name] if layer in self.gathered]
                here = [lane for lane in waiting if lane.place == name]
                again = [calls.pop(lane) for lane in here] if self.block_visitor else None
                self._visit([layer for layer in ready if self.gathered[layer].tokens], again)
                del again
                done.add(name)
                for lane in here:
                    lane.resume()
                    self._advance(name, len(inside[name]))
        self.report.passes += 1  # every block ran twice

    # what both share

    def _collect(self, lanes: Iterable[Lane]) -> Collector:
        started = time.perf_counter()
        seen = self.collector()
        for lane in lanes:
            self._update(seen, lane.place, lane.x, lane.rows, lane.batch)
        self.report.collect_seconds += time.perf_counter() - started
        return seen

    def _update(self, seen: Collector, layer: Layer, x: Tensor, rows: Tensor | None, batch: Batch) -> None:
        """The model may run in autocast or keep gradients; statistics do neither."""
        with torch.autocast(x.device.type, enabled=False):
            tokens = _tokens(x.detach(), rows, _masks(batch))
            if tokens is None and layer.name not in self.report.unmasked:
                self.report.unmasked.append(layer.name)
            seen.update(x.detach().reshape(-1, x.shape[-1]) if tokens is None else tokens)

    def _output_tokens(self, name: str, batch: Batch, output: Tensor) -> Tensor:
        """(..., width) -> (tokens, width): what a block gives for the tokens that count."""
        tokens = _tokens(output, None, _masks(batch))
        if tokens is None and name not in self.report.unmasked:
            self.report.unmasked.append(name)
        return output.reshape(-1, output.shape[-1]) if tokens is None else tokens

    def _visit(self, layers: Sequence[Layer], calls: list[BlockCall] | None = None) -> None:
        started = time.perf_counter()
        ordered = sorted(layers, key=lambda layer: self.scouted.order[layer])
        fresh = [layer for layer in ordered if layer not in self.visited]
        if fresh:
            if fresh[0].block != self.block:  # a block's activations leave gaps in the heap that the next cannot fill
                self.block = fresh[0].block
                give_back()
            with torch.autocast(fresh[0].weight.device.type, enabled=False):
                arrivals = [Arrival(layer, self.gathered.pop(layer)) for layer in fresh]
                if self.block_visitor and calls is not None:
                    self.block_visitor(arrivals, calls)
                else:
                    self.visitor(arrivals)
            self.visited.update(fresh)
        self.report.visit_seconds += time.perf_counter() - started

    def _advance(self, what: str, by: int = 1) -> None:
        self.work_done = min(self.work_done + by, self.work)
        self.progress(self.work_done, self.work, what)


class _Reading:
    """What a collector has seen: the tensors of some lanes, held weakly and as they were."""

    def __init__(self, lanes: Sequence[Lane], seen: Collector) -> None:
        self.seen = seen
        self.inputs = {lane: (weakref.ref(lane.x), lane.x._version) for lane in lanes}

    def same(self, lanes: Sequence[Lane]) -> bool:
        """Whether these lanes now show the very same, unchanged tensors."""
        return len(lanes) == len(self.inputs) and all(
            lane in self.inputs and self.inputs[lane][0]() is lane.x and self.inputs[lane][1] == lane.x._version
            for lane in lanes
        )


class _Watcher:
    """Collects inputs as they pass, without pausing. Layers that read one tensor share one collector."""

    def __init__(self, walk: _Walk, layers: Sequence[Layer], within_block: bool = False) -> None:
        self.walk, self.layers = walk, set(layers)
        self.leader = {
            layer: head
            for layer, head in walk.scouted.leader.items()
            if head in self.layers and (head.block == layer.block or not within_block)
        }
        self.collectors: dict[Layer, Collector] = {}
        self.active = True
        self.start({})

    def start(self, batch: Batch) -> None:
        self.batch, self.recent = batch, Recent()

    def arrive(self, layer: Layer, x: Tensor, rows: Tensor | None) -> None:
        if not self.active or layer not in self.layers:
            return
        started = time.perf_counter()
        head = self.leader.get(layer)
        if head is not None:
            if self.recent.find(x) is not head:
                raise RunFailure(f"{layer.name} read the input of {head.name} at first, and another one later")
            self.collectors[layer] = self.collectors[head]
        else:
            self.recent.add(x, layer)
            if layer not in self.collectors:
                self.collectors[layer] = self.walk.collector()
            self.walk._update(self.collectors[layer], layer, x, rows, self.batch)
        self.walk.report.collect_seconds += time.perf_counter() - started
        self.walk._advance(layer.name)


def _masks(batch: Batch) -> dict[str, Tensor]:
    return {name: mask for name, mask in batch.items() if name.endswith("mask") and mask.dim() == 2}


def _tokens(x: Tensor, rows: Tensor | None, masks: Mapping[str, Tensor]) -> Tensor | None:
    """(..., in) -> (tokens, in) without padding; None where no mask is laid out like x."""
    flat = x.reshape(-1, x.shape[-1])
    fitting = [
        mask.bool()
        for mask in masks.values()
        if (rows is not None or mask.shape == x.shape[:-1] or (x.dim() == 2 and mask.numel() == len(flat)))
    ]
    if all(bool(mask.all()) for mask in (fitting or masks.values())):
        return flat
    if not fitting:
        return None
    if any(not torch.equal(mask, fitting[0]) for mask in fitting):
        raise UsageError(
            f"{' and '.join(masks)} have the same shape {tuple(fitting[0].shape)} and different padding; "
            f"pad the encoder's and the decoder's input to different lengths, to tell them apart"
        )
    mask = fitting[0].flatten().to(x.device)
    return flat[mask if rows is None else mask[rows]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

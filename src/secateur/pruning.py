"""prune(model, method, ...): an allocation, a walk and a method, joined."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocation import Allocation, Evidence
from secateur.blocks import BlockCall
from secateur.data.calibration import Calibration
from secateur.errors import NumericalFailure
from secateur.gradients import collect_gradients
from secateur.inputs import Data, batches_of
from secateur.job import Job, Uncalled, check_job, coverage_of
from secateur.masks import Pattern, Unstructured, keep_model, zero_dropped_
from secateur.memory import peak_memory
from secateur.methods import Method
from secateur.methods.magnitude import Magnitude
from secateur.models.layers import Layer
from secateur.models.substitute import running_with
from secateur.progress import Progress, silent
from secateur.refinements import Refinement
from secateur.result import OutputError, PrunedLayer, PruneResult
from secateur.scout import Batch, scout
from secateur.statistics import Bundle, Gradient, Gram, SecondMoment, Statistic
from secateur.view import BlockView, LayerView, widened
from secateur.walk import Arrival, Schedule, Walked, evaluating, walk


def prune(
    model: nn.Module,
    method: Method,
    calibration: Data | None = None,
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
    progress: Progress = silent,
) -> PruneResult:
    """Prune a model in place.

    Args:
        model: any transformers model, on one device, with plain floating-point weights.
        method: what to prune by, for example `Wanda()`.
        calibration: token ids (see `secateur.calibration`), a (n, seqlen) tensor, or ready batches with their
            attention masks. Methods that need no data ignore it.
        sparsity: share of the weights removed, in [0, 1). Left out for n:m patterns.
        pattern: comparison group or n:m; None is the method's own.
        allocation: how the sparsity is spread over the layers; None is uniform.
        schedule: "sequential" (the default), "block" or "oneshot"; see `secateur.walk`.
        include, exclude: kinds of layers or patterns over their names.
        batch_size: sequences that run together.
        uncalled: what to do with a layer whose weight is used without a call.
        refine: what improves each layer after the method, in this order, for example `(Swap(), Refit())`.
        progress: told how far the walk is.

    Returns:
        What was cut, layer by layer, and what the user should know.

    Raises:
        UsageError: the request cannot be met; nothing was touched.
        LowCoverage: under 90 % of the weights asked for are in layers that the engine sees; nothing was touched.
        NumericalFailure: a statistic or score is not finite; the model is then partly pruned.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from secateur.methods.wanda import Wanda
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, vocab_size=20))
    >>> prune(model, Wanda(), torch.randint(20, (2, 8)), sparsity=0.5).sparsity_layers
    0.5
    """
    job = check_job(
        model, method, sparsity=sparsity, pattern=pattern, allocation=allocation, schedule=schedule,
        include=include, exclude=exclude, uncalled=uncalled, refine=refine,
    )  # fmt: skip
    batches: list[Batch] = []
    if job.needs_data:
        batches = batches_of(model, job.check_data(calibration), batch_size, method.together)
    started = time.perf_counter()
    weight = job.layers[0].weight
    with evaluating(model), peak_memory(weight.device) as peak:
        run = _Run(model, job, batches, progress)
        run.all()
    seconds = {"total": time.perf_counter() - started} | run.seconds
    pruned = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in run.records)
    everything = sum(parameter.numel() for parameter in model.parameters())
    return PruneResult(
        method={"name": method.name(), **asdict(method)},
        pattern=str(job.pattern),
        schedule=job.schedule if job.needs_data else "none",
        allocation={"name": job.allocation.name(), **asdict(job.allocation)},
        target=job.sparsity,
        sparsity_layers=pruned / sum(layer.shape[0] * layer.shape[1] for layer in run.records),
        sparsity_model=pruned / everything,
        layers=tuple(run.records),
        calibration=_record(calibration) if job.needs_data else None,
        coverage=run.coverage,
        passes=run.passes,
        seconds=seconds,
        peak_memory_bytes=peak.bytes,
        device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        warnings=tuple(run.warnings),
        refine=tuple({"name": one.name(), **asdict(one)} for one in job.refine),
    )


class _Run:
    """The state of one run: statistics come in, masks go out."""

    def __init__(self, model: nn.Module, job: Job, batches: list[Batch], progress: Progress) -> None:
        self.model, self.job, self.batches, self.progress = model, job, batches, progress
        self.records: list[PrunedLayer] = []
        self.warnings: list[str] = []
        self.passes = 0
        self.seconds = {"allocate": 0.0, "gradients": 0.0, "forward": 0.0, "collect": 0.0, "select": 0.0}
        self.targets: dict[Layer, float] = {}
        self.gradients: dict[Layer, Gradient] = {}
        self.keeps: dict[Layer, Tensor] = {}  # known before the walk that changes weights
        self.unrefined: list[str] = []

    def all(self) -> None:
        job = self.job
        walks = bool(
            job.needs or job.method.needs or job.allocation.needs
        )  # otherwise a layer need not be called to be pruned
        self.scouted = scout(self.model, self.batches[0], job.layers) if walks else None
        self.coverage = coverage_of(job, self.scouted)
        if job.method.gradients:
            self._collect_gradients()
        if job.globally:
            self._compare_all()
        else:
            seen = self._observe(job.allocation.needs) if job.allocation.needs else {}
            started = time.perf_counter()
            evidence = Evidence(seen, self.model, self.batches, self.progress)
            self.targets = job.allocation.allocate(job.layers, job.sparsity, evidence)
            self.seconds["allocate"] = time.perf_counter() - started
        if not self.records:
            self._prune_all()
        order = {layer.name: layer.order for layer in job.layers}
        self.records.sort(key=lambda record: order[record.name])
        if self.unrefined:
            self.warnings.append(f"not refined, since no input of theirs was seen: {', '.join(self.unrefined)}")

    def _prune_all(self) -> None:
        job = self.job
        if not job.needs:
            started = time.perf_counter()
            for i, layer in enumerate(job.layers):
                if layer.routed and layer in self.gradients and not self.gradients[layer].seen:
                    self._without_tokens(layer)
                else:
                    self._prune(layer, None)
                self.progress(i + 1, len(job.layers), layer.name)
            self.seconds["select"] += time.perf_counter() - started
            return
        walked = self._walk(job.needs, self._visit, job.schedule)
        for layer in walked.unvisited:
            self._without_tokens(layer)

    def _visit(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            assert isinstance(arrival.seen, Bundle)
            self._prune(arrival.layer, arrival.seen)

    def _visit_block(self, arrivals: list[Arrival], calls: list[BlockCall]) -> None:
        """For a method that decides over a whole block."""
        layers = [arrival.layer for arrival in arrivals]
        views = [self._view(arrival.layer, arrival.seen) for arrival in arrivals]  # type: ignore[arg-type]
        name, targets = layers[0].block, [self.targets[layer] for layer in layers]
        using = running_with(self.job.found.blocks[name], layers)
        keeps = self.job.method.prune_block(BlockView(name, views, targets, calls, using), self.job.pattern)
        for arrival, view, keep in zip(arrivals, views, keeps, strict=True):
            assert isinstance(arrival.seen, Bundle)
            view.warnings[:] = [text for text in view.warnings if text not in self.warnings]  # once for all blocks
            self._finish(arrival.layer, view, keep, arrival.seen, self.job.method)
        if self.scouted and any(self.scouted.calls[layer] > 1 for layer in layers):
            self.warnings.append(
                f"{name}: the model uses it at several places; shares were learnt at the first of them"
            )

    def _prune(self, layer: Layer, seen: Bundle | None, method: Method | None = None) -> None:
        method = method or self.job.method
        view = self._view(layer, seen)
        if layer in self.keeps:
            keep = self.keeps.pop(layer)
            zero_dropped_(view.weight, keep)
        else:
            if seen is not None and self.job.compares_first and not method.solves:
                method = Magnitude()
                self.warnings.append(f"{layer.name}: no token reached it in the dense model; pruned by magnitude")
            keep = method.prune_layer(view, self._pattern(), self.targets[layer])
        self._finish(layer, view, keep, seen, method)

    def _finish(self, layer: Layer, view: LayerView, keep: Tensor, seen: Bundle | None, method: Method) -> None:
        """What comes after the choice: refinements, the check, the write."""
        error = None
        if self.job.refine and seen is None:
            self.unrefined.append(layer.name)
        elif self.job.refine:
            keep, error = self._refine(layer, view, keep)
        if (method.solves or error) and not torch.isfinite(view.weight.sum()):
            whose = " + ".join((method.name(), *(one.name() for one in self.job.refine)))
            raise NumericalFailure(f"{whose} made weights of {layer.name} that are not finite numbers")
        self._write(layer, view.weight, keep, seen, error)
        self.warnings.extend(view.warnings)

    def _refine(self, layer: Layer, view: LayerView, keep: Tensor) -> tuple[Tensor, OutputError]:
        started = time.perf_counter()
        dense, errors = widened(layer.weight), []
        for refinement in self.job.refine:
            refined = refinement.refine(view, dense, keep, self._pattern())
            keep = refined.keep
            errors += [refined.before, refined.after]
        whole = view[Gram].output_power(dense) or 1.0
        taken = time.perf_counter() - started
        self.seconds["refine"] = self.seconds.get("refine", 0.0) + taken
        self.seconds["select"] -= taken  # it is part of the visits
        before, after = (float(error.sum(dtype=torch.float64)) / whole for error in (errors[0], errors[-1]))
        return keep, OutputError(before, after)

    def _pattern(self) -> Pattern:
        return Unstructured("layer") if self.job.globally else self.job.pattern

    def _view(self, layer: Layer, seen: Bundle | None) -> LayerView:
        wide = widened(layer.weight, copy=bool(self.job.refine))
        return LayerView(layer.name, wide, seen or Bundle(), self.gradients.get(layer))

    def _write(
        self, layer: Layer, weight: Tensor, keep: Tensor, seen: Bundle | None, error: OutputError | None = None
    ) -> None:
        if layer.weight.data_ptr() != weight.data_ptr():
            layer.weight.copy_(weight)
        sparsity = 1 - int(keep.count_nonzero()) / keep.numel()
        tokens = None if seen is None else seen.tokens
        target = self.targets[layer]
        self.records.append(
            PrunedLayer(layer.name, layer.block, layer.kind, layer.shape, target, sparsity, tokens, error)
        )

    def _without_tokens(self, layer: Layer) -> None:
        """No input was seen: by magnitude, or left dense as the user chose."""
        if layer in self.keeps or not self.job.method.needs:
            pass  # the method can do without
        elif layer.routed:
            self.warnings.append(f"{layer.name}: no calibration token reached this expert; pruned by magnitude")
        elif self.job.uncalled == "magnitude":
            self.warnings.append(f"{layer.name}: its weight is used without a call; pruned by magnitude")
        else:
            self.warnings.append(
                f"{layer.name}: its weight is used without a call; left dense (--uncalled magnitude prunes it)"
            )
            return
        self._prune(layer, None, Magnitude())

    # scores of all layers at once

    def _compare_all(self) -> None:
        job = self.job
        scores: dict[Layer, Tensor] = {}

        def score(arrivals: list[Arrival]) -> None:
            for arrival in arrivals:
                assert isinstance(arrival.seen, Bundle)
                seen[arrival.layer] = arrival.seen
                view = self._view(arrival.layer, arrival.seen)
                scores[arrival.layer] = job.method.score(view)
                self.warnings.extend(view.warnings)

        seen: dict[Layer, Bundle] = {}
        left: list[Layer] = []
        if job.method.needs:
            left = self._walk(job.method.needs, score, "oneshot").unvisited
        else:
            scores = {layer: job.method.score(self._view(layer, None)) for layer in job.layers}
        assert job.sparsity is not None
        keeps = dict(zip(scores, keep_model(list(scores.values()), job.sparsity), strict=True))
        self.targets = {layer: 1 - int(keep.sum()) / keep.numel() for layer, keep in keeps.items()}
        self.targets |= dict.fromkeys(left, job.sparsity)
        if job.method.solves:
            return  # each layer's share is known now; the solver chooses inside the layer
        if job.refine:
            self.keeps = keeps
            return
        for layer, keep in keeps.items():
            self._write(layer, zero_dropped_(self._view(layer, None).weight, keep), keep, seen.get(layer))
        for layer in left:
            self._without_tokens(layer)

    # reading the model

    def _collect_gradients(self) -> None:
        """Of the dense model, before anything is cut."""
        started, request = time.perf_counter(), self.job.method.gradients
        assert request is not None
        self.gradients = collect_gradients(
            self.model, self.batches, self.job.layers, request,
            blocks=self.job.found.blocks.values(), progress=self.progress,
        )  # fmt: skip
        self.passes += 1
        self.seconds["gradients"] = time.perf_counter() - started

    def _observe(self, needs: tuple[type[Statistic], ...]) -> dict[Layer, SecondMoment]:
        seen: dict[Layer, SecondMoment] = {}

        def remember(arrivals: list[Arrival]) -> None:
            for arrival in arrivals:
                assert isinstance(arrival.seen, Bundle)
                seen[arrival.layer] = arrival.seen[SecondMoment]

        self._walk(needs, remember, "oneshot")
        return seen

    def _walk(self, needs: tuple[type[Statistic], ...], visit: Any, schedule: Schedule) -> Walked:
        walked = walk(
            self.model, self.batches, self.job.layers, blocks=self.job.found.blocks, collector=lambda: Bundle(needs),
            visit=visit, visit_block=self._visit_block if self.job.method.blockwise else None, schedule=schedule,
            progress=self.progress, scouted=self.scouted,
        )  # fmt: skip
        for name, calls in walked.late.items():
            self.warnings.append(f"{name}: {calls} calls came after it had been pruned and were not counted")
        for name in walked.unmasked:
            self.warnings.append(f"{name}: padding counted as tokens, since its input is not laid out like the mask")
        self.passes += walked.passes
        self.seconds["forward"] += walked.forward_seconds
        self.seconds["collect"] += walked.collect_seconds
        self.seconds["select"] += walked.visit_seconds
        return walked


def _record(calibration: Data | None) -> Mapping[str, Any]:
    if isinstance(calibration, Calibration):
        return calibration.record
    if isinstance(calibration, Tensor):
        return {
            "text": None,
            "samples": calibration.shape[0],
            "seqlen": calibration.shape[1],
            "how": "ids of the caller",
        }
    return {"text": None, "samples": len(calibration or ()), "how": "batches of the caller"}

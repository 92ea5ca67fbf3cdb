"""The three schedules against plain runs that share no code with the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from families import FAMILIES, ids, make
from torch import Tensor
from transformers import PreTrainedModel

import naive
from secateur.inputs import batches_of
from secateur.methods.wanda import Wanda
from secateur.models.layers import Layer, find, find_layers
from secateur.pruning import prune
from secateur.scout import run, scout
from secateur.statistics import SecondMoment
from secateur.walk import walk

SHARED = {"albert", "zamba2"}  # one weight at several places: "sequential" there means all places first
SINGLE = sorted(set(FAMILIES) - SHARED)


@contextlib.contextmanager
def recorded(model: PreTrainedModel, seen: dict[tuple[int, int], list[Tensor]]) -> Iterator[None]:
    """Every input of every matrix, caught where torch multiplies; keyed by the weight's storage and offset."""
    linear, addmm, matmul = torch.nn.functional.linear, torch.addmm, torch.Tensor.__matmul__

    def note(weight: Tensor, x: Tensor) -> None:
        key = (weight.untyped_storage().data_ptr(), weight.storage_offset())
        seen.setdefault(key, []).append(x.detach().reshape(-1, x.shape[-1]).clone())

    def new_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        note(weight, x)
        return linear(x, weight, bias)

    def new_addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        note(weight, x)
        return addmm(bias, x, weight)

    def new_matmul(x: Tensor, weight: Tensor) -> Tensor:
        if weight.dim() == 2:
            note(weight, x)
        return matmul(x, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", new_linear)
        patch.setattr(torch, "addmm", new_addmm)
        patch.setattr(torch.Tensor, "__matmul__", new_matmul)
        yield


def eager(family: str) -> PreTrainedModel:
    model = make(family, torch.float64)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def inputs_of(model: PreTrainedModel, layers: list[Layer]) -> dict[str, Tensor]:
    """One plain forward pass of all batches: the inputs of each layer, (tokens, in); absent when it was not called."""
    seen: dict[tuple[int, int], list[Tensor]] = {}
    with torch.no_grad(), recorded(model, seen):
        for batch in batches_of(model, ids(), 2):
            run(model, batch)
    found: dict[str, Tensor] = {}
    for layer in layers:
        key = (layer.weight.untyped_storage().data_ptr(), layer.weight.storage_offset())
        if key in seen:
            found[layer.name] = torch.cat(seen[key])
    return found


def plain_wanda(layer: Layer, x: Tensor) -> None:
    layer.weight.mul_(naive.keep_from_score(naive.wanda(layer.weight, x), "row", 0.5))


def in_call_order(model: PreTrainedModel) -> list[Layer]:
    layers = [layer for layer in find_layers(model) if layer.kind != "router"]
    order = scout(model, batches_of(model, ids())[0], layers).order
    return sorted(layers, key=lambda layer: order[layer])


def by_layer(model: PreTrainedModel) -> None:
    """True-sequential: a whole forward pass of everything before each single layer."""
    for layer in in_call_order(model):
        x = inputs_of(model, [layer]).get(layer.name)
        if x is not None:
            plain_wanda(layer, x)


def by_block(model: PreTrainedModel) -> None:
    """The papers' schedule: the inputs of a whole block at once, behind pruned blocks."""
    layers = in_call_order(model)
    for block in dict.fromkeys(layer.block for layer in layers):
        inside = [layer for layer in layers if layer.block == block]
        seen = inputs_of(model, inside)
        for layer in inside:
            if layer.name in seen:
                plain_wanda(layer, seen[layer.name])


def at_once(model: PreTrainedModel) -> None:
    layers = in_call_order(model)
    seen = inputs_of(model, layers)
    for layer in layers:
        if layer.name in seen:
            plain_wanda(layer, seen[layer.name])


@pytest.mark.parametrize(("schedule", "plain"), [("sequential", by_layer), ("block", by_block), ("oneshot", at_once)])
@pytest.mark.parametrize("family", SINGLE)
def test_schedule_equals_a_plain_run(family: str, schedule: str, plain: Callable[[PreTrainedModel], None]) -> None:
    expected, model = eager(family), eager(family)
    called = inputs_of(model, in_call_order(model)).keys()
    plain(expected)
    result = prune(model, Wanda(), ids(), sparsity=0.5, schedule=schedule, batch_size=2)
    assert result.passes == (2 if schedule == "block" else 1)
    assert len(called) >= 0.7 * len(result.layers)
    for ours, theirs in zip(find_layers(model), find_layers(expected), strict=True):
        if ours.name in called:
            assert torch.equal(ours.weight, theirs.weight), ours.name


@pytest.mark.parametrize("schedule", ["sequential", "block", "oneshot"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_that_changes_nothing_is_the_plain_forward_pass(family: str, schedule: str) -> None:
    """Bit for bit: what leaves the last block, and what every layer sees."""
    model = make(family)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    batches, found = batches_of(model, ids(), 2), find(model)
    outputs: list[list[Tensor]] = [[], []]
    which = 0

    def remember(module: torch.nn.Module, args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, Tensor)
        outputs[which].append(first)

    last = list(found.blocks.values())[-1]
    handle = last.register_forward_hook(remember)
    with torch.no_grad():
        for batch in batches:
            run(model, batch)
        which = 1
        visited: list[str] = []
        report = walk(
            model, batches, found.layers, blocks=found.blocks, collector=SecondMoment, schedule=schedule,
            visit=lambda arrivals: visited.extend(arrival.layer.name for arrival in arrivals),
        )  # fmt: skip
    handle.remove()
    walked = outputs[1][-len(outputs[0]) :]  # the look ahead came first; shared weights needed a pass of their own
    assert all(torch.equal(a, b) for a, b in zip(outputs[0], walked, strict=True))
    assert len(visited) == len(set(visited)) == len(found.layers) - len(report.unvisited)


@pytest.mark.parametrize("schedule", ["sequential", "block"])
@pytest.mark.parametrize("family", sorted(SHARED))
def test_a_shared_weight_collects_from_all_its_places(family: str, schedule: str) -> None:
    model = make(family, torch.float64)
    layers = in_call_order(model)
    seen = inputs_of(model, layers)
    counts = scout(model, batches_of(model, ids())[0], layers).calls
    result = prune(model, Wanda(), ids(), sparsity=0.5, schedule=schedule, batch_size=2)
    tokens = {layer.name: layer.tokens for layer in result.layers}
    shared = [layer for layer in layers if counts[layer] > 1]
    assert shared
    for layer in shared:
        assert tokens[layer.name] == len(seen[layer.name]) == counts[layer] * ids().numel()
    assert result.passes == (3 if schedule == "block" else 2)

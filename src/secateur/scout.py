"""A look ahead: one tiny forward pass tells how a model calls its layers."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.layers import Layer
from secateur.models.taps import tapped

Batch = Mapping[str, Tensor]
"""Keyword arguments of the model. 2-D tensors whose name ends in `mask` mark the tokens that count."""


@dataclass(frozen=True)
class Scouted:
    """What a tiny forward pass showed: how often, in which order and on whose input each layer is called."""

    calls: dict[Layer, int]
    leader: dict[Layer, Layer]
    order: dict[Layer, int]

    @property
    def uncalled(self) -> list[Layer]:
        """Layers that never run as modules. An expert may just have had no token, so none is among them."""
        return [layer for layer, n in self.calls.items() if not n and not layer.routed]


def scout(model: nn.Module, batch: Batch, layers: Sequence[Layer], tokens: int = 16) -> Scouted:
    """Run the model on the first few tokens of the first sequence, to learn how its layers are called."""
    calls = dict.fromkeys(layers, 0)
    first: list[Layer] = []
    leader: dict[Layer, Layer] = {}
    recent = Recent()

    def arrive(layer: Layer, x: Tensor, rows: Tensor | None) -> None:
        calls[layer] += 1
        if calls[layer] == 1:
            first.append(layer)
            before = recent.find(x)
            if before is not None:
                leader[layer] = before
            else:
                recent.add(x, layer)

    plain = all(value.dim() == 2 for value in batch.values())  # (sequences, tokens); others have axes of their own
    small = {name: value[:1, :tokens] for name, value in batch.items()} if plain else batch
    with torch.inference_mode(False), torch.no_grad(), tapped(layers, arrive):
        run(model, small)
    leader = {layer: head for layer, head in leader.items() if calls[layer] == 1 and calls[head] == 1}
    order = list(sorted(set(layers) - set(first), key=lambda layer: layer.order))
    for layer in order:  # unseen ones stand right behind the layer before them in the model
        before = [i for i, other in enumerate(first) if other.order < layer.order]
        first.insert(before[-1] + 1 if before else 0, layer)
    return Scouted(calls, leader, {layer: i for i, layer in enumerate(first)})


def run(model: nn.Module, batch: Batch) -> None:
    """One forward pass without the head: the layers inside the blocks are all that counts."""
    body: nn.Module = getattr(model, "base_model", model)
    device = next(body.parameters()).device
    inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
    for name, value in inputs.items():
        if value.is_inference():  # it has no version, by which a change in place is noticed
            inputs[name] = value.clone()
    if "use_cache" in inspect.signature(body.forward).parameters:
        inputs["use_cache"] = False
    body(**inputs)


class Recent:
    """Which layer first read a tensor that is still alive and unchanged."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[weakref.ref[Tensor], int, Layer]] = {}

    def add(self, x: Tensor, layer: Layer) -> None:
        self.seen[id(x)] = (weakref.ref(x), x._version, layer)

    def find(self, x: Tensor) -> Layer | None:
        reference, version, layer = self.seen.get(id(x), (None, -1, None))
        alive = reference is not None and reference() is x and version == x._version
        return layer if alive else None

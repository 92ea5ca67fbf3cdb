"""Which weights were pruned: the zeros of the model, held to what `pruning.json` counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.models.layers import Found, Layer
from secateur.models.save import RECORD

SURPLUS = 0.01  # share of a layer that may be zero besides what was pruned: some models come with zeros


def read_record(folder: str | Path) -> dict[str, Any]:
    """`pruning.json` of a model folder.

    Raises:
        UsageError: there is none, or it is not a record of a pruning.

    >>> read_record("/nowhere")
    Traceback (most recent call last):
    secateur.errors.UsageError: /nowhere has no pruning.json: ...
    """
    file = Path(folder) / RECORD
    if not file.is_file():
        raise UsageError(
            f"{folder} has no {RECORD}: recover starts from a folder that secateur prune --out has written."
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}.") from error
    return check_record(record, str(file))


def check_record(record: object, where: str = "The record") -> dict[str, Any]:
    """A record with its layers.

    Raises:
        UsageError: it has none, or one of them lacks a name, a shape or a sparsity.
    """
    layers = record.get("layers") if isinstance(record, Mapping) else None
    if not isinstance(record, Mapping) or not isinstance(layers, list | tuple) or not layers:
        raise UsageError(f"{where} lists no pruned layers, so it is not known which zeros are to stay.")
    for i, layer in enumerate(layers):
        lacking = {"name", "shape", "sparsity"} - (set(layer) if isinstance(layer, Mapping) else set())
        if lacking:
            raise UsageError(f"{where}: layer {i} has no {sorted(lacking)[0]}.")
    return dict(record)


def pruned_layers(model: nn.Module, found: Found, record: Mapping[str, Any]) -> tuple[list[Layer], list[str]]:
    """The layers that the record says were pruned, after counting their zeros, and what the user should know.

    Raises:
        UsageError: a layer is missing or has another shape, or its zeros are not those of the record.
    """
    layers = {layer.name: layer for layer in found.layers}
    chosen: list[Layer] = []
    warnings: list[str] = []
    for entry in record["layers"]:
        name, share = entry["name"], float(entry["sparsity"])
        layer = layers.get(name)
        if layer is None:
            raise UsageError(f"{RECORD} names the layer {name}, which {type(model).__name__} does not have.")
        if list(layer.shape) != list(entry["shape"]):
            raise UsageError(
                f"{RECORD} gives {name} the shape {tuple(entry['shape'])}, but in the model it is {layer.shape}."
            )
        if share <= 0:
            continue
        count = layer.weight.numel()
        there, wanted = zeros(layer.weight), round(share * count)
        if there < wanted or there - wanted > SURPLUS * count:
            raise UsageError(
                f"{name} has {there} zeros of {count}, but {RECORD} says {wanted}: these weights are not the ones "
                f"that were pruned. Start from the folder that secateur prune wrote."
            )
        if there > wanted:
            warnings.append(f"{name}: {there - wanted} zeros besides the {wanted} pruned ones; they stay zero too")
        chosen.append(layer)
    if not chosen:
        raise UsageError(f"{RECORD} says that nothing was pruned (every sparsity is 0): there is nothing to recover.")
    return chosen, warnings


def zeros(tensor: Tensor) -> int:
    """Entries that are exactly zero."""
    return tensor.numel() - int(tensor.count_nonzero())

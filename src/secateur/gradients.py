"""Gradients of the dense model's loss, remembered per weight: how much the loss depends on each.

    g_s = d loss(sequence s) / d W          loss: mean cross-entropy over the tokens of one sequence
    l1    mean_s |g_s|                      l2    sqrt(mean_s g_s^2)

Every sequence has its own backward pass, so the way the calibration set is cut into batches changes nothing.
A gradient is added to its sum in fp32 and freed as soon as it arrives; one weight-sized sum a layer stays.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateur.errors import InvalidParameter, NumericalFailure, UsageError
from secateur.memory import free_memory
from secateur.models.layers import Layer
from secateur.models.taps import replaced_forward, tapped
from secateur.progress import Progress, silent
from secateur.scout import Batch
from secateur.statistics import Gradient, Norm

Checkpointing = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class GradientRequest:
    """What a method wants to know of the gradients.

    Checkpointed blocks keep no activations and run again in the backward pass: one more forward pass of the blocks,
    and one block's activations at a time. The numbers are the same. `auto` does it where all activations of one
    sequence would fill more than half of the memory that is free.
    """

    norm: Norm = "l1"
    checkpointing: Checkpointing = "auto"

    def __post_init__(self) -> None:
        for name, kinds in (("norm", Norm), ("checkpointing", Checkpointing)):
            if getattr(self, name) not in get_args(kinds):
                raise InvalidParameter(name, "gradients", f"one of {', '.join(get_args(kinds))}", getattr(self, name))


def collect_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[Layer],
    request: GradientRequest,
    *,
    blocks: Iterable[nn.Module] = (),
    progress: Progress = silent,
) -> dict[Layer, Gradient]:
    """One backward pass a sequence through the model as it is.

    Args:
        model: a model with a language-model head, in eval mode; causal, masked, or encoder-decoder. A masked model is
            asked for the very tokens it reads.
        batches: keyword arguments with their attention masks; padding does not count in the loss.
        layers: whose weights' gradients are wanted. All others get none, and none is kept on the parameters.
        request: the norm, and whether to checkpoint.
        blocks: the modules to checkpoint.
        progress: told the sequences done.

    Raises:
        UsageError: the model computes no loss from labels.
        NumericalFailure: the loss is not finite.
    """
    if "labels" not in inspect.signature(model.forward).parameters:
        raise UsageError(
            f"gradients need a model with a language-model head, whose loss can be taken; {type(model).__name__} "
            f"has none: load it as a causal or masked language model"
        )
    found = {
        layer: Gradient(request.norm, 0, torch.zeros(layer.shape, dtype=torch.float32, device=layer.weight.device))
        for layer in layers
    }
    total = sum(_rows(batch) for batch in batches)
    done = 0
    with ExitStack() as undo:
        undo.enter_context(_accumulating(model, found))
        for block in dict.fromkeys(blocks) if _checkpoints(request, batches, layers) else ():
            again = partial(checkpoint, block.forward, use_reentrant=False)
            undo.enter_context(replaced_forward(block, again))
        experts = [layer for layer in layers if layer.expert is not None]
        undo.enter_context(tapped(experts, _pass))  # one by one, as in the walk: grouped kernels know few dtypes
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        for batch in batches:
            for row in range(_rows(batch)):
                loss = language_loss(model, {name: value[row : row + 1] for name, value in batch.items()})
                if not bool(torch.isfinite(loss)):
                    raise NumericalFailure(
                        f"the loss of calibration sequence {done} is {loss.item()}; try another dtype or text"
                    )
                loss.backward()
                done += 1
                progress(done, total, "gradients")
    for gradient in found.values():
        gradient.samples = done
    return found


def _pass(layer: Layer, x: Tensor, rows: Tensor | None) -> None:
    """Nothing is done when a layer is reached."""


def _checkpoints(request: GradientRequest, batches: Sequence[Batch], layers: Sequence[Layer]) -> bool:
    if request.checkpointing != "auto":
        return request.checkpointing == "always"
    tokens = max(value[0].numel() for batch in batches for value in batch.values())
    held = sum(sum(layer.shape) for layer in layers)  # inputs and outputs; half as much again for what lies between
    return 1.5 * tokens * held * layers[0].weight.element_size() > free_memory(layers[0].weight.device) / 2


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def language_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of one sequence, as the model itself defines it from labels (-100 does not count).

    Without `labels` in the batch they are the tokens that it reads, each foretold from those before.
    """
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
    if "labels" not in inputs:
        inputs["labels"] = _labels(inputs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    loss: Tensor = model(**inputs).loss
    return loss


def _labels(inputs: Mapping[str, Tensor]) -> Tensor:
    if "decoder_input_ids" in inputs:
        read = inputs["decoder_input_ids"]
        labels = torch.cat([read[:, 1:], torch.full_like(read[:, :1], -100)], dim=1)
        mask = inputs.get("decoder_attention_mask")
        mask = None if mask is None else torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    else:
        labels, mask = inputs["input_ids"].clone(), inputs.get("attention_mask")
        if mask is not None:  # nothing real stands before the first token that could foretell it
            labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    return labels if mask is None else labels.masked_fill(mask == 0, -100)


@contextmanager
def _accumulating(model: nn.Module, found: Mapping[Layer, Gradient]) -> Iterator[None]:
    """Only the layers' parameters get gradients, each taken away the moment it is complete."""
    slices: dict[nn.Parameter, list[Layer]] = {}
    for layer in found:
        slices.setdefault(getattr(layer.module, layer.parameter), []).append(layer)

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for layer in slices[parameter]:  # type: ignore[index]  # torch hands back the parameter itself
            gradient = layer.view_of(parameter.grad).float()  # ours to change: nobody sees it any more
            if found[layer].norm == "l1":
                found[layer].sum.add_(gradient.abs_())
            else:
                found[layer].sum.addcmul_(gradient, gradient)
        parameter.grad = None

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with ExitStack() as undo:
        try:
            for parameter, _, _ in before:
                parameter.requires_grad_(parameter in slices)
                parameter.grad = None
                if parameter in slices:
                    undo.callback(parameter.register_post_accumulate_grad_hook(take).remove)
            yield
        finally:
            for parameter, wanted, gradient in before:
                parameter.grad = gradient
                parameter.requires_grad_(wanted)

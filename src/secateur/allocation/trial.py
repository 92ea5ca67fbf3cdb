"""A pruned model on trial: how far it is from the dense one at any sparsities, and the slope along each of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocation.contract import Evidence
from secateur.allocation.owl import wanda_score
from secateur.divergence import kl_divergence
from secateur.errors import NumericalFailure, UsageError
from secateur.masks import Unstructured
from secateur.models.layers import Layer

WINDOW = 256  # tokens that a sequence is cut to
EVERY = 4  # of so many predictions one is compared


@contextmanager
def on_trial(layers: Sequence[Layer], evidence: Evidence, tokens: int) -> Iterator[Trial]:
    """A trial of a model, which has every weight, gradient and flag back when the block ends.

    Args:
        layers: whose weights are dropped, by their Wanda scores (`evidence.seen`), within rows.
        tokens: how many are read, of the sequences in `evidence.batches`, each cut to its first 256.

    Raises:
        UsageError: the model makes no predictions over a vocabulary.
    """
    model = evidence.model
    assert model is not None and evidence.batches, "nothing to try"
    device = next(model.parameters()).device
    ours = {id(parameter_of(layer)) for layer in layers}
    parameters = list(model.parameters())
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), ExitStack() as undo:
        trial = Trial(model, layers, evidence, tokens)
        undo.callback(trial.restore)
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in ours)
            if id(parameter) in ours:
                undo.callback(parameter.register_post_accumulate_grad_hook(trial.receive).remove)
        try:
            yield trial
        finally:
            for parameter, flag, gradient in before:
                parameter.requires_grad_(flag)
                parameter.grad = gradient


class Trial:
    """See `on_trial`, which makes it."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], evidence: Evidence, tokens: int) -> None:
        self.model, self.layers, self.seen = model, list(layers), evidence.seen
        self.windows = _windows(evidence.batches, tokens, next(model.parameters()).device)
        with torch.no_grad():
            self.expected = [self._predict(window) for window in self.windows]
        self.counts = [_counting(window, p) for window, p in zip(self.windows, self.expected, strict=True)]
        self.dense = {layer: layer.weight.clone() for layer in self.layers}
        self.bands: dict[Layer, Tensor] = {}
        self.slopes: dict[Layer, float] = {}
        self.holders: dict[int, list[Layer]] = {}
        for layer in self.layers:
            self.holders.setdefault(id(parameter_of(layer)), []).append(layer)

    def measure(self, sparsities: Mapping[Layer, float], delta: float) -> tuple[float, dict[Layer, float]]:
        """The divergence from the dense model at these sparsities, and its slope along each.

        Args:
            delta: half the width of the band of weights that a slope is taken over; 0 leaves the slopes out.

        Returns:
            KL(dense, pruned) in nats, the mean over the predictions compared, and its slope by layer.

        Raises:
            NumericalFailure: the divergence is not a finite number.
        """
        self._cut(sparsities, delta)
        self.slopes = dict.fromkeys(self.layers, 0.0)
        total, everything = 0.0, sum(float(count.sum()) for count in self.counts)
        for window, expected, count in zip(self.windows, self.expected, self.counts, strict=True):
            with torch.set_grad_enabled(delta > 0):
                loss = (kl_divergence(expected, self._predict(window)) * count).sum() / max(everything, 1.0)
                if delta:
                    loss.backward()
            total += float(loss.detach())
        if not total < float("inf"):
            raise NumericalFailure(f"the divergence from the dense model is {total}; no sparsities can be searched")
        return total, {layer: -slope / (2 * delta) for layer, slope in self.slopes.items()} if delta else {}

    def receive(self, parameter: Tensor) -> None:
        """A gradient has arrived: what the weights of the bands, put back, would change."""
        assert parameter.grad is not None
        for layer in self.holders[id(parameter)]:
            gradient = parameter.grad if layer.expert is None else parameter.grad[layer.expert]
            gradient = gradient.t() if layer.transposed else gradient
            change = gradient * self.dense[layer] * self.bands[layer]
            self.slopes[layer] += float(change.sum(dtype=torch.promote_types(change.dtype, torch.float32)))
        parameter.grad = None

    def restore(self) -> None:
        """Every weight as it was."""
        with torch.no_grad():
            for layer, weight in self.dense.items():
                layer.weight.copy_(weight)

    def _cut(self, sparsities: Mapping[Layer, float], delta: float) -> None:
        pattern = Unstructured("row")
        with torch.no_grad():
            for layer, sparsity in sparsities.items():
                score = wanda_score(self.dense[layer], self.seen.get(layer))
                layer.weight.copy_(self.dense[layer] * pattern.keep(score, sparsity))
                if delta:
                    more = pattern.keep(score, max(sparsity - delta, 0.0))
                    self.bands[layer] = more & ~pattern.keep(score, min(sparsity + delta, 0.999))

    def _predict(self, window: Mapping[str, Tensor]) -> Tensor:
        """(sequences, positions, vocabulary) logits of one of every few positions, the last among them."""
        forward = inspect.signature(self.model.forward).parameters
        read = window.get("decoder_input_ids", window.get("input_ids"))
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in forward else {}
        places = None if read is None else _places(read.shape[1]).to(read.device)
        if places is not None and "logits_to_keep" in forward:
            options["logits_to_keep"] = places
        logits = getattr(self.model(**window, **options), "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise UsageError(
                f"the descent allocation compares predictions over a vocabulary; {type(self.model).__name__} makes none"
            )
        return logits if "logits_to_keep" in options else logits[:, _places(logits.shape[1]).to(logits.device)]


def parameter_of(layer: Layer) -> Tensor:
    """The parameter that holds a layer, which for experts holds others as well."""
    parameter: Tensor = getattr(layer.module, layer.parameter)
    return parameter


def _places(length: int) -> Tensor:
    return torch.arange(length - 1, -1, -EVERY).flip(0)


def _windows(batches: Sequence[Mapping[str, Tensor]], tokens: int, device: torch.device) -> list[dict[str, Tensor]]:
    """The first sequences, cut short where every input is laid out as (sequences, tokens)."""
    windows, room = [], tokens
    for batch in batches:
        if room <= 0:
            break
        plain = all(value.dim() == 2 for value in batch.values())
        length = min(WINDOW, max(value.shape[1] for value in batch.values())) if plain else 0
        rows = max(1, room // length) if plain else None
        window = {
            name: (value[:rows, :length] if plain else value).to(device, copy=True) for name, value in batch.items()
        }
        windows.append(window)
        room -= max(value.numel() for name, value in window.items() if name.endswith("ids") or len(window) == 1)
    return windows


def _counting(window: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """(sequences, positions) 1 where a prediction counts, 0 at padding."""
    mask = window.get("decoder_attention_mask" if "decoder_input_ids" in window else "attention_mask")
    if mask is None or mask.dim() != 2:
        return logits.new_ones(logits.shape[:2])
    return mask[:, _places(mask.shape[1]).to(mask.device)].to(logits.dtype)

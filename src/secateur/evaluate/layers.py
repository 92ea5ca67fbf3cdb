"""How far the output of each layer has moved, with both models run end to end.

    error = ||y_pruned - y_dense||^2 / ||y_dense||^2      summed over all tokens and outputs

Each pruned layer reads what the pruned layers before it produced, so the error is the one met in use, and
it means the same for every method.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.errors import NumericalFailure, UsageError
from secateur.progress import Progress, silent
from secateur.walk import evaluating


class LayerError(NamedTuple):
    """A layer and the relative error of its module's output; None where it has none that can be compared.

    That is: a weight that is used without its module being called, an expert that the two models sent
    different tokens to, or a dense output that is all zero.
    """

    name: str
    error: float | None


def layer_errors(model: Any, dense: Any, ids: Tensor, *, progress: Progress = silent) -> list[LayerError]:
    """Relative squared error of every layer's output against the dense model, on the same tokens.

    The dense model's outputs are held for the time of the call: some (1, 256) ids are enough for a picture.

    Args:
        model: the pruned model.
        dense: the model before pruning, with the same layers; on any device.
        ids: (n, seqlen) token ids.
        progress: called with forward passes done and in all.

    Returns:
        One `LayerError` per layer in model order. Experts whose weights share one module share its error.

    Raises:
        UsageError: the two models do not have the same layers.
        NumericalFailure: an error is not finite; the message names the layer.

    >>> import transformers
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> layer_errors(model, model, torch.arange(8)[None])[0]
    LayerError(name='model.layers.0.self_attn.q_proj', error=0.0)
    """
    places, dense_places = _places(model), _places(dense)
    if places.keys() != dense_places.keys():
        odd = sorted(places.keys() ^ dense_places.keys())
        raise UsageError(
            f"Layer errors need the same layers in both models; {type(model).__name__} has {len(places)}, "
            f"the dense {type(dense).__name__} {len(dense_places)}; {odd[0]} is in one only."
        )

    kept: dict[str, deque[Tensor]] = defaultdict(deque)
    parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    unlike: set[str] = set()

    def keep(place: str, output: Tensor) -> None:
        kept[place].append(output.clone())  # some blocks add to a layer's output in place

    def compare(place: str, output: Tensor) -> None:
        if not kept[place] or kept[place][0].shape != output.shape:
            unlike.add(place)
            return
        reference = kept[place].popleft().to(output.device, torch.float64)
        parts[place][0] += (output.double() - reference).square().sum().item()
        parts[place][1] += reference.square().sum().item()

    for done, (one, at, see) in enumerate([(dense, dense_places, keep), (model, places, compare)], 1):
        modules = {place: one.get_submodule(place) for place in at.values()}
        with evaluating(one), torch.no_grad(), watching(modules, see):
            _run(one, ids)
        progress(done, 2, "errors per layer")
    unlike.update(place for place, left in kept.items() if left)
    return [
        LayerError(name, None if place in unlike else _ratio(name, *parts[place])) for name, place in places.items()
    ]


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, output)` whenever one of the modules returns; the hooks leave at the end."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: see(name, _tensor(output))

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _places(model: nn.Module) -> dict[str, str]:
    """Layer -> its module, both by name; a module that holds many experts stands for all of them."""
    from secateur.models.layers import find_layers

    names = {module: name for name, module in model.named_modules()}
    return {layer.name: names[layer.module] for layer in find_layers(model)}


def _run(model: Any, ids: Tensor) -> None:
    ids = ids.to(model.get_input_embeddings().weight.device)
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model(input_ids=ids, use_cache=False, return_dict=True, **both)


def _tensor(output: Any) -> Tensor:
    first = output if isinstance(output, Tensor) else output[0]
    if not isinstance(first, Tensor):
        raise UsageError(f"A layer's module returned {type(first).__name__}, not a tensor.")
    return first


def _ratio(name: str, moved: float, whole: float) -> float | None:
    if whole == 0:
        return None
    if not (moved / whole < float("inf")):
        raise NumericalFailure(f"The output of {name} is not finite: error {moved}, dense norm {whole}.")
    return moved / whole

"""A block run with other weights, so that gradients reach them, without touching its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.layers import Layer


@contextmanager
def substituted(block: nn.Module, weights: Mapping[Layer, Tensor]) -> Iterator[None]:
    """While open, layers apply these (out, in) tensors in place of their own weights.

    The tensors are cast to the dtype of the parameters, and laid out as each is stored: transposed, or as one slice of
    the 3-D parameter of all experts. Gradients reach these tensors and nothing else: `block`'s own parameters ask for
    none meanwhile. Everything is undone on the way out.

    >>> from secateur.models.layers import Layer
    >>> linear = nn.Linear(2, 1, bias=False)
    >>> with substituted(linear, {Layer("q", "0", "mlp", (linear,)): torch.tensor([[2.0, 3.0]])}):
    ...     linear(torch.ones(1, 2)).item()
    5.0
    """
    places: dict[tuple[int, str], list[tuple[Layer, Tensor]]] = {}
    for layer, weight in weights.items():
        places.setdefault((id(getattr(layer.module, layer.parameter)), layer.parameter), []).append((layer, weight))
    wanted = [parameter for parameter in block.parameters() if parameter.requires_grad]
    own: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for pairs in places.values():
            layer = pairs[0][0]
            parameter = getattr(layer.module, layer.parameter)
            stored = _stored(parameter, pairs)
            for module in layer.modules:
                registry: dict[str, Any] = module._parameters
                own.append((registry, layer.parameter, parameter))
                registry[layer.parameter] = stored
        yield
    finally:
        for registry, name, parameter in own:
            registry[name] = parameter
        for parameter in wanted:
            parameter.requires_grad_(True)


def running_with(
    block: nn.Module, layers: Sequence[Layer]
) -> Callable[[Sequence[Tensor]], AbstractContextManager[None]]:
    """`substituted` for these layers of a block: it takes one (out, in) tensor a layer, in their order."""
    return lambda weights: substituted(block, dict(zip(layers, weights, strict=True)))


def _stored(parameter: nn.Parameter, pairs: list[tuple[Layer, Tensor]]) -> Tensor:
    """The tensors as the parameter holds them; experts without one keep their slice."""
    cast = {layer.expert: (w.t() if layer.transposed else w).to(parameter.dtype) for layer, w in pairs}
    if None in cast:
        return cast[None]
    slices = parameter.detach().unbind()
    return torch.stack([cast.get(expert, part) for expert, part in enumerate(slices)])

"""Being told just before a layer runs, and with which input, without touching the model's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.models.layers import Layer

Arrive = Callable[[Layer, Tensor, Tensor | None], None]
"""Called with the layer, its input (..., in), and for an expert the (tokens,) positions routed to it."""


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, this one module runs `forward`; what was set on the instance before comes back afterwards."""
    own = module.__dict__.get("forward")  # accelerate, for one, sets it there
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@contextmanager
def tapped(layers: Sequence[Layer], arrive: Arrive) -> Iterator[None]:
    """While open, `arrive` is called before each of `layers` runs, and may change the layer's weight.

    Linear maps are watched by forward pre-hooks. Expert modules run their experts one by one, as their own
    eager code does, so that each slice has its own moment. Everything is undone on the way out.
    """
    experts: dict[nn.Module, dict[tuple[int, str], Layer]] = {}
    for layer in layers:
        if layer.expert is not None:
            for module in layer.modules:
                experts.setdefault(module, {})[layer.expert, layer.parameter] = layer
    with ExitStack() as undo:
        for layer in layers:
            if layer.expert is None:
                for module in layer.modules:
                    hook = partial(_pre_hook, layer, arrive)
                    undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for module, watched in experts.items():
            undo.enter_context(replaced_forward(module, partial(_run_experts, module, watched, arrive)))
        yield


def _pre_hook(layer: Layer, arrive: Arrive, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arrive(layer, args[0] if args else kwargs["input"], None)


def _run_experts(
    module: Any,
    watched: dict[tuple[int, str], Layer],
    arrive: Arrive,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """hidden_states: (tokens, in); top_k_index, top_k_weights: (tokens, k). Sums as the eager code does."""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():  # ascending
        if expert >= module.num_experts:
            continue
        slot, token = torch.where(top_k_index.t() == expert)
        x = hidden_states[token]
        for leaf in (first, "down_proj"):
            layer = watched.get((expert, leaf))
            if layer is not None:
                arrive(layer, x, token)
            x = _expert_linear(module, leaf, expert, x)
            if leaf != "down_proj":
                x = module._apply_gate(x) if leaf == "gate_up_proj" else module.act_fn(x)
        if getattr(module, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        output.index_add_(0, token, (x * top_k_weights[token, slot, None]).to(output.dtype))
    return output


def _expert_linear(module: Any, leaf: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, leaf)[expert]
    bias = getattr(module, f"{leaf}_bias")[expert] if getattr(module, "has_bias", False) else None
    if not getattr(module, "is_transposed", False):
        return F.linear(x, weight, bias)
    product: Tensor = x @ weight
    return product if bias is None else product + bias

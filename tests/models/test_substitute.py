"""A block run with other weights: as if they were its own, and nothing stays behind."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, ids, make
from torch import nn

from secateur.inputs import batches_of
from secateur.models.layers import find
from secateur.models.substitute import running_with, substituted
from secateur.models.taps import tapped
from secateur.scout import run


@pytest.mark.parametrize("family", FAMILIES)
def test_as_if_the_weights_were_its_own(family: str) -> None:
    """The output, and the gradients, of a model whose weights were changed in place."""
    model, changed = make(family, torch.float64), make(family, torch.float64)
    outputs: list[torch.Tensor] = []

    def remember(module: nn.Module, args: object, output: object) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    layers, twins = ([x for x in find(m).layers if x.kind != "router"] for m in (model, changed))
    weights = {layer: (layer.weight * 0.9).requires_grad_() for layer in layers}
    for twin in twins:
        twin.weight.mul_(0.9)
    gradients = []
    for one, context in ((model, substituted(model, weights)), (changed, nullcontext())):
        found = find(one)
        handle = list(found.blocks.values())[-1].register_forward_hook(remember)
        with tapped(found.layers, lambda *_: None), context:
            run(one, batches_of(one, ids(2))[0])
            outputs[-1].square().sum().backward()
        handle.remove()
    torch.testing.assert_close(outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :])
    for (layer, weight), twin in zip(weights.items(), twins, strict=True):
        whole = getattr(twin.module, twin.parameter).grad
        if whole is not None and weight.grad is not None:
            part = whole if twin.expert is None else whole[twin.expert]
            gradients.append(weight.grad)
            torch.testing.assert_close(weight.grad, part.t() if twin.transposed else part, msg=layer.name)
    assert len(gradients) > 0.8 * len(layers)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_everything_is_undone_after_an_error() -> None:
    model = make("mixtral", torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    layers = list(find(model).layers)
    with pytest.raises(ZeroDivisionError), running_with(model, layers)([layer.weight.float() for layer in layers]):
        linear = model.model.layers[0].self_attn.q_proj
        assert linear.weight.dtype == torch.bfloat16 and not isinstance(linear.weight, nn.Parameter)
        assert not any(parameter.requires_grad for parameter in before.values())
        raise ZeroDivisionError
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert [name for name, p in before.items() if not p.requires_grad] == ["model.norm.weight"]


def test_experts_without_a_tensor_keep_their_slice() -> None:
    model = make("mixtral")
    layers = [layer for layer in find(model).layers if layer.expert == 1]
    experts = model.model.layers[0].mlp.experts
    before = experts.down_proj.detach().clone()
    with substituted(model, {layer: torch.zeros(layer.shape) for layer in layers}):
        assert not experts.down_proj[1].any() and torch.equal(experts.down_proj[[0, 2, 3]], before[[0, 2, 3]])
    assert torch.equal(experts.down_proj, before)

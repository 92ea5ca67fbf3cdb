"""The error per layer against plain hooks; experts, uncalled weights, and hooks that leave."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_models import CAUSAL, tiny, tiny_bert, tiny_t5

from secateur.errors import NumericalFailure, UsageError
from secateur.evaluate import layer_errors
from secateur.models.layers import find_layers

IDS = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(2))


def outputs(model) -> dict[str, torch.Tensor]:
    """Every linear layer's output, by name."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o})))
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return {name: copy.copy(o) for name, o in seen.items() if isinstance(o, torch.Tensor)}


def halved(dense):
    model = copy.deepcopy(dense)
    for layer in find_layers(model):
        layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0
    return model


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2", "OPT"])
def test_agrees_with_plain_hooks_and_accumulates(family: str) -> None:
    dense = tiny(family)
    model = halved(dense)
    errors = layer_errors(model, dense, IDS)
    ys, yd = outputs(model), outputs(dense)
    assert [name for name, _ in errors] == [layer.name for layer in find_layers(model)]
    for name, error in errors:
        want = (ys[name] - yd[name]).square().sum() / yd[name].square().sum()
        assert error == pytest.approx(want.item(), rel=1e-4) and error > 0


def test_errors_before_the_cut_are_zero_and_after_it_are_not() -> None:
    dense = tiny("Llama")
    model = copy.deepcopy(dense)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(0.5)
    errors = dict(layer_errors(model, dense, IDS))
    assert errors["model.layers.0.mlp.up_proj"] == 0
    assert errors["model.layers.0.mlp.down_proj"] == pytest.approx(0.25)
    assert all(error > 0 for name, error in errors.items() if ".layers.1." in name)


@pytest.mark.parametrize("family", [*CAUSAL, "Bert", "T5"])
def test_every_family_runs_and_a_model_equals_itself(family: str) -> None:
    model = {"Bert": tiny_bert, "T5": tiny_t5}.get(family, lambda: tiny(family))()
    errors = layer_errors(model, model, IDS)
    assert len(errors) == len(find_layers(model)) and {error for _, error in errors} <= {0.0, None}
    assert sum(error == 0 for _, error in errors) > len(errors) / 2


def test_experts_share_the_error_of_their_module() -> None:
    dense = tiny("Mixtral")
    errors = [e for name, e in layer_errors(halved(dense), dense, IDS) if "layers.0" in name and "experts" in name]
    assert len(errors) == 8 and len(set(errors)) == 1 and errors[0] is not None and errors[0] > 0


def test_a_weight_used_without_a_call_has_no_error() -> None:
    errors = dict(layer_errors(tiny("Mamba"), tiny("Mamba"), IDS))
    uncalled = {name.rpartition(".")[2] for name, error in errors.items() if error is None}
    assert uncalled == {"dt_proj"} and 0.0 in errors.values()


def test_outputs_changed_in_place_by_the_block_are_kept_as_they_were() -> None:
    dense, model = tiny("Llama"), tiny("Llama")
    for m in (dense, model):
        block = m.model.layers[0]
        block.mlp.down_proj.register_forward_hook(lambda *a: None)
        block.mlp.register_forward_hook(lambda module, inputs, output: output.mul_(0))
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    assert dict(layer_errors(model, dense, IDS))["model.layers.0.mlp.down_proj"] == pytest.approx(4)


def test_hooks_and_modes_come_back_also_after_a_failure() -> None:
    dense, model = tiny("Llama"), tiny("Llama").train()
    layer_errors(model, dense, IDS)
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer_errors(model, dense, IDS)
    handle.remove()
    assert model.training and not dense.training
    assert not any(m._forward_hooks for one in (model, dense) for m in one.modules())


def test_different_models_are_refused() -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM has 14, the dense GPT2LMHeadModel 8"):
        layer_errors(tiny("Llama"), tiny("GPT2"), IDS)


def test_what_is_not_finite_is_named() -> None:
    model = tiny("Llama")
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = math.nan
    with pytest.raises(NumericalFailure, match=r"layers\.1\.self_attn\.v_proj is not finite"):
        layer_errors(model, tiny("Llama"), IDS)


def test_progress() -> None:
    seen = []
    layer_errors(tiny("Llama"), tiny("Llama"), IDS, progress=lambda *a: seen.append(a[:2]))
    assert seen == [(1, 2), (2, 2)]

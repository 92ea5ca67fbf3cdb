"""Zeros are counted exactly; tied weights once; n:m groups along the inputs."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import tiny, tiny_t5

from secateur.errors import ModelNotSupported
from secateur.evaluate import sparsity
from secateur.evaluate.sparsity import fitting_groups
from secateur.models.layers import find_layers


def test_a_dense_model_has_none() -> None:
    result = sparsity(tiny("Llama"))
    assert (result.layers, result.model, len(result.per_layer)) == (0, 0, 14)
    assert set(result.nm) == {"2:4", "4:8"} and max(result.nm.values()) == 0
    assert result.per_layer[0].shape == (32, 32) and result.per_layer[0].name.endswith("q_proj")


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Mixtral", "Mamba"])
def test_counts_are_exact(family: str) -> None:
    model = tiny(family)
    for p in model.parameters():  # norms and biases start at 0 or 1
        p.data.add_(0.5).masked_fill_(p.data == 0, 0.5)
    torch.manual_seed(0)
    zeroed = weights = 0
    wanted = []
    for layer in find_layers(model):
        drop = torch.rand(layer.weight.shape) < 0.3
        layer.weight[drop] = 0
        zeroed, weights = zeroed + int(drop.sum()), weights + drop.numel()
        wanted.append((layer.name, tuple(drop.shape), int(drop.sum()) / drop.numel()))
    result = sparsity(model)
    assert [(row.name, row.shape, row.sparsity) for row in result.per_layer] == wanted
    assert result.layers == zeroed / weights
    assert result.model == zeroed / sum(p.numel() for p in model.parameters())


def test_tied_parameters_count_once() -> None:
    model = tiny("GPT2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.lm_head.weight.data.zero_()
    zeros = sum(int((p == 0).sum()) for p in model.parameters())  # biases are zero too
    assert sparsity(model).model == zeros / sum(p.numel() for p in model.parameters())


def test_n_of_m_groups_run_along_the_inputs() -> None:
    model = tiny("GPT2")  # stores (in, out): the mistake would show
    for layer in find_layers(model):
        layer.weight[:, 0::4] = 0
        layer.weight[:, 3::4] = 0
    result = sparsity(model)
    assert result.nm == {"2:4": 1, "4:8": 1} and result.layers == 0.5
    assert "2:4 holds" in str(result) and str(result).startswith("50.00% of the layers")


def test_4_of_8_is_weaker_than_2_of_4() -> None:
    model = tiny("Llama")
    for layer in find_layers(model):
        layer.weight.unflatten(1, (-1, 8))[..., :4] = 0
    result = sparsity(model)
    assert result.nm == {"2:4": 0.5, "4:8": 1}
    assert all(row.nm == {"2:4": 0.5, "4:8": 1} for row in result.per_layer)


def test_widths_that_do_not_divide_are_left_out() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=12, intermediate_size=10, num_hidden_layers=1, num_attention_heads=2)
    )
    result = sparsity(model)
    nm = {row.name.rpartition(".")[2]: set(row.nm) for row in result.per_layer}
    assert nm["q_proj"] == {"2:4"} and nm["down_proj"] == set() and set(result.nm) == {"2:4"}


def test_fitting_groups_and_negative_zero() -> None:
    weight = torch.tensor([[0.0, -0.0, 3, 4, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0, 1, 0]])
    assert fitting_groups(weight, 2, 4) == (3, 4)
    assert fitting_groups(weight, 1, 4) == (1, 4)
    assert fitting_groups(weight, 4, 8) == (1, 2)


def test_encoder_decoders_and_models_without_blocks() -> None:
    assert sparsity(tiny_t5()).layers == 0
    with pytest.raises(ModelNotSupported):
        sparsity(torch.nn.Linear(2, 2))


def test_serialises_and_reports_progress() -> None:
    seen = []
    result = sparsity(tiny("Llama"), progress=lambda *a: seen.append(a))
    record = json.loads(json.dumps(result.to_dict()))
    assert record["per_layer"][0] == {
        "name": "model.layers.0.self_attn.q_proj", "shape": [32, 32], "sparsity": 0, "nm": {"2:4": 0, "4:8": 0},
    }  # fmt: skip
    assert seen[-1][:2] == (14, 14)

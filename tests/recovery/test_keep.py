"""The zeros of a model against the record of its pruning."""

import json

import pytest
import torch
from families import make

from secateur.errors import UsageError
from secateur.methods.magnitude import Magnitude
from secateur.models.layers import find
from secateur.pruning import prune
from secateur.recovery.keep import check_record, pruned_layers, read_record


@pytest.fixture
def pruned():
    model = make("llama")
    return model, prune(model, Magnitude(), sparsity=0.5, exclude=("q_proj",)).to_dict()


def test_the_pruned_layers_are_those_of_the_record(pruned):
    model, record = pruned
    layers, warnings = pruned_layers(model, find(model), record)
    assert len(layers) == 12 and not any("q_proj" in layer.name for layer in layers) and not warnings


def test_layers_with_sparsity_zero_were_not_pruned(pruned):
    model, record = pruned
    record["layers"] = [
        dict(layer, sparsity=0.0 if i else layer["sparsity"]) for i, layer in enumerate(record["layers"])
    ]
    assert len(pruned_layers(model, find(model), record)[0]) == 1


def fill(layer):
    layer["sparsity"] = 0.75  # more than there is


def starve(layer):
    layer["sparsity"] = 0.25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (fill, "has 512 zeros of 1024, but pruning.json says 768"),
        (starve, "has 512 zeros of 1024, but pruning.json says 256"),
        (
            lambda layer: layer.update(name="model.layers.7.x"),
            "names the layer model.layers.7.x, which LlamaForCausalLM",
        ),
        (lambda layer: layer.update(shape=[8, 8]), r"the shape \(8, 8\), but in the model it is \(32, 32\)"),
    ],
)
def test_disagreement_is_said(pruned, change, said):
    model, record = pruned
    entry = next(layer for layer in record["layers"] if "o_proj" in layer["name"])
    entry["shape"] = list(entry["shape"])
    change(entry)
    with pytest.raises(UsageError, match=said):
        pruned_layers(model, find(model), record)


def test_one_lost_zero_is_enough(pruned):
    model, record = pruned
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[weight == 0] = torch.cat([torch.ones(1), torch.zeros(int((weight == 0).sum()) - 1)])
    with pytest.raises(UsageError, match=r"up_proj has 1023 zeros of 2048, but pruning\.json says 1024"):
        pruned_layers(model, find(model), record)


def test_a_few_zeros_more_are_said_and_stay(pruned):
    model, record = pruned
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight.view(-1)[weight.view(-1).nonzero()[:3]] = 0
    layers, warnings = pruned_layers(model, find(model), record)
    assert len(layers) == 12 and "3 zeros besides the 1024 pruned ones" in warnings[0]


def test_nothing_pruned(pruned):
    model, record = pruned
    record["layers"] = [dict(layer, sparsity=0.0) for layer in record["layers"]]
    with pytest.raises(UsageError, match="nothing was pruned"):
        pruned_layers(model, find(model), record)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no pruning.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "lists no pruned layers"),
        ("{}", "lists no pruned layers"),
        ('{"layers": []}', "lists no pruned layers"),
        ('{"layers": [{"name": "a", "shape": [1, 1]}]}', "layer 0 has no sparsity"),
        ('{"layers": [1]}', "layer 0 has no name"),
    ],
)
def test_records_that_are_none(tmp_path, text, said):
    if text is not None:
        (tmp_path / "pruning.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_record(tmp_path)


def test_a_record_is_read_as_it_was_written(pruned, tmp_path):
    (tmp_path / "pruning.json").write_text(json.dumps(pruned[1]))
    assert read_record(tmp_path)["layers"][0]["name"] == check_record(pruned[1])["layers"][0]["name"]

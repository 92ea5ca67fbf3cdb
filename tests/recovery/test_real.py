"""Recovery of the real model: the zeros are counted by their places, the share of parameters held to its bound."""

import copy

import pytest
import torch

from secateur.data.calibration import calibration
from secateur.methods.magnitude import Magnitude
from secateur.models.layers import find_layers
from secateur.pruning import prune
from secateur.recovering import recover
from secateur.recovery.options import Recovery


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_learns_and_loses_no_zero(smollm2):
    model, tokenizer = copy.deepcopy(smollm2[0]).float(), smollm2[1]
    pruning = prune(model, Magnitude(), sparsity=0.5)
    dropped = {layer.name: layer.weight == 0 for layer in find_layers(model)}
    ids = calibration(tokenizer, "gutenberg", n=1, seqlen=64, model=model)
    options = Recovery(steps=3, lr=2e-3, batch_size=1, warmup=0.0, schedule="constant")
    result = recover(model, tokenizer, ids, pruning, options)
    assert result.losses["last"] < result.losses["first"] - 0.2
    assert result.share <= 0.01 and result.trained.keys() == {"adapters", "norms"}
    assert result.zeros["lost"] == 0 and result.zeros["before"] == sum(int(d.sum()) for d in dropped.values())
    for layer in find_layers(model):
        assert torch.equal(layer.weight == 0, dropped[layer.name])

"""peft's adapters on a pruned model: trained, never merged."""

import copy

import pytest
import torch
from families import ids, make

from secateur.errors import UsageError
from secateur.methods.magnitude import Magnitude
from secateur.pruning import prune
from secateur.recovering import recover
from secateur.recovery.lora import detach, merge
from secateur.recovery.options import Recovery

peft = pytest.importorskip("peft")
OPTIONS = Recovery(train=("adapters",), adapter="lora", rank=2, steps=6, lr=0.02, batch_size=4, warmup=0.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_pruned_weights_are_untouched_and_come_back(family):
    model, data = make(family), ids(4)
    pruning = prune(model, Magnitude(), sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    result = recover(model, None, data, pruning, OPTIONS, held_out=data)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))  # the global random state is left alone
    assert result.held_out["loss_after"] < result.held_out["loss_before"] and result.zeros["lost"] == 0
    assert result.trained == {"adapters": sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)}
    assert "not merged" in result.warnings[0]
    detach(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failed_run_takes_its_adapters_along(monkeypatch):
    model = make("llama")
    pruning = prune(model, Magnitude(), sparsity=0.5)
    names = list(model.state_dict())

    def broken(*args, **kwargs):
        raise RuntimeError("stop")

    monkeypatch.setattr("secateur.recovering.train", broken)
    with pytest.raises(RuntimeError, match="stop"):
        recover(model, None, ids(4), pruning, OPTIONS)
    assert list(model.state_dict()) == names


def test_experts_and_merging_are_refused():
    model = make("mixtral")
    pruning = prune(model, Magnitude(), sparsity=0.5)
    with pytest.raises(UsageError, match="is a slice of a 3-D weight"):
        recover(model, None, ids(4), pruning, OPTIONS)
    with pytest.raises(UsageError, match="its zeros would be lost"):
        merge(model)

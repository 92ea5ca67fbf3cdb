"""Pruning in rounds: each round keeps the zeros of the one before."""

import itertools

import pytest
import torch
from families import ids, make

from secateur.errors import UsageError
from secateur.iterative import prune_iteratively, shares
from secateur.methods.wanda import Wanda
from secateur.models.layers import find_layers
from secateur.recovering import recover
from secateur.recovery.options import Recovery

OPTIONS = Recovery(train=("kept", "norms"), steps=2, lr=1e-3)


def test_every_round_takes_the_same_share_of_what_is_left():
    found = shares(0.9, 5)
    left = [1.0, *(1 - share for share in found)]
    assert found[-1] == 0.9
    assert [b / a for a, b in itertools.pairwise(left)] == pytest.approx([0.1**0.2] * 5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_zeros_only_grow(family, monkeypatch):
    model, seen = make(family), []

    def watched(*args, **kwargs):
        result = recover(*args, **kwargs)
        seen.append({layer.name: layer.weight == 0 for layer in find_layers(model)})
        return result

    monkeypatch.setattr("secateur.iterative.recover", watched)
    done = prune_iteratively(model, None, ids(4), sparsity=0.7, rounds=3, options=OPTIONS, held_out=ids(2, seed=1))
    assert len(seen) == len(done.pruned) == 3
    for earlier, later in itertools.pairwise(seen):
        assert all(bool((later[name] | ~zero).all()) for name, zero in earlier.items())
    assert [cut.sparsity_layers for cut in done.pruned] == pytest.approx(shares(0.7, 3), abs=1e-3)
    assert all(training.zeros["lost"] == 0 for training in done.recovered)
    record = done.to_dict()
    assert record["target"] == 0.7 and len(record["recovery"]) == 3 and len(record["rounds"]) == 3
    recover(model, None, ids(4), record, OPTIONS)  # the record is that of the model


def test_another_method_reads_its_calibration():
    done = prune_iteratively(
        make("llama"), None, ids(4), sparsity=0.5, rounds=2, method=Wanda(), calibration=ids(2), options=OPTIONS
    )
    assert [cut.method["name"] for cut in done.pruned] == ["wanda", "wanda"]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"rounds": 0}, "The 'rounds' of prune_iteratively"),
        ({"sparsity": 1.0}, "must be a number in"),
        ({"options": Recovery(train=("all",))}, "parts that keep the zeros"),
    ],
)
def test_refused_before_anything_is_touched(request_, said):
    model = make("llama")
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(UsageError, match=said):
        prune_iteratively(model, None, ids(4), **{"sparsity": 0.5, "options": OPTIONS, **request_})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

"""A run that was killed and goes on is the run that was not, to the bit; anything else is refused."""

import copy
import dataclasses
import json

import pytest
import torch
from families import ids, make
from safetensors import safe_open

from secateur.errors import LoadFailure, NumericalFailure, UsageError
from secateur.methods.magnitude import Magnitude
from secateur.pruning import prune
from secateur.recovering import recover
from secateur.recovery import checkpoint as checkpoints
from secateur.recovery import loop
from secateur.recovery.options import Recovery

RECIPES = {
    "text": Recovery(steps=8, lr=0.01, checkpoint_every=3, accumulate=2),
    "best": Recovery(steps=8, lr=0.05, checkpoint_every=2, keep="best", train=("kept", "norms")),
    "distil": Recovery(steps=8, lr=0.01, checkpoint_every=3, objective="distil", weight_decay=0.1),
    "reconstruct": Recovery(steps=4, lr=0.01, checkpoint_every=3, objective="reconstruct", inputs="pruned"),
}


class Killed(Exception):
    pass


def start(options, family="llama"):
    model = make(family)
    dense = copy.deepcopy(model) if options.objective != "text" else None
    return model, prune(model, Magnitude(), sparsity=0.5), dense


def kill_after(writes, monkeypatch):
    """The process dies when so many checkpoints are on disk."""
    count = 0
    write = checkpoints.write

    def counted(file, state):
        nonlocal count
        write(file, state)
        count += 1
        if count == writes:
            raise Killed

    for place in ("secateur.recovery.loop.write", "secateur.recovery.reconstruct.write"):
        monkeypatch.setattr(place, counted)


@pytest.mark.parametrize("writes", [1, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_is_uninterrupted(recipe, writes, tmp_path, monkeypatch):
    options, data = RECIPES[recipe], ids(5)
    model, pruning, dense = start(options)
    whole_file = tmp_path / "whole"
    whole = recover(model, None, data, pruning, options, held_out=ids(2, seed=1), dense=dense, checkpoint=whole_file)

    again, pruning, dense = start(options)
    file = tmp_path / "state"
    before = copy.deepcopy(again.state_dict())
    with monkeypatch.context() as patch:
        kill_after(writes, patch)
        try:
            recover(again, None, data, pruning, options, held_out=ids(2, seed=1), dense=dense, checkpoint=file)
        except Killed:
            assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
        else:
            again, pruning, dense = start(options)  # it had fewer checkpoints: resuming a finished run does nothing
    torch.manual_seed(123)  # whatever the global random state is
    resumed = recover(
        again, None, data, pruning, options, held_out=ids(2, seed=1), dense=dense, checkpoint=file, resume=True
    )

    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out and resumed.zeros == whole.zeros
    states = [contents(path) for path in (whole_file, file)]
    assert states[0].keys() == states[1].keys()
    assert any(name.startswith("exp_avg_sq.") for name in states[0]) or recipe == "reconstruct"
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "whole"]


def contents(file):
    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        return {name: opened.get_tensor(name) for name in names}


@pytest.fixture
def stopped(tmp_path):
    model, pruning, _ = start(RECIPES["text"])
    file = tmp_path / "state"
    recover(copy.deepcopy(model), None, ids(5), pruning, RECIPES["text"], checkpoint=file)
    return model, pruning, file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.02}, "a run with lr 0.01, and this one asks for 0.02"),
        ({"train": ("norms",)}, "a run with train adapters norms biases, and this one asks for norms"),
        ({"adapter": "scaled"}, "adapter masked, and this one asks for scaled"),
        ({"seed": 1}, "seed 0, and this one asks for 1"),
    ],
)
def test_another_recipe_is_refused(stopped, change, said):
    model, pruning, file = stopped
    before, content = copy.deepcopy(model.state_dict()), file.read_bytes()
    with pytest.raises(UsageError, match=said):
        recover(
            model, None, ids(5), pruning, dataclasses.replace(RECIPES["text"], **change), checkpoint=file, resume=True
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert file.read_bytes() == content


def test_another_text_or_model_is_refused(stopped):
    model, pruning, file = stopped
    with pytest.raises(UsageError, match="of a run with text "):
        recover(model, None, ids(5, seed=9), pruning, RECIPES["text"], checkpoint=file, resume=True)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(UsageError, match="of a run with model "):
        recover(model, None, ids(5), pruning, RECIPES["text"], checkpoint=file, resume=True)


def test_no_checkpoint_or_a_damaged_one(stopped, tmp_path):
    model, pruning, file = stopped
    with pytest.raises(UsageError, match="There is no checkpoint"):
        recover(model, None, ids(5), pruning, RECIPES["text"], checkpoint=tmp_path / "none", resume=True)
    with pytest.raises(UsageError, match="name the checkpoint file"):
        recover(model, None, ids(5), pruning, RECIPES["text"], resume=True)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(LoadFailure, match="is damaged"):
        recover(model, None, ids(5), pruning, RECIPES["text"], checkpoint=file, resume=True)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match="is no checkpoint of secateur recover"):
        recover(model, None, ids(5), pruning, RECIPES["text"], checkpoint=file, resume=True)


def test_a_full_disk_leaves_the_last_checkpoint(stopped, monkeypatch):
    from secateur.errors import SaveFailure

    model, pruning, file = stopped
    content = file.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("secateur.recovery.checkpoint.save_file", full)
    with pytest.raises(SaveFailure, match="No space left on device"):
        recover(model, None, ids(5), pruning, RECIPES["text"], checkpoint=file)
    assert file.read_bytes() == content and [path.name for path in file.parent.iterdir()] == ["state"]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_model(stopped):
    model, pruning, _ = stopped
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalFailure, match="try a lower learning rate than 1e"):
        recover(model, None, ids(5), pruning, Recovery(steps=20, lr=1e30, warmup=0.0, clip=0.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_identity_is_plain(stopped):
    with safe_open(stopped[2], framework="pt") as opened:
        identity = json.loads(opened.metadata()["identity"])
    assert identity["lr"] == 0.01 and len(identity["model"]) == 64 and identity["torch"] == torch.__version__


def test_order_gives_every_window_once_before_any_comes_again():
    drawn = loop.order(5, 13, seed=3).tolist()
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4] and drawn[:5] != drawn[5:10]
    assert drawn == loop.order(5, 13, seed=3).tolist() != loop.order(5, 13, seed=4).tolist()

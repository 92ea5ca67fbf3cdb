"""Blocks replayed with the arguments of the model's own forward pass, and windows of them."""

import copy
from functools import partial

import pytest
import torch
from families import FAMILIES, ids, make
from torch import nn

from secateur.errors import ModelNotSupported, UsageError
from secateur.inputs import batches_of
from secateur.methods.magnitude import Magnitude
from secateur.models.layers import find, find_blocks
from secateur.pruning import prune
from secateur.recovering import recover
from secateur.recovery.options import Recovery
from secateur.recovery.overlay import Overlay
from secateur.recovery.reconstruct import reconstruct, record_calls
from secateur.recovery.subsets import find_trainees
from secateur.scout import run


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_calls_are_the_models_own_forward_pass(family):
    model = make(family)
    blocks, batch = find_blocks(model), batches_of(model, ids(2), 2)[0]
    outputs = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: outputs.append(out if isinstance(out, torch.Tensor) else out[0]))
        for block in blocks.values()
    ]
    calls = record_calls(model, blocks, partial(run, model, batch))
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(outputs) >= 2
    x = None
    for call, output in zip(calls, outputs, strict=True):
        x = call.x if call.x is not None else x
        with torch.no_grad():
            x = call.run(blocks[call.block], x)
        assert torch.equal(x, output)
    assert sum(call.x is not None for call in calls) == (2 if family == "t5" else 1)  # where a stack begins
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_a_window_gets_the_inputs_and_targets_that_were_asked_for(inputs, monkeypatch):
    """The second window's data, against hooks on whole forward passes."""
    dense = make("llama")
    model = copy.deepcopy(dense)
    pruning = prune(model, Magnitude(), sparsity=0.5)
    seen = []

    def watched(parts, loss_of, options, **rest):
        held = dict(
            zip(loss_of.__code__.co_freevars, (cell.cell_contents for cell in loss_of.__closure__), strict=True)
        )
        seen.append((held["inputs"][0], held["targets"][0]))
        return train(parts, loss_of, options, **rest)

    from secateur.recovery.loop import train

    monkeypatch.setattr("secateur.recovery.reconstruct.train", watched)
    options = Recovery(objective="reconstruct", train=("norms",), steps=2, inputs=inputs, targets=inputs, batch_size=4)
    recover(model, None, ids(4), pruning, options, dense=dense)

    def state(of, block, side):
        found = []
        hook = of.model.layers[block].register_forward_hook(lambda m, a, out: found.append((a[0], out)))
        with torch.no_grad():
            of(input_ids=ids(4))
        hook.remove()
        return found[0][side]

    source = dense if inputs == "dense" else model  # the first block is the recovered one by then
    torch.testing.assert_close(seen[1][0], state(source, 1, 0))
    with torch.no_grad():
        wanted = state(dense, 1, 1)
        if inputs == "pruned":
            probe = copy.deepcopy(model)
            probe.model.layers[1] = copy.deepcopy(dense.model.layers[1])
            wanted = state(probe, 1, 1)
    torch.testing.assert_close(seen[1][1], wanted)


def test_more_blocks_in_a_window_make_fewer_windows():
    dense = make("llama")
    for window, count in ((1, 2), (2, 1), (5, 1)):
        model = copy.deepcopy(dense)
        pruning = prune(model, Magnitude(), sparsity=0.5)
        options = Recovery(objective="reconstruct", window=window, steps=2)
        assert len(recover(model, None, ids(2), pruning, options, dense=dense).losses["windows"]) == count


class Straight(nn.Module):
    """Two blocks of one matrix each: nothing bends."""

    _no_split_modules = ("Linear",)

    def __init__(self, bend):
        super().__init__()
        first = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) if bend else nn.Linear(8, 8)
        self.layers = nn.ModuleList([first, nn.Linear(8, 8)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(("bend", "window"), [(False, 1), (False, 2), (True, 1)])
def test_a_window_that_is_one_matrix_is_refused(bend, window):
    """Wherever it stands: with a bend in the first window, the second is still one matrix."""
    model = Straight(bend)
    blocks = {f"layers.{i}": block for i, block in enumerate(model.layers)}
    trainees, _ = find_trainees(model, (), {}, ("biases",))
    overlay = Overlay(trainees)
    calls = [record_calls(model, blocks, lambda: model(torch.randn(2, 5, 8)))]
    before = copy.deepcopy(overlay.parts)
    options = Recovery(objective="reconstruct", train=("biases",), window=window, steps=1)
    with overlay.open(), pytest.raises(UsageError, match="has no non-linearity, it is one matrix: take a larger"):
        reconstruct(overlay, blocks, blocks, calls, options)
    assert all(torch.equal(part, before[name]) for name, part in overlay.parts.items())


def test_nothing_to_train_inside_the_blocks():
    dense = make("gpt2")
    model = copy.deepcopy(dense)
    prune(model, Magnitude(), sparsity=0.5)
    blocks = find_blocks(model)
    trainees, _ = find_trainees(model, (), find(model).blocks, ("embeddings",))
    batch = batches_of(dense, ids(1), 1)[0]
    calls = [record_calls(dense, find_blocks(dense), partial(run, dense, batch))]
    with pytest.raises(UsageError, match="There is nothing of --train norms inside the blocks"):
        reconstruct(Overlay(trainees), blocks, find_blocks(dense), calls, Recovery(train=("norms",)))


def test_a_block_without_a_hidden_state_is_said():
    model = Straight(bend=True)
    blocks = {f"layers.{i}": block for i, block in enumerate(model.layers)}
    with pytest.raises(ModelNotSupported, match=r"layers\.0 reads no hidden state"):
        record_calls(model, blocks, lambda: model(torch.ones(2, 8, dtype=torch.int64)))
    with pytest.raises(ModelNotSupported, match="Straight never calls its blocks"):
        record_calls(model, blocks, lambda: None)

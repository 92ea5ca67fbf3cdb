"""What is laid over a model: its modules read the training weights, and nothing else changes."""

import copy

import pytest
import torch
from families import ids, make
from torch import nn

from secateur.errors import NumericalFailure
from secateur.methods.magnitude import Magnitude
from secateur.models.layers import find
from secateur.pruning import prune
from secateur.recovery.overlay import Overlay, shadowed
from secateur.recovery.subsets import find_trainees


def laid(family, train, dtype=torch.float32, **options):
    model = make(family, dtype)
    prune(model, Magnitude(), sparsity=0.5, uncalled="magnitude")
    found = find(model)
    layers = [layer for layer in found.layers if layer.kind != "router"]
    trainees, _ = find_trainees(model, layers, found.blocks, train)
    return model, layers, Overlay(trainees, **options)


def shake(overlay):
    with torch.no_grad():
        for part in overlay.parts.values():
            part.add_(torch.randn_like(part) * 0.3)


def logits(model):
    with torch.no_grad():
        extra = {"decoder_input_ids": ids(2)} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids(2), **extra).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "mixtral", "mamba", "zamba2", "albert", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ["masked", "scaled"])
def test_the_function_is_the_same_before_and_after_the_merge(family, dtype, adapter):
    model, layers, overlay = laid(family, ("adapters", "norms", "biases"), dtype, adapter=adapter)
    plain, keeps = logits(model), [layer.weight != 0 for layer in layers]
    with overlay.open():
        torch.testing.assert_close(logits(model), plain)  # nothing is trained yet
    shake(overlay)
    with overlay.open():
        trained = logits(model)
    assert torch.equal(logits(model), plain)  # closed: as it was
    assert overlay.merge_() == 0
    assert torch.equal(logits(model), trained) and not torch.equal(trained, plain)
    for layer, keep in zip(layers, keeps, strict=True):
        assert (layer.weight[~keep] == 0).all() and (layer.weight[keep] != 0).all()


def test_prune_at_merge_brings_the_zeros_back_and_changes_the_function():
    model, layers, overlay = laid("llama", ("adapters",), adapter="prune-at-merge")
    keeps = [layer.weight != 0 for layer in layers]
    shake(overlay)
    with overlay.open():
        trained = logits(model)
    assert overlay.merge_() == 0
    assert not torch.allclose(logits(model), trained, rtol=0.01)
    assert all((layer.weight[~keep] == 0).all() for layer, keep in zip(layers, keeps, strict=True))


def test_the_merge_rounds_once():
    """fp32 sums cast to bf16, not bf16 sums."""
    _, layers, overlay = laid("llama", ("adapters",), torch.bfloat16, scale=0.5)
    shake(overlay)
    before = {layer.name: layer.weight.clone() for layer in layers}
    overlay.merge_()
    for layer in layers:
        w = before[layer.name].double()
        ab = {part: overlay.parts[f"{layer.name}.weight.{part}"].detach().double() for part in "AB"}
        exact = w + 0.5 * (w != 0) * (ab["B"] @ ab["A"])
        # within half a unit in the last place of bf16, and a little for fp32
        assert ((layer.weight.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_experts_that_were_not_pruned_stay():
    model = make("mixtral")
    prune(model, Magnitude(), sparsity=0.5, include=("*.down_proj[1]", "*.down_proj[3]"))
    found = find(model)
    layers = [layer for layer in found.layers if layer.name.endswith(("down_proj[1]", "down_proj[3]"))]
    before = copy.deepcopy(model.state_dict())
    for train, adapter in ((("adapters",), "scaled"), (("kept",), "masked")):
        overlay = Overlay(find_trainees(model, layers, found.blocks, train)[0], adapter=adapter)
        shake(overlay)
        overlay.merge_()
        for name, tensor in model.state_dict().items():
            if not name.endswith("experts.down_proj"):
                assert torch.equal(tensor, before[name])
                continue
            for expert in range(4):
                assert torch.equal(tensor[expert], before[name][expert]) == (expert in (0, 2))
        model.load_state_dict(before)


def test_an_experts_weight_is_computed_once_a_call():
    model, _, overlay = laid("mixtral", ("adapters",))
    count = 0
    plain = overlay.weight

    def counted(trainee):
        nonlocal count
        count += trainee.parameter.dim() == 3
        return plain(trainee)

    overlay.weight = counted
    with overlay.open():
        logits(model)
    assert count == 4  # two blocks, two weights each


def test_nothing_is_written_when_something_is_not_finite():
    model, _, overlay = laid("llama", ("adapters",))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        list(overlay.parts.values())[-1][0, 0] = torch.nan
    with pytest.raises(NumericalFailure, match="is not finite after training; the model was left as it was"):
        overlay.merge_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_are_read_in_both_places_and_stay_tied():
    model, _, overlay = laid("opt", ("head",))
    assert [t.name for t in overlay.trainees] == ["model.decoder.embed_tokens.weight"]
    shake(overlay)
    with overlay.open():
        assert torch.equal(model.lm_head.weight, model.model.decoder.embed_tokens.weight)
        assert not torch.equal(
            model.lm_head.weight, dict(model.named_parameters())["model.decoder.embed_tokens.weight"]
        )
    overlay.merge_()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_shadows_leave_even_after_an_error():
    layer = nn.Linear(2, 2)
    names = list(dict(layer.named_parameters()))
    with (
        pytest.raises(RuntimeError),
        shadowed(layer, {"weight": lambda: torch.zeros(2, 2), "bias": lambda: torch.ones(2)}),
    ):
        assert layer(torch.ones(2)).tolist() == [1.0, 1.0] and isinstance(layer, nn.Linear)
        raise RuntimeError
    assert type(layer) is nn.Linear and list(dict(layer.named_parameters())) == names
    assert isinstance(layer.weight, nn.Parameter)

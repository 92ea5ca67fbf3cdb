"""The contract of refinements: every one found x patterns x every family, behind several methods."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, ids, make
from test_battery import SPARSITY, arguments, expected_zeros
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.masks import Unstructured, parse_pattern
from secateur.methods import make_method
from secateur.models.layers import find_layers
from secateur.pruning import prune
from secateur.refinements import find_refinements, make_refinement

REFINEMENTS = sorted(find_refinements())
SOME = ["llama", "gpt2", "gpt_oss", "mamba", "albert", "t5"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "pattern"), [("wanda", "row"), ("sparsegpt", "2:4"), ("magnitude", "model")])
@pytest.mark.parametrize("name", REFINEMENTS)
def test_refine(name: str, method: str, pattern: str, family: str) -> None:
    model, wanted = make(family), parse_pattern(pattern)
    before = copy.deepcopy(model.state_dict())
    grads = [parameter.requires_grad for parameter in model.parameters()]
    refine = [make_refinement(name)]
    more = arguments(wanted)

    result = prune(
        model, make_method(method), ids(), batch_size=2, uncalled="magnitude", schedule="oneshot", refine=refine, **more
    )

    assert [one["name"] for one in result.refine] == [name]
    layers = {layer.name: layer for layer in find_layers(model) if layer.kind != "router"}
    assert {record.name for record in result.layers} == layers.keys()
    gain, dropped = 0.0, 0
    for record in result.layers:
        keep = layers[record.name].weight != 0
        dropped += int((~keep).sum())
        expected_zeros(wanted, keep)
        assert record.sparsity == pytest.approx(1 - keep.float().mean().item(), abs=1e-6)
        assert (record.output_error is None) == (record.tokens is None)
        if record.output_error:
            assert 0 <= record.output_error.after <= record.output_error.before
            gain += record.output_error.before - record.output_error.after
    assert gain > 0
    if wanted == Unstructured("model"):
        assert dropped == round(sum(layer.weight.numel() for layer in layers.values()) * SPARSITY)
    silent = [record.name for record in result.layers if record.tokens is None]
    said = [text for text in result.warnings if "not refined" in text]
    assert said == ([f"not refined, since no input of theirs was seen: {', '.join(silent)}"] if silent else [])
    own = {id(p) for layer in layers.values() for m in layer.modules for p in m.parameters(recurse=False)}
    for key, parameter in model.named_parameters():
        if id(parameter) not in own:
            assert torch.equal(parameter, before[key]), f"{key} is no layer, but changed"
    assert grads == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("name", REFINEMENTS)
def test_sparsity_zero_is_the_identity(name: str, family: str) -> None:
    model = make(family)
    before = copy.deepcopy(model.state_dict())
    prune(model, make_method("wanda"), ids(), sparsity=0.0, refine=[make_refinement(name)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("schedule", ["sequential", "block"])
@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("name", REFINEMENTS)
def test_batch_split_changes_nothing(name: str, family: str, schedule: str) -> None:
    found = []
    for batch_size in (1, 6):
        model = make(family, torch.float64)
        # conjugate gradients amplify rounding once the largest eigenvalues are done: few steps
        refine = [make_refinement(name, **({"iterations": 4} if name == "refit" else {}))]
        prune(model, make_method("wanda"), ids(), sparsity=0.5, batch_size=batch_size, schedule=schedule, refine=refine)
        found.append({layer.name: layer.weight for layer in find_layers(model)})
    for key, weight in found[0].items():
        assert torch.equal(weight != 0, found[1][key] != 0), key
        torch.testing.assert_close(weight, found[1][key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", REFINEMENTS)
def test_modes_and_dtypes_stay(name: str) -> None:
    model = make("llama", torch.bfloat16).train()
    prune(model, make_method("sparsegpt"), ids(), sparsity=0.5, refine=[make_refinement(name)])
    assert all(module.training for module in model.modules())
    for layer in find_layers(model):
        assert layer.weight.dtype == torch.bfloat16
        assert int((layer.weight == 0).sum()) >= layer.weight.numel() // 2


class Watch:
    """Inputs of every linear map in one plain forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(lambda m, args, name=name: self.note(name, args[0]))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        with torch.no_grad():
            model(ids())
        for hook in hooks:
            hook.remove()

    def note(self, name: str, x: Tensor) -> None:
        self.seen[name] = x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize("chain", [["refit"], ["swap", "refit"], ["refit", "swap", "refit"]], ids="+".join)
def test_recorded_errors_are_those_of_a_plain_forward_pass(chain: list[str]) -> None:
    dense, plain, model = (make("llama", torch.float64) for _ in range(3))
    seen = Watch(dense).seen
    how = {"sparsity": 0.5, "schedule": "oneshot"}
    prune(plain, make_method("wanda"), ids(), **how)
    result = prune(model, make_method("wanda"), ids(), refine=[make_refinement(name) for name in chain], **how)
    weights = [{layer.name: layer.weight for layer in find_layers(m)} for m in (dense, plain, model)]
    for record in result.layers:
        whole, before, after = (w[record.name] for w in weights)
        x = seen[record.name]
        assert record.output_error is not None
        for weight, told in ((before, record.output_error.before), (after, record.output_error.after)):
            expected = (x @ (weight - whole).T).square().sum() / (x @ whole.T).square().sum()
            assert told == pytest.approx(float(expected), rel=1e-6)
        assert record.output_error.after < record.output_error.before
        if chain == ["refit"]:
            assert torch.equal(before != 0, after != 0)


def test_the_warm_start_is_the_methods_own_weight() -> None:
    """SparseGPT's corrections are where refit begins; with nothing dropped twice, it can only improve on them."""
    model, alone = make("llama", torch.float64), make("llama", torch.float64)
    how = {"sparsity": 0.5, "schedule": "oneshot"}
    result = prune(model, make_method("sparsegpt"), ids(), refine=[make_refinement("refit")], **how)
    seen, dense = Watch(make("llama", torch.float64)).seen, make("llama", torch.float64).state_dict()
    prune(alone, make_method("sparsegpt"), ids(), **how)
    for record in result.layers:
        w, w0 = alone.state_dict()[f"{record.name}.weight"], dense[f"{record.name}.weight"]
        x = seen[record.name]
        assert record.output_error is not None
        expected = float((x @ (w - w0).T).square().sum() / (x @ w0.T).square().sum())
        assert record.output_error.before == pytest.approx(expected, rel=1e-6)


def test_swap_refuses_counts_per_column_before_anything_is_touched() -> None:
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="counts per column"):
        prune(
            model, make_method("wanda"), ids(), sparsity=0.5, pattern=Unstructured("column"),
            refine=[make_refinement("swap")],
        )  # fmt: skip
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prune(
        model, make_method("wanda"), ids(), sparsity=SPARSITY, pattern=Unstructured("column"),
        refine=[make_refinement("refit")],
    )  # fmt: skip
    for layer in find_layers(model):
        expected_zeros(Unstructured("column"), layer.weight != 0)

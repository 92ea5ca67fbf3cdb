"""The contract: every method found x every pattern x every family."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, ids, make

from secateur.errors import UsageError
from secateur.masks import NM, Pattern, Unstructured, parse_pattern
from secateur.masks import PATTERNS as PATTERN_WORDS
from secateur.methods import Method, find_methods, make_method
from secateur.models.layers import find_layers
from secateur.pruning import prune

METHODS = sorted(find_methods())
PATTERNS = ["row", "layer", "column", "model", "2:4", "4:8", "1:4", "6:8"]
SPARSITY = 0.6
OPTIONS: dict[str, dict[str, object]] = {
    "besa": {"steps": 2},  # more take longer than they show
    "alps": {"iterations": 9},
}


def made(name: str) -> Method:
    return make_method(name, **OPTIONS.get(name, {}))


def arguments(pattern: Pattern) -> dict[str, object]:
    return {"pattern": pattern} | ({} if isinstance(pattern, NM) else {"sparsity": SPARSITY})


def follows(method: Method, pattern: Pattern) -> bool:
    return ("n:m" if isinstance(pattern, NM) else pattern.per) in method.patterns


def expected_zeros(pattern: Pattern, keep: torch.Tensor, shared_out: bool = False) -> None:
    """Exact counts in every comparison group of one layer's keep mask; equal ones if the method shares them out."""
    rows, columns = keep.shape
    if shared_out:
        assert pattern != Unstructured("row") or len(keep.sum(1).unique()) == 1
    elif isinstance(pattern, NM):
        assert (keep.reshape(-1, pattern.m).sum(1) == pattern.n).all()
    elif pattern.per == "row":
        assert ((~keep).sum(1) == round(columns * SPARSITY)).all()
    elif pattern.per == "column":
        assert ((~keep).sum(0) == round(rows * SPARSITY)).all()
    elif pattern.per == "layer":
        assert int((~keep).sum()) == round(rows * columns * SPARSITY)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", METHODS)
def test_cut(name: str, pattern: str, family: str) -> None:
    model, wanted, method = make(family), parse_pattern(pattern), made(name)
    before = copy.deepcopy(model.state_dict())
    weights = {layer.name: layer.weight.clone() for layer in find_layers(model)}
    grads = [parameter.requires_grad for parameter in model.parameters()]

    if not follows(method, wanted):
        with pytest.raises(UsageError, match=rf"{name} cannot follow the pattern {wanted}: .*; its patterns are row"):
            prune(model, method, ids(), batch_size=2, uncalled="magnitude", **arguments(wanted))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        return
    result = prune(model, method, ids(), batch_size=2, uncalled="magnitude", **arguments(wanted))

    cut = {record.name: record for record in result.layers}
    layers = {layer.name: layer for layer in find_layers(model)}
    targeted = {n: layer for n, layer in layers.items() if layer.kind != "router"}
    assert cut.keys() == targeted.keys()
    dropped = 0
    for layer_name, layer in targeted.items():
        keep = layer.weight != 0  # random weights are never zero by themselves
        dropped += int((~keep).sum())
        expected_zeros(wanted, keep, method.blockwise and cut[layer_name].tokens is not None)
        assert cut[layer_name].sparsity == pytest.approx(1 - keep.float().mean().item(), abs=1e-6)
        if not method.solves:
            assert torch.equal(layer.weight[keep], weights[layer_name][keep])
    if method.blockwise:
        for block in {record.block for record in result.layers}:
            inside = [targeted[r.name] for r in result.layers if r.block == block and r.tokens is not None]
            gone = sum(int((layer.weight == 0).sum()) for layer in inside)
            budget = round(sum(layer.weight.numel() for layer in inside) * SPARSITY)
            # per row a step is one weight in each row of a layer
            assert abs(gone - budget) <= (wanted == Unstructured("row")) * min(len(x.weight) for x in inside) / 2
    if wanted == Unstructured("model"):
        total = sum(layer.weight.numel() for layer in targeted.values())
        # a solver shares the total out to the layers first, and layers without a score of their own stand apart:
        # each of them rounds for itself
        apart = len(targeted) if method.solves else len(result.coverage.uncalled)
        assert abs(dropped - round(total * SPARSITY)) <= apart
    own = {
        id(parameter) for layer in targeted.values() for m in layer.modules for parameter in m.parameters(recurse=False)
    }
    for key, parameter in model.named_parameters():
        if id(parameter) not in own:
            assert torch.equal(parameter, before[key]), f"{key} is no layer, but changed"
        assert parameter.dtype == before[key].dtype
    assert grads == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_sparsity_zero_is_the_identity(name: str, family: str) -> None:
    model = make(family)
    before = copy.deepcopy(model.state_dict())
    prune(model, made(name), ids(), sparsity=0.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("schedule", ["sequential", "block", "oneshot"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_batch_split_changes_nothing(name: str, family: str, schedule: str) -> None:
    masks = []
    if made(name).blockwise and schedule != "block":
        with pytest.raises(UsageError, match=f"in the block schedule; it cannot use {schedule}"):
            prune(make(family), made(name), ids(), sparsity=0.5, schedule=schedule)
        return
    for batch_size in (1, 6):
        model = make(family, torch.float64)
        prune(model, made(name), ids(), sparsity=0.5, batch_size=batch_size, schedule=schedule)
        masks.append({layer.name: layer.weight != 0 for layer in find_layers(model)})
    assert all(torch.equal(masks[0][key], masks[1][key]) for key in masks[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_same_request_same_weights(name: str, family: str) -> None:
    models = [make(family), make(family)]
    for model in models:
        prune(model, made(name), ids(), sparsity=0.5, batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_low_precision_keeps_its_dtype_and_counts(name: str) -> None:
    model = make("llama", torch.bfloat16)
    for layer in find_layers(model):  # few distinct values: ties everywhere
        layer.weight.copy_((layer.weight * 20).round().clamp(-3, 3) / 20 + 1)
    method = made(name)
    prune(model, method, ids(), sparsity=0.5, pattern=Unstructured("row"))
    zeros = {layer: (layer.weight == 0).sum(1) for layer in find_layers(model)}
    assert sum(int(count.sum()) for count in zeros.values()) * 2 == sum(layer.weight.numel() for layer in zeros)
    for layer, count in zeros.items():
        assert layer.weight.dtype == torch.bfloat16
        assert (count == (count[0] if method.blockwise else layer.shape[1] // 2)).all()


@pytest.mark.parametrize("name", METHODS)
def test_width_that_does_not_divide(name: str) -> None:
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    said = r"3:5 needs .* divisible by 5; model.layers.0.self_attn.q_proj has 32"
    with pytest.raises(UsageError, match=said if follows(made(name), NM(3, 5)) else "cannot follow the pattern 3:5"):
        prune(model, made(name), ids(), pattern=NM(3, 5))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), float("inf"), True, "half", None])
def test_bad_sparsity(name: str, sparsity: object) -> None:
    with pytest.raises(UsageError, match="sparsity"):
        prune(make("llama"), make_method(name), ids(), sparsity=sparsity)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_one_of_the_three_functions_is_its_own(name: str) -> None:
    kind = find_methods()[name]
    own = {f for f in ("score", "prune_layer", "prune_block") if getattr(kind, f) is not getattr(Method, f)}
    assert own in ({"score"}, {"prune_layer"}, {"prune_layer", "score"}, {"prune_block"})
    assert set(kind.patterns) <= set(PATTERN_WORDS) and (kind.why or set(kind.patterns) == set(PATTERN_WORDS))

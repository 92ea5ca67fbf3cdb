"""The searched allocation: its slopes against plain autograd, its steps, and that it leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, ids, make
from torch import Tensor, nn

from secateur.allocation import Descent, Evidence
from secateur.allocation.trial import on_trial
from secateur.errors import InvalidParameter, NumericalFailure, UsageError
from secateur.inputs import batches_of
from secateur.methods.magnitude import Magnitude
from secateur.methods.wanda import Wanda
from secateur.models.layers import Layer, find_layers
from secateur.planning import plan
from secateur.pruning import prune
from secateur.statistics import SecondMoment


def seen_by(model: nn.Module, layers: list[Layer]) -> dict[Layer, SecondMoment]:
    """What plain hooks see in one forward pass of all ids."""
    seen = {layer: SecondMoment() for layer in layers}
    handles = [
        layer.module.register_forward_pre_hook(lambda m, x, layer=layer: seen[layer].update(x[0].flatten(0, -2)))
        for layer in layers
    ]
    with torch.no_grad():
        model(ids())
    for handle in handles:
        handle.remove()
    return seen


def naive_keep(weight: Tensor, seen: SecondMoment, sparsity: float) -> Tensor:
    keep = torch.ones_like(weight, dtype=torch.bool)
    for row, scores in zip(keep, weight.abs() * seen.mean.sqrt(), strict=True):
        row[scores.argsort()[: round(sparsity * len(scores))]] = False
    return keep


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_slopes_are_those_of_autograd(family: str) -> None:
    model = make(family, torch.float64)
    layers, plain = find_layers(model), copy.deepcopy(model)
    seen = seen_by(model, layers)
    sparsities = {layer: 0.3 + 0.02 * i for i, layer in enumerate(layers)}
    with on_trial(layers, Evidence(seen, model, batches_of(model, ids())), 96) as trial:
        loss, slopes = trial.measure(sparsities, 0.1)

    places = [3, 7, 11, 15]  # every fourth prediction of sixteen, the last among them
    with torch.no_grad():
        p = plain(ids()).logits[:, places].softmax(-1)
    others = find_layers(plain)
    dense = [other.weight.clone() for other in others]
    for layer, other in zip(layers, others, strict=True):
        other.weight.mul_(naive_keep(other.weight, seen[layer], sparsities[layer]))
    q = plain(ids()).logits[:, places].log_softmax(-1)
    expected = (p * (p.log() - q)).sum(-1).mean()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9)
    for layer, other, weight in zip(layers, others, dense, strict=True):
        gradient = other.module.get_parameter(other.parameter).grad
        assert gradient is not None
        gradient = gradient.t() if other.transposed else gradient
        s = sparsities[layer]
        band = naive_keep(weight, seen[layer], s - 0.1) & ~naive_keep(weight, seen[layer], s + 0.1)
        assert slopes[layer] == pytest.approx(-float((gradient * weight * band).sum()) / 0.2, rel=1e-8, abs=1e-12)


EACH = [(family, "block") for family in sorted(FAMILIES)]
EACH += [(family, "layer") for family in ("llama", "mixtral", "t5")]  # one kind of every storage is enough


@pytest.mark.parametrize(("family", "per"), EACH)
def test_no_trace_and_an_exact_budget(family: str, per: str) -> None:
    model = make(family)
    layers = find_layers(model)
    first = next(model.parameters())
    first.requires_grad_(False)
    first_gradient, last = torch.ones_like(first), layers[-1]
    first.grad = first_gradient
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    descent = Descent(steps=2, tokens=64, bound=0.1, per=per)  # type: ignore[arg-type]
    evidence = Evidence({}, model, batches_of(model, ids(), 2))
    given = descent.allocate(layers, 0.6, evidence)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert first.grad is first_gradient and last.module.get_parameter(last.parameter).grad is None
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    total = sum(layer.weight.numel() for layer in layers)
    assert sum(s * layer.weight.numel() for layer, s in given.items()) == pytest.approx(0.6 * total, abs=1e-6)
    assert all(0.5 - 1e-6 <= s <= 0.7 + 1e-6 for s in given.values())
    if per == "block":
        assert len({(layer.block, s) for layer, s in given.items()}) == len({layer.block for layer in layers})
    assert descent.allocate(layers, 0.6, evidence) == given  # deterministic


def test_it_spares_the_block_that_matters() -> None:
    """A block that adds nothing to the stream can lose more than one that does."""
    model = make("jamba")
    layers = find_layers(model)
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    for layer in layers:
        if layer.block in blocks[1:]:
            layer.weight.mul_(1e-3)
    evidence = Evidence({}, model, batches_of(model, ids()))
    given = {layer.block: s for layer, s in Descent(steps=4, tokens=96).allocate(layers, 0.6, evidence).items()}
    assert given[blocks[0]] < 0.6 < min(given[block] for block in blocks[1:])


def test_it_never_ends_above_its_start() -> None:
    model = make("llama", torch.float64)
    layers = find_layers(model)
    evidence = Evidence(seen_by(model, layers), model, batches_of(model, ids()))
    for stride in (0.01, 0.4):
        given = Descent(steps=3, tokens=96, bound=0.3, stride=stride, per="layer").allocate(layers, 0.5, evidence)
        with on_trial(layers, evidence, 96) as trial:
            assert trial.measure(given, 0.0)[0] <= trial.measure(dict.fromkeys(layers, 0.5), 0.0)[0]


def test_padding_does_not_count() -> None:
    model = make("llama", torch.float64)
    layers = find_layers(model)
    batch = {"input_ids": ids(2), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    batch["attention_mask"][1] = 0
    losses = []
    for given in (batch, {"input_ids": ids(2)[:1]}):
        with on_trial(layers, Evidence({}, model, [given]), 32) as trial:
            losses.append(trial.measure(dict.fromkeys(layers, 0.5), 0.0)[0])
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=["magnitude", "wanda"])
def test_through_prune_and_plan(method: Magnitude | Wanda) -> None:
    descent = Descent(steps=2, tokens=32)
    model = make("mixtral").requires_grad_(False)
    with torch.no_grad():
        result = prune(model, method, ids(), sparsity=0.6, allocation=descent)
    planned = plan(make("mixtral"), method, (6, 16), sparsity=0.6, allocation=descent)
    assert planned.passes == result.passes == (2 if method == Wanda() else 1)
    assert result.allocation["name"] == "descent" and result.seconds["allocate"] > 0
    assert result.sparsity_layers == pytest.approx(0.6, abs=0.01)
    assert len({layer.target for layer in result.layers}) == 2
    assert planned.estimated_seconds > plan(make("mixtral"), method, (6, 16), sparsity=0.6).estimated_seconds


def test_it_needs_predictions() -> None:
    from transformers import LlamaConfig, LlamaModel

    body = LlamaModel(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                  vocab_size=64))  # fmt: skip
    before = {name: value.clone() for name, value in body.state_dict().items()}
    with pytest.raises(UsageError, match="predictions over a vocabulary; LlamaModel makes none"):
        prune(body, Wanda(), ids(), sparsity=0.5, allocation=Descent())
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


def test_a_model_that_is_not_finite() -> None:
    model = make("llama")
    layers = find_layers(model)
    model.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(NumericalFailure, match="divergence from the dense model is nan"):
        Descent(tokens=32).allocate(layers, 0.5, Evidence({}, model, batches_of(model, ids())))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("steps", True),
        ("tokens", 0),
        ("bound", 0.0),
        ("stride", 0.5),
        ("per", "row"),
        ("bound", float("nan")),
    ],
)
def test_options_out_of_range(option: str, value: object) -> None:
    with pytest.raises(InvalidParameter, match=f"'{option}' of descent"):
        Descent(**{option: value})  # type: ignore[arg-type]


def test_work_is_counted_in_passes() -> None:
    assert Descent(steps=8, tokens=1000).work(10_000) == pytest.approx(2.6)
    assert Descent(steps=8, tokens=1000).work(100) == 26


def test_a_plan_counts_the_second_copy() -> None:
    plans = [plan(make("llama"), Magnitude(), (1, 4), sparsity=0.5, allocation=a) for a in (Descent(), None)]
    weights = 5 * plans[0].weights  # fp32, and a flag each
    assert plans[0].estimated_memory_bytes == max(4 * plans[0].parameters + weights, plans[1].estimated_memory_bytes)

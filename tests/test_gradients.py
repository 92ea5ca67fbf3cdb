"""Gradient sums against autograd called plainly, sequence by sequence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from families import FAMILIES, ids, make

from secateur.errors import InvalidParameter, NumericalFailure, UsageError
from secateur.gradients import GradientRequest, collect_gradients
from secateur.inputs import batches_of
from secateur.methods import make_method
from secateur.models.layers import find, find_layers
from secateur.pruning import prune
from secateur.statistics import Gradient


def plain_loss(model: torch.nn.Module, family: str, row: Tensor) -> Tensor:
    """Mean cross-entropy written out: next token, same token (masked models), or the decoder's next token."""
    if family == "t5":
        half = row.shape[1] // 2
        start = torch.zeros_like(row[:, :1])
        read = torch.cat([start, row[:, half:-1]], dim=1)
        logits = model(input_ids=row[:, :half], decoder_input_ids=read).logits
        return F.cross_entropy(logits[0, :-1], read[0, 1:])
    logits = model(input_ids=row, use_cache=False).logits if family not in ("bert", "albert") else model(row).logits
    return (
        F.cross_entropy(logits[0], row[0])
        if family in ("bert", "albert")
        else F.cross_entropy(logits[0, :-1], row[0, 1:])
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_equal_plain_autograd(family: str) -> None:
    model, data = make(family, torch.float64), ids(3, 12)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    found = find(model)
    wanted = {
        norm: {layer: torch.zeros(layer.shape, dtype=torch.float64) for layer in found.layers} for norm in ("l1", "l2")
    }
    for row in data.split(1):
        model.zero_grad()
        plain_loss(model, family, row).backward()
        for layer in found.layers:
            parameter = getattr(layer.module, layer.parameter)
            g = torch.zeros_like(layer.weight) if parameter.grad is None else layer.view_of(parameter.grad)
            wanted["l1"][layer] += g.abs()
            wanted["l2"][layer] += g**2
    model.zero_grad()
    for norm in ("l1", "l2"):
        for checkpointing, size in (("always", 1), ("never", 2)):
            batches = batches_of(model, data, size)
            request = GradientRequest(norm, checkpointing)
            sums = collect_gradients(model, batches, found.layers, request, blocks=found.blocks.values())
            for layer in found.layers:
                assert sums[layer].samples == 3
                torch.testing.assert_close(sums[layer].sum.double(), wanted[norm][layer], rtol=1e-4, atol=1e-8)


def test_nothing_is_left_behind_also_after_an_error() -> None:
    model = make("llama")
    model.lm_head.weight.requires_grad_(False)
    kept = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = kept
    before = [p.requires_grad for p in model.parameters()]
    layers = find_layers(model)
    collect_gradients(model, batches_of(model, ids(2)), layers[:3], GradientRequest())
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalFailure, match="the loss of calibration sequence 0 is nan"):
        collect_gradients(
            model, batches_of(model, ids(2)), layers, GradientRequest(), blocks=find(model).blocks.values()
        )
    assert before == [p.requires_grad for p in model.parameters()]
    assert model.model.norm.weight.grad is kept
    assert all(p.grad is None for p in model.parameters() if p is not model.model.norm.weight)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_padding_does_not_count() -> None:
    model, data = make("llama", torch.float64), ids(2, 8)
    padded = torch.cat([data, torch.full((2, 4), 5)], dim=1)
    mask = (torch.arange(12) < 8).long().repeat(2, 1)
    layers = find_layers(model)
    plain = collect_gradients(model, [{"input_ids": data}], layers, GradientRequest())
    masked = collect_gradients(model, [{"input_ids": padded, "attention_mask": mask}], layers, GradientRequest())
    for layer in layers:
        torch.testing.assert_close(plain[layer].sum, masked[layer].sum, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_score_does_not_depend_on_the_number_of_samples(norm: str) -> None:
    data = ids(2)
    masks = []
    for times in (1, 3):
        model = make("llama", torch.float64)
        prune(model, make_method("gblm", norm=norm), data.repeat(times, 1), sparsity=0.5, schedule="oneshot")
        masks.append([layer.weight != 0 for layer in find_layers(model)])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_sum_is_the_released_scaling() -> None:
    """|W| sqrt(mean over sequences of sum x^2) + |W| 100 sum |g|, written out on one layer."""
    model, data = make("llama", torch.float64), ids(3, 10)
    layer = find_layers(model)[0]
    seen: list[Tensor] = []
    handle = layer.module.register_forward_hook(lambda m, a, o: seen.append(a[0].detach()))
    total = torch.zeros(layer.shape, dtype=torch.float64)
    for row in data.split(1):
        model.zero_grad()
        plain_loss(model, "llama", row).backward()
        total += layer.module.weight.grad.abs()
    handle.remove()
    model.zero_grad()
    norm = torch.stack([x[0].square().sum(0) for x in seen]).mean(0).sqrt()
    score = layer.weight.abs() * norm + layer.weight.abs() * 100 * total
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(16, dim=1).indices, True)
    method = make_method("gblm", reduction="sum", alpha=100.0)
    prune(model, method, data, sparsity=0.5, schedule="oneshot", include=["layers.0.self_attn.q_proj"])
    assert torch.equal(layer.weight != 0, keep)


def test_bfloat16_gradients_do_not_underflow() -> None:
    """fp16 would lose everything under 6e-8; sums are fp32."""
    model = make("llama", torch.bfloat16)
    model.lm_head.weight.data.mul_(1e-6)
    sums = collect_gradients(model, batches_of(model, ids(2)), find_layers(model), GradientRequest("l1"))
    assert all(g.sum.dtype == torch.float32 and float(g.sum.max()) > 0 for g in sums.values())


def test_no_head() -> None:
    body = AutoModel.from_config(make("llama").config)
    with pytest.raises(UsageError, match="language-model head"):
        prune(body, make_method("gblm"), ids(2), sparsity=0.5)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gblm", {"alpha": -1.0}, "alpha"),
        ("gblm", {"norm": "l3"}, "one of l1, l2"),
        ("gblm", {"reduction": "max"}, "mean or sum"),
        ("gradient", {"checkpointing": "perhaps"}, "auto, always, never"),
    ],
)
def test_bad_options(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidParameter, match=said):
        make_method(name, **options)


def test_mean_and_total() -> None:
    assert Gradient("l2", 4, torch.tensor([16.0])).mean.item() == 2.0
    assert Gradient("l2", 4, torch.tensor([16.0])).total.item() == 4.0
    assert Gradient("l1", 4, torch.tensor([16.0])).mean.item() == 4.0

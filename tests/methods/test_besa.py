"""BESA against its formulas written plainly, and what it promises besides the battery."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from families import ids, make
from torch import Tensor, nn

import naive
from secateur.allocation import Owl, Table
from secateur.errors import NumericalFailure, UsageError
from secateur.inputs import batches_of
from secateur.masks import Pattern, Unstructured
from secateur.methods import BlockView, Method
from secateur.methods.besa import BESA
from secateur.methods.wanda import Wanda
from secateur.models.layers import find_layers
from secateur.planning import plan
from secateur.pruning import prune
from secateur.scout import run

ROW, LAYER = Unstructured("row"), Unstructured("layer")


@pytest.mark.parametrize("pattern", [ROW, LAYER], ids=["layers", "rows"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_without_a_step_it_is_wanda(family: str, pattern: Pattern) -> None:
    expected, model = make(family), make(family)
    prune(expected, Wanda(), ids(), sparsity=0.5, schedule="block", batch_size=2)
    prune(model, BESA(steps=0), ids(), sparsity=0.5, pattern=pattern, batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))


def test_without_a_step_magnitude_is_magnitude_per_row() -> None:
    model = make("llama")
    dense = {layer.name: layer.weight.clone() for layer in find_layers(model)}
    prune(model, BESA(steps=0, metric="magnitude"), ids(), sparsity=0.25)
    for layer in find_layers(model):
        expected = naive.keep_from_score(dense[layer.name].abs(), "row", 0.25)
        assert torch.equal(layer.weight != 0, expected)


def plain_besa(
    w: list[Tensor], x: Tensor, forward: object, target: float, per_row: bool, steps: int, lr: float
) -> list:
    """The first block's masks, with torch's own derivatives through the soft masks.

    w: the dense matrices; x: (tokens, in) inputs of each; forward: weights -> block output (tokens, width).
    """
    rank = [naive.wanda(m, inputs).argsort(dim=1, stable=True).argsort(dim=1) for m, inputs in zip(w, x, strict=True)]
    units = [len(m) if per_row else 1 for m in w]
    size = torch.cat([torch.full((u,), m.numel() / u, dtype=torch.float64) for m, u in zip(w, units, strict=True)])
    theta = torch.zeros(sum(units), dtype=torch.float64, requires_grad=True)
    budget = round(target * sum(m.numel() for m in w))
    start = math.log(target / (1 - target))

    def shares() -> Tensor:
        c = torch.zeros((), dtype=torch.float64)
        for _ in range(50):  # Newton, whose last step carries the derivative
            with torch.no_grad():
                a = torch.sigmoid(start + theta + c)
                c = c - (size @ a - budget) / (size @ (a * (1 - a)))
        a = torch.sigmoid(start + theta + c)
        slope = (size @ (a * (1 - a))).detach()
        return torch.sigmoid(start + theta + c - (size @ a - budget) / slope)

    def keep_part(t: Tensor) -> Tensor:
        return t.clamp(min=0) ** 2 / 2

    adam = torch.optim.Adam([theta], lr=lr, eps=1e-2)
    dense = forward(w).detach()  # type: ignore[operator]
    unit = None
    for step in range(steps):
        masked = []
        for m, r, a in zip(w, rank, shares().split(units), strict=True):
            columns = m.shape[1]
            width = torch.minimum(torch.full_like(a, 0.1), 2 * torch.minimum(a, 1 - a)).clamp(min=1 / columns)
            low = (a - width.detach() / 2) * columns
            high = (a + width.detach() / 2) * columns
            # candidates evenly between low and high: how far the cell [r, r + 1] stays, on average
            r1 = r + 1.0
            soft = (
                keep_part(r1 - low[:, None]) - keep_part(r1 - high[:, None])
                - keep_part(r - low[:, None]) + keep_part(r - high[:, None])
            ) / (high - low)[:, None]  # fmt: skip
            hard = (r >= (a * columns).round()[:, None]).to(m.dtype)
            masked.append(m * (hard - soft.detach() + soft))
        error = (forward(masked) - dense).square().sum(0) / dense.square().mean(0)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(error.sum(), theta)
        unit = unit if unit is not None else gradient.square().mean().sqrt()
        theta.grad = gradient / unit
        adam.param_groups[0]["lr"] = lr * (1 - step / steps)
        adam.step()
    return [a.detach() for a in shares().split(units)]


@pytest.mark.parametrize("per_row", [True, False], ids=["rows", "layers"])
def test_it_is_the_formulas(per_row: bool) -> None:
    """The first block of a Llama in fp64, all sequences in every step."""
    model, target, steps, lr = make("llama", torch.float64), 0.6, 4, 0.2
    block = model.model.layers[0]
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    inputs: dict[str, Tensor] = {}
    given: list[tuple[tuple[object, ...], dict[str, object]]] = []
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1))
        )
        for name in names
    ]
    handles.append(
        block.register_forward_pre_hook(lambda m, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    )
    with torch.no_grad():
        run(model, batches_of(model, ids(), 6)[0])
    for handle in handles:
        handle.remove()
    (args, kwargs) = given[0]

    def forward(weights: list[Tensor]) -> Tensor:
        named = {f"{name}.weight": weight for name, weight in zip(names, weights, strict=True)}
        output: Tensor = torch.func.functional_call(block, named, args, kwargs)
        return output.flatten(0, 1)

    dense = [block.get_submodule(name).weight.detach().clone() for name in names]
    shares = plain_besa(dense, [inputs[name] for name in names], forward, target, per_row, steps, lr)  # type: ignore[arg-type]
    method = BESA(steps=steps, sequences=6, lr=lr)
    prune(model, method, ids(), sparsity=target, pattern=LAYER if per_row else ROW, batch_size=3)
    assert max(float((a - target).abs().max()) for a in shares) > 0.1
    for name, a, w in zip(names, shares, dense, strict=True):
        dropped = (block.get_submodule(name).weight == 0).sum(1)
        assert (dropped - a * w.shape[1]).abs().max() < (1 if per_row else 1.5), name
        for row, count in enumerate(dropped.tolist()):
            order = naive.wanda(w, inputs[name])[row].argsort(stable=True)
            assert (block.get_submodule(name).weight[row, order[:count]] == 0).all()


def block_error(pattern: Pattern, method: Method, sparsity: float) -> float:
    """Relative error of the first block's output on the calibration text."""
    outputs: list[Tensor] = []
    for each in (None, method):
        model = make("llama")
        if each:
            prune(model, each, ids(), sparsity=sparsity, pattern=pattern, schedule="block", include=["layers.0"])
        handle = model.model.layers[0].register_forward_hook(lambda m, args, output: outputs.append(output))
        with torch.no_grad():
            run(model, batches_of(model, ids(), 6)[0])
        handle.remove()
    dense, pruned = (x.flatten(0, 1) for x in outputs)
    return float(((pruned - dense).square().mean(0) / dense.square().mean(0)).mean())


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("pattern", [ROW, LAYER], ids=["layers", "rows"])
def test_it_learns(pattern: Pattern, sparsity: float) -> None:
    frozen = block_error(pattern, BESA(steps=0), sparsity)
    assert block_error(pattern, BESA(), sparsity) < 0.95 * frozen


def test_per_row_the_budget_is_met_to_half_a_step_and_that_is_said() -> None:
    off = "per row, a block is within half its smallest layer's number of rows of its budget"
    assert prune(make("llama"), BESA(steps=1), ids(), sparsity=0.33, pattern=ROW).warnings.count(off) == 1
    assert not prune(make("llama"), BESA(steps=1), ids(), sparsity=0.33).warnings


def test_the_allocation_sets_each_blocks_budget() -> None:
    model = make("llama")
    result = prune(model, BESA(steps=2), ids(), sparsity=0.5, allocation=Table((("layers.0", 0.3),)))
    for block, share in (("model.layers.0", 0.3), ("model.layers.1", 0.5)):
        inside = [layer for layer in find_layers(model) if layer.block == block]
        total = sum(layer.weight.numel() for layer in inside)
        assert sum(int((layer.weight == 0).sum()) for layer in inside) == round(total * share)
        assert {r.target for r in result.layers if r.block == block} == {share}
    assert prune(make("llama"), BESA(steps=2), ids(), sparsity=0.5, allocation=Owl()).passes == 3


@pytest.mark.parametrize("family", ["albert", "zamba2"])
def test_a_block_used_at_several_places_is_said(family: str) -> None:
    result = prune(make(family), BESA(steps=1), ids(), sparsity=0.5)
    said = [text for text in result.warnings if "the model uses it at several places; shares were learnt at" in text]
    assert len(said) == 1


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 12])
def test_batches_divide_the_sequences_of_a_step(batch_size: int) -> None:
    method = BESA(sequences=4)
    assert 4 % method.together(batch_size) == 0 and method.together(batch_size) <= batch_size
    with pytest.raises(UsageError, match="batch_size"):
        prune(make("llama"), method, ids(), sparsity=0.5, batch_size=0)


def test_turns_go_round() -> None:
    @dataclass
    class Call:
        sequences: int

    calls = [Call(n) for n in (1, 1, 3, 1, 1, 1)]
    turns = BlockView("b", [], [], calls, None).turns(2)  # type: ignore[arg-type]
    sizes = [[call.sequences for call in next(turns)] for _ in range(6)]
    assert sizes == [[1, 1], [3], [1, 1], [1], [1, 1], [3]]


class WithoutGradients(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> object:
        with torch.no_grad():
            return self.inner(*args, **kwargs)


def test_layers_that_no_gradient_reaches_stay_at_their_target() -> None:
    model, expected = make("llama"), make("llama")
    for one in (model, expected):
        for block in one.model.layers:
            block.self_attn = WithoutGradients(block.self_attn)
            block.mlp = WithoutGradients(block.mlp)
    result = prune(model, BESA(), ids(), sparsity=0.5)
    prune(expected, BESA(steps=0), ids(), sparsity=0.5)
    assert [w for w in result.warnings if "no gradient reaches them" in w] == [
        f"model.layers.{i}: its layers stay at their targets: no gradient reaches them" for i in (0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    model = make("llama")
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = bad
    with pytest.raises(NumericalFailure, match="not finite"):
        prune(model, BESA(steps=1), ids(), sparsity=0.5)
    assert not any("forward" in vars(module) for module in model.modules())


def test_under_inference_mode_and_with_dropout() -> None:
    plain, model = make("gpt2"), make("gpt2").train()
    prune(plain, BESA(steps=2), ids(), sparsity=0.5)
    with torch.inference_mode():
        prune(model, BESA(steps=2), ids(), sparsity=0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        *({"steps": -1}, {"steps": 1.5}, {"sequences": 0}, {"lr": 0.0}, {"lr": math.nan}),
        *({"width": 0.0}, {"width": 1.1}, {"metric": "taylor"}),
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"The '{next(iter(options))}' of besa must be"):
        BESA(**options)  # type: ignore[arg-type]


def test_the_plan_is_what_happens() -> None:
    model = make("llama")
    planned = plan(model, BESA(steps=2), (6, 16), sparsity=0.5)
    done = prune(model, BESA(steps=2), ids(), sparsity=0.5)
    assert (planned.passes, planned.schedule, planned.pattern) == (done.passes, done.schedule, done.pattern)
    assert (done.passes, done.schedule) == (2, "block")
    longer = plan(model, BESA(steps=64), (6, 16), sparsity=0.5)
    assert longer.estimated_seconds > 2 * planned.estimated_seconds

"""Running a block again while every batch waits at it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, ids, make
from torch import Tensor, nn

from secateur.blocks import BlockCall
from secateur.errors import RunFailure
from secateur.inputs import batches_of
from secateur.models.layers import find
from secateur.scout import Batch
from secateur.statistics import SecondMoment
from secateur.walk import Arrival, Walked, walk

Visit = Callable[[list[Arrival], list[BlockCall]], None]


def by_block(model: nn.Module, data: Tensor | list[Batch], visit_block: Visit) -> Walked:
    found = find(model)
    batches = batches_of(model, data, 2)

    def wrong(arrivals: list[Arrival]) -> None:
        raise AssertionError("a block's visitor comes instead")

    return walk(
        model, batches, found.layers, blocks=found.blocks, collector=SecondMoment, visit=wrong, schedule="block",
        visit_block=visit_block,
    )  # fmt: skip


def clean(model: nn.Module) -> bool:
    return not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unchanged_block_gives_the_same_again(family: str) -> None:
    model = make(family)
    visited: list[str] = []

    def visit(arrivals: list[Arrival], calls: list[BlockCall]) -> None:
        tokens = arrivals[0].seen.tokens
        visited.append(arrivals[0].layer.block)
        assert [call.sequences for call in calls] == [2, 2, 2] and not torch.is_grad_enabled()
        for _ in range(2):
            for call in calls:
                again = call.run()
                assert torch.equal(again, call.dense) and again.shape[1] == model.config.hidden_size
                assert not again.requires_grad
        with torch.enable_grad():
            assert calls[0].run().requires_grad
        assert arrivals[0].seen.tokens == tokens  # running again collects nothing
        arrivals[0].layer.weight.zero_()
        if arrivals[0].layer.name.endswith(("q_proj", "in_proj")):
            assert not torch.equal(calls[0].run(), calls[0].dense)

    report = by_block(model, ids(), visit)
    assert len(visited) == len(set(visited)) == len(find(model).blocks)
    assert report.passes == 2 + (family in ("albert", "zamba2"))
    assert clean(model)


def test_padding_is_left_out() -> None:
    mask = torch.ones(6, 16, dtype=torch.long)
    mask[0, 10:] = 0
    mask[3, 4:] = 0
    data: list[Batch] = [{"input_ids": ids()[i : i + 3], "attention_mask": mask[i : i + 3]} for i in (0, 3)]
    seen: list[int] = []

    def visit(arrivals: list[Arrival], calls: list[BlockCall]) -> None:
        seen.extend(len(call.run()) for call in calls)
        assert all(call.run().shape == call.dense.shape for call in calls)

    by_block(make("llama"), data, visit)
    assert seen == [48 - 6, 48 - 12] * 2


@pytest.mark.parametrize("where", ["first", "second"])
def test_an_error_of_the_visitor_ends_all_batches(where: str) -> None:
    model = make("llama")
    visits = 0

    def visit(arrivals: list[Arrival], calls: list[BlockCall]) -> None:
        nonlocal visits
        visits += 1
        if visits == (1 if where == "first" else 2):
            with torch.enable_grad():
                calls[0].run()
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        by_block(model, ids(), visit)
    assert clean(model) and torch.is_grad_enabled()


class InAutocast(nn.Module):
    """Runs its blocks under autocast and with gradients, whatever the caller does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
            x = x * self.scale
            for layer in self.layers:
                x = layer(x) + 0
        return x.float().detach()


def test_it_runs_in_the_modes_of_the_model_and_outside_its_graph() -> None:
    def visit(arrivals: list[Arrival], calls: list[BlockCall]) -> None:
        assert not torch.is_autocast_enabled("cpu")
        for call in calls:
            assert call.dense.dtype == torch.bfloat16 and not call.dense.requires_grad
            assert torch.equal(call.run(), call.dense) and not call.run().requires_grad
            with torch.enable_grad():
                assert not any(torch.autograd.grad(call.run().sum(), [model.scale], allow_unused=True))
        assert not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()

    model = InAutocast()
    by_block(model, [{"x": torch.randn(2, 3, 4)}, {"x": torch.randn(1, 3, 4)}], visit)


class Narrows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 3))])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x)
        return y


def test_a_block_without_a_hidden_state() -> None:
    with pytest.raises(RunFailure, match=r"layers.0 gives no hidden state: .* shape of its input \(2, 3, 4\)"):
        by_block(Narrows(), [{"x": torch.randn(2, 3, 4)}], lambda *_: None)

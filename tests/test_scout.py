"""The look ahead: how often, in which order and on whose input layers are called."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ids, make
from torch import Tensor, nn

from secateur.inputs import batches_of
from secateur.models.layers import Layer, find
from secateur.scout import Recent, Scouted, run, scout


class Block(nn.Module):
    """b reads a's input; c does so too, and is called again; d only by its weight; e reads a like-shaped tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.c, self.e, self.a, self.b = (nn.Linear(4, 4, bias=False) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x) + self.c(x)
        z = self.c(y)
        return self.e(z) @ self.d.weight


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.embedding = nn.Embedding(64, 4)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.sizes.append(tuple(input_ids.shape))
        x: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def by_name(scouted: Scouted) -> tuple[list[str], dict[str, int], dict[str, str]]:
    short = {layer: layer.name.removeprefix("layers.") for layer in scouted.calls}
    order = sorted(scouted.order, key=lambda layer: scouted.order[layer])
    return (
        [short[layer] for layer in order],
        {short[layer]: n for layer, n in scouted.calls.items()},
        {short[layer]: short[head] for layer, head in scouted.leader.items()},
    )


def test_what_it_finds() -> None:
    toy = Toy()
    order, calls, leader = by_name(scout(toy, {"input_ids": ids(3, 40)}, find(toy).layers))
    assert toy.sizes == [(1, 16)]
    assert calls == {f"{i}.{x}": n for i in (0, 1) for x, n in zip("abcde", (1, 1, 2, 0, 1), strict=True)}
    assert leader == {"0.b": "0.a", "1.b": "1.a"}
    # in the order of the calls; uncalled ones stand right behind the layer before them in the model
    assert order == [f"{i}.{x}" for i in (0, 1) for x in "dabce"]


def test_uncalled() -> None:
    toy = Toy()
    assert [layer.name for layer in scout(toy, {"input_ids": ids()}, find(toy).layers).uncalled] == [
        "layers.0.d",
        "layers.1.d",
    ]
    model = make("mixtral")
    scouted = scout(model, {"input_ids": ids(1, 1)}, find(model).layers)
    assert 0 in scouted.calls.values() and not scouted.uncalled  # an expert that had no token


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_is_that_of_a_longer_run(family: str) -> None:
    model = make(family)
    layers = find(model).layers
    (short, _, _), (whole, _, _) = (by_name(scout(model, batches_of(model, ids())[0], layers, n)) for n in (4, 99))
    assert short == whole


def test_nothing_is_left_behind() -> None:
    model = make("mixtral")
    scout(model, {"input_ids": ids()}, find(model).layers)
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert torch.is_grad_enabled()


def test_a_forward_pass_without_the_head_and_the_cache() -> None:
    model = make("llama")
    seen: list[object] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    model.model.register_forward_hook(lambda m, args, out: seen.append(out.past_key_values))
    run(model, {"input_ids": ids()})
    assert seen == [None]


def test_recent() -> None:
    recent, layer = Recent(), Layer("a", "0", "mlp", ())
    x = torch.ones(2)
    assert recent.find(x) is None
    recent.add(x, layer)
    assert recent.find(x) is layer
    assert recent.find(x.clone()) is None
    x.add_(1)
    assert recent.find(x) is None
    recent.add(x, layer)
    key = id(x)
    del x
    other = torch.ones(2)
    recent.seen[id(other)] = recent.seen.pop(key)  # the address has been given to another tensor
    assert recent.find(other) is None

"""One sparsity to one per layer: exact budgets, and OWL as its paper defines it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import ids, make
from torch import Tensor, nn

from secateur.allocation import ALLOCATIONS, HIGHEST, Allocation, Evidence, Owl, Table, Uniform, meet_budget
from secateur.errors import InvalidParameter, LoadFailure, UsageError
from secateur.methods.magnitude import Magnitude
from secateur.methods.wanda import Wanda
from secateur.models.layers import Layer, find_layers
from secateur.pruning import prune
from secateur.statistics import SecondMoment


def seen_by(model: nn.Module, layers: list[Layer]) -> dict[Layer, SecondMoment]:
    """What plain hooks see in one forward pass of all ids."""
    seen = {layer: SecondMoment() for layer in layers}

    def watch(layer: Layer, x: Tensor) -> None:
        seen[layer].update(x.reshape(-1, x.shape[-1]))

    handles = [
        layer.module.register_forward_pre_hook(lambda m, args, layer=layer: watch(layer, args[0])) for layer in layers
    ]
    with torch.no_grad():
        model(ids())
    for handle in handles:
        handle.remove()
    return seen


def spiky() -> nn.Module:
    """A Llama with ever more outlying weights."""
    model = make("llama", torch.float64)
    generator = torch.Generator().manual_seed(3)
    for i, layer in enumerate(find_layers(model)):
        chosen = torch.rand(layer.shape, generator=generator) < 0.01 * i
        layer.weight[chosen] *= 30
    return model


def naive_owl(
    blocks: list[list[Layer]], seen: dict[Layer, SecondMoment], target: float, lam: float, m: float
) -> list[float]:
    """Yin et al. 2024: D of each block, scaled to [0, 2 lambda]; sparsity = target - D + weighted mean of D."""
    ratios, sizes = [], []
    for layers in blocks:
        scores = torch.cat([(layer.weight.abs() * seen[layer].mean.sqrt()).flatten() for layer in layers])
        ratios.append((scores > m * scores.mean()).double().mean().item())
        sizes.append(scores.numel())
    low, high = min(ratios), max(ratios)
    d = [(r - low) / (high - low) * 2 * lam for r in ratios]
    mean = sum(x * n for x, n in zip(d, sizes, strict=True)) / sum(sizes)
    return [target - x + mean for x in d]


def test_uniform() -> None:
    layers = find_layers(make("llama"))
    assert Uniform().allocate(layers, 0.3) == dict.fromkeys(layers, 0.3)
    with pytest.raises(UsageError, match="uniform allocation needs a sparsity"):
        Uniform().allocate(layers, None)


@pytest.mark.parametrize(("bound", "outlier"), [(0.08, 5.0), (0.2, 3.0)])
@pytest.mark.parametrize("leave_out", [(), ("0.mlp.up_proj", "0.mlp.down_proj")])  # blocks of unequal size
def test_owl_is_the_papers(bound: float, outlier: float, leave_out: tuple[str, ...]) -> None:
    model = spiky()
    layers = [layer for layer in find_layers(model) if not layer.name.endswith(leave_out or ("nothing",))]
    seen = seen_by(model, layers)
    given = Owl(bound, outlier).allocate(layers, 0.6, Evidence(seen))
    blocks = [[layer for layer in layers if layer.block == b] for b in dict.fromkeys(x.block for x in layers)]
    expected = naive_owl(blocks, seen, 0.6, bound, outlier)
    for inside, wanted in zip(blocks, expected, strict=True):
        assert {given[layer] for layer in inside} == {given[inside[0]]}  # one sparsity a block
        assert given[inside[0]] == pytest.approx(wanted, abs=1e-12)
    assert max(expected) - min(expected) == pytest.approx(2 * bound)
    assert expected[0] > expected[1]  # the block with more outliers keeps more
    total = sum(layer.weight.numel() for layer in layers)
    assert sum(s * layer.weight.numel() for layer, s in given.items()) == pytest.approx(0.6 * total, abs=1e-6)


def test_owl_of_blocks_that_do_not_differ() -> None:
    layers = find_layers(make("llama"))
    for owl in (Owl(outlier=1e9), Owl(bound=0)):
        assert list(owl.allocate(layers, 0.5).values()) == pytest.approx([0.5] * len(layers))


def test_owl_scores_a_layer_that_saw_nothing_by_its_weights() -> None:
    layers = find_layers(spiky())
    plain = {layer: SecondMoment() for layer in layers}  # without a token
    assert Owl().allocate(layers, 0.5, Evidence(plain)) == Owl().allocate(layers, 0.5)


@pytest.mark.parametrize("target", [0.0, 0.01, 0.5, 0.985, HIGHEST, 0.999])
@pytest.mark.parametrize("wanted", [[0.3, 0.5, 0.7], [-5.0, 0.0, 5.0], [0.9, 0.2, 0.9]])
def test_budget_is_met_at_the_extremes(wanted: list[float], target: float) -> None:
    sizes = [1000, 37, 100_000]
    given = meet_budget([w + target - 0.5 for w in wanted], sizes, target)
    assert abs(sum(s * n for s, n in zip(given, sizes, strict=True)) - target * sum(sizes)) < 1e-3
    assert all(0 <= s <= max(HIGHEST, target) for s in given)
    assert sorted(given) == [s for _, s in sorted(zip(wanted, given, strict=True))]  # the order stays


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=["magnitude", "wanda"])
def test_owl_through_prune(family: str, method: Magnitude | Wanda) -> None:
    model = make(family)
    result = prune(model, method, ids(), sparsity=0.7, allocation=Owl(bound=0.2, outlier=2.0), batch_size=2)
    uniform = prune(make(family), method, ids(), sparsity=0.7)
    assert result.passes == uniform.passes + 1
    assert result.allocation == {"name": "owl", "bound": 0.2, "outlier": 2.0}
    assert result.schedule == "sequential"
    targets = {layer.block: layer.target for layer in result.layers}
    assert len(set(targets.values())) == len(targets) == 2
    assert all(layer.target == targets[layer.block] for layer in result.layers)
    sizes = [layer.shape[0] * layer.shape[1] for layer in result.layers]
    wanted = sum(layer.target * size for layer, size in zip(result.layers, sizes, strict=True))
    assert wanted == pytest.approx(0.7 * sum(sizes), abs=1e-6)
    for layer, found in zip(result.layers, (x for x in find_layers(model) if x.kind != "router"), strict=True):
        groups = 1 if method == Magnitude() else layer.shape[0]
        zeros = int((found.weight == 0).sum())
        assert zeros == groups * round(layer.target * found.weight.numel() / groups)


def test_owl_looks_at_the_dense_model() -> None:
    """Its statistics come before any cut, so a sequential walk takes the same targets as a plain dense pass."""
    dense = spiky()
    layers = find_layers(dense)
    expected = Owl().allocate(layers, 0.5, Evidence(seen_by(dense, layers)))
    result = prune(spiky(), Wanda(), ids(), sparsity=0.5, allocation=Owl())
    assert {x.name: x.target for x in result.layers} == pytest.approx({x.name: s for x, s in expected.items()})


def test_table_takes_the_first_match() -> None:
    layers = find_layers(make("llama"))
    table = Table((("layers.0.mlp", 0.1), ("mlp", 0.2), ("*.q_proj", 0.0)))
    given = {layer.name: s for layer, s in table.allocate(layers, 0.7).items()}
    assert given["model.layers.0.mlp.up_proj"] == 0.1
    assert given["model.layers.1.mlp.up_proj"] == 0.2
    assert given["model.layers.1.self_attn.q_proj"] == 0.0
    assert given["model.layers.1.self_attn.k_proj"] == 0.7


def test_table_that_fits_the_layers_badly() -> None:
    layers = find_layers(make("llama"))
    with pytest.raises(UsageError, match=r"no sparsity for model.layers.0.self_attn.q_proj; add one, or give"):
        Table((("mlp", 0.2),)).allocate(layers, None)
    with pytest.raises(UsageError, match=r"'experts' matches none of 14 layers \(model.layers.0.self_attn.q_proj"):
        Table((("mlp", 0.2), ("experts", 0.2))).allocate(layers, 0.5)
    for bad in (1.0, -0.1, "0.5", None, True):
        with pytest.raises(InvalidParameter, match="allocation entry 'mlp'"):
            Table((("mlp", bad),))  # type: ignore[arg-type]


def test_full_table_needs_no_sparsity(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"mlp": 0.25, "layers": 0.5}))
    result = prune(make("llama"), Magnitude(), allocation=Table.read(file))
    assert {layer.kind: layer.sparsity for layer in result.layers} == {"mlp": 0.25, "attention": 0.5}
    assert result.target is None
    json.dumps(result.to_dict())


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "3", b"\xff\xfe"])
def test_broken_table(tmp_path: Path, content: str | bytes | None) -> None:
    file = tmp_path / "table.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LoadFailure, match=r"allocation table .*table\.json"):
        Table.read(file)


@pytest.mark.parametrize(
    ("option", "bad"), [("bound", 0.5), ("bound", -0.1), ("outlier", 0.5), ("outlier", float("nan"))]
)
def test_options_out_of_range(option: str, bad: float) -> None:
    with pytest.raises(InvalidParameter, match=f"'{option}' of owl"):
        Owl(**{option: bad})


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_every_allocation_introduces_itself(name: str) -> None:
    kind: type[Allocation] = ALLOCATIONS[name]
    assert kind.name() == name and kind.summary() and kind.source

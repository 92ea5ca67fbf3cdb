"""Which matrices a model has, by name, order, kind and orientation."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import FAMILIES, make
from torch import nn

from secateur.errors import ModelNotSupported, UnknownName, UsageError
from secateur.models.layers import Found, find, find_blocks, find_layers, matches, select

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
EXPERTS = [f"experts.{leaf}[{i}]" for i in range(4) for leaf in ("gate_up_proj", "down_proj")]
STACK = ["q", "k", "v", "o"]

# family -> the leaves of its second block, and (kind -> number) over the model
EXPECTED: dict[str, tuple[str, list[str], dict[str, int]]] = {
    "llama": (
        "model.layers.1",
        [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
        {"attention": 8, "mlp": 6},
    ),
    "gpt2": ("transformer.h.1", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], {"attention": 4, "mlp": 4}),
    "mixtral": ("model.layers.1", [*ATTENTION, *(f"mlp.{e}" for e in EXPERTS)], {"attention": 8, "mlp": 16}),
    "jamba": (
        "model.layers.1",
        [*ATTENTION, *(f"feed_forward.{e}" for e in EXPERTS)],
        {"attention": 4, "mlp": 22, "ssm": 12},
    ),
    "mamba": ("backbone.layers.1", [f"mixer.{x}" for x in ("in_proj", "x_proj", "dt_proj", "out_proj")], {"ssm": 8}),
    "t5": (
        "decoder.block.0",
        [
            *(f"layer.0.SelfAttention.{x}" for x in STACK),
            *(f"layer.1.EncDecAttention.{x}" for x in STACK),
            "layer.2.DenseReluDense.wi",
            "layer.2.DenseReluDense.wo",
        ],
        {"attention": 24, "mlp": 8},
    ),
    "albert": (
        "albert.encoder.albert_layer_groups.0",
        [f"albert_layers.0.{x}" for x in ("attention.query", "attention.key", "attention.value", "attention.dense")]
        + ["albert_layers.0.ffn", "albert_layers.0.ffn_output"],
        {"attention": 4, "mlp": 2},
    ),
    "zamba2": (
        "model.layers.2",
        ["mamba.in_proj", "mamba.out_proj"],
        {"ssm": 8, "attention": 4, "mlp": 8},
    ),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_names_and_kinds(family: str) -> None:
    block, leaves, kinds = EXPECTED[family]
    layers = find_layers(make(family))
    assert [layer.name for layer in layers if layer.block == block] == [f"{block}.{leaf}" for leaf in leaves]
    assert Counter(layer.kind for layer in layers) == kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_order_names_and_shapes_hold_together(family: str) -> None:
    model = make(family)
    found = find(model)
    assert [layer.order for layer in found.layers] == list(range(len(found.layers)))
    assert len({layer.name for layer in found.layers}) == len(found.layers)
    blocks = list(found.blocks)
    assert [blocks.index(layer.block) for layer in found.layers] == sorted(blocks.index(x.block) for x in found.layers)
    for layer in found.layers:
        assert layer.name.startswith(f"{layer.block}.")
        assert model.get_submodule(layer.name.partition("[")[0].removesuffix(f".{layer.parameter}")) is layer.module
        assert layer.weight.shape == layer.shape
        assert not layer.weight.requires_grad
    inside = sum(p.numel() for block in _distinct(found) for p in block.parameters() if p.dim() >= 2)
    seen = sum(layer.weight.numel() for layer in found.layers)
    biases = sum(p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and n.endswith("bias"))
    tables = sum(m.weight.numel() for b in _distinct(found) for m in b.modules() if isinstance(m, nn.Embedding))
    assert seen + sum(n for _, n in found.unseen.values()) == inside - biases - tables


def _distinct(found: Found) -> list[nn.ParameterList]:
    parameters = {id(p): p for block in found.blocks.values() for p in block.parameters()}
    return [nn.ParameterList(parameters.values()), *(_Tables(block) for block in found.blocks.values())]


class _Tables(nn.ParameterList):
    """The embeddings of a block, without its parameters."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for i, module in enumerate(m for m in block.modules() if isinstance(m, nn.Embedding)):
            self.add_module(str(i), module)

    def parameters(self, recurse: bool = True):
        return iter(())


def test_a_transposed_weight_is_a_view_of_its_parameter() -> None:
    model = make("gpt2")
    layer = find_layers(model)[0]
    stored = model.transformer.h[0].attn.c_attn.weight
    assert (layer.shape, stored.shape) == ((96, 32), (32, 96))
    layer.weight[3, 5] = 7.0
    assert stored[5, 3] == 7.0


def test_an_expert_is_a_slice_of_its_parameter() -> None:
    for family, transposed in (("mixtral", False), ("gpt_oss", True)):
        model = make(family)
        layer = next(x for x in find_layers(model) if x.expert == 2 and x.parameter == "gate_up_proj")
        layer.weight[3, 5] = 7.0
        stored = layer.module.gate_up_proj[2]
        assert layer.transposed == transposed and layer.shape == (128, 32)
        assert (stored.T if transposed else stored)[3, 5] == 7.0


def test_a_weight_at_two_places_is_one_layer() -> None:
    model = make("zamba2")
    shared = [layer for layer in find_layers(model) if "shared_transformer" in layer.name]
    assert all(len(layer.modules) == 2 for layer in shared)
    assert {layer.block for layer in shared} == {"model.layers.1"}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jamba", "qwen3_moe"])
def test_bare_routers_are_seen_but_no_part_of_all(family: str) -> None:
    found = find(make(family))
    routers = {name for name, (kind, _) in found.unseen.items() if kind == "router"}
    assert routers
    layers, unseen = select(found)
    assert len(layers) == len(found.layers) and not routers & unseen.keys()
    _, unseen = select(found, ["mlp", "router"])
    assert routers <= unseen.keys()


class Gated(nn.Module):
    """A router that is a plain Linear beside its experts, and a gate of a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.shared_gate = nn.Linear(4, 1)
        self.mix = nn.Linear(4, 4)


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = Gated()


def test_linear_routers_are_left_out_unless_named() -> None:
    found = find(Stack(Outer(), Outer()))
    kinds = {layer.name.removeprefix("layers.0.moe."): layer.kind for layer in found.layers[:5]}
    assert kinds == {"gate": "router", "experts.0": "mlp", "experts.1": "mlp", "shared_gate": "router", "mix": "mlp"}
    leaves = [[x.name.removeprefix("layers.0.moe.") for x in select(found, words)[0]] for words in (
        ["all"], ["all", "router"], ["router"], ["gate"],
    )]  # fmt: skip
    assert [leaf for leaf in leaves[0] if "layers" not in leaf] == ["experts.0", "experts.1", "mix"]
    assert len(leaves[1]) == 10
    assert [leaf for leaf in leaves[2] if "layers" not in leaf] == ["gate", "shared_gate"]
    assert [leaf for leaf in leaves[3] if "layers" not in leaf] == ["gate"]


@pytest.mark.parametrize(
    ("include", "exclude", "count"),
    [
        (["all"], [], 14),
        (["attention"], [], 8),
        (["all"], ["attention"], 6),
        (["q_proj", "layers.1.mlp"], [], 5),
        (["all"], ["layers.0", "down_proj"], 6),
        (["*.layers.?.mlp.*_proj"], [], 6),
        (["model.layers.0.mlp.up_proj"], [], 1),
    ],
)
def test_choosing(include: list[str], exclude: list[str], count: int) -> None:
    assert len(select(find(make("llama")), include, exclude)[0]) == count


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        (["q_prj"], [], r"There is no layer 'q_prj'. Did you mean 'q_proj'\? Known: all, attention"),
        (["all"], ["layers.2"], "There is no layer 'layers.2'"),
        (["atention"], [], "Did you mean 'attention'"),
    ],
)
def test_words_that_name_nothing(include: list[str], exclude: list[str], said: str) -> None:
    with pytest.raises(UnknownName, match=said):
        select(find(make("llama")), include, exclude)


@pytest.mark.parametrize(("include", "exclude"), [(["ssm"], []), (["mlp"], ["all"]), ([], [])])
def test_a_choice_that_leaves_nothing(include: list[str], exclude: list[str]) -> None:
    with pytest.raises(UsageError, match="leaves no layer"):
        select(find(make("llama")), include, exclude)


@pytest.mark.parametrize(
    ("word", "name", "expected"),
    [
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "model.layers.11.mlp.up_proj", False),
        ("up_proj", "model.layers.1.mlp.up_proj", True),
        ("up_proj", "model.layers.1.mlp.gate_up_proj", False),
        ("model", "model.layers.1.mlp.up_proj", True),
        ("lay*", "model.layers.1.mlp.up_proj", True),
        ("layers.[01]", "model.layers.1.mlp.up_proj", False),
        ("experts.down_proj", "mlp.experts.down_proj[12]", True),
        ("down_proj[1]", "mlp.experts.down_proj[12]", False),
        ("down_proj[12]", "mlp.experts.down_proj[12]", True),
        ("DOWN_PROJ", "mlp.down_proj", False),
    ],
)
def test_matching(word: str, name: str, expected: bool) -> None:
    assert matches(word, name) == expected


def test_models_without_blocks_or_layers() -> None:
    with pytest.raises(ModelNotSupported, match="Linear has no blocks: looked for a ModuleList of"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(ModelNotSupported, match="Stack has no blocks"):
        find_blocks(Stack(nn.Conv1d(2, 2, 3)))
    marked = Stack(nn.LayerNorm(4))
    marked._no_split_modules = ["LayerNorm"]  # type: ignore[assignment]
    with pytest.raises(ModelNotSupported, match=r"1 blocks, but no nn\.Linear"):
        find(marked)


def test_weights_that_cannot_be_pruned() -> None:
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.ones(64, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelNotSupported, match=r"layers.1.mlp.up_proj holds a torch.int8 .*without quantisation"):
        find(model)
    model = make("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 64, device="meta")
    with pytest.raises(UsageError, match=r"layers.1.mlp.up_proj is on the meta device"):
        find(model)
    with torch.inference_mode():
        model = make("llama")
    with pytest.raises(UsageError, match=r"q_proj was made under torch.inference_mode"):
        find(model)

"""Architecture as data: the blocks of any model, and the matrices inside them.

A block is an item of an outermost `ModuleList` whose class the model lists in `_no_split_modules`, or that
transformers marks as a checkpointed layer. A layer is one weight applied as a matrix inside a block, seen
as (out, in) whatever stores it: `nn.Linear`, GPT-2's `Conv1D` (stored in, out), or one slice of the 3-D
expert parameters of transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from secateur.errors import ModelNotSupported, UnknownName, UsageError

Kind = Literal["attention", "mlp", "ssm", "router"]
KINDS: dict[str, str] = {
    "attention": "projections of self- and cross-attention",
    "mlp": "feed-forward matrices, experts included",
    "ssm": "matrices of state-space and other recurrent mixers",
    "router": "what sends a token to its experts; left dense unless it is named",
}
_KIND_OF_CLASS: tuple[tuple[str, Kind], ...] = (
    (r"Router|TopKGate", "router"),
    (r"MLP|Mlp|FeedForward|FFN|Experts", "mlp"),
    (r"Attention|SelfAttn", "attention"),
    (r"Mixer|Mamba|SSM|DeltaNet|RWKV|Rwkv|Recurrent|ShortConv", "ssm"),
)
_EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class Layer:
    """One matrix inside a block.

    `modules` are the modules that apply it: more than one when a parameter is shared. `order` is the
    position in the model, first to last. A layer is hashed by identity.
    """

    name: str
    block: str
    kind: Kind
    modules: tuple[nn.Module, ...]
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False
    order: int = 0

    @property
    def routed(self) -> bool:
        """Whether only some tokens reach it: one of several experts, however they are stored."""
        return self.expert is not None or "expert" in self.name

    @property
    def module(self) -> nn.Module:
        """The first module that applies the layer."""
        return self.modules[0]

    @property
    def weight(self) -> Tensor:
        """(out, in) view of the parameter itself: writing to it changes the model."""
        return self.view_of(getattr(self.module, self.parameter).detach())

    def view_of(self, parameter: Tensor) -> Tensor:
        """(out, in): this layer's part of a tensor that is laid out like the parameter, its gradient for one."""
        part = parameter if self.expert is None else parameter[self.expert]
        return part.t() if self.transposed else part

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        rows, columns = self.weight.shape
        return rows, columns


@dataclass(frozen=True)
class Found:
    """The layers of a model, and the block matrices that are no layer.

    `unseen` maps parameter names to (kind, number of weights): routers kept as bare parameters, convolution
    kernels, and anything else with two or more dimensions that no layer stands for.
    """

    layers: tuple[Layer, ...]
    blocks: dict[str, nn.Module]
    unseen: dict[str, tuple[Kind, int]] = field(default_factory=dict)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by name, in the order of the model.

    Raises:
        ModelNotSupported: no `ModuleList` of blocks was found.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    no_split = set(getattr(model, "_no_split_modules", None) or ())
    lists = list(_outermost_lists(model))
    items = {f"{name}.{i}": item for name, children in lists for i, item in enumerate(children)}
    blocks = {
        name: item
        for name, item in items.items()
        if type(item).__name__ in no_split or isinstance(item, GradientCheckpointingLayer)
    } or {name: item for name, item in items.items() if any(_is_linear(m) for m in item.modules())}
    if blocks:
        return blocks
    raise ModelNotSupported(
        f"{type(model).__name__} has no blocks: looked for a ModuleList of "
        f"{sorted(no_split) or 'checkpointed layers'} in {len(lists)} module lists"
    )


def find(model: nn.Module) -> Found:
    """All layers of all blocks, with what the blocks hold besides.

    Raises:
        ModelNotSupported: no blocks, no layers, or weights that are not plain floating-point matrices.
        UsageError: a weight is on the meta device (offloaded).
    """
    blocks = find_blocks(model)
    places: dict[tuple[int, int | None], Layer] = {}
    unseen: dict[str, tuple[Kind, int]] = {}
    for block_name, block in blocks.items():
        for name, module, ancestors in _walk(block_name, block):
            kind = _kind((*ancestors, module))
            for layer in _layers_of(name, block_name, module, ancestors, kind):
                key = (id(getattr(module, layer.parameter)), layer.expert)
                if key not in places:
                    _check_weight(layer)
                    places[key] = replace(layer, order=len(places))
                elif module not in places[key].modules:
                    places[key] = replace(places[key], modules=(*places[key].modules, module))
    seen = {key[0] for key in places}
    for block_name, block in blocks.items():
        for name, module, ancestors in _walk(block_name, block):
            for leaf, parameter in module.named_parameters(recurse=False):
                matrix = parameter.dim() >= 2 and not leaf.endswith("bias") and not isinstance(module, nn.Embedding)
                if matrix and id(parameter) not in seen:
                    unseen[f"{name}.{leaf}"] = (_kind((*ancestors, module)), parameter.numel())
    if not places:
        raise ModelNotSupported(
            f"{type(model).__name__} has {len(blocks)} blocks, but no nn.Linear, Conv1D or expert parameter in them"
        )
    return Found(tuple(places.values()), blocks, unseen)


def find_layers(model: nn.Module) -> list[Layer]:
    """All layers of all blocks, first to last.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, vocab_size=20))
    >>> [(layer.name, layer.shape, layer.kind) for layer in find_layers(model)][-1]
    ('model.layers.0.mlp.down_proj', (16, 32), 'mlp')
    """
    return list(find(model).layers)


def select(
    found: Found, include: Sequence[str] = ("all",), exclude: Sequence[str] = ()
) -> tuple[list[Layer], dict[str, int]]:
    """The layers that `include` names and `exclude` does not, and the unseen weights in the same region.

    A word is a kind (`attention`, `mlp`, `ssm`, `router`), `all` (every kind but routers), or a pattern over
    layer names: `q_proj`, `layers.0`, `*.experts.*`.

    Raises:
        UsageError: a word that names nothing, or a choice that leaves nothing.
    """
    include, exclude = ([words] if isinstance(words, str) else words for words in (include, exclude))
    kinds = {layer.name: layer.kind for layer in found.layers} | {n: kind for n, (kind, _) in found.unseen.items()}
    for word in (*include, *exclude):
        if word != "all" and word not in KINDS and not any(_chooses(word, name, kinds[name]) for name in kinds):
            leaves = {name.rpartition(".")[2].partition("[")[0] for name in kinds}
            raise UnknownName("layer", word, leaves | set(KINDS) | {"all"})

    def chosen(name: str) -> bool:
        inside = any(_chooses(word, name, kinds[name]) for word in include)
        return inside and not any(_chooses(word, name, kinds[name]) for word in exclude)

    layers = [layer for layer in found.layers if chosen(layer.name)]
    if not layers:
        raise UsageError(f"--include {' '.join(include)} --exclude {' '.join(exclude)} leaves no layer to prune")
    return layers, {name: count for name, (_, count) in found.unseen.items() if chosen(name)}


def check_untied(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Refuse layers whose parameter is used outside the blocks as well (an embedding, a head).

    Raises:
        UsageError: names the layer and the other place.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer in layers:
        own = {id(module) for module in layer.modules}
        others = [
            name
            for name in names[id(getattr(layer.module, layer.parameter))]
            if id(model.get_submodule(name.rpartition(".")[0])) not in own
        ]
        if others:
            raise UsageError(
                f"{layer.name} is tied to {others[0]}, which pruning would change too; "
                f"leave it out with --exclude {layer.name}"
            )


def _outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and len(child):
            yield path, child
        else:
            yield from _outermost_lists(child, f"{path}.")


def _walk(
    name: str, module: nn.Module, above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Every module below, with its ancestors inside the block (the block itself first)."""
    yield name, module, above
    for child_name, child in module.named_children():
        yield from _walk(f"{name}.{child_name}", child, (*above, module))


def _kind(path: tuple[nn.Module, ...]) -> Kind:
    """From the classes of the modules below the block, the innermost first."""
    for module in reversed(path[1:]):
        for pattern, kind in _KIND_OF_CLASS:
            if re.search(pattern, type(module).__name__):
                return kind
    return "mlp"


def _layers_of(
    name: str, block: str, module: nn.Module, ancestors: tuple[nn.Module, ...], kind: Kind
) -> Iterator[Layer]:
    if _is_linear(module):
        if isinstance(module, nn.Linear) and _routes(module, ancestors):
            kind = "router"
        yield Layer(name, block, kind, (module,), transposed=not isinstance(module, nn.Linear))
    elif is_experts(module):
        transposed = bool(getattr(module, "is_transposed", False))
        weights = [leaf for leaf in _EXPERT_WEIGHTS if isinstance(getattr(module, leaf, None), nn.Parameter)]
        for expert in range(len(getattr(module, weights[0]))):
            for leaf in weights:
                yield Layer(f"{name}.{leaf}[{expert}]", block, kind, (module,), leaf, expert, transposed)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # stores (in, out)

    return isinstance(module, nn.Linear | Conv1D)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds 3-D expert parameters that transformers' experts interface can run."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3 and hasattr(module, "_apply_gate")


def _routes(module: nn.Linear, ancestors: tuple[nn.Module, ...]) -> bool:
    """A gate: one output, or one for each of the experts beside it."""
    siblings = ancestors[-1].named_children() if ancestors else ()
    experts = [child for name, child in siblings if "expert" in name]
    counts = [len(child) for child in experts if isinstance(child, nn.ModuleList)]
    counts += [len(child.down_proj) for child in experts if is_experts(child)]  # type: ignore[arg-type]
    return module.out_features in (1, *counts)


def _check_weight(layer: Layer) -> None:
    weight = layer.weight
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ModelNotSupported(
            f"{layer.name} holds a {weight.dtype} tensor of shape {tuple(weight.shape)}; pruning needs plain "
            f"floating-point matrices: load the model without quantisation"
        )
    if weight.device.type == "meta":
        raise UsageError(f"{layer.name} is on the meta device (offloaded); load the whole model on one device")
    if weight.is_inference():
        raise UsageError(
            f"{layer.name} was made under torch.inference_mode, which forbids changing it; load it outside"
        )


def matches(word: str, name: str) -> bool:
    """Whether a shell-style pattern names a layer, or a part of its dotted path.

    >>> matches("q_proj", "layers.0.self_attn.q_proj"), matches("layers.1", "layers.10.mlp")
    (True, False)
    >>> matches("down_proj[3]", "mlp.experts.down_proj[3]"), matches("down_proj", "mlp.experts.down_proj[3]")
    (True, True)
    """
    pattern = word.replace("[", "[[]")  # brackets number experts; they are no character class
    return any(
        fnmatchcase(text, form)
        for text in {name, name.partition("[")[0]}
        for form in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    )


def _chooses(word: str, name: str, kind: str) -> bool:
    if word == "all":
        return kind != "router"
    return kind == word if word in KINDS else matches(word, name)

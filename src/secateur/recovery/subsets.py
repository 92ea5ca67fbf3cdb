"""Which parameters are trained: the subsets of PERP, and the two baselines.

Source: Zimmer et al. 2023, arXiv:2312.15230, section 3: biases, norms, embeddings, head, low-rank adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.models.layers import Layer

SUBSETS: dict[str, str] = {
    "adapters": "low-rank adapters on the pruned layers",
    "biases": "every bias, those of norms and experts included",
    "norms": "weights and biases of every norm",
    "embeddings": "every embedding outside the blocks: tokens, positions",
    "head": "the output head; tied to the embedding, it is one tensor, and training one trains the other",
    "kept": "every kept weight of the pruned layers; their zeros stay",
    "all": "every parameter; the zeros are lost",
}


@dataclass(frozen=True, eq=False)
class Trainee:
    """One parameter of the model that is trained.

    `how` is full, kept or adapter; `places` are the modules that use it and its name there; `layers` the
    pruned layers that it holds.
    """

    name: str
    subset: str
    how: str
    parameter: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]
    layers: tuple[Layer, ...] = ()

    @property
    def transposed(self) -> bool:
        """Whether it is stored (in, out)."""
        return any(layer.transposed for layer in self.layers)

    @property
    def matrix(self) -> Tensor:
        """(..., out, in) view of the parameter, without gradient."""
        stored = self.parameter.detach()
        return stored.mT if self.transposed else stored


def find_trainees(
    model: nn.Module,
    layers: Sequence[Layer],
    blocks: dict[str, nn.Module],
    train: Sequence[str],
    *,
    needed: bool = True,
) -> tuple[list[Trainee], list[str]]:
    """The parameters that `train` names, each once, in the order of the model, and what the user should know.

    Args:
        model: a pruned model.
        layers: its pruned layers, as its record names them.
        blocks: its blocks by name.
        train: keys of `SUBSETS`.
        needed: whether there must be any.

    Raises:
        UsageError: the model has none of what was asked for.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> [trainee.name for trainee in find_trainees(model, (), {}, ("biases",))[0]]
    ['0.bias', '1.bias']
    """
    names, places = _places(model)
    found: dict[int, Trainee] = {}
    warnings: list[str] = []
    for word in dict.fromkeys(train):
        chosen = list(_chosen(model, layers, blocks, word))
        for parameter, how, held in chosen:
            key = id(parameter)
            if key not in found and key in names:
                found[key] = Trainee(names[key], word, how, parameter, tuple(places[key]), held)
        if not chosen:
            warnings.append(f"{type(model).__name__} has no {word}: nothing of that name is trained")
    if needed and not found:
        raise UsageError(
            f"{type(model).__name__} has nothing of --train {' '.join(train)}: name others of {', '.join(SUBSETS)}."
        )
    warnings += _tied(found, places, names, train)
    order = {key: i for i, key in enumerate(names)}
    return sorted(found.values(), key=lambda trainee: order[id(trainee.parameter)]), warnings


def _places(model: nn.Module) -> tuple[dict[int, str], dict[int, list[tuple[nn.Module, str]]]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, leaf))
    return names, places


def _chosen(
    model: nn.Module, layers: Sequence[Layer], blocks: dict[str, nn.Module], word: str
) -> Iterator[tuple[nn.Parameter, str, tuple[Layer, ...]]]:
    pruned = _by_parameter(layers)
    if word in ("adapters", "kept"):
        for held in pruned.values():
            parameter: nn.Parameter = getattr(held[0].module, held[0].parameter)
            yield parameter, "adapter" if word == "adapters" else "kept", held
        return
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for leaf, parameter in module.named_parameters(recurse=False):
            bias = leaf == "bias" or leaf.endswith("_bias")
            if (
                word == "all"
                or (word == "biases" and bias)
                or (word == "norms" and norm and parameter.dim() <= 1)
                or (word == "embeddings" and isinstance(module, nn.Embedding) and id(module) not in inside)
                or (word == "head" and module is head and not bias)
            ):
                yield parameter, "full", pruned.get(id(parameter), ())


def _by_parameter(layers: Sequence[Layer]) -> dict[int, tuple[Layer, ...]]:
    """Layers by the parameter that holds them: all experts of a module are slices of one."""
    held: dict[int, tuple[Layer, ...]] = {}
    for layer in layers:
        key = id(getattr(layer.module, layer.parameter))
        held[key] = (*held.get(key, ()), layer)
    return held


def _tied(
    found: dict[int, Trainee],
    places: dict[int, list[tuple[nn.Module, str]]],
    names: dict[int, str],
    train: Sequence[str],
) -> list[str]:
    said = []
    for key, trainee in found.items():
        kinds = {isinstance(module, nn.Embedding) for module, _ in places[key]}
        if (
            trainee.how == "full"
            and len(kinds) == 2
            and not {"embeddings", "head"} <= set(train)
            and "all" not in train
        ):
            said.append(f"{names[key]}: embedding and head are one tensor, so both are trained")
    return said

"""Sparsity: the share of weights that are exactly zero, counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from secateur.progress import Progress, silent

PATTERNS = ((2, 4), (4, 8))  # n kept of m: what the hardware knows


@dataclass(frozen=True)
class LayerSparsity:
    """shape: (out, in). `sparsity`: share of zeros. `nm`: pattern -> share of groups that satisfy it."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    nm: dict[str, float]


@dataclass(frozen=True)
class Sparsity:
    """Zeros of a model, as shares in [0, 1].

    `layers` is over the matrices inside the blocks, `model` over all parameters, tied ones counted once.
    `nm` maps "2:4" and "4:8" to the share of groups of m consecutive inputs that hold at most n non-zeros,
    over the layers whose width m divides; a pattern that fits no layer is left out.
    """

    layers: float
    model: float
    nm: dict[str, float]
    per_layer: tuple[LayerSparsity, ...]

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        held = "".join(f", {name} holds" for name, share in self.nm.items() if share == 1)
        return f"{self.layers:.2%} of the layers, {self.model:.2%} of the model{held}"


def sparsity(model: nn.Module, *, progress: Progress = silent) -> Sparsity:
    """Count the zeros of each layer and of the whole model, and test for n:m patterns.

    Args:
        model: a model with blocks; nothing in it is changed.
        progress: called with layers done and in all.

    Returns:
        A `Sparsity`; counts are exact, -0.0 is zero.

    Raises:
        ModelNotSupported: the model has no blocks or layers.

    >>> import transformers
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> _ = model.model.layers[0].mlp.down_proj.weight.data.zero_()
    >>> print(sparsity(model))  # 64 of 448 and of 616
    14.29% of the layers, 10.39% of the model
    """
    from secateur.models.layers import find_layers

    layers = find_layers(model)
    counts: list[tuple[int, int]] = []
    groups: dict[str, list[tuple[int, int]]] = {f"{n}:{m}": [] for n, m in PATTERNS}
    rows: list[LayerSparsity] = []
    for done, layer in enumerate(layers, 1):
        weight = layer.weight
        counts.append((zeros(weight), weight.numel()))
        own = {}
        for n, m in PATTERNS:
            if weight.shape[1] % m == 0:
                groups[f"{n}:{m}"].append(fitting_groups(weight, n, m))
                own[f"{n}:{m}"] = _share(groups[f"{n}:{m}"][-1:])
        rows.append(LayerSparsity(layer.name, (weight.shape[0], weight.shape[1]), _share(counts[-1:]), own))
        progress(done, len(layers), "counting zeros")
    return Sparsity(
        layers=_share(counts),
        model=_share([(zeros(p.detach()), p.numel()) for p in model.parameters()]),
        nm={name: _share(found) for name, found in groups.items() if found},
        per_layer=tuple(rows),
    )


def zeros(tensor: Tensor) -> int:
    """The number of entries that are exactly zero."""
    return tensor.numel() - int(tensor.count_nonzero())


def fitting_groups(weight: Tensor, n: int, m: int) -> tuple[int, int]:
    """Of a weight (out, in), m dividing in: how many groups of m inputs hold at most n non-zeros, and all.

    >>> import torch
    >>> fitting_groups(torch.tensor([[0.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 0.0]]), 2, 4)
    (1, 2)
    """
    kept = (weight != 0).unflatten(1, (-1, m)).sum(-1)
    return int((kept <= n).sum()), kept.numel()


def _share(counts: Sequence[tuple[int, int]]) -> float:
    return sum(part for part, _ in counts) / max(1, sum(whole for _, whole in counts))

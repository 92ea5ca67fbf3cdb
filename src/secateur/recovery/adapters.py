"""Low-rank adapters on pruned layers, and what becomes of them when they are merged.

    W     (out, in) the pruned weight, keep = W != 0 its kept entries
    B A   (out, rank) (rank, in), s the scale

                       weight while training       weight after the merge
    masked             W + s keep * BA             the same: zeros stay, the function is the same
    scaled             W * BA                      the same
    prune-at-merge     W + s BA                    W + s keep * BA: zeros return, the function changes
    lora (peft)        W + s BA                    never merged: the zeros would be lost

`*` is element by element. 3-D weights (experts) have an A and a B for each of their matrices.

Source: Zimmer et al. 2023, "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv:2312.15230,
section 3 (MaskLoRA, ScaleLoRA, LoRA-Prune). There, ScaleLoRA starts with all of A and B equal, so that every
component gets one gradient and the rank stays 1; here BA also starts at 1, but its components differ.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

Parts = dict[str, Tensor]
LORA = "lora"


class Adapter(Protocol):
    """Two functions on a weight (..., out, in) in fp32 and the parts A (..., rank, in) and B (..., out, rank)."""

    def start(self, shape: torch.Size, rank: int, generator: torch.Generator) -> Parts:
        """A and B with which the model is what it was."""
        ...

    def weight(self, w: Tensor, keep: Tensor, parts: Parts, scale: float) -> Tensor:
        """The weight while training."""
        ...

    def merge(self, w: Tensor, keep: Tensor, parts: Parts, scale: float) -> Tensor:
        """The weight afterwards; zero wherever `keep` is False."""
        ...


class Masked:
    """W + s keep * BA, before and after.

    >>> w, parts = torch.tensor([[2.0, 0.0]]), {"A": torch.ones(1, 2), "B": torch.ones(1, 1)}
    >>> Masked().merge(w, w != 0, parts, 0.5)
    tensor([[2.5000, 0.0000]])
    """

    def start(self, shape: torch.Size, rank: int, generator: torch.Generator) -> Parts:
        *stack, out, inputs = shape
        return {"A": _uniform((*stack, rank, inputs), generator), "B": torch.zeros(*stack, out, rank, device="cpu")}

    def weight(self, w: Tensor, keep: Tensor, parts: Parts, scale: float) -> Tensor:
        return w + (parts["B"] * scale @ parts["A"]) * keep

    merge = weight


class Scaled:
    """W * BA, before and after. BA starts as a matrix of ones in its first component."""

    def start(self, shape: torch.Size, rank: int, generator: torch.Generator) -> Parts:
        *stack, out, inputs = shape
        a, b = _uniform((*stack, rank, inputs), generator), torch.zeros(*stack, out, rank, device="cpu")
        a[..., 0, :], b[..., 0] = 1.0, 1.0
        return {"A": a, "B": b}

    def weight(self, w: Tensor, keep: Tensor, parts: Parts, scale: float) -> Tensor:
        return w * (parts["B"] @ parts["A"])

    merge = weight


class PruneAtMerge(Masked):
    """W + s BA while training; the zeros return with the merge."""

    def weight(self, w: Tensor, keep: Tensor, parts: Parts, scale: float) -> Tensor:
        return w + parts["B"] * scale @ parts["A"]


ADAPTERS: dict[str, Adapter] = {"masked": Masked(), "scaled": Scaled(), "prune-at-merge": PruneAtMerge()}


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """What peft and `nn.Linear` start with: within 1 / sqrt(inputs)."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.rand(shape, generator=generator, device="cpu") * (2 * bound) - bound

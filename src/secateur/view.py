"""Layers and blocks as methods and refinements see them: wide copies of weights, and what their inputs were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from secateur.blocks import BlockCall
from secateur.errors import NumericalFailure
from secateur.statistics import Bundle, Gradient, S


@dataclass
class LayerView:
    """A layer as a method sees it.

    `weight` is (out, in) in fp32 (fp64 for fp64 models), free to be changed. `view[Gram]` gives a statistic of
    the layer's inputs, `gradient` is there for methods that ask for it. `warn` records what the user should know.
    """

    name: str
    weight: Tensor
    statistics: Bundle = field(default_factory=Bundle)
    gradient: Gradient | None = None
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, kind: type[S]) -> S:
        return self.statistics[kind]

    def warn(self, text: str) -> None:
        """Put `text` into the result, with the layer's name."""
        self.warnings.append(f"{self.name}: {text}")


@dataclass
class BlockView:
    """A block as a method sees it, while every batch waits there and nothing in it has been pruned.

    `layers` are those that a token reached, `targets` their sparsities: together they are the block's budget, which
    the method may share out in another way. `calls` has one entry a batch: `call.dense` is what the block gave,
    `call.run()` what it gives now. Inside `using(weights)`, one (out, in) tensor a layer, the block runs with these,
    and gradients reach them.
    """

    name: str
    layers: list[LayerView]
    targets: list[float]
    calls: list[BlockCall]
    using: Callable[[Sequence[Tensor]], AbstractContextManager[None]]

    @cached_property
    def energy(self) -> Tensor:
        """(width,) mean square of each channel of the dense output, over all tokens; fp64."""
        tokens = sum(len(call.dense) for call in self.calls)
        return torch.stack([call.dense.double().square().sum(0) for call in self.calls]).sum(0) / max(tokens, 1)

    def turns(self, sequences: int) -> Iterator[list[BlockCall]]:
        """Batches of `sequences` sequences together, or just over, in order and round and round without end."""
        while True:
            turn: list[BlockCall] = []
            for call in self.calls:
                turn.append(call)
                if sum(one.sequences for one in turn) >= sequences:
                    yield turn
                    turn = []
            if turn:
                yield turn

    def error_gradient(self, weights: Sequence[Tensor], calls: Sequence[BlockCall]) -> list[Tensor]:
        """How the block's error on some batches changes with the weights that it runs with.

        The error is sum_t sum_c (Y - Y')_tc^2 / energy_c, over tokens t and the channels c of the block's output.

        Args:
            weights: one (out, in) tensor a layer; they come back asking for no gradient.
            calls: some of `calls`.

        Returns:
            The derivative by each of `weights`; zero where no gradient reaches.

        Raises:
            NumericalFailure: it is not finite.
        """
        total = [torch.zeros_like(weight) for weight in weights]
        price = self.energy.where(self.energy > 0, 1.0).reciprocal()
        for call in calls:
            leaves = [weight.detach().requires_grad_() for weight in weights]
            with torch.enable_grad(), self.using(leaves):
                error = (call.run() - call.dense).to(leaves[0].dtype)
                loss = (error.square() * price.to(error.dtype)).sum()
                parts = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else []
            for whole, part in zip(total, parts, strict=False):
                if part is not None:
                    whole.add_(part)
        if not all(torch.isfinite(whole.sum()) for whole in total):
            raise NumericalFailure(f"the error of {self.name} has a gradient that is not finite")
        return total

    def warn(self, text: str) -> None:
        """Put `text` into the result, with the block's name."""
        self.layers[0].warnings.append(f"{self.name}: {text}")


def widened(weight: Tensor, *, copy: bool = False) -> Tensor:
    """(out, in) in fp32 or wider, contiguous; `copy` asks for memory of its own.

    >>> widened(torch.ones(1, 2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=copy)
    return wide.contiguous()

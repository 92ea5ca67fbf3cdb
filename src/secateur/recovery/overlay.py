"""What is trained, laid over a model: its modules read the weights in training instead of their own, for a while.

The model's own parameters are not touched until `merge_`. What is trained is kept in fp32 whatever the model's
dtype, and rounded once, when a module reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import NumericalFailure
from secateur.models.layers import is_experts
from secateur.models.taps import replaced_forward
from secateur.recovery.adapters import ADAPTERS
from secateur.recovery.subsets import Trainee


class Overlay:
    """`parts` holds the tensors to train by name: NAME for a whole parameter, NAME.A and NAME.B for an adapter."""

    def __init__(
        self, trainees: Sequence[Trainee], *, adapter: str = "masked", rank: int = 4, scale: float = 2.0, seed: int = 0
    ) -> None:
        self.trainees, self.kind, self.scale = tuple(trainees), ADAPTERS[adapter], scale
        self.parts: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(seed)
        for trainee in self.trainees:
            own = trainee.parameter.detach()
            if trainee.how == "adapter":
                started = self.kind.start(trainee.matrix.shape, rank, generator)
                fresh = {f"{trainee.name}.{part}": tensor for part, tensor in started.items()}
            else:
                fresh = {trainee.name: own.to(torch.float32, copy=True)}
            for name, tensor in fresh.items():
                self.parts[name] = nn.Parameter(tensor.to(own.device).contiguous())

    def counts(self) -> dict[str, int]:
        """Numbers that are trained, by subset. Of `kept`, only the kept ones."""
        found: dict[str, int] = {}
        for trainee in self.trainees:
            found[trainee.subset] = found.get(trainee.subset, 0) + self._count(trainee)
        return found

    def weight(self, trainee: Trainee) -> Tensor:
        """The parameter as the model reads it while training: its own shape and dtype, with gradient."""
        with torch.autocast(trainee.parameter.device.type, enabled=False):
            return self._in_fp32(trainee, merging=False).to(trainee.parameter.dtype)

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, the model computes with what is trained; its own parameters need no gradient."""
        readers: dict[nn.Module, dict[str, Callable[[], Tensor]]] = {}
        for trainee in self.trainees:
            for module, leaf in trainee.places:
                readers.setdefault(module, {})[leaf] = partial(self.weight, trainee)
        with ExitStack() as undo:
            for module, leaves in readers.items():
                undo.enter_context(_held(module, leaves) if is_experts(module) else shadowed(module, leaves))
            yield

    @torch.no_grad()
    def merge_(self) -> int:
        """Write what was trained into the model: computed in fp32, rounded once.

        Returns:
            How many zeros of the pruned layers were lost.

        Raises:
            NumericalFailure: what was trained is not finite; nothing was written.
        """
        lost = 0
        for name, part in self.parts.items():
            if not torch.isfinite(part.sum(dtype=torch.float64)):
                raise NumericalFailure(f"{name} is not finite after training; the model was left as it was")
        for trainee in self.trainees:
            own = trainee.parameter.detach()
            dropped = own == 0
            own.copy_(self._in_fp32(trainee, merging=True))
            lost += int((dropped & (own != 0)).sum()) if trainee.layers else 0
        return lost

    def _in_fp32(self, trainee: Trainee, *, merging: bool) -> Tensor:
        if trainee.how == "full":
            return self.parts[trainee.name]
        if trainee.how == "kept":
            return self._only_held(trainee, self.parts[trainee.name] * (trainee.parameter.detach() != 0))
        w = trainee.matrix
        compute = self.kind.merge if merging else self.kind.weight
        parts: dict[str, Tensor] = {part: self.parts[f"{trainee.name}.{part}"] for part in ("A", "B")}
        new = compute(w.to(torch.float32), w != 0, parts, self.scale)
        return self._only_held(trainee, new.mT if trainee.transposed else new)

    def _only_held(self, trainee: Trainee, new: Tensor) -> Tensor:
        """Experts beside the pruned ones stay what they are."""
        own = trainee.parameter.detach()
        if own.dim() < 3 or len(trainee.layers) == len(own):
            return new
        held = torch.zeros(len(own), 1, 1, dtype=torch.bool, device=own.device)
        held[[layer.expert for layer in trainee.layers if layer.expert is not None]] = True
        return torch.where(held, new, own.to(new.dtype))

    def _count(self, trainee: Trainee) -> int:
        if trainee.how == "kept":
            return sum(int(layer.weight.count_nonzero()) for layer in trainee.layers)
        share = 1.0
        if trainee.how == "adapter" and trainee.parameter.dim() == 3:
            share = len(trainee.layers) / len(trainee.parameter)
        own = [
            part
            for name, part in self.parts.items()
            if name in (trainee.name, f"{trainee.name}.A", f"{trainee.name}.B")
        ]
        return round(share * sum(part.numel() for part in own))


@contextmanager
def shadowed(module: nn.Module, leaves: dict[str, Callable[[], Tensor]]) -> Iterator[None]:
    """While open, reading one of `leaves` from the module calls its function; its parameters are where they were.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> with shadowed(layer, {"weight": lambda: torch.eye(2)}):
    ...     layer(torch.tensor([1.0, 2.0])).tolist(), len(list(layer.parameters()))
    ([1.0, 2.0], 1)
    """
    plain: Any = type(module)
    readers = {leaf: property(partial(_ask, read)) for leaf, read in leaves.items()}
    module.__class__ = type(plain.__name__, (plain,), {"__module__": plain.__module__, **readers})
    try:
        yield
    finally:
        module.__class__ = plain


def _ask(read: Callable[[], Tensor], module: nn.Module) -> Tensor:
    return read()


@contextmanager
def _held(module: nn.Module, leaves: dict[str, Callable[[], Tensor]]) -> Iterator[None]:
    """As `shadowed`, for modules that read a weight once for each expert: it is computed once a call."""
    now: dict[str, Tensor] = {}

    def read(leaf: str) -> Tensor:
        if leaf not in now:
            now[leaf] = leaves[leaf]()
        return now[leaf]

    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        now.clear()
        try:
            return plain(*args, **kwargs)
        finally:
            now.clear()

    with shadowed(module, {leaf: partial(read, leaf) for leaf in leaves}), replaced_forward(module, forward):
        yield

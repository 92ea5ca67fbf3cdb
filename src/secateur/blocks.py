"""A block that a batch waits at: what it gave as it was, and a way to run it again on its own inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from secateur.coroutines import Lane
from secateur.errors import RunFailure


class BlockCall:
    """One batch at a block, with the arguments that the model itself gave to the block.

    `dense` is what the block gave before anything in it changed: its hidden states (tokens, width) without padding,
    in the model's dtype. `sequences` is how many sequences the batch has.
    """

    def __init__(
        self,
        name: str,
        lane: Lane,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        select: Callable[[Tensor], Tensor],
    ) -> None:
        self.name, self._lane, self._forward, self._select = name, lane, forward, select
        self._args, self._kwargs = _detached(args), _detached(dict(kwargs))
        self.sequences = len(next(iter(lane.batch.values())))
        self.dense = self._hidden(output).detach()

    def run(self) -> Tensor:
        """The block's hidden states now, (tokens, width) as in `dense`.

        Gradients are kept if the caller's grad mode says so; they never reach the inputs. No pause happens, and no
        statistic is collected.
        """
        with self._lane.lent():
            return self._hidden(self._forward(*self._args, **self._kwargs))

    def _hidden(self, output: Any) -> Tensor:
        """The first floating tensor of the output that is shaped like the first one of the input."""
        inputs = _floating((self._args, self._kwargs))
        shape = next((x.shape for x in inputs), None)
        for tensor in _floating(output):
            if tensor.shape == shape:
                return self._select(tensor)
        raise RunFailure(
            f"the block {self.name} gives no hidden state: no floating tensor of its output has the shape of its input"
            f" {None if shape is None else tuple(shape)}"
        )


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floating(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floating(item)


def _detached(value: Any) -> Any:
    """The same arguments outside any graph that the model may keep."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(_detached(item) for item in value)
    if type(value) is dict:
        return {key: _detached(item) for key, item in value.items()}
    return value

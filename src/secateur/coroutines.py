"""Forward passes that can wait: one coroutine (greenlet) a batch.

Torch keeps its grad and autocast modes per thread, not per coroutine, so they are saved and restored at every
switch. A lane that is ended leaves the model's frames in good order, wherever it waits.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor


class Lane:
    """One batch on its way through the model: a coroutine with its own grad and autocast modes."""

    def __init__(self, batch: Mapping[str, Tensor], job: Callable[[], None]) -> None:
        self.batch = batch
        self.place: Any = None  # where it waits: a layer, a block's name, or None when it has ended
        self.x: Tensor
        self.rows: Tensor | None = None
        self._modes = _modes()
        self._coroutine = greenlet(job)
        self._coroutine.gr_context = contextvars.copy_context()
        self._coroutine.lane = self

    @staticmethod
    def current() -> Lane:
        """The lane whose code is running."""
        lane: Lane = getcurrent().lane
        return lane

    def resume(self) -> None:
        """Run on until the next pause or the end. The caller's modes are as before afterwards."""
        outside = _modes()
        self.place = None
        _restore(self._modes)
        try:
            self._coroutine.switch()
        finally:
            self._modes = _modes()
            _restore(outside)

    def pause(self, place: object, x: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Called inside: wait at `place` until resumed, showing x (..., in) and its token positions."""
        self.place, self.rows = place, rows
        if x is not None:
            self.x = x
        self._coroutine.parent.switch()
        if x is not None:
            del self.x

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While open, code outside runs under this waiting lane's autocast; whether gradients are kept is up to it."""
        outside = _modes()
        _restore((outside[0], *self._modes[1:]))
        try:
            yield
        finally:
            _restore(outside)

    def end(self) -> None:
        """Leave the model's frames, wherever the batch waits."""
        if self._coroutine and not self._coroutine.dead:
            outside = _modes()
            self._coroutine.throw()
            _restore(outside)


Modes = tuple[bool, tuple[tuple[str, bool, torch.dtype], ...], bool]


def _modes() -> Modes:
    """What torch keeps per thread and a coroutine must therefore carry along."""
    kinds = ("cpu", "cuda")
    autocast = tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)
    return torch.is_grad_enabled(), autocast, torch.is_autocast_cache_enabled()


def _restore(modes: Modes) -> None:
    grad, autocast, cache = modes
    torch.set_grad_enabled(grad)
    for kind, enabled, dtype in autocast:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(cache)

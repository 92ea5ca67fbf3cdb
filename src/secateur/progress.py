"""How long-running functions say how far they are: a callable that a command line may draw."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the work done so far, the whole, and what is being done."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


def silent(done: int, total: int, what: str) -> None:
    """The default: says nothing."""

"""Several processes on one piece of work, as `torchrun` starts them: who this one is, its share, and what all have.

Everything here does nothing in a process that is alone. `torchrun` tells a process who it is by the environment
variables RANK, WORLD_SIZE and LOCAL_RANK, and where the others are by MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from secateur.errors import UsageError

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # one process may do for hours what the others wait for


def rank() -> int:
    """The number of this process, from 0; 0 too if it is alone."""
    return _number("RANK", 0)


def world() -> int:
    """How many processes there are.

    >>> world()
    1
    """
    return _number("WORLD_SIZE", 1)


def local_device(device: str | None) -> str | None:
    """A device that every process would take, made the own one of each: cuda becomes cuda:LOCAL_RANK.

    >>> local_device("cuda"), local_device("cpu"), local_device(None)
    ('cuda', 'cpu', None)
    """
    return f"{device}:{_number('LOCAL_RANK', 0)}" if world() > 1 and device in ("cuda", "xpu") else device


def share(items: Sequence[T]) -> list[T]:
    """What this process does of them: every world()-th.

    >>> share([1, 2, 3])
    [1, 2, 3]
    """
    return list(items[rank() :: world()])


@contextmanager
def together() -> Iterator[None]:
    """Inside, `gather` and `wait` reach all processes (through gloo, so on any device).

    Raises:
        UsageError: the environment names several processes and not where they meet.
    """
    from torch import distributed

    if world() == 1 or distributed.is_initialized():
        yield
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UsageError(f"WORLD_SIZE is {world()}, but {' and '.join(missing)} is not set: start with torchrun.")
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def gather(found: Sequence[T]) -> list[T]:
    """The shares of all processes put together again in the order of the whole; the same in every process.

    >>> gather(share("abc"))
    ['a', 'b', 'c']
    """
    if world() == 1:
        return list(found)
    from torch import distributed

    shares: list[Any] = [None] * world()
    distributed.all_gather_object(shares, list(found))
    longest = max(map(len, shares))
    return [one[place] for place in range(longest) for one in shares if place < len(one)]


def agreed(value: T) -> T:
    """What process 0 has, in all of them.

    >>> agreed("mine")
    'mine'
    """
    if world() == 1:
        return value
    from torch import distributed

    told: list[Any] = [value]
    distributed.broadcast_object_list(told)
    found: T = told[0]
    return found


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        from torch import distributed

        distributed.barrier()


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if value and not value.isdigit():
        raise UsageError(f"The environment variable {name} must be a whole number; it is '{value}'.")
    return int(value) if value else default

"""Peak memory of a piece of work: what the operating system and the accelerator saw."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Filled when the `with` block ends. Bytes."""

    host: int = 0  # highest resident set; of the whole process life where the system cannot reset it
    device: int = 0  # highest allocation on CUDA, 0 without

    @property
    def bytes(self) -> int:
        """What to report: the device's peak where one is used, the host's otherwise."""
        return self.device or self.host


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak while the block runs.

    >>> with peak_memory(torch.device("cpu")) as peak:
    ...     _ = torch.zeros(1000)
    >>> peak.bytes > 0
    True
    """
    peak = Peak()
    with contextlib.suppress(OSError):  # 5 resets the high-water mark of this process; not every kernel allows it
        _CLEAR.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield peak
    finally:
        peak.host = _high_water()
        if device.type == "cuda":
            peak.device = torch.cuda.max_memory_allocated(device)


def free_memory(device: torch.device) -> int:
    """Bytes that a new tensor on this device may still take.

    >>> free_memory(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def give_back() -> None:
    """Return freed heap pages to the system, where the C library knows how (glibc); about a millisecond.

    >>> give_back()
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or none to ask
        return None
    return trim


def _high_water() -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

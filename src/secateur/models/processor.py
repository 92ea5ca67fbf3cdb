"""What the processor multiplies itself, and what it only imitates."""

from __future__ import annotations

import platform

import torch

WITHOUT_BFLOAT16 = ("DEFAULT", "AVX2")  # what PyTorch calls x86 processors older than AVX-512


def imitates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products in this dtype are made up of conversions there, many times slower than in float32.

    Known for 16-bit floats on x86 processors without AVX-512 (5 to 300 times on one: docs/LOG.md); False elsewhere.

    >>> imitates(torch.float32, torch.device("cpu"))
    False
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.cpu.get_cpu_capability() in WITHOUT_BFLOAT16

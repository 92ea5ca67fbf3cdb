"""A processor that only imitates a dtype is known, so that its user can be told."""

import platform

import pytest
import torch

from secateur.models.processor import imitates

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("machine", "capability", "dtype", "device", "expected"),
    [
        ("x86_64", "AVX2", torch.bfloat16, CPU, True),
        ("AMD64", "DEFAULT", torch.float16, CPU, True),
        ("x86_64", "AVX512", torch.bfloat16, CPU, False),
        ("x86_64", "AVX2", torch.float32, CPU, False),
        ("x86_64", "AVX2", torch.bfloat16, CUDA, False),
        ("aarch64", "DEFAULT", torch.bfloat16, CPU, False),
    ],
)
def test_what_is_imitated(monkeypatch, machine, capability, dtype, device, expected):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert imitates(dtype, device) is expected

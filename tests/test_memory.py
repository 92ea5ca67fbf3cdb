"""Peak memory sees what came and went."""

from __future__ import annotations

import pytest
import torch

from secateur import memory
from secateur.memory import Peak, peak_memory

SIZE = 200 * 2**20


def test_the_peak_counts_what_is_gone_at_the_end() -> None:
    with peak_memory(torch.device("cpu")) as before:
        pass
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(SIZE // 4)
    assert peak.bytes >= before.bytes + SIZE * 0.9
    assert peak.device == 0


@pytest.mark.skipif(not memory._CLEAR.exists(), reason="this system cannot reset the high-water mark")
def test_every_measurement_starts_afresh() -> None:
    with peak_memory(torch.device("cpu")) as high:
        torch.ones(SIZE // 4)
    with peak_memory(torch.device("cpu")) as low:
        pass
    assert low.bytes < high.bytes - SIZE * 0.8


def test_an_error_is_measured_too() -> None:
    seen: list[Peak] = []
    with pytest.raises(ZeroDivisionError), peak_memory(torch.device("cpu")) as peak:
        seen.append(peak)
        _ = 1 / 0
    assert seen[0].bytes > 0


def test_without_a_proc_filesystem(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such")
    with peak_memory(torch.device("cpu")) as peak:
        pass
    assert 10 * 2**20 < peak.bytes < 2**40


def test_an_accelerator_counts_before_the_host() -> None:
    assert Peak(host=5).bytes == 5
    assert Peak(host=5, device=3).bytes == 3

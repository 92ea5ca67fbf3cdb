"""Who a process is, by torchrun's environment variables; the rest is tested with two processes in a study."""

from __future__ import annotations

import pytest

from secateur import parallel
from secateur.errors import UsageError


def test_alone_everything_is_ones_own(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with parallel.together():
        parallel.wait()
        assert (parallel.rank(), parallel.world()) == (0, 1)
        assert parallel.gather(parallel.share([3, 1, 2])) == [3, 1, 2] and parallel.agreed("x") == "x"


def test_shares_are_disjoint_and_whole(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(parallel.share(range(8)))
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert parallel.local_device("cuda") == "cuda:2" and parallel.local_device("cuda:0") == "cuda:0"


def test_an_environment_that_cannot_be_is_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE must be a whole number; it is 'two'"):
        parallel.world()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="MASTER_ADDR"), parallel.together():
        pass

"""What a walk shows of batches that take different ways, and what it counts and leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import ids, make
from torch import Tensor, nn

from secateur.inputs import batches_of
from secateur.methods.wanda import Wanda
from secateur.models.layers import find
from secateur.pruning import prune
from secateur.statistics import SecondMoment
from secateur.walk import Arrival, Walked, walk

SCHEDULES = ["sequential", "block", "oneshot"]


class Broken(RuntimeError):
    pass


def walk_through(
    model: nn.Module,
    data: Tensor,
    collector: Callable[[], SecondMoment],
    visit: Callable[[list[Arrival]], None],
    schedule: str,
    steps: list[tuple[int, int]] | None = None,
    batch_size: int = 2,
) -> Walked:
    found, noted = find(model), [] if steps is None else steps
    return walk(
        model, batches_of(model, data, batch_size), found.layers, blocks=found.blocks, collector=collector,
        visit=visit, schedule=schedule, progress=lambda done, total, what: noted.append((done, total)),
    )  # fmt: skip


class Branches(nn.Module):
    """Three layers, defined last to first; odd sequences skip the second, or swap it with the third."""

    def __init__(self, swap: bool = False) -> None:
        super().__init__()
        self.swap = swap
        self.third, self.second, self.first = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, odd: bool) -> Tensor:
        x = self.first(x)
        if odd and self.swap:
            y: Tensor = self.second(self.third(x))
            return y
        if not odd:
            x = self.second(x)
        z: Tensor = self.third(x)
        return z


class Branching(nn.Module):
    def __init__(self, swap: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Branches(swap), Branches(swap)])
        self.embedding = nn.Embedding(64, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, bool(input_ids[0, 0] % 2))
        return x


def odd_and_even() -> Tensor:
    x = ids(6, 5)
    x[:, 0] = torch.tensor([4, 5, 7, 6, 9, 11])  # two even, four odd
    return x


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batches_that_skip_a_layer_wait_for_the_others(schedule: str) -> None:
    """In the order of the calls, whatever the order of definition."""
    visits: list[tuple[str, int]] = []

    def visit(arrivals: list[Arrival]) -> None:
        visits.extend((arrival.layer.name, arrival.seen.tokens) for arrival in arrivals)

    report = walk_through(Branching(), odd_and_even(), SecondMoment, visit, schedule, batch_size=1)
    leaves = [("first", 30), ("second", 10), ("third", 30)]
    assert visits == [(f"layers.{i}.{leaf}", n) for i in (0, 1) for leaf, n in leaves]
    assert not report.late and not report.unvisited and not report.repeated


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_calls_after_the_visit_are_counted(schedule: str) -> None:
    """No order fits all batches: the sequential schedule cannot wait for everyone, and says so."""
    model = Branching(swap=True)
    result = prune(model, Wanda(), odd_and_even(), sparsity=0.5, schedule=schedule)
    tokens = [layer.tokens for layer in result.layers if layer.name.startswith("layers.0")]  # third, second, first
    if schedule != "sequential":
        assert tokens == [30, 30, 30] and not result.warnings
        return
    assert tokens == [30, 10, 30]
    assert [text for text in result.warnings if "layers.0" in text] == [
        "layers.0.second: 4 calls came after it had been pruned and were not counted"
    ]


class Skips(nn.Module):
    """Two layers that read one tensor; odd sequences skip the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, odd: bool) -> Tensor:
        y: Tensor = self.first(x) if odd else self.first(x) + self.second(x)
        return y


def test_a_shared_input_counts_only_for_those_who_read_it() -> None:
    tokens: dict[str, int] = {}

    def visit(arrivals: list[Arrival]) -> None:
        tokens.update({arrival.layer.name: arrival.seen.tokens for arrival in arrivals})

    model = Branching()
    model.layers = nn.ModuleList([Skips()])
    walk_through(model, odd_and_even(), SecondMoment, visit, "sequential", batch_size=1)
    assert tokens == {"layers.0.first": 30, "layers.0.second": 10}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", ["llama", "albert"])
def test_work_is_counted_to_the_end(family: str, schedule: str) -> None:
    steps: list[tuple[int, int]] = []
    report = walk_through(make(family), ids(), SecondMoment, lambda arrivals: None, schedule, steps)
    assert len({total for _, total in steps}) == 1
    assert steps[-2] == steps[-1]  # full before the last call says so
    assert not report.late  # calls of a weight with several places are expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_statistics_and_solvers_know_no_autocast(schedule: str) -> None:
    seen: list[bool] = []

    class Notes(SecondMoment):
        def update(self, x: Tensor) -> None:
            seen.append(torch.is_autocast_enabled("cpu") or x.requires_grad)
            super().update(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        walk_through(
            make("llama"), ids(), Notes, lambda arrivals: seen.append(torch.is_autocast_enabled("cpu")), schedule
        )
    assert seen and not any(seen)


@pytest.mark.parametrize("schedule", ["sequential", "block"])
def test_batches_end_even_when_the_error_is_kept(schedule: str) -> None:
    """A traceback holds the frames of the walk; the model's own frames must be left all the same."""
    model, left = make("llama"), []
    plain = model.model.forward

    def notes(*args: object, **kwargs: object) -> object:
        try:
            return plain(*args, **kwargs)
        finally:
            left.append(True)

    def visit(arrivals: list[Arrival]) -> None:
        raise Broken

    model.model.forward = notes
    with pytest.raises(Broken) as kept:
        walk_through(model, ids(), SecondMoment, visit, schedule)
    assert kept.tb and len(left) == 1 + 3  # the look ahead, and every batch

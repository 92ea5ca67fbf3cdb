"""What a walk shows of batches that take different ways, and what it counts and leaves behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from families import ids, make
from torch import Tensor, nn

from secateur.errors import RunFailure
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
    tokens = [(layer.name, layer.tokens) for layer in result.layers if layer.block == "layers.0"]
    late = schedule == "sequential"  # listed in the order of definition, whatever that of the calls
    assert tokens == [("layers.0.third", 30), ("layers.0.second", 10 if late else 30), ("layers.0.first", 30)]
    if not late:
        assert not result.warnings
        return
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


@pytest.mark.parametrize("schedule", ["block", "oneshot"])
def test_an_input_that_is_shared_at_times_is_refused(schedule: str) -> None:
    """Statistics taken in passing are shared as the look ahead showed; a model that goes on otherwise is caught."""

    class Copies(Skips):
        def forward(self, x: Tensor, odd: bool) -> Tensor:
            y: Tensor = self.first(x) + self.second(x * 2 if odd else x)
            return y

    model = Branching()
    model.layers = nn.ModuleList([Copies()])
    with pytest.raises(RunFailure, match=r"0\.second read the input of layers\.0\.first at first, and another"):
        walk_through(model, odd_and_even(), SecondMoment, lambda arrivals: None, schedule, batch_size=1)
    report = walk_through(model, odd_and_even(), SecondMoment, lambda arrivals: None, "sequential", batch_size=1)
    assert not report.unvisited


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batches_that_skip_a_block_wait_for_the_others(schedule: str) -> None:
    class Jumps(Branching):
        def forward(self, input_ids: Tensor) -> Tensor:
            x: Tensor = self.embedding(input_ids)
            return self.layers[1](x if input_ids[0, 0] % 2 else self.layers[0](x, False), False)

    visits: list[tuple[str, int]] = []

    def visit(arrivals: list[Arrival]) -> None:
        visits.extend((arrival.layer.block, arrival.seen.tokens) for arrival in arrivals)

    walk_through(Jumps(), odd_and_even(), SecondMoment, visit, schedule, batch_size=1)
    assert visits == [("layers.0", 10)] * 3 + [("layers.1", 30)] * 3


@pytest.mark.parametrize(("schedule", "most"), [("sequential", 2), ("block", 4)])
def test_statistics_are_dropped_once_they_have_been_used(schedule: str, most: int) -> None:
    """Sequential: the latest, and the one before that the next layer may share. Block: those of one block."""
    alive: weakref.WeakSet[SecondMoment] = weakref.WeakSet()
    counts: list[int] = []

    class Counted(SecondMoment):
        def __init__(self) -> None:
            super().__init__()
            alive.add(self)

    walk_through(make("llama"), ids(), Counted, lambda arrivals: counts.append(len(alive)), schedule)
    assert 0 < max(counts) <= most
    assert not alive


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", ["llama", "albert"])
def test_work_is_counted_to_the_end(family: str, schedule: str) -> None:
    steps: list[tuple[int, int]] = []
    report = walk_through(make(family), ids(), SecondMoment, lambda arrivals: None, schedule, steps)
    assert len({total for _, total in steps}) == 1
    assert steps[-2] == steps[-1]  # full before the last call says so
    assert not report.late  # calls of a weight with several places are expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_statistics_and_solvers_know_neither_autocast_nor_gradients(schedule: str) -> None:
    seen: list[bool] = []

    class Notes(SecondMoment):
        def update(self, x: Tensor) -> None:
            seen.append(torch.is_autocast_enabled("cpu") or x.requires_grad)
            super().update(x)

    class Keeps(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                y: Tensor = self.inner(x)
                return y

    model = make("llama")
    model.model.layers[0].mlp = Keeps(model.model.layers[0].mlp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        walk_through(model, ids(), Notes, lambda arrivals: seen.append(torch.is_autocast_enabled("cpu")), schedule)
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


class Shuffles(nn.Module):
    """A layer that gets some of the tokens, in no layout that a mask has; as experts in a ModuleList do."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.part = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.whole(x)
        y[0, :3] = self.part(y[0, :3])
        return y


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_padding_that_cannot_be_told_apart_is_said(schedule: str) -> None:
    class Model(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Shuffles()])

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            y: Tensor = self.layers[0](self.embedding(input_ids))
            return y

    full = torch.ones(2, 5, dtype=torch.long)
    padded = full.clone()
    padded[1, 2:] = 0
    for mask, said in ((full, 0), (padded, 1)):
        result = prune(
            Model(), Wanda(), [{"input_ids": ids(2, 5), "attention_mask": mask}], sparsity=0.5, schedule=schedule
        )
        assert len(result.warnings) == said
        assert all("layers.0.part: padding counted" in text for text in result.warnings)
        assert {layer.name: layer.tokens for layer in result.layers} == {
            "layers.0.whole": int(mask.sum()),
            "layers.0.part": 3,
        }

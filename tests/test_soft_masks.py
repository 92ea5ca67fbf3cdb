"""Shares that are learnt under a fixed budget, and the slope that is lent to a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.errors import NumericalFailure
from secateur.soft_masks import Shares, ranks, slope


def shares_of(shapes: list[tuple[int, int]], targets: list[float], per_row: bool) -> Shares:
    return Shares([torch.ones(shape) for shape in shapes], targets, per_row=per_row)


def test_ranks_are_places_in_the_row() -> None:
    score = torch.tensor([[2.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert ranks(score).tolist() == [[3, 0, 2, 1], [0, 1, 2, 3]]
    with pytest.raises(NumericalFailure, match=r"1 of 8 scores of shape \(2, 4\) are not finite"):
        ranks(score.where(score < 2, float("inf")))


def soft_keep(share: float, columns: int, width: float, points: int = 4000) -> Tensor:
    """(columns,) how much of every rank stays on average, when candidate shares are spread evenly over the window."""
    width = max(min(width, 2 * share, 2 - 2 * share), 1 / columns)
    low = share - width / 2
    candidates = low + width * (torch.arange(points, dtype=torch.float64) + 0.5) / points
    rank = torch.arange(columns, dtype=torch.float64)
    return (rank[None] + 1 - candidates[:, None] * columns).clamp(0, 1).mean(0)


@pytest.mark.parametrize("width", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.31, 0.5, 0.734])
def test_slope_is_the_derivative_of_the_soft_mask(share: float, width: float) -> None:
    columns, step = 30, 1e-3
    pull = torch.randn(columns, dtype=torch.float64)
    change = soft_keep(share + step, columns, width) - soft_keep(share - step, columns, width)
    if 2 * min(share, 1 - share) > width + 1e-2:  # the window keeps its width
        expected = float(pull @ change) / (2 * step)
        ours = slope(pull[None], torch.arange(columns)[None], torch.tensor([share], dtype=torch.float64), width)
        assert float(ours) == pytest.approx(expected, rel=0.02, abs=0.3)
    soft = soft_keep(share, columns, width)
    assert (soft.diff() >= 0).all() and float(soft.mean()) == pytest.approx(1 - share, abs=1e-3)


def test_slope_of_one_share_for_all_rows_is_the_sum() -> None:
    pull, rank = torch.randn(5, 12), ranks(torch.rand(5, 12))
    one, each = torch.tensor([0.4]), torch.full((5,), 0.4)
    torch.testing.assert_close(slope(pull, rank, one, 0.3)[0], slope(pull, rank, each, 0.3).sum())


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.98, 0.999])
def test_slope_of_a_constant_pull_is_the_number_of_weights(share: float) -> None:
    inside = slope(torch.ones(1, 40), torch.arange(40)[None], torch.tensor([share]), 0.1)
    assert float(inside) == pytest.approx(-40, rel=0.03) or share in (0.001, 0.999)
    assert -40.01 <= float(inside) <= 0


@pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("per_row", [True, False])
def test_the_start_is_the_target(target: float, per_row: bool) -> None:
    shares = shares_of([(6, 40), (3, 20)], [target, target], per_row)
    assert all(torch.allclose(a, torch.full_like(a, target), atol=2e-3) for a in shares.now())
    dropped = [int(c.expand(rows).sum()) for c, rows in zip(shares.counts(), (6, 3), strict=True)]
    assert abs(sum(dropped) - round(300 * target)) <= (0 if per_row else 1.5)


@pytest.mark.parametrize("wanted", [0.05, 0.2, 0.8, 0.95])
def test_every_share_can_be_reached(wanted: float) -> None:
    shares = shares_of([(1, 100), (1, 900)], [0.5, 0.5], per_row=False)
    for _ in range(400):
        shares.theta += 0.3 * torch.tensor([1.0, 0.0]) * (wanted - shares.now()[0])
    assert float(shares.now()[0]) == pytest.approx(wanted, abs=0.01)
    assert sum(int(c) * r for c, r in zip(shares.counts(), (1, 1), strict=True)) == 500


def test_the_released_parametrisation_cannot_go_far() -> None:
    """softmax(sigmoid(theta)) over candidates 1, 0.99, ..., 0: why there is another one here."""
    candidates = torch.arange(100, -1, -1, dtype=torch.float64) / 100
    reached = [
        float(torch.softmax(torch.sigmoid(100.0 * torch.sign(candidates - cut) * side), 0) @ candidates)
        for cut in torch.linspace(-0.005, 1.005, 102).tolist()
        for side in (1, -1)
    ]
    assert min(reached) == pytest.approx(0.376, abs=1e-3) and max(reached) == pytest.approx(0.624, abs=1e-3)
    assert float(torch.softmax(torch.sigmoid(torch.zeros(101)), 0) @ candidates.float()) == pytest.approx(0.5)


@pytest.mark.parametrize("per_row", [True, False])
def test_gradient_is_that_of_the_shares_under_the_budget(per_row: bool) -> None:
    shares = shares_of([(3, 10), (2, 25)], [0.3, 0.7], per_row)
    shares.theta += torch.randn_like(shares.theta)
    price = [torch.randn_like(a) for a in shares.now()]

    def loss() -> float:
        return sum(float(p @ a) for p, a in zip(price, shares.now(), strict=True))

    ours, expected = shares.gradient(price), []
    for u in range(len(shares.theta)):
        values = []
        for step in (1e-5, -1e-5):
            shares.theta[u] += step
            values.append(loss())
            shares.theta[u] -= step
        expected.append((values[0] - values[1]) / 2e-5)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert float(shares.size @ torch.cat(shares.now())) == pytest.approx(shares.budget, abs=1e-8)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("target", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("per_row", [True, False])
def test_counts_meet_the_budget(per_row: bool, target: float, spread: float) -> None:
    shapes = [(7, 33), (16, 8), (5, 61)]
    shares = shares_of(shapes, [target] * 3, per_row)
    shares.theta += spread * torch.randn_like(shares.theta)
    counts = shares.counts()
    total = 0
    for count, (rows, columns) in zip(counts, shapes, strict=True):
        assert int(count.min()) >= 0 and int(count.max()) <= columns
        total += int(count.expand(rows).sum())
    assert abs(total - round(target * sum(r * c for r, c in shapes))) <= (0 if per_row else 2.5)


def test_a_layer_that_is_to_stay_dense_stays_dense() -> None:
    shares = shares_of([(2, 8), (2, 8)], [0.0, 0.5], per_row=True)
    shares.theta += torch.tensor([50.0, 1.0, 0.0, 0.0])
    assert [count.sum() for count in shares.counts()] == [0, 8]
    assert torch.isfinite(shares.gradient([torch.ones(2), torch.ones(2)])).all()
    assert [c.tolist() for c in shares_of([(2, 8)], [0.0], per_row=True).counts()] == [[0, 0]]

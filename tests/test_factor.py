"""The factor of an inverse: the same whatever way it is computed."""

from __future__ import annotations

import pytest
import torch

from secateur.factor import inverse_factor


@pytest.mark.parametrize("size", [1, 2, 191, 192, 193, 401])
def test_small_and_large_matrices(size: int) -> None:
    x = torch.randn(2 * size, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    gram = x.T @ x / len(x)
    before = gram.clone()
    factor = inverse_factor(gram, damping=0.02)
    damped = gram + 0.02 * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper.diagonal() > 0).all() and not factor.dead.any() and not factor.note
    torch.testing.assert_close(factor.upper.T @ factor.upper @ damped, torch.eye(size, dtype=gram.dtype))
    assert torch.equal(gram, before)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_dead_inputs_take_the_mean_of_the_others_at_any_scale(scale: float) -> None:
    gram = torch.diag(torch.tensor([2.0, 0.0, 4.0, 0.0], dtype=torch.float64)) * scale
    factor = inverse_factor(gram, damping=0.5)
    assert factor.dead.tolist() == [False, True, False, True]
    expected = (torch.tensor([3.5, 4.5, 5.5, 4.5], dtype=torch.float64) * scale).rsqrt()
    torch.testing.assert_close(factor.upper, torch.diag(expected))


def test_inputs_that_were_all_dead() -> None:
    factor = inverse_factor(torch.zeros(3, 3), damping=0.0)
    assert factor.dead.all() and torch.equal(factor.upper, torch.eye(3))


@pytest.mark.parametrize(("retries", "lowest", "damping"), [(3, -0.5, "1"), (3, -5.0, "10"), (4, -50.0, "100")])
def test_ten_times_the_damping_each_time(retries: int, lowest: float, damping: str) -> None:
    gram = torch.diag(torch.tensor([4.0 - lowest, lowest, 0.0 + 5.0 - 2.0]))  # the mean is 7 / 3
    factor = inverse_factor(gram, damping=0.01, retries=retries)
    assert factor.note == f"not positive definite; damping raised from 0.01 to {damping}"
    assert torch.isfinite(factor.upper).all()
    expected = (gram.diagonal().double() + float(damping) * gram.diagonal().double().mean()).rsqrt()
    torch.testing.assert_close(factor.upper.diagonal().double(), expected, rtol=1e-5, atol=0.0)

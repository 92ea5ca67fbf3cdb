"""Divergences against brute force in Python floats, their bounds, and rows with ruled-out tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from secateur.divergence import divergences, entropy, js_divergence, kl_divergence
from secateur.errors import UsageError

INF = math.inf
LN2 = math.log(2)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


def brute_kl(p: list[float], q: list[float]) -> float:
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return INF
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def brute_js(p: list[float], q: list[float]) -> float:
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return brute_kl(p, m) / 2 + brute_kl(q, m) / 2


def logits(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


ROWS = [
    *logits(3, 5).tolist(),
    [0.0, -INF, 1.0, -INF, 2.0],
    [-INF, 0.5, -INF, -INF, 1.0],
    [40.0, 0, 0, -40, 1],
]


@pytest.mark.parametrize("first, second", [*itertools.product(range(len(ROWS)), repeat=2)])
def test_agrees_with_brute_force(first: int, second: int) -> None:
    p, q = softmax(ROWS[first]), softmax(ROWS[second])
    a, b = (torch.tensor(ROWS[i], dtype=torch.float64) for i in (first, second))
    assert kl_divergence(a, b).item() == pytest.approx(brute_kl(p, q), rel=1e-9, abs=1e-13)
    assert js_divergence(a, b).item() == pytest.approx(brute_js(p, q), rel=1e-9, abs=1e-13)
    assert entropy(a).item() == pytest.approx(-sum(x * math.log(x) for x in p if x > 0), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_and_shape_of_the_result(dtype: torch.dtype) -> None:
    a, b = logits(2, 3, 50, seed=1, dtype=dtype), logits(2, 3, 50, seed=2, dtype=dtype)
    for result in (kl_divergence(a, b), js_divergence(a, b), entropy(a)):
        assert result.shape == (2, 3)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = js_divergence(a.double(), b.double())
    torch.testing.assert_close(js_divergence(a, b).double(), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        kl_divergence(a, b).double(), kl_divergence(a.double(), b.double()), rtol=1e-5, atol=1e-6
    )


def test_mixed_dtypes_take_the_wider() -> None:
    a, b = logits(4, 7, seed=1), logits(4, 7, seed=2, dtype=torch.bfloat16)
    assert js_divergence(a, b).dtype == kl_divergence(b, a).dtype == torch.float64


def test_js_is_symmetric_and_bounded_by_ln_2() -> None:
    a, b = (
        logits(200, 30, seed=3, scale=30, dtype=torch.float32),
        logits(200, 30, seed=4, scale=30, dtype=torch.float32),
    )
    forth, back = js_divergence(a, b), js_divergence(b, a)
    assert torch.equal(forth, back)
    assert 0.3 < forth.max() <= LN2 and forth.min() >= 0
    assert js_divergence(torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0])).item() == pytest.approx(LN2)


def test_same_predictions_are_exactly_zero_even_over_a_large_vocabulary() -> None:
    a = logits(8, 50_000, seed=5, dtype=torch.float32)
    a[:, ::3] = -INF
    assert js_divergence(a, a).eq(0).all() and kl_divergence(a, a).eq(0).all()


def test_small_differences_are_not_lost_in_fp32() -> None:
    a = logits(8, 50_000, seed=6)
    b = a + logits(8, 50_000, seed=7, scale=0.01)
    exact = js_divergence(a, b)  # about 1e-5 nats
    torch.testing.assert_close(js_divergence(a.float(), b.float()).double(), exact, rtol=0.01, atol=0)


def test_shift_of_the_logits_changes_nothing() -> None:
    a, b = logits(9, 40, seed=8), logits(9, 40, seed=9)
    torch.testing.assert_close(js_divergence(a + 100, b - 50), js_divergence(a, b))
    torch.testing.assert_close(kl_divergence(a + 100, b - 50), kl_divergence(a, b))
    torch.testing.assert_close(entropy(a - 77), entropy(a))


def test_the_last_axis_is_the_vocabulary_not_the_positions() -> None:
    """Khanal and Capone's code softmaxes over the positions: another number (specs/unstructured.md 7.2)."""
    a, b = logits(6, 11, seed=10), logits(6, 11, seed=11)
    over_positions = js_divergence(a.T, b.T).mean().item()
    ours = js_divergence(a, b).mean().item()
    want = sum(brute_js(softmax(p), softmax(q)) for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 6
    assert ours == pytest.approx(want) and abs(ours - over_positions) > 1e-3


@pytest.mark.parametrize("function", [kl_divergence, js_divergence])
def test_gradients_agree_with_finite_differences(function) -> None:
    a, b = logits(3, 6, seed=12).requires_grad_(), logits(3, 6, seed=13).requires_grad_()
    assert torch.autograd.gradcheck(function, (a, b))


def test_gradients_are_finite_where_both_rule_a_token_out() -> None:
    a = torch.tensor([0.0, 1.0, -INF], requires_grad=True)
    b = torch.tensor([1.0, 0.0, -INF], requires_grad=True)
    (js_divergence(a, b) + kl_divergence(a, b) + entropy(a)).backward()
    assert a.grad is not None and b.grad is not None
    assert a.grad.isfinite().all() and b.grad.isfinite().all() and a.grad.abs().sum() > 0


def test_nan_is_passed_on_not_hidden() -> None:
    a, b = torch.tensor([0.0, math.nan]), torch.zeros(2)
    for result in (
        kl_divergence(a, b),
        kl_divergence(b, a),
        js_divergence(a, b),
        js_divergence(b, a),
        entropy(a),
    ):
        assert result.isnan()


def test_wrong_shapes_and_dtypes_are_named() -> None:
    with pytest.raises(UsageError, match=r"p_logits \(2, 5\) and q_logits \(2, 6\)"):
        js_divergence(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(UsageError, match=r"p_logits \(5,\) and q_logits \(2, 5\)"):
        kl_divergence(torch.zeros(5), torch.zeros(2, 5))  # no silent broadcasting
    with pytest.raises(UsageError, match=r"floating point.*int64 \(2, 5\)"):
        entropy(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(UsageError, match=r"q_logits|p_logits"):
        js_divergence(torch.zeros(2, 0), torch.zeros(2, 0))


@pytest.mark.parametrize("first, second", [*itertools.product(range(len(ROWS)), repeat=2)])
def test_both_at_once_agree_with_brute_force(first: int, second: int) -> None:
    p, q = softmax(ROWS[first]), softmax(ROWS[second])
    log_p, log_q = (torch.tensor(ROWS[i], dtype=torch.float64).log_softmax(-1) for i in (first, second))
    js, kl = divergences(log_p, log_q)
    assert kl.item() == pytest.approx(brute_kl(p, q), rel=1e-9, abs=1e-13)
    assert js.item() == pytest.approx(brute_js(p, q), rel=1e-9, abs=1e-13)


def test_both_at_once_equal_the_single_ones_in_fp32() -> None:
    a, b = logits(50, 1000, dtype=torch.float32), logits(50, 1000, seed=1, dtype=torch.float32)
    b[25:] = a[25:] + 0.1 * b[25:]
    js, kl = divergences(a.log_softmax(-1), b.log_softmax(-1))
    torch.testing.assert_close(js, js_divergence(a, b), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kl, kl_divergence(a, b), rtol=1e-5, atol=1e-7)
    same = divergences(a.log_softmax(-1), a.log_softmax(-1))
    assert not same[0].any() and not same[1].any()

"""Running sums: whatever the cut into batches, the sum is that of all tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.factor import inverse_factor
from secateur.statistics import Bundle, Gram, SecondMoment, Statistic

KINDS = [SecondMoment, Gram]
X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fed(kind: type[Statistic], *parts: Tensor) -> Statistic:
    statistic = kind()
    for part in parts:
        statistic.update(part)
    return statistic


def expected(kind: type[Statistic], x: Tensor) -> Tensor:
    wide = x.double()
    return wide.T @ wide / len(x) if kind is Gram else wide.square().mean(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7, 0, 43], [25, 25]])
def test_any_split_gives_the_definition(kind: type[Statistic], sizes: list[int]) -> None:
    whole = fed(kind, *X.split(sizes))
    assert whole.tokens == 50
    assert whole.mean.dtype == torch.float64
    torch.testing.assert_close(whole.mean, expected(kind, X))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_as_if_seen_at_once(kind: type[Statistic]) -> None:
    left, right = fed(kind, X[:20]), fed(kind, X[20:])
    before = right.mean.clone()
    for merged in (kind(), left):
        if merged.tokens == 0:
            merged.merge(left)
        merged.merge(right)
        merged.merge(kind())
        assert merged.tokens == 50
        torch.testing.assert_close(merged.mean, expected(kind, X))
    merged.update(X)
    assert torch.equal(right.mean, before)  # what was merged is left alone


@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_an_empty_one_shares_no_memory(kind: type[Statistic]) -> None:
    source, target = fed(kind, X), kind()
    before = source.mean.clone()
    target.merge(source)
    target.update(X * 3)
    assert torch.equal(source.mean, before)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_wide(kind: type[Statistic]) -> None:
    """In bf16 a sum of ones would stop at 256."""
    ones = torch.ones(1000, 2, dtype=torch.bfloat16)
    assert torch.equal(fed(kind, *ones.split(100)).mean.double(), expected(kind, ones))
    x = X.bfloat16()
    torch.testing.assert_close(fed(kind, *x.split(9)).mean.double(), expected(kind, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_token(kind: type[Statistic]) -> None:
    statistic = fed(kind, X[:0])
    assert statistic.tokens == 0
    with pytest.raises(ValueError, match="no token"):
        _ = statistic.mean


def test_gram_is_exactly_symmetric() -> None:
    gram = fed(Gram, *X.float().split(13))
    assert gram.mean.dtype == torch.float32
    assert torch.equal(gram.mean, gram.mean.T)


def test_gram_of_a_view() -> None:
    torch.testing.assert_close(fed(Gram, X[::2, ::3]).mean, expected(Gram, X[::2, ::3]))


def test_a_factor_does_not_outlive_its_matrix() -> None:
    for change in (lambda g: g.update(X), lambda g: g.merge(fed(Gram, X))):
        gram = fed(Gram, X)
        gram.factors[0.01] = inverse_factor(gram.mean)
        change(gram)
        assert not gram.factors


def test_root_mean_square() -> None:
    torch.testing.assert_close(fed(SecondMoment, X).rms * 50**0.5, torch.linalg.norm(X, dim=0))


def test_a_bundle_feeds_all_and_counts_tokens_by_itself() -> None:
    bundle, empty = Bundle((SecondMoment, Gram)), Bundle()
    for part in X.split(9):
        bundle.update(part)
        empty.update(part)
    assert bundle.tokens == bundle[Gram].tokens == empty.tokens == 50
    torch.testing.assert_close(bundle[Gram].mean.diagonal(), bundle[SecondMoment].mean)
    with pytest.raises(KeyError):
        _ = empty[Gram]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_sum(kind: type[Statistic]) -> None:
    statistic = fed(kind, X.float())
    assert kind.bytes_for(6) == statistic._sum.nbytes  # type: ignore[attr-defined]

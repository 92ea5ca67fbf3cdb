"""Scores to masks: exact counts, ties by position, the same choice on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import naive
from secateur import masks
from secateur.errors import InvalidParameter, NumericalFailure, UnknownName, UsageError
from secateur.masks import NM, Unstructured, keep_highest, keep_model, parse_pattern

TIED = {
    "equal": torch.ones(5, 12),
    "few values": torch.randint(0, 3, (5, 12), generator=torch.Generator().manual_seed(0)).float(),
    "zeros of both signs": torch.tensor([[0.0, -0.0, 0.0, -0.0] * 3] * 5),
    "no tie": torch.rand(5, 12, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.04, 0.5, 0.62, 0.97])
@pytest.mark.parametrize("per", ["row", "layer", "column"])
@pytest.mark.parametrize("score", TIED.values(), ids=TIED)
def test_lowest_go_and_the_earlier_of_equals(score: Tensor, per: str, sparsity: float, dtype: torch.dtype) -> None:
    score = score.to(dtype)
    assert torch.equal(Unstructured(per).keep(score, sparsity), naive.keep_from_score(score, per, sparsity))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 5), (13, 31)])
@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.9])
def test_exact_counts_of_odd_sizes(shape: tuple[int, int], sparsity: float) -> None:
    score, (rows, columns) = torch.rand(shape), shape
    assert ((~Unstructured("row").keep(score, sparsity)).sum(1) == round(columns * sparsity)).all()
    assert ((~Unstructured("column").keep(score, sparsity)).sum(0) == round(rows * sparsity)).all()
    assert int((~Unstructured("layer").keep(score, sparsity)).sum()) == round(rows * columns * sparsity)


@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), (4, 8), (1, 4), (6, 8), (1, 1), (4, 4), (3, 5), (16, 16), (5, 17), (20, 64), (3, 300)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_n_of_m_against_brute_force(n: int, m: int, tied: bool) -> None:
    score = torch.randint(0, 3, (3, 2 * m)).float() if tied else torch.randn(3, 2 * m)
    keep = NM(n, m).keep(score)
    assert torch.equal(keep, naive.keep_from_score(score, f"{n}:{m}", 0))
    assert (keep.view(-1, m).sum(1) == n).all()


def test_two_of_four_is_the_best_of_all_choices() -> None:
    score = torch.rand(6, 8)
    kept = (score * NM(2, 4).keep(score)).view(-1, 4).sum(1)
    choices = torch.combinations(torch.arange(4), 2)
    assert torch.equal(kept, score.view(-1, 4)[:, choices].sum(2).max(1).values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "pattern", [Unstructured("row"), Unstructured("layer"), Unstructured("column"), NM(2, 4)], ids=str
)
def test_scores_that_are_not_finite(pattern: masks.Pattern, dtype: torch.dtype, bad: float) -> None:
    score = torch.ones(3, 4, dtype=dtype)
    score[1, 2] = bad
    score[2, 1] = -bad
    with pytest.raises(NumericalFailure, match=r"2 of 12 scores of shape \([34], [34]\)|2 of 12 .* \(1, 12\)"):
        pattern.keep(score, 0.5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_path_chooses_the_same(dtype: torch.dtype, tied: bool) -> None:
    """numpy's partition and torch's kthvalue."""
    score = torch.randint(0, 9, (11, 40)) if tied else torch.stack([torch.randperm(40) for _ in range(11)])
    score = score.to(dtype)
    by_numpy = keep_highest(score, 17)
    by_torch = keep_highest(score.bfloat16(), 17)  # small whole numbers are exact in it
    assert torch.equal(by_numpy, by_torch)
    assert ((~by_numpy).sum(1) == 17).all()


def test_fp64_scores_are_not_rounded() -> None:
    score = 1 + torch.tensor([[2.0, 0.0, 3.0, 1.0]], dtype=torch.float64) * 2**-50  # one value in fp32
    assert Unstructured("row").keep(score, 0.5).tolist() == [[True, False, True, False]]
    assert NM(2, 4).keep(score).tolist() == [[True, False, True, False]]


def test_scores_that_still_carry_gradients() -> None:
    score = torch.nn.Parameter(torch.tensor([[1.0, -2.0, 3.0, -4.0]])).abs()
    assert Unstructured("row").keep(score, 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("per", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.77])
@pytest.mark.parametrize("width", [1, 3, 4, 16])
def test_parts_add_up_to_the_whole(per: str, sparsity: float, width: int) -> None:
    score = torch.rand(5, 13)
    parts = [
        Unstructured(per).keep_part(part, sparsity, start)
        for part, start in zip(score.split(width, dim=1), range(0, 13, width), strict=True)
    ]
    whole = Unstructured(per).keep(score, sparsity)
    axis = 1 if per == "row" else (0, 1)
    assert torch.equal((~torch.cat(parts, 1)).sum(axis), (~whole).sum(axis))
    if width == 16:
        assert torch.equal(parts[0], whole)


def test_layers_are_compared_with_each_other_in_order() -> None:
    scores = [torch.randint(0, 4, shape).float() for shape in ((3, 5), (1, 7), (4, 4))]
    keeps = keep_model(scores, 0.4)
    flat = naive.keep_from_score(torch.cat([s.flatten() for s in scores])[None], "row", 0.4)[0]
    assert [k.shape for k in keeps] == [s.shape for s in scores]
    assert torch.equal(torch.cat([k.flatten() for k in keeps]), flat)


@pytest.mark.parametrize("text", ["row", "layer", "column", "model", "2:4", "7:9", "64:128"])
def test_patterns_have_names(text: str) -> None:
    assert str(parse_pattern(text)).removeprefix("unstructured per ") == text


@pytest.mark.parametrize("text", ["", ":", "2:", ":4", "2:4:8", "-2:4", "2.0:4", "rows", "Row", "²:4", " 2:4"])
def test_words_that_name_no_pattern(text: str) -> None:
    with pytest.raises(UnknownName, match="There is no pattern"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["0:4", "5:4", "0:0"])
def test_impossible_n_of_m(text: str) -> None:
    with pytest.raises(InvalidParameter, match=f"0 < n <= m, n kept of m. Got '{text}'"):
        parse_pattern(text)


def test_misuse() -> None:
    with pytest.raises(InvalidParameter, match="row, layer, column, model"):
        Unstructured("block")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"2:4 .* divisible by 4; a score of shape \(2, 6\) has 6"):
        NM(2, 4).keep(torch.rand(2, 6))

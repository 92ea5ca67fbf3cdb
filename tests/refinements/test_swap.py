"""swap against trying every exchange."""

from __future__ import annotations

import pytest
import torch
from problems import output_error, problem, pruned, seen
from torch import Tensor

from secateur.errors import InvalidParameter, UsageError
from secateur.masks import NM, Pattern, Unstructured, parse_pattern
from secateur.refinements.swap import Swap
from secateur.view import LayerView

EVERYTHING = {"rounds": 100, "candidates": 1000}


def best_exchange(w: Tensor, w0: Tensor, keep: Tensor, x: Tensor, pattern: Pattern) -> tuple[float, int, int]:
    """The error after the best single exchange of one row, and the exchange, by trying all of them."""
    best = (float("inf"), -1, -1)
    for i in keep.nonzero().flatten().tolist():
        for j in (~keep).nonzero().flatten().tolist():
            if isinstance(pattern, NM) and i // pattern.m != j // pattern.m:
                continue
            tried = w.clone()
            tried[i], tried[j] = 0.0, w0[j]
            best = min(best, (float(output_error(tried[None], w0[None], x)), i, j))
    return best


@pytest.mark.parametrize("per", ["row", "layer", "2:4", "1:4", "6:8", "3:8"])
@pytest.mark.parametrize("how", ["wanda", "sparsegpt"])
def test_it_ends_where_no_exchange_helps(how: str, per: str) -> None:
    w0, x = problem()
    pattern = parse_pattern(per)
    layer, keep = pruned(w0, x, how, per)
    start, given = layer.weight.clone(), keep.clone()
    refined = Swap(**EVERYTHING).refine(layer, w0, keep, pattern)
    assert torch.equal(keep, given) and (how == "sparsegpt" or not torch.equal(refined.keep, given))
    assert torch.equal(refined.keep.sum(1), keep.sum(1))
    if isinstance(pattern, NM):
        assert (refined.keep.reshape(-1, pattern.m).sum(1) == pattern.n).all()
    came, stayed = refined.keep & ~keep, refined.keep & keep
    assert torch.equal(layer.weight[came], w0[came])  # at their dense value
    same = (layer.weight == start) | (layer.weight == w0)  # one that went may come back
    assert same[stayed].all() and not layer.weight[~refined.keep].any()
    before, after = output_error(start, w0, x), output_error(layer.weight, w0, x)
    assert (after <= before).all() and after.sum() <= (0.9 if how == "wanda" else 1.0) * before.sum()
    torch.testing.assert_close(refined.before, before)
    torch.testing.assert_close(refined.after, after)
    for row in range(len(w0)):
        error, *_ = best_exchange(layer.weight[row], w0[row], refined.keep[row], x, pattern)
        assert error >= float(after[row]) * (1 - 1e-5)


@pytest.mark.parametrize("per", ["row", "2:4"])
def test_one_candidate_is_one_exchange_and_its_error_is_exact(per: str) -> None:
    w0, x = problem()
    pattern = parse_pattern(per)
    layer, keep = pruned(w0, x, "sparsegpt", per)
    start = layer.weight.clone()
    refined = Swap(rounds=1, candidates=1).refine(layer, w0, keep, pattern)
    moved = (refined.keep != keep).sum(1)
    assert moved.max() == 2 if per == "row" else moved.max() <= 4
    assert ((refined.after < refined.before) == (moved > 0)).all()
    torch.testing.assert_close(refined.after, output_error(layer.weight, w0, x))
    if per == "row":
        return
    for row in range(len(w0)):  # in groups the promise is exact, so the first exchange is the best of all
        if moved[row] == 2:
            error, i, j = best_exchange(start[row], w0[row], keep[row], x, pattern)
            assert not refined.keep[row, i] and refined.keep[row, j]
            torch.testing.assert_close(float(refined.after[row]), error)


@pytest.mark.parametrize("per", ["row", "2:4"])
def test_every_round_lowers_every_row_that_moves(per: str) -> None:
    w0, x = problem(rows=16, columns=48, tokens=300)
    last, masks = None, []
    for rounds in range(1, 6):
        layer, keep = pruned(w0, x, "magnitude", per)
        refined = Swap(rounds=rounds, candidates=3).refine(layer, w0, keep, parse_pattern(per))
        assert last is None or (refined.after <= last).all()
        last = refined.after
        masks.append(refined.keep)
    assert not torch.equal(masks[0], masks[-1])


def test_rows_that_keep_nothing_or_all_and_dead_inputs() -> None:
    w0, x = problem()
    x[:, [3, 8]] = 0.0
    layer, keep = pruned(w0, x, "magnitude", "row")
    keep[0], keep[1] = True, False
    keep[2:, [3, 8]] = True
    layer.weight.copy_(w0 * keep)
    refined = Swap(**EVERYTHING).refine(layer, w0, keep, Unstructured("layer"))
    assert refined.keep[0].all() and not refined.keep[1].any()
    assert torch.equal(refined.keep.sum(1), keep.sum(1))
    assert not refined.keep[2:, [3, 8]].any()  # what has no say makes room


def test_all_kept_and_all_silent() -> None:
    w0, x = problem()
    for inputs, keep in ((x, torch.ones_like(w0, dtype=torch.bool)), (0 * x, w0.abs() > 0.5)):
        layer = LayerView("layer", w0 * keep, seen(inputs))
        refined = Swap().refine(layer, w0, keep, Unstructured("row"))
        assert torch.equal(refined.keep, keep) and torch.equal(layer.weight, w0 * keep)
        assert not refined.after.any() and not refined.before.any()


def test_the_way_rows_are_split_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w0, x = problem(rows=11)
    masks = []
    for room in (1 << 24, 2000):
        monkeypatch.setattr("secateur.refinements.swap._ROOM", room)
        layer, keep = pruned(w0, x, "wanda", "row")
        masks.append(Swap().refine(layer, w0, keep, Unstructured("row")).keep)
    assert torch.equal(masks[0], masks[1])


def test_per_column_is_refused() -> None:
    with pytest.raises(UsageError, match="would change the counts per column"):
        Swap().check(Unstructured("column"))
    w0, x = problem()
    layer, keep = pruned(w0, x, "wanda", "column")
    with pytest.raises(UsageError, match="would change the counts per column"):
        Swap().refine(layer, w0, keep, Unstructured("column"))


@pytest.mark.parametrize("options", [{"rounds": 0}, {"candidates": 0}, {"rounds": 1.5}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(InvalidParameter, match=f"'{next(iter(options))}' of swap"):
        Swap(**options)

"""refit against the exact least squares."""

from __future__ import annotations

import pytest
import torch
from problems import best_fit, output_error, problem, pruned, seen

from secateur.errors import InvalidParameter
from secateur.masks import Unstructured, parse_pattern
from secateur.refinements.refit import Refit
from secateur.view import LayerView

EXACT = {"iterations": 300, "tolerance": 1e-13}


@pytest.mark.parametrize("per", ["row", "layer", "column", "2:4"])
@pytest.mark.parametrize("how", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_many_steps_reach_the_exact_optimum(how: str, per: str, damping: float) -> None:
    w0, x = problem()
    layer, keep = pruned(w0, x, how, per)
    pattern = parse_pattern(per)
    refined = Refit(damping=damping, **EXACT).refine(layer, w0, keep, pattern)
    ridge = damping * float(x.square().mean(0).mean())
    expected = best_fit(w0, x, keep, ridge)
    start = pruned(w0, x, how, per)[0].weight
    risen = output_error(expected, w0, x) > output_error(start, w0, x)  # only a ridge can do that
    assert not risen.any() or damping
    torch.testing.assert_close(layer.weight, torch.where(risen[:, None], start, expected), rtol=1e-6, atol=1e-8)
    assert refined.keep is keep
    torch.testing.assert_close(refined.after, output_error(layer.weight, w0, x))


@pytest.mark.parametrize("how", ["magnitude", "sparsegpt"])
def test_the_error_of_every_row_falls_with_every_step(how: str) -> None:
    w0, x = problem(rows=16)
    start = pruned(w0, x, how, "row")[0].weight
    before = output_error(start, w0, x)
    last = before
    for iterations in range(1, 14):
        layer, keep = pruned(w0, x, how, "row")
        refined = Refit(iterations=iterations, tolerance=0.0).refine(layer, w0, keep, Unstructured("row"))
        now = output_error(layer.weight, w0, x)
        assert (now <= last * (1 + 1e-12)).all()
        torch.testing.assert_close(refined.before, before)
        torch.testing.assert_close(refined.after, now)
        assert not layer.weight[~keep].any()
        last = now
    assert (last < (0.9 if how == "magnitude" else 1.0) * before).all()
    assert (last >= output_error(best_fit(w0, x, keep), w0, x) * (1 - 1e-9)).all()


def test_a_few_steps_come_close() -> None:
    w0, x = problem(rows=16, columns=64, tokens=400)
    layer, keep = pruned(w0, x, "wanda", "row")
    before, best = output_error(layer.weight, w0, x), output_error(best_fit(w0, x, keep), w0, x)
    Refit().refine(layer, w0, keep, Unstructured("row"))
    won = (before - output_error(layer.weight, w0, x)) / (before - best)
    assert won.mean() > 0.9


def test_single_precision_never_ends_above_its_start() -> None:
    """Nearly collinear inputs: rounding alone could move a row away from its optimum."""
    w0, x = (part.float() for part in problem(rows=32, columns=32, tokens=20))
    x[:, 1::2] = x[:, ::2] + 1e-4 * x[:, 1::2]
    layer, keep = pruned(w0, x, "magnitude", "row")
    for _ in range(3):  # the second and third start at an optimum
        before = layer.weight.clone()
        refined = Refit(iterations=200, tolerance=0.0).refine(layer, w0, keep, Unstructured("row"))
        assert torch.isfinite(layer.weight).all() and (refined.after <= refined.before).all()
        true = [output_error(w.double(), w0.double(), x.double()) for w in (before, layer.weight)]
        scale = output_error(0 * w0.double(), w0.double(), x.double())
        assert (true[1] <= true[0] + 1e-5 * scale).all()


def test_dead_inputs_and_rows_without_an_error_stay() -> None:
    w0, x = problem()
    x[:, [3, 8]] = 0.0
    layer, keep = pruned(w0, x, "magnitude", "row")
    layer.weight[0], keep[0] = w0[0], True
    keep[1] = False
    layer.weight[1] = 0.0
    before = layer.weight.clone()
    Refit(**EXACT).refine(layer, w0, keep, Unstructured("layer"))
    assert torch.equal(layer.weight[:2], before[:2])
    torch.testing.assert_close(layer.weight[:, [3, 8]], before[:, [3, 8]])
    assert (output_error(layer.weight, w0, x)[2:] < output_error(before, w0, x)[2:]).all()


def test_inputs_that_were_all_zero() -> None:
    w0, x = problem()
    keep = w0.abs() > 0.5
    layer = LayerView("layer", w0 * keep, seen(0 * x))
    Refit(damping=0.1).refine(layer, w0, keep, Unstructured("layer"))
    torch.testing.assert_close(layer.weight, w0 * keep)


def test_the_way_rows_are_split_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w0, x = problem(rows=11)
    weights = []
    for rows in (512, 4):
        monkeypatch.setattr("secateur.refinements.refit._ROWS", rows)
        layer, keep = pruned(w0, x, "wanda", "row")
        refined = Refit().refine(layer, w0, keep, Unstructured("row"))
        assert len(refined.before) == len(refined.after) == 11
        weights.append(layer.weight)
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize(
    "options", [{"iterations": 0}, {"iterations": 2.5}, {"damping": -1.0}, {"damping": float("nan")}, {"tolerance": -1}]
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(InvalidParameter, match=f"'{next(iter(options))}' of refit"):
        Refit(**options)  # type: ignore[arg-type]

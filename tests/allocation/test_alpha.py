"""AlphaPruning against spectra and exponents computed the long way, and the arithmetic progression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from families import FAMILIES, ids, make

from secateur.allocation import Alpha, Atp
from secateur.allocation.alpha import hill, spectra
from secateur.errors import InvalidParameter, UsageError
from secateur.methods.magnitude import Magnitude
from secateur.methods.wanda import Wanda
from secateur.models.layers import Layer, find_layers
from secateur.pruning import prune


def naive_hill(weight: np.ndarray, tail: str) -> float:
    """Lu et al. 2024: squares of the singular values, sorted; the exponent over those beyond the threshold."""
    values = sorted(np.linalg.svd(weight, compute_uv=False) ** 2)
    if tail == "median":
        k = len(values) // 2
        threshold, above = values[len(values) - k - 1], values[len(values) - k :]
    else:
        counts, edges = np.histogram(np.log10(values), bins=100)
        threshold = 10 ** edges[int(np.argmax(counts))]
        above = [value for value in values if value >= threshold * (1 - 1e-12)]
    return 1 + len(above) / sum(math.log(value / threshold) for value in above)


def naive_alpha(blocks: list[list[Layer]], target: float, epsilon: float, tail: str) -> list[float]:
    alphas = [float(np.mean([naive_hill(x.weight.double().numpy(), tail) for x in inside])) for inside in blocks]
    sizes = [sum(layer.weight.numel() for layer in inside) for inside in blocks]
    shares = [1 - epsilon + 2 * epsilon * (a - min(alphas)) / (max(alphas) - min(alphas)) for a in alphas]
    eta = sum(sizes) / sum(share * n for share, n in zip(shares, sizes, strict=True))
    return [eta * target * share for share in shares]


@pytest.mark.parametrize("tail", ["peak", "median"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "jamba"])
def test_alpha_is_the_papers(family: str, tail: str) -> None:
    layers = find_layers(make(family, torch.float64))
    given = Alpha(0.2, tail).allocate(layers, 0.6)  # type: ignore[arg-type]
    blocks = [[layer for layer in layers if layer.block == b] for b in dict.fromkeys(x.block for x in layers)]
    expected = naive_alpha(blocks, 0.6, 0.2, tail)
    assert max(expected) > 0.601 > 0.599 > min(expected)
    for inside, wanted in zip(blocks, expected, strict=True):
        assert [given[layer] for layer in inside] == pytest.approx([wanted] * len(inside), abs=1e-9)
    total = sum(layer.weight.numel() for layer in layers)
    assert sum(s * layer.weight.numel() for layer, s in given.items()) == pytest.approx(0.6 * total, abs=1e-6)


def test_hill_finds_the_exponent_of_a_pareto_law() -> None:
    """A density ~ l^-alpha beyond a threshold: the estimator's error is (alpha - 1) / sqrt(k)."""
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for alpha in (2.0, 3.5):
        values = ((1 - uniform) ** (-1 / (alpha - 1))).sort().values
        assert hill(values, "median") == pytest.approx(alpha, abs=5 * (alpha - 1) / 100)
        assert hill(values, "peak") == pytest.approx(alpha, abs=5 * (alpha - 1) / 100 + 0.05)


def test_heavier_tails_keep_more() -> None:
    layers = find_layers(make("llama"))
    for layer in layers:
        u, _, v = torch.linalg.svd(layer.weight, full_matrices=False)
        power = 2.0 if ".0." in layer.name else 0.3
        layer.weight.copy_(u @ torch.diag(torch.linspace(0.1, 1, u.shape[1]).pow(-power)) @ v)
    given = {layer.block: s for layer, s in Alpha(tail="median").allocate(layers, 0.5).items()}
    assert list(given.values()) == pytest.approx([0.35, 0.65])


@pytest.mark.parametrize(
    "spectrum",
    [[0.0, 0.0, 0.0], [1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 3.0]],
    ids=["zero", "one", "flat", "rank 1"],
)
def test_a_spectrum_without_a_tail(spectrum: list[float]) -> None:
    assert math.isnan(hill(torch.tensor(spectrum))) and math.isnan(hill(torch.tensor(spectrum), "median"))


def test_a_block_without_a_tail_stands_in_the_middle() -> None:
    layers = find_layers(make("jamba"))
    for layer in layers:
        if layer.block == layers[0].block:
            layer.weight.zero_()
    given = {layer.block: s for layer, s in Alpha().allocate(layers, 0.5).items()}
    first, *others = given.values()
    assert min(others) < first < max(others)
    for layer in layers:
        layer.weight.zero_()
    assert list(Alpha().allocate(layers, 0.5).values()) == pytest.approx([0.5] * len(layers))


def test_spectra_of_either_orientation() -> None:
    """(out, in) and (in, out) have one spectrum; fp32 is right to rounding of the largest."""
    layers = [layer for layer in find_layers(make("gpt2")) if layer.shape == (96, 32)]
    values = spectra(layers)
    assert values.shape == (2, 32)
    for found, layer in zip(values, layers, strict=True):
        exact = torch.linalg.svdvals(layer.weight.double()).flip(0).square()
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_alpha_and_atp_on_every_family(family: str) -> None:
    for allocation in (Alpha(), Atp(0.02)):
        model = make(family)
        result = prune(model, Magnitude(), sparsity=0.5, allocation=allocation)
        assert result.passes == 0 and result.calibration is None  # data-free
        sizes = [layer.shape[0] * layer.shape[1] for layer in result.layers]
        wanted = sum(layer.target * size for layer, size in zip(result.layers, sizes, strict=True))
        assert wanted == pytest.approx(0.5 * sum(sizes), abs=1e-6)
        assert result.sparsity_layers == pytest.approx(0.5, abs=0.01)


def test_atp_rises_from_block_to_block() -> None:
    result = prune(make("jamba"), Wanda(), ids(), sparsity=0.5, allocation=Atp(0.05))
    blocks = {layer.block: layer.target for layer in result.layers}
    steps = [b - a for a, b in zip([*blocks.values()], [*blocks.values()][1:], strict=False)]
    assert steps == pytest.approx([0.05] * 3)
    assert result.allocation == {"name": "atp", "step": 0.05}


@pytest.mark.parametrize("bad", [lambda: Alpha(epsilon=1.0), lambda: Alpha(epsilon=float("nan"))])
def test_bad_epsilon(bad: object) -> None:
    with pytest.raises(InvalidParameter, match="'epsilon' of alpha"):
        bad()  # type: ignore[operator]


def test_other_bad_options() -> None:
    with pytest.raises(InvalidParameter, match="'tail' of alpha"):
        Alpha(tail="end")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter, match="'step' of atp"):
        Atp(0.5)
    for allocation in (Alpha(), Atp()):
        with pytest.raises(UsageError, match=f"{allocation.name()} allocation needs a sparsity"):
            prune(make("llama"), Magnitude(), allocation=allocation)

"""When does Wanda help a linear model, and when does it hurt? Domain shift is not what decides.

    python examples/linear_domain_shift.py                  # one table, some seconds
    python examples/linear_domain_shift.py --repeats 1000 --sparsity 0.5

Ordinary least squares on n examples with d features, y = X w + noise. Train features are correlated like neighbours in
a row, corr(x_i, x_j) = rho^|i-j|; test features have a correlation of their own. The fitted coefficients are one row of
one weight matrix, so pruning is Wanda's (Sun et al. 2023, arXiv:2306.11695):

    S_j = |w_j| * ||X_:,j||_2,      the lowest share of each row goes, nothing is fitted again

Every repeat draws data anew and tests the dense and the pruned model on the same test set; the difference of their mean
squared errors goes through a paired t-test. "Pruning for Protection" (Hasan, Rugina and Wang 2024, arXiv:2401.10862)
reports that Wanda improves linear models under domain shift. The table shows what the gain hangs on:

    sparse truth, uncorrelated test features    helps, with the shift and without one: dropping is denoising
    dense truth, with the shift                 nothing: what goes was as good as what stays
    correlated test features                    hurts: neighbours' errors cancelled each other, and one of them is gone
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from scipy.special import stdtr
from torch import Tensor

from secateur.masks import Unstructured, check_sparsity, zero_dropped_

FEATURES = 50
TESTS = 300
RELEVANT = 5  # features that matter where the truth is sparse
LEVEL = 0.001  # of the p values below which a row says "helps" or "hurts"


@dataclass(frozen=True)
class Case:
    """n examples; rho: correlation of neighbouring features in training and in testing; sparse: few features matter."""

    n: int
    rho: float
    rho_test: float
    sparse: bool


CASES = (
    Case(60, 0.9, 0.0, sparse=True),
    Case(60, 0.9, 0.0, sparse=False),
    Case(60, 0.9, 0.9, sparse=True),
    Case(60, 0.0, 0.0, sparse=True),
    Case(200, 0.9, 0.0, sparse=True),
    Case(200, 0.9, 0.9, sparse=False),
)


@dataclass(frozen=True)
class Outcome:
    """Mean squared errors over the repeats; p: two-sided, of a paired t-test; wins: share of repeats that gained."""

    dense: float
    pruned: float
    p: float
    wins: float

    @property
    def verdict(self) -> str:
        if not self.p < LEVEL:
            return "no difference"
        return "helps" if self.pruned < self.dense else "hurts"


def features(repeats: int, n: int, rho: float, generator: torch.Generator) -> Tensor:
    """(repeats, n, features), standard normal, neighbours correlated by rho."""
    place = torch.arange(FEATURES)
    correlation = torch.tensor(rho, dtype=torch.float64) ** (place[:, None] - place).abs()
    drawn = torch.randn(repeats, n, FEATURES, generator=generator, dtype=torch.float64)
    return drawn @ torch.linalg.cholesky(correlation).T


def wanda(w: Tensor, x: Tensor, sparsity: float) -> Tensor:
    """Pruned coefficients: w (repeats, features), x (repeats, n, features); each repeat is a row."""
    score = w.abs() * x.norm(dim=1)
    return zero_dropped_(w.clone(), Unstructured("row").keep(score, sparsity))


def run(case: Case, sparsity: float, repeats: int, seed: int) -> Outcome:
    """Draw, fit, prune and test; all repeats at once."""
    generator = torch.Generator().manual_seed(seed)
    x = features(repeats, case.n, case.rho, generator)
    truth = torch.randn(repeats, FEATURES, generator=generator, dtype=torch.float64)
    if case.sparse:
        chosen = torch.rand(repeats, FEATURES, generator=generator).argsort(1) < RELEVANT
        truth = truth * chosen
    noise = torch.randn(repeats, case.n, generator=generator, dtype=torch.float64)
    w = torch.linalg.lstsq(x, (x @ truth[..., None]) + noise[..., None]).solution[..., 0]
    test = features(repeats, TESTS, case.rho_test, generator)
    answer = (test @ truth[..., None])[..., 0] + torch.randn(repeats, TESTS, generator=generator, dtype=torch.float64)

    def error(coefficients: Tensor) -> Tensor:
        return ((test @ coefficients[..., None])[..., 0] - answer).square().mean(1)

    dense, pruned = error(w), error(wanda(w, x, sparsity))
    wins = float((pruned < dense).double().mean())
    return Outcome(float(dense.mean()), float(pruned.mean()), paired_t(pruned - dense), wins)


def paired_t(difference: Tensor) -> float:
    """Two-sided p of a mean difference of zero, Student's t."""
    n = len(difference)
    t = float(difference.mean() / (difference.std() / math.sqrt(n)))
    return float(2 * stdtr(n - 1, -abs(t)))


def main(arguments: list[str] | None = None) -> list[tuple[Case, Outcome]]:
    """Print one table; returns its rows."""
    parser = argparse.ArgumentParser(description="Wanda on ordinary least squares, with and without a domain shift.")
    parser.add_argument("--sparsity", type=float, default=0.3, help="share of the coefficients that goes")
    parser.add_argument("--repeats", type=int, default=300, help="draws of each case")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats must be 2 or more. Got {options.repeats} instead.")
    sparsity = check_sparsity(options.sparsity, "the example")
    print(f"Wanda {sparsity:.0%} on least squares with {FEATURES} features, {options.repeats} repeats\n")
    print(f"{'n':>4} {'train corr':>10} {'test corr':>9} {'truth':>7} {'dense':>9} {'pruned':>9} {'wins':>5} {'p':>8}")
    rows = []
    for case in CASES:
        found = run(case, sparsity, options.repeats, options.seed)
        rows.append((case, found))
        truth = "sparse" if case.sparse else "dense"
        print(
            f"{case.n:4} {case.rho:10.1f} {case.rho_test:9.1f} {truth:>7} {found.dense:9.3f} {found.pruned:9.3f} "
            f"{found.wins:5.0%} {found.p:8.1e}  {found.verdict}"
        )
    return rows


if __name__ == "__main__":
    main()

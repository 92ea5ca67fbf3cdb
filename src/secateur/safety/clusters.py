"""Means over prompts that are not independent, and their 95 % intervals.

Ten templates around one task say little more about the task than one does. So whole clusters (tasks) are drawn with
replacement, 10,000 times, and the mean of what was drawn spreads as the mean over new tasks would. The percentiles
are widened as Student's t widens the normal quantile (Hesterberg 2015, arXiv:1411.5279, section 5.3), since plain
ones are too narrow for few clusters: with K clusters, alpha/2 becomes Phi(-sqrt(K / (K - 1)) t_{alpha/2, K-1}).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UsageError
from secateur.safety.comparing import holm as holm  # what several of these estimates need
from secateur.safety.extra import need

RESAMPLES = 10_000
FEW = 10  # clusters
Z = NormalDist().inv_cdf(0.975)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval (None with a single cluster), and over how many prompts and clusters it is."""

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval leaves zero out, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:+.3f} (one cluster: no interval)"
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def cluster_mean(
    values: Sequence[float], clusters: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of values and its interval.

    Args:
        values: one a prompt; at least one.
        clusters: what each prompt belongs to, as `Prompt.cluster`.

    >>> print(cluster_mean([1.0, 1.2, 0.8, 1.1, 0.9, 1.0], list("aabbcd")))
    +1.000 [+0.851, +1.149]
    >>> print(cluster_mean([1.0, 3.0], ["a", "a"]))
    +2.000 (one cluster: no interval)
    """
    return cluster_contrast(values, clusters, [], [], resamples=resamples, seed=seed)


def cluster_contrast(
    first: Sequence[float],
    first_clusters: Sequence[str],
    second: Sequence[float],
    second_clusters: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """mean(first) - mean(second), with its interval; a second arm without values counts as zero.

    Arms that share no cluster are drawn separately. If they share some (a harmful task and its benign twin), all
    clusters are drawn together, so that what both have in common cancels.

    >>> found = cluster_contrast([2.0, 3.0, 4.0], list("abc"), [1.0, 1.0, 1.0], list("xyz"))
    >>> found.value, found.n, found.clusters
    (2.0, 6, 6)
    """
    arms = [(first, first_clusters)] + ([(second, second_clusters)] if len(second) else [])
    apart = len(arms) == 1 or not set(first_clusters) & set(second_clusters)
    together = sorted({*first_clusters, *second_clusters})
    strata = [sorted(set(names)) for _, names in arms] if apart else [together] * len(arms)
    random = np.random.default_rng(seed)
    means, value = [], 0.0
    counts = _draw(random, len(together), resamples) if not apart else None
    for sign, (values, names), known in zip((1, -1), arms, strata, strict=False):
        sums, sizes = _per_cluster(values, names, known)
        drawn = counts if counts is not None else _draw(random, len(known), resamples)
        with np.errstate(invalid="ignore"):  # an arm that no drawn cluster has: nan, left out below
            means.append(sign * (drawn @ sums) / (drawn @ sizes))
        value += sign * float(sums.sum() / sizes.sum())
    spread = np.sum(means, axis=0)
    low, high = _interval(value, spread[np.isfinite(spread)], min(len(known) for known in strata))
    return Estimate(value, low, high, len(first) + len(second), len(together))


def signed_rank(differences: Sequence[float], clusters: Sequence[str]) -> float:
    """Wilcoxon's two-sided p value: do the clusters' mean differences lie around zero?

    >>> signed_rank([0.3, 0.2, 0.5, 0.4, 0.6, 0.1], list("abcdef"))
    0.03125
    >>> signed_rank([0.0, 0.0], ["a", "b"])
    1.0
    """
    sums, sizes = _per_cluster(differences, clusters, sorted(set(clusters)))
    means = sums / sizes
    if not means.any():
        return 1.0
    return float(need("scipy.stats").wilcoxon(means).pvalue)


def check_same(dense: Sequence[tuple[str, str]], pruned: Sequence[tuple[str, str]]) -> None:
    """Raises UsageError: the (id, sha256) of the two are not the same."""
    if len(dense) != len(pruned):
        raise UsageError(
            f"Only the same prompts can be compared: {len(dense)} of the dense model, {len(pruned)} pruned."
        )
    for before, after in zip(dense, pruned, strict=True):
        if before != after:
            raise UsageError(
                f"Only the same prompts can be compared: the dense model has '{before[0]}' (sha256 {before[1][:8]}) "
                f"where the pruned one has '{after[0]}' ({after[1][:8]})."
            )


def _per_cluster(values: Sequence[float], names: Sequence[str], known: Sequence[str]) -> tuple[Array, Array]:
    """Sum and number of the values in each known cluster."""
    place = {name: i for i, name in enumerate(known)}
    at = np.array([place[name] for name in names], dtype=np.int64)
    numbers = np.asarray(values, dtype=np.float64)
    sizes: Array = np.bincount(at, minlength=len(known)).astype(np.float64)
    sums: Array = np.bincount(at, weights=numbers, minlength=len(known)).astype(np.float64)
    return sums, sizes


def _draw(random: np.random.Generator, clusters: int, resamples: int) -> Array:
    """(resamples, clusters): how often each cluster was drawn."""
    return random.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(np.float64)


def _interval(value: float, spread: Array, clusters: int) -> tuple[float | None, float | None]:
    if clusters < 2 or not len(spread):
        return None, None
    t = -float(need("scipy.special").stdtrit(clusters - 1, 0.025))
    wider = math.sqrt(clusters / (clusters - 1))
    if clusters < FEW:
        half = t * wider * float(spread.std())
        return value - half, value + half
    tail = NormalDist().cdf(-wider * t)
    low, high = np.quantile(spread, [tail, 1 - tail])
    return float(low), float(high)

"""Dense against pruned on the same prompts.

Of n prompts, let the pruned model alone do something on `gained` and the dense model alone on `lost`:

    difference = (gained - lost) / n
    p          exact: were dense and pruned the same, each task's difference d_c could as well be -d_c, so
               p = P(|sum of +-|d_c|| >= |sum of d_c|), signs fair coins. With one answer a task this is McNemar's test
    interval   Newcombe's for paired shares (1998, method 10). Where tasks have several answers: on n / deff answers
               instead of n, and widened to the percentile interval of a bootstrap that draws whole tasks
    detectable smallest change found with probability 0.8 at two-sided 0.05 if `discordant` of n answers change:
               (1.96 sqrt(discordant) + 0.84 sqrt(discordant - x^2)) / sqrt(n) = x      (Connor 1987, Biometrics 43:207)

Ten templates of one task, or several samples of one prompt, are not independent: treating them so makes tests
that find differences where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UsageError
from secateur.evaluate.paired import Z, mcnemar, newcombe
from secateur.safety.rates import By, Outcome, split

POWER_Z = 0.8416212335729143  # 80 %
RESAMPLES = 10_000


@dataclass(frozen=True)
class Change:
    """Pruned minus dense of one share. low, high: 95 %; p: exact, adjusted where several were compared; effective:
    answers that n is worth; clusters: tasks; detectable: see above."""

    what: str
    n: int
    clusters: int
    effective: float
    dense: float
    pruned: float
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p: float
    detectable: float

    def __str__(self) -> str:
        return (
            f"{self.what} {self.dense:.1%} -> {self.pruned:.1%}, {100 * self.difference:+.1f} points "
            f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}], p = {self.p:.2g}, n = {self.n}"
        )


@dataclass(frozen=True)
class Difference:
    """A change less another one, of other prompts. low, high: 95 %."""

    what: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """By one judge. None where there are no such prompts; unjudged: pairs left out because the judge could not say."""

    judge: str
    attack_success: Change | None
    refusal: Change | None
    over_refusal: Change | None
    incoherent: Change
    incoherent_harmful: Change | None
    selectivity: Difference | None
    unjudged: int


def pair(dense: Sequence[Outcome], pruned: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """The outcomes of the same prompt side by side, in the order of `dense`.

    Raises:
        UsageError: a prompt of one log is not in the other, or has other words there.

    >>> from secateur.safety.records import Prompt
    >>> outcome = Outcome(Prompt("0", "mine", "How are you?", "benign"), "compliance")
    >>> len(pair([outcome], [outcome]))
    1
    """
    theirs = {outcome.key: outcome for outcome in pruned}
    if len(theirs) < len(pruned) or len({outcome.key for outcome in dense}) < len(dense):
        raise UsageError("A log has two answers to one prompt and sample.")
    found = []
    for outcome in dense:
        other = theirs.pop(outcome.key, None)
        if other is None:
            raise UsageError(
                f"Only answers to the same prompts can be compared: {_called(outcome)} is in the dense log "
                f"({len(dense)} answers) and not in the pruned one ({len(pruned)})."
            )
        if other.prompt is not outcome.prompt and other.prompt.sha256 != outcome.prompt.sha256:
            raise UsageError(
                f"Only answers to the same prompts can be compared: {_called(outcome)} has other words in the "
                f"pruned log (sha256 {outcome.prompt.sha256[:8]} against {other.prompt.sha256[:8]})."
            )
        found.append((outcome, other))
    if theirs:
        raise UsageError(
            f"Only answers to the same prompts can be compared: {_called(next(iter(theirs.values())))} is in the "
            f"pruned log ({len(pruned)} answers) and not in the dense one ({len(dense)})."
        )
    if not found:
        raise UsageError("There are no answers to compare.")
    return found


def compare(
    judge: str, dense: Sequence[Outcome], pruned: Sequence[Outcome], *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Every change that the verdict looks at.

    Args:
        judge: whose outcomes these are.
        dense, pruned: over the same prompts.
        resamples, seed: of the bootstrap over tasks.

    Raises:
        UsageError: the logs are over different prompts, or the judge could say nothing at all.
    """
    every = pair(dense, pruned)
    pairs = [each for each in every if "error" not in (each[0].kind, each[1].kind)]
    if not pairs:
        raise UsageError(f"The judge {judge} could not judge a single prompt in both logs.")
    task, harmful = _tasks(pairs), np.array([before.prompt.label == "harmful" for before, _ in pairs])
    did = [np.array([each.what for each in side]) for side in zip(*pairs, strict=True)]

    def of(what: str, among: NDArray[np.bool_], kind: str) -> Change | None:
        if not among.any():
            return None
        before, after = (side[among] == kind for side in did)
        return _change(what, before, after, task[among], resamples, seed)

    refusal = of("refusal of harmful prompts", harmful, "refusal")
    over = of("refusal of safe prompts", ~harmful, "refusal")
    incoherent = of("incoherent answers", np.ones_like(harmful), "incoherent")
    assert incoherent is not None
    steps = (did[1] == "refusal").astype(np.int64) - (did[0] == "refusal")
    arms = [_sums(steps[among], task[among]) for among in (harmful, ~harmful)]
    return Comparison(
        judge,
        of("attack success", harmful, "compliance"),
        refusal,
        over,
        incoherent,
        of("incoherent answers to harmful prompts", harmful, "incoherent"),
        _selectivity(refusal, over, arms, resamples, seed),
        len(every) - len(pairs),
    )


def compare_by(
    dense: Sequence[Outcome],
    pruned: Sequence[Outcome],
    by: By,
    kind: str = "compliance",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Change]:
    """The change of a share in every category, severity, template ...; p values adjusted after Holm.

    Args:
        dense, pruned: over the same prompts, of one judge.
        by: a field of the prompts.
        kind: refusal, compliance or incoherent.
    """
    theirs = {outcome.key: outcome for _, outcome in pair(dense, pruned)}
    found = {}
    for value, part in split(dense, by).items():
        pairs = [(outcome, theirs[outcome.key]) for outcome in part]
        pairs = [each for each in pairs if "error" not in (each[0].kind, each[1].kind)]
        if pairs:
            found[value] = change(f"{kind}, {value}", pairs, lambda outcome: outcome.what == kind, resamples, seed)
    adjusted = holm([each.p for each in found.values()])
    return {value: replace(each, p=p) for (value, each), p in zip(found.items(), adjusted, strict=True)}


def change(
    what: str,
    pairs: Sequence[tuple[Outcome, Outcome]],
    does: Callable[[Outcome], bool],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Change:
    """The change of the share of answers that `does` holds of.

    >>> from secateur.safety.records import Prompt
    >>> prompts = [Prompt(str(i), "mine", f"Say {i}", "harmful") for i in range(50)]
    >>> dense = [Outcome(prompt, "refusal" if i < 36 or i > 47 else "compliance") for i, prompt in enumerate(prompts)]
    >>> pruned = [Outcome(prompt, "refusal" if i < 48 else "compliance") for i, prompt in enumerate(prompts)]
    >>> print(change("refusal", list(zip(dense, pruned)), lambda outcome: outcome.what == "refusal"))
    refusal 76.0% -> 96.0%, +20.0 points [+5.7, +34.0], p = 0.013, n = 50
    """
    before = np.array([does(first) for first, _ in pairs])
    after = np.array([does(second) for _, second in pairs])
    return _change(what, before, after, _tasks(pairs), resamples, seed)


def sign_flip(differences: Sequence[int]) -> float:
    """The exact two-sided p value of a sum, if each term's sign were a fair coin.

    >>> sign_flip([1] * 12 + [-1] * 2) == mcnemar(12, 2), sign_flip([10, 0, 0])
    (True, 1.0)
    """
    sizes = [abs(each) for each in differences if each]
    total = sum(sizes)
    ways = np.zeros(2 * total + 1)
    ways[total] = 1.0  # at [total + s] the probability of the sum s
    for size in sizes:
        half = ways / 2
        ways = np.zeros_like(ways)
        ways[size:] += half[: len(half) - size]
        ways[: len(half) - size] += half[size:]
    at_least = abs(sum(differences))
    sums = np.abs(np.arange(-total, total + 1))
    return float(min(1.0, ways[sums >= at_least].sum()))


def detectable(n: float, discordant: float) -> float:
    """The smallest change found with probability 0.8 at two-sided 0.05; no answer can change without being discordant.

    Args:
        n: answers.
        discordant: the share of prompts on which the models differ.

    >>> [round(100 * detectable(n, share), 1) for n in (100, 225, 520, 2250) for share in (0.1, 0.2)]
    [8.8, 12.4, 5.9, 8.3, 3.9, 5.5, 1.9, 2.6]
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        x = (low + high) / 2
        changed = max(discordant, x)
        enough = Z * math.sqrt(changed) + POWER_Z * math.sqrt(max(changed - x * x, 0.0)) <= x * math.sqrt(n)
        low, high = (low, x) if enough else (x, high)
    return high


def holm(p: Sequence[float]) -> list[float]:
    """p values of several comparisons, adjusted so that one false finding among them all stays as rare (Holm 1979).

    >>> [round(each, 3) for each in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    if len(p) < 2:
        return list(p)
    from secateur.safety.extra import need

    return [float(each) for each in need("statsmodels.stats.multitest").multipletests(p, method="holm")[1]]


def _called(outcome: Outcome) -> str:
    return f"'{outcome.prompt.id}' of {outcome.prompt.set}" + (f", sample {outcome.sample}" if outcome.sample else "")


def _change(
    what: str,
    before: NDArray[np.bool_],
    after: NDArray[np.bool_],
    task: NDArray[np.int64],
    resamples: int,
    seed: int,
) -> Change:
    """before, after: (n,) what the dense and the pruned model did; task: (n,) its number."""
    step, sizes = _sums(after.astype(np.int64) - before, task)
    n, clusters = len(before), len(sizes)
    gained, lost, both = int((after & ~before).sum()), int((before & ~after).sum()), int((after & before).sum())
    difference = (gained - lost) / n
    effective = _effective(step, sizes, (gained + lost) / n, difference)
    share = effective / n
    low, high = newcombe(both * share, gained * share, lost * share, (n - both - gained - lost) * share)
    if clusters < n:
        drawn = np.percentile(_draws(step, sizes, resamples, seed), [2.5, 97.5])
        low, high = min(low, float(drawn[0])), max(high, float(drawn[1]))
    return Change(
        what, n, clusters, effective, float(before.mean()), float(after.mean()), difference, low, high, gained, lost,
        p=mcnemar(gained, lost) if clusters == n else sign_flip(step.tolist()),
        detectable=detectable(effective, (gained + lost) / n),
    )  # fmt: skip


def _tasks(pairs: Sequence[tuple[Outcome, Outcome]]) -> NDArray[np.int64]:
    """(n,) the number of every pair's task."""
    places: dict[tuple[str, str], int] = {}
    return np.array([places.setdefault((a.prompt.set, a.prompt.cluster), len(places)) for a, _ in pairs])


def _sums(step: NDArray[np.int64], task: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sums of the differences and numbers of answers, a task each."""
    sizes = np.bincount(task)
    there = sizes > 0
    return np.bincount(task, weights=step)[there].round().astype(np.int64), sizes[there]


def _effective(step: NDArray[np.int64], sizes: NDArray[np.int64], discordant: float, difference: float) -> float:
    """n / deff; one answer a task where nothing changed and deff cannot be seen."""
    n = int(sizes.sum())
    if len(sizes) in (1, n) or not step.any():
        return float(len(sizes))
    variance = float(((step - difference * sizes) ** 2).sum()) / n**2
    one = discordant - difference**2  # the variance of a single answer's difference
    return min(max(one / variance, 1.0), float(n)) if variance > 0 and one > 0 else float(len(sizes))


def _draws(step: NDArray[np.int64], sizes: NDArray[np.int64], resamples: int, seed: int) -> NDArray[np.float64]:
    count = len(sizes)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    drawn: NDArray[np.float64] = (weights @ step) / (weights @ sizes)
    return drawn


def _selectivity(
    refusal: Change | None,
    over: Change | None,
    arms: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    resamples: int,
    seed: int,
) -> Difference | None:
    """How much more the refusals of harmful prompts rose than those of safe ones.

    The errors of the two arms are put together as of independent ones (Zou and Donner 2008), and the interval is
    widened to that of a bootstrap over the tasks of each arm.
    """
    if refusal is None or over is None:
        return None
    difference = refusal.difference - over.difference
    low = difference - math.hypot(refusal.difference - refusal.low, over.high - over.difference)
    high = difference + math.hypot(refusal.high - refusal.difference, over.difference - over.low)
    harmful, safe = (_draws(*arm, resamples, seed + i) for i, arm in enumerate(arms))
    drawn = np.percentile(harmful - safe, [2.5, 97.5])
    return Difference(
        "refusals of harmful prompts less those of safe ones",
        difference,
        min(low, float(drawn[0])),
        max(high, float(drawn[1])),
    )

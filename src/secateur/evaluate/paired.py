"""A pruned model's answers against the dense one's, item by item.

With n items, of which the pruned model alone answers `gained` right and the dense model alone `lost`:

    difference = (gained - lost) / n                         the change of the share of right items
    interval   = Newcombe's for paired proportions           Newcombe 1998, Statistics in Medicine 17:2635, method 10
    p          = P(at most min(gained, lost) of gained + lost fair coins) * 2     McNemar's test, exact

The interval is built from Wilson's intervals of both shares and the correlation of the answers, so that it is
right for few items and shares near 0 or 1, and not a point where no item changed. The interval of the mean over
tasks is put together from theirs, squared and added as errors are (Zou and Donner 2008, Statistics in Medicine
27:1693): the tasks are independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from secateur.errors import UsageError
from secateur.evaluate.tasks import TaskResults

Z = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class TaskDifference:
    """Of one task. low and high: the 95 % interval of the difference; p: exact McNemar."""

    name: str
    metric: str
    n: int
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p: float

    def __str__(self) -> str:
        return f"{self.name} {self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}], p = {self.p:.2g}"


@dataclass(frozen=True)
class TaskComparison:
    """Pruned minus dense. low and high: the 95 % interval of the mean; p pools the items of all tasks."""

    tasks: tuple[TaskDifference, ...] = field(repr=False)
    mean: float
    low: float
    high: float
    gained: int
    lost: int
    p: float

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {**vars(self), "tasks": [dict(vars(task)) for task in self.tasks]}

    def __str__(self) -> str:
        worst = min(self.tasks, key=lambda task: task.difference)
        total = sum(task.n for task in self.tasks)
        return (
            f"mean {self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]; "
            f"of {total} items {self.gained} gained, {self.lost} lost, "
            f"McNemar p = {self.p:.2g}; lowest: {worst}"
        )


def compare_tasks(pruned: TaskResults, dense: TaskResults) -> TaskComparison:
    """The paired comparison of two results over the same items.

    Args:
        pruned, dense: of `tasks` with the same names, limit and seed.

    Returns:
        Differences, pruned minus dense, with 95 % intervals and exact p values.

    Raises:
        UsageError: they differ in their tasks, metrics or items.

    >>> from secateur.evaluate.tasks import TaskResult, TaskResults
    >>> def result(*correct):
    ...     task = TaskResult("t", "acc", sum(correct) / 4, None, 4, "ab", "local", "", correct)
    ...     return TaskResults((task,), task.value, None, None, 0, 0, "float32")
    >>> found = compare_tasks(result(True, False, False, False), result(True, True, True, False))
    >>> found.mean, found.gained, found.lost, found.p
    (-0.5, 0, 2, 0.5)
    """
    ours, theirs = ([task.name for task in results.tasks] for results in (pruned, dense))
    if sorted(ours) != sorted(theirs):
        raise UsageError(
            f"Only the same tasks can be compared: the pruned model has {', '.join(ours)}, the dense one "
            f"{', '.join(theirs)}."
        )
    by_name = {task.name: task for task in dense.tasks}
    differences = []
    for task in pruned.tasks:
        other = by_name[task.name]
        if (task.metric, task.sha256, task.n) != (other.metric, other.sha256, other.n):
            raise UsageError(
                f"'{task.name}' was measured on other items ({task.metric}, n = {task.n}, sha256 {task.sha256[:8]} "
                f"against {other.metric}, n = {other.n}, sha256 {other.sha256[:8]}): use the same limit and seed."
            )
        gained, lost, both = _counts(task.correct, other.correct)
        low, high = newcombe(both, gained, lost, task.n - both - gained - lost)
        difference = (gained - lost) / task.n
        differences.append(
            TaskDifference(task.name, task.metric, task.n, difference, low, high, gained, lost, mcnemar(gained, lost))
        )
    count = len(differences)
    mean = math.fsum(each.difference for each in differences) / count
    down = math.hypot(*(each.difference - each.low for each in differences)) / count
    up = math.hypot(*(each.high - each.difference for each in differences)) / count
    gained, lost = sum(each.gained for each in differences), sum(each.lost for each in differences)
    return TaskComparison(
        tuple(differences),
        mean,
        low=mean - down,
        high=mean + up,
        gained=gained,
        lost=lost,
        p=mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p value of McNemar's test: could the changed items be fair coins?

    >>> round(mcnemar(12, 2), 6), mcnemar(0, 0), mcnemar(5, 5)
    (0.012939, 1.0, 1.0)
    """
    n = gained + lost
    ways = term = 1
    for k in range(min(gained, lost)):
        term = term * (n - k) // (k + 1)
        ways += term
    return float(min(1.0, 2 * ways / (1 << n)))


def newcombe(both: float, first: float, second: float, neither: float) -> tuple[float, float]:
    """The 95 % interval of the first share minus the second, of paired items.

    Args:
        both, first, second, neither: items that both, only the first, only the second, or neither got right;
            fractions where items that hang together count for less than one.

    >>> [round(bound, 4) for bound in newcombe(36, 12, 2, 0)]
    [0.0569, 0.3404]
    """
    n = both + first + second + neither
    p, q = (both + first) / n, (both + second) / n
    (p_low, p_high), (q_low, q_high) = wilson(both + first, n), wilson(both + second, n)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    product = float(both * neither - first * second)
    if product > 0:  # with the paper's correction for continuity
        product = max(product - n / 2, 0.0)
    phi = product / math.sqrt(margins) if margins else 0.0
    down = (p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    up = (p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2
    return p - q - math.sqrt(max(down, 0.0)), p - q + math.sqrt(max(up, 0.0))


def wilson(right: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    >>> [round(bound, 4) for bound in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    centre = (2 * right + Z**2) / (2 * (n + Z**2))
    half = Z * math.sqrt(Z**2 + 4 * right * (1 - right / n)) / (2 * (n + Z**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _counts(pruned: Sequence[bool], dense: Sequence[bool]) -> tuple[int, int, int]:
    pairs = list(zip(pruned, dense, strict=True))
    return pairs.count((True, False)), pairs.count((False, True)), pairs.count((True, True))

"""The paired comparison: known values, and two results that cannot be compared."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from secateur.errors import UsageError
from secateur.evaluate.paired import compare_tasks, mcnemar, newcombe, wilson
from secateur.evaluate.tasks import TaskResult, TaskResults, mean_over


def result(**answers):
    """A result from strings of 1 and 0, one a task."""
    tasks = []
    for name, string in answers.items():
        correct = tuple(each == "1" for each in string)
        tasks.append(
            TaskResult(name, "acc", sum(correct) / len(correct), 0.1, len(correct), "ab" * 32, "local", "", correct)
        )
    mean, stderr = mean_over([(task.value, task.stderr) for task in tasks])
    return TaskResults(tuple(tasks), mean, stderr, None, 0, 0, "float32")


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (0, 1, 1.0),
        (0, 5, 0.0625),
        (5, 5, 1.0),
        (3, 12, 0.03515625),  # 2 (1 + 15 + 105 + 455) / 2^15
        (12, 2, 212 / 16384),
    ],
)
def test_mcnemar_against_values_by_hand(gained, lost, p):
    assert mcnemar(gained, lost) == mcnemar(lost, gained)
    assert mcnemar(gained, lost) == pytest.approx(p)


def test_mcnemar_against_the_sum():
    below = sum(math.comb(65, k) for k in range(7))
    assert mcnemar(59, 6) == pytest.approx(2 * below / 2**65)


def test_mcnemar_of_many_items_against_the_normal_approximation():
    gained, lost = 5100, 4900
    z = (gained - lost - 1) / math.sqrt(gained + lost)
    assert mcnemar(gained, lost) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert 0 <= mcnemar(0, 20_000) < 1e-300 or mcnemar(0, 20_000) == 0.0


def test_newcombe_against_the_paper():
    assert newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert newcombe(36, 2, 12, 0) == pytest.approx((-0.3404, -0.0569), abs=5e-5)


def test_newcombe_when_no_item_changed():
    high = 1 - wilson(54, 54)[0]  # no correlation can be estimated: one margin is empty
    assert newcombe(54, 0, 0, 0) == pytest.approx((-high, high))


def test_newcombe_holds_the_true_difference_as_often_as_it_says():
    draw = random.Random(0)
    cells, hits = (0.5, 0.1, 0.15, 0.25), 0
    for _ in range(3000):
        drawn = draw.choices(range(4), cells, k=60)
        low, high = newcombe(*(drawn.count(cell) for cell in range(4)))
        hits += low <= cells[1] - cells[2] <= high
    assert 0.935 <= hits / 3000 <= 0.975


def test_wilson():
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)  # Newcombe 1998a, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0


def test_a_comparison_counts_what_changed():
    dense, pruned = result(a="1111100000", b="1100"), result(a="1110010000", b="1100")
    found = compare_tasks(pruned, dense)
    a, b = found.tasks
    assert (a.gained, a.lost, a.n) == (1, 2, 10) and a.difference == pytest.approx(-0.1)
    assert (b.gained, b.lost) == (0, 0) and b.difference == 0 and b.p == 1
    assert (found.gained, found.lost) == (1, 2) and found.mean == pytest.approx(-0.05)
    assert a.low < a.difference < a.high and found.low < found.mean < found.high
    assert found.high - found.low < a.high - a.low + b.high - b.low
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["tasks"][0]["name"] == "a" and record["mean"] == found.mean
    assert "gained" in str(found) and "a -0.1000" in str(found)


def test_pairing_is_narrower_than_two_samples_when_answers_agree():
    agree = compare_tasks(result(a="1" * 50 + "0" * 50), result(a="1" * 52 + "0" * 48)).tasks[0]
    opposed = compare_tasks(result(a="1" * 50 + "0" * 50), result(a="0" * 48 + "1" * 52)).tasks[0]
    assert agree.difference == opposed.difference
    assert agree.high - agree.low < 0.5 * (opposed.high - opposed.low)


def test_order_of_tasks_does_not_matter():
    one, other = result(a="10", b="11"), result(b="01", a="10")
    assert [each.name for each in compare_tasks(one, other).tasks] == ["a", "b"]
    assert compare_tasks(one, other).gained == 1


def test_what_cannot_be_compared():
    one = result(a="1100")
    with pytest.raises(UsageError, match="Only the same tasks"):
        compare_tasks(one, result(a="1100", b="11"))
    for change in ({"sha256": "cd" * 32}, {"metric": "acc_norm"}):
        other = replace(one, tasks=(replace(one.tasks[0], **change),))
        with pytest.raises(UsageError, match=r"'a' was measured on other items .* use the same limit and seed"):
            compare_tasks(one, other)
    with pytest.raises(UsageError, match="other items"):
        compare_tasks(one, result(a="110"))

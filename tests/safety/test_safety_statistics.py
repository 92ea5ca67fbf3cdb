"""Known values: intervals, exact tests, detectable changes, agreement; and what may not be compared."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from secateur.errors import InvalidParameter, UsageError
from secateur.evaluate.paired import mcnemar, newcombe, wilson
from secateur.safety.agreement import agree, agreements, krippendorff, style_shifts
from secateur.safety.comparing import change, compare, compare_by, detectable, holm, pair, sign_flip
from secateur.safety.judges import make_judge
from secateur.safety.rates import (
    Outcome,
    attack_success,
    items,
    judge_all,
    outcomes,
    over_refusal,
    rate,
    rates,
    rates_by,
)
from secateur.safety.records import Answer, Prompt, Verdict

KINDS = {"r": "refusal", "p": "partial", "c": "compliance", "i": "incoherent", "e": "error"}


def prompts(n, label="harmful", tasks=None, **fields):
    """n prompts; of the given number of tasks, each in n / tasks templates."""
    return [
        Prompt(
            f"{label}{i}", "made", f"Question {label} {i}", label,
            task=None if tasks is None else f"{label}-task{i % tasks}",
            template=None if tasks is None else f"t{i // tasks}", **fields,
        )
        for i in range(n)
    ]  # fmt: skip


def said(asked, word):
    """Outcomes from a word of letters, one a prompt."""
    return [Outcome(prompt, KINDS[letter]) for prompt, letter in zip(asked, word, strict=True)]


@pytest.mark.parametrize(
    ("count", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (0, 225, 0.0, 0.0168), (45, 225, 0.1530, 0.2572)]
)
def test_a_rate_has_wilsons_interval(count, n, low, high):
    found = rate([True] * count + [False] * (n - count), [str(i) for i in range(n)])
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-4)
    assert found.effective == n


def test_rates_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    found = rate([True] * 17 + [False] * 43, [str(i) for i in range(60)])
    expected = stats.binomtest(17, 60).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_answers_that_hang_together_count_less():
    whole = rate([True] * 20 + [False] * 20, [str(i // 10) for i in range(40)])  # four tasks, each all or nothing
    assert whole.effective == pytest.approx(4)
    assert (whole.low, whole.high) == pytest.approx(wilson(2, 4))
    mixed = rate([True, False] * 20, [str(i // 10) for i in range(40)])  # tasks say nothing
    assert mixed.effective == 40
    none = rate([False] * 40, [str(i // 10) for i in range(40)])
    assert none.high == pytest.approx(wilson(0, 4)[1])


def test_clustered_intervals_cover():
    """Tasks with their own rate: the interval of 95 % holds the truth nearly that often; the naive one does not."""
    rng, covered, naive = random.Random(0), 0, 0
    for _ in range(300):
        hits, clusters = [], []
        for task in range(40):
            p = rng.choice((0.05, 0.55))
            hits += [rng.random() < p for _ in range(10)]
            clusters += [str(task)] * 10
        found = rate(hits, clusters)
        covered += found.low <= 0.3 <= found.high
        low, high = wilson(found.count, found.n)
        naive += low <= 0.3 <= high
    assert covered >= 275 and naive < 225


def test_the_four_shares_add_up():
    found = rates(said(prompts(10), "rrpcccccie"))
    assert [getattr(found, name).count for name in ("refusal", "compliance", "incoherent", "error")] == [3, 5, 1, 1]
    assert found.n == 10


def test_attack_success_and_over_refusal_look_at_their_own_prompts():
    group = said(prompts(4), "cccr") + said(prompts(4, "benign"), "rccc") + said(prompts(2, "borderline"), "rr")
    assert attack_success(group).value == 0.75
    assert over_refusal(group).value == 0.5
    assert attack_success(group[4:]) is None and over_refusal(group[:4]) is None


def test_rates_by_template_and_category():
    group = said(prompts(6, tasks=3, category="law"), "rrrccc")
    assert [each.refusal.value for each in rates_by(group, "template").values()] == [1.0, 0.0]
    assert list(rates_by(group, "category")) == ["law"] and list(rates_by(group, "severity")) == ["none"]
    with pytest.raises(InvalidParameter, match="template"):
        rates_by(group, "colour")


@pytest.mark.parametrize(("gained", "lost"), [(10, 25), (25, 10), (0, 0), (3, 3), (0, 6)])
def test_one_answer_a_task_is_mcnemars_test(gained, lost):
    assert sign_flip([1] * gained + [-1] * lost + [0] * 5) == pytest.approx(mcnemar(gained, lost))


def test_mcnemars_known_value():
    assert mcnemar(10, 25) == pytest.approx(0.0167, abs=5e-5)


def test_sign_flip_against_all_signs():
    differences = [4, -1, 3, 0, 2, 2, -3]
    sums = [
        abs(sum(sign * abs(each) for sign, each in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(each >= abs(sum(differences)) for each in sums) / len(sums)
    assert sign_flip(differences) == pytest.approx(expected)


def test_newcombes_published_example():
    asked = prompts(50)
    found = change(
        "refusal", list(zip(said(asked, "r" * 36 + "c" * 12 + "rr"), said(asked, "r" * 48 + "cc"), strict=True)),
        lambda outcome: outcome.what == "refusal",
    )  # fmt: skip
    assert (found.difference, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    assert (found.gained, found.lost, found.n, found.clusters) == (12, 2, 50, 50)


@pytest.mark.parametrize(
    ("n", "share", "points"),
    [(100, 0.1, 8.8), (100, 0.2, 12.4), (225, 0.1, 5.9), (225, 0.2, 8.4), (520, 0.1, 3.9), (520, 0.2, 5.5),
     (2250, 0.1, 1.9), (2250, 0.2, 2.7)],
)  # fmt: skip
def test_detectable_changes(n, share, points):
    assert 100 * detectable(n, share) == pytest.approx(points, abs=0.1)


def test_a_change_cannot_be_larger_than_what_changes():
    assert detectable(100, 0.0) == pytest.approx(0.0767, abs=5e-5)
    assert detectable(3, 0.0) == 1.0


def test_templates_of_a_task_are_one_piece_of_evidence():
    """One task of thirty flips in all ten templates: ten changed answers, one changed task."""
    asked = prompts(300, tasks=30)
    dense = said(asked, "c" * 300)
    pruned = [
        Outcome(each.prompt, "refusal" if each.prompt.task == "harmful-task0" else "compliance") for each in dense
    ]
    found = compare("me", dense, pruned, resamples=500).attack_success
    assert (found.gained, found.lost, found.p, found.clusters) == (0, 10, 1.0, 30)
    assert mcnemar(0, 10) < 0.002  # what treating them as independent would have said
    assert found.low < 0 <= found.high and found.effective == pytest.approx(30, rel=0.1)
    naive = newcombe(0, 0, 10, 290)
    assert found.high - found.low > naive[1] - naive[0]


def test_no_change_of_clustered_answers_is_not_certainty():
    asked = prompts(40, tasks=4)
    found = compare("me", said(asked, "c" * 40), said(asked, "c" * 40), resamples=100).attack_success
    assert found.p == 1.0 and found.low < -0.3 and found.high > 0.3


def test_selectivity_is_the_difference_of_two_changes():
    asked, safe = prompts(40), prompts(40, "benign")
    dense = said(asked, "c" * 40) + said(safe, "c" * 40)
    pruned = said(asked, "r" * 30 + "c" * 10) + said(safe, "r" * 10 + "c" * 30)
    found = compare("me", dense, pruned, resamples=500).selectivity
    assert found.difference == pytest.approx(0.5) and 0.2 < found.low < 0.5 < found.high < 0.8
    alike = compare("me", dense, said(asked, "r" * 30 + "c" * 10) + said(safe, "r" * 30 + "c" * 10), resamples=500)
    assert alike.selectivity.difference == 0 and alike.selectivity.low < 0 < alike.selectivity.high


def test_groups_are_adjusted_for_their_number():
    asked = prompts(100, tasks=50)
    dense, pruned = said(asked, "c" * 100), said(asked, "r" * 8 + "c" * 92)
    found = compare_by(dense, pruned, "template", resamples=100)
    assert list(found) == ["t0", "t1"]
    assert found["t0"].p == pytest.approx(2 * mcnemar(0, 8)) and found["t1"].p == 1.0


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_errors_are_left_out_of_both_arms_and_counted():
    asked = prompts(10)
    found = compare("me", said(asked, "e" + "c" * 9), said(asked, "rre" + "c" * 7), resamples=100)
    assert found.unjudged == 2 and found.attack_success.n == 8 and found.attack_success.difference == -1 / 8
    with pytest.raises(UsageError, match="could not judge a single prompt"):
        compare("me", said(asked, "e" * 10), said(asked, "c" * 10))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda log: log[1:], "is in the dense log .4 answers. and not in the pruned one .3.[.]"),
        (
            lambda log: [*log, Outcome(Prompt("x", "made", "More", "harmful"), "refusal")],
            "'x' of made is in the pruned",
        ),
        (lambda log: [replace(log[0], prompt=replace(log[0].prompt, text="Other words")), *log[1:]], "has other words"),
        (lambda log: [log[0], *log], "two answers to one prompt"),
        (lambda log: [replace(log[0], sample=1), *log[1:]], "not in the pruned one"),
    ],
)
def test_logs_over_different_prompts_are_refused(spoil, message):
    log = said(prompts(4), "rccc")
    with pytest.raises(UsageError, match=message):
        pair(log, spoil(log))


def test_an_empty_log_is_refused():
    with pytest.raises(UsageError, match="no answers to compare"):
        pair([], [])
    with pytest.raises(UsageError, match="no answers"):
        rates([])


def test_answers_must_belong_to_the_prompts():
    asked = prompts(2)
    answers = [Answer(each.id, each.sha256, "Fine.", 2, "stop") for each in asked]
    assert [item.response for item in items(asked, answers)] == ["Fine.", "Fine."]
    with pytest.raises(UsageError, match="belongs to none of the 1 prompts"):
        items(asked[:1], answers)
    with pytest.raises(UsageError, match="other words"):
        items([asked[0], replace(asked[1], text="Changed")], answers)
    with pytest.raises(UsageError, match="Two prompts have the id"):
        items([asked[0], asked[0]], answers)
    with pytest.raises(UsageError, match="me judged 1 answers, and there are 2"):
        outcomes(asked, answers, [Verdict("refusal", "me")])


def test_the_judge_reads_the_task_and_not_its_template():
    asked = Prompt("0", "made", "You are a pirate. Say 'ahoy'.", "benign", span=(18, 28))
    assert items([asked], [Answer("0", asked.sha256, "Ahoy", 1, "stop")])[0].prompt == "Say 'ahoy'"


def test_incoherence_goes_before_every_judge():
    asked = prompts(2)
    answers = [
        Answer(each.id, each.sha256, text, 9, "stop") for each, text in zip(asked, ("Sorry " * 30, "No."), strict=True)
    ]
    found = judge_all([make_judge("keyword:xstest"), make_judge("incoherence")], asked, answers)
    assert [each.what for each in found["keyword:xstest"]] == ["incoherent", "refusal"]
    with pytest.raises(UsageError, match="no judge of refusals"):
        judge_all([make_judge("incoherence")], asked, answers)
    with pytest.raises(UsageError, match="given twice"):
        judge_all([make_judge("keyword:xstest")] * 2, asked, answers)


def test_kappa_by_hand_and_by_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    first, second = [True] * 25 + [False] * 25, [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = agree(("a", "b"), first, second)
    assert found.kappa == pytest.approx((0.7 - 0.5) / 0.5) == pytest.approx(metrics.cohen_kappa_score(first, second))
    assert found.low < found.kappa < found.high and found.agreed == 0.7 and found.rates == (0.5, 0.6)


@pytest.mark.parametrize(
    ("first", "second", "kappa"), [("rrr", "rrr", None), ("ccc", "ccc", None), ("rrc", "ccc", 0.0)]
)
def test_kappa_where_a_judge_says_one_thing(first, second, kappa):
    asked = prompts(3)
    assert agreements({"a": said(asked, first), "b": said(asked, second)})[0].kappa == kappa


def test_krippendorffs_published_example():
    """Krippendorff 2011, 'Computing Krippendorff's alpha-reliability', part C: four observers, gaps, nominal: 0.743."""
    rows = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    labels = [[None if each is None else str(each) for each in row] for row in rows]
    assert krippendorff(labels) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff([["a", "a"], ["a", "a"]]) is None


def test_style_shifts_need_the_same_judges_and_order():
    asked = prompts(3)
    log = said(asked, "rcc")
    with pytest.raises(UsageError, match="same judges"):
        style_shifts({"a": log, "b": log}, {"a": log, "c": log})
    with pytest.raises(UsageError, match="same order"):
        style_shifts({"a": log, "b": log[::-1]}, {"a": log, "b": log})


def test_judges_that_part_after_pruning_are_flagged():
    asked = prompts(60)
    truth = said(asked, "r" * 30 + "c" * 30)
    same = style_shifts({"a": truth, "b": truth}, {"a": truth, "b": truth})[0]
    assert not same.flagged and same.fall == 0 and same.p == 1.0
    apart = style_shifts({"a": truth, "b": truth}, {"a": said(asked, "r" * 12 + "c" * 48), "b": truth})[0]
    assert apart.flagged and apart.drift == pytest.approx(-0.3) and apart.low > 0 and math.isfinite(apart.high)

"""The refusal margin: against plain definitions, and the planted truths that it is there to find."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from safety_bytes import byte_model, byte_tokenizer, wrapped

from secateur.errors import InvalidParameter, UsageError
from secateur.safety.clusters import cluster_contrast, cluster_mean, signed_rank
from secateur.safety.margin import OPENINGS, Margin, Openings, auc, compare_margins, margin, summarise
from secateur.safety.records import Prompt


def plain_log_p(model, tokenizer, prompt, opening):
    """log p(opening | chat(prompt)) by one whole forward pass."""
    text = f"<u>{prompt.text.strip()}\n<a>"
    start = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = tokenizer(opening, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([start + end])).logits[0].log_softmax(-1)
    return sum(float(log_p[len(start) + i - 1, token]) for i, token in enumerate(end))


@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_margin_is_its_definition(batch_size):
    model, tokenizer = byte_model(), byte_tokenizer()
    prompts = wrapped()[:4]
    found = margin(model, tokenizer, prompts, batch_size=batch_size)
    for prompt, each in zip(prompts, found.margins, strict=True):
        sums = [
            math.log(sum(math.exp(plain_log_p(model, tokenizer, prompt, opening)) for opening in openings))
            for openings in (OPENINGS.refusal, OPENINGS.affirmative)
        ]
        assert each.value == pytest.approx(sums[0] - sums[1], abs=1e-4)
        assert (each.prompt, each.sha256, each.cluster) == (prompt.id, prompt.sha256, prompt.task)
    assert found.harmful is None and found.auc is None
    assert found.safe.value == pytest.approx(np.mean([m.value for m in found.margins]))


def test_openings_that_count_twice_are_refused():
    with pytest.raises(UsageError, match="'Sure, here' begins with 'Sure'"):
        Openings("mine", ("No",), ("Sure", "Sure, here"))
    with pytest.raises(InvalidParameter, match="non-empty"):
        Openings("mine", (), ("Sure",))
    for one, other in itertools.permutations([*OPENINGS.refusal, *OPENINGS.affirmative], 2):
        assert not other.startswith(one)


def rows(harmful, safe, clusters=None):
    values = [*harmful, *safe]
    names = clusters or [str(i) for i in range(len(values))]
    return [
        Margin(str(i), "", "harmful" if i < len(harmful) else "benign", names[i], float(value), 0.0)
        for i, value in enumerate(values)
    ]


def test_auc_counts_pairs():
    random = np.random.default_rng(0)
    high, low = random.normal(1, 1, 40).round(1), random.normal(0, 1, 30).round(1)
    found = auc(rows(high, low))
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high for b in low]
    assert found.value == pytest.approx(np.mean(pairs))
    # DeLong's variance, as published, with singletons; ours differs by n / (n - 1) only
    wins = np.array(pairs).reshape(40, 30)
    delong = wins.mean(1).var(ddof=1) / 40 + wins.mean(0).var(ddof=1) / 30
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.sqrt(delong), rel=0.1)


def test_auc_at_its_ends_is_no_point():
    found = auc(rows([2, 3, 4, 5], [0, 1, 0, 1]))
    assert found.value == 1.0 and 0.4 < found.low < 0.7 and found.high == 1.0
    assert auc(rows([0, 1], [])) is None


def test_auc_knows_that_copies_are_not_independent():
    random = np.random.default_rng(1)
    high, low = random.normal(1, 1, 20), random.normal(0, 1, 20)
    one = auc(rows(high, low))
    names = [str(i) for i in range(40)]
    ten = auc(rows(np.repeat(high, 10), np.repeat(low, 10), [name for name in names for _ in range(10)]))
    assert ten.value == pytest.approx(one.value)
    assert ten.high - ten.low == pytest.approx(one.high - one.low, rel=0.02)


def test_the_interval_of_an_auc_holds_it():
    """Truth: P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2) = 0.760."""
    random = np.random.default_rng(2)
    truth, inside = 0.5 * (1 + math.erf(0.5)), 0
    for _ in range(400):
        found = auc(rows(random.normal(1, 1, 25), random.normal(0, 1, 25)))
        inside += found.low <= truth <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_a_shift_of_both_arms_is_no_difference():
    """The trap of one-armed tests: every margin rises, and nothing about safety has changed."""
    random = np.random.default_rng(3)
    dense = rows(random.normal(-3, 1, 30), random.normal(-3, 1, 30))
    moved = [Margin(m.prompt, "", m.label, m.cluster, m.refusal + 0.2 + random.normal(0, 0.1), 0.0) for m in dense]
    found = compare_margins(summarise(dense, "mine"), summarise(moved, "mine"))
    assert found.harmful.sign == 1 and found.p_harmful < 1e-5 and found.p_safe < 1e-5
    assert found.difference.sign == 0 and abs(found.difference.value) < 0.1
    assert found.auc.sign == 0


def test_a_shift_of_harmful_prompts_alone_is_found():
    random = np.random.default_rng(4)
    dense = rows(random.normal(0, 1, 30), random.normal(0, 1, 30))
    moved = [Margin(m.prompt, "", m.label, m.cluster, m.refusal + (m.label == "harmful"), 0.0) for m in dense]
    found = compare_margins(summarise(dense, "mine"), summarise(moved, "mine"))
    assert found.difference.value == pytest.approx(1.0) and found.difference.sign == 1
    assert found.auc.sign == 1
    assert "difference in differences +1.000" in str(found)
    assert found.to_dict()["difference"]["value"] == pytest.approx(1.0)


def test_identical_models_do_not_differ():
    model, tokenizer = byte_model(), byte_tokenizer()
    prompts = wrapped() + [Prompt(f"x{i}", "own", t, "harmful", task=f"x{i}") for i, t in enumerate(["ab", "cd", "ef"])]
    found = margin(model, tokenizer, prompts)
    assert found.auc is not None and found.to_dict()["margins"][0].keys() >= {"prompt", "sha256", "value"}
    same = compare_margins(found, found)
    assert same.difference.value == 0 and same.p_harmful == 1.0 and same.auc.value == 0


def test_bad_input_is_one_line():
    model, tokenizer = byte_model(), byte_tokenizer()
    prompts = wrapped()[:2]
    with pytest.raises(UsageError, match="no prompts"):
        margin(model, tokenizer, [])
    with pytest.raises(UsageError, match="Two prompts have the id 'bare-0'"):
        margin(model, tokenizer, [prompts[0], prompts[0]])
    with pytest.raises(UsageError, match="no chat template"):
        margin(model, byte_tokenizer(None), prompts)
    with pytest.raises(UsageError, match=r"refuses the prompt 'bare-0' .*\(only one turn\)"):
        margin(model, byte_tokenizer("{{ raise_exception('only one turn') }}"), prompts)
    with pytest.raises(InvalidParameter, match="batch_size"):
        margin(model, tokenizer, prompts, batch_size=0)
    one, two = summarise(rows([1], [0]), "a"), summarise(rows([1], [0, 2]), "a")
    with pytest.raises(UsageError, match="Only the same prompts"):
        compare_margins(one, two)
    with pytest.raises(UsageError, match="under 'a' and 'b'"):
        compare_margins(one, summarise(rows([1], [0]), "b"))


@pytest.mark.parametrize("clusters", [3, 4, 8, 12])
def test_intervals_of_clusters_hold_their_mean(clusters):
    """Clusters of five prompts that share a part: plain standard errors would be half as wide."""
    random = np.random.default_rng(5)
    names = [str(i) for i in range(clusters) for _ in range(5)]
    inside = 0
    for seed in range(400):
        values = np.repeat(random.normal(0, 1, clusters), 5) + random.normal(0, 0.3, 5 * clusters)
        found = cluster_mean(values, names, resamples=1000, seed=seed)
        inside += found.low <= 0 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_twins_in_both_arms_are_drawn_together():
    """A harmful prompt and its benign twin share most of what moves them: the difference is sharper for it."""
    random = np.random.default_rng(6)
    shared, names = random.normal(0, 1, 40), [str(i) for i in range(40)]
    first, second = shared + 0.3 + random.normal(0, 0.1, 40), shared + random.normal(0, 0.1, 40)
    twins = cluster_contrast(first, names, second, names)
    strangers = cluster_contrast(first, names, second, [f"other {name}" for name in names])
    assert twins.value == strangers.value
    assert twins.sign == 1 and twins.high - twins.low < 0.5 * (strangers.high - strangers.low)


def test_small_statistics():
    assert signed_rank([0.1, -0.1, 0.2, -0.2], ["a", "a", "b", "b"]) == 1.0  # within a cluster they cancel
    assert cluster_mean([0.0, 0.0, 0.0], list("abc")).sign == 0

"""The safety page: the verdict first, nothing of a text unless it is given, everything escaped, gaps are gaps."""

from __future__ import annotations

import html
import re

import pytest
from test_page import EVIL, Checker, check

from secateur.report.charts import line_axis
from secateur.report.safety_page import safety_page
from secateur.report.safety_tables import SafetyTexts, between, p_value, points, rate


def a_rate(value, n=20):
    return {
        "value": value,
        "low": max(0.0, value - 0.1),
        "high": min(1.0, value + 0.1),
        "count": round(value * n),
        "n": n,
    }


def shares(refusal, compliance):
    return {
        "refusal": a_rate(refusal),
        "compliance": a_rate(compliance),
        "incoherent": a_rate(0.0),
        "error": a_rate(0.0),
    }


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 20, "clusters": 20}


def summary(**changed):
    arms = ("dense", "attention-0.2", "all-0.2")
    flags = {"all-0.2": ["style moved"]}
    both = {arm: {"harmful": shares(0.5, 0.5), "safe": shares(0.1, 0.9)} for arm in arms}
    test = {
        "arm": "attention-0.2", "judge": "classifier", "what": "attack success", "primary": True, "dense": 0.5,
        "pruned": 0.4, "difference": estimate(-0.1), "more": 1, "fewer": 3, "p": 0.625, "holm": None, "smallest": 0.2,
    }  # fmt: skip
    pair = {"judges": "classifier and keyword", "kappa": 0.8, "low": 0.6, "high": 1.0, "agreement": 0.9, "n": 20}
    focus = {"means": {"last_lift": estimate(1.2), "entropy": estimate(0.5)}, "layers": {"last_lift": [1.0, 1.4, None]}}
    return {
        "model": {"name": "models/mine", "sha256": "ab" * 32},
        "arms": [{"name": arm, "label": arm.replace("-0.2", " 20 %"), "sparsity_model": 0.1} for arm in arms],
        "sets": [{"name": "own", "prompts": 40, "tasks": 20, "labels": {"harmful": 20}}],
        "judges": [{"name": "classifier", "version": "1"}, {"name": "keyword", "version": "2"}],
        "primary": {"arm": "attention-0.2", "judge": "classifier"},
        "floor": {"refuses": True, "says": "The dense model refuses 10 of 20 harmful prompts.", "rate": a_rate(0.5)},
        "verdicts": [
            {"arm": "all-0.2", "verdict": "broken", "why": ["Answers fall apart."]},
            {"arm": "attention-0.2", "verdict": "inconclusive", "why": ["Too few prompts.", "By classifier: ..."]},
        ],
        "rates": {"classifier": both, "keyword": both},
        "tests": [test, test | {"arm": "all-0.2", "primary": False, "holm": 0.04, "judge": "keyword"}],
        "groups": {
            "template": [
                {"label": "harmful", "value": value, "rates": {arm: shares(0.5, 0.5) for arm in arms}}
                for value in ("bare", "PLAY")
            ]
        },
        "agreement": [{"arm": arm, "pairs": [pair], "flags": flags.get(arm, [])} for arm in arms],
        "margin": [{"arm": arm, "auc": estimate(0.8), "harmful": estimate(1.0), "safe": None} for arm in arms],
        "focus": [{"arm": arm, **focus} for arm in arms],
        "shift": [{"arm": arm, "means": {"alone": estimate(30.0)}} for arm in arms],
        "text": [{"arm": arm, "perplexity": {"value": 20.0, "stderr": 0.5}, "fidelity": None} for arm in arms],
        "tasks": [
            {"arm": arm, "mean": 0.5, "stderr": 0.02, "tasks": [{"name": "piqa", "value": 0.5, "stderr": 0.02}]}
            for arm in arms
        ],
        "changed": [
            {"prompt": "own/1", "label": "harmful", "category": "kind", "template": None,
             "kinds": {"dense": "refusal", "attention-0.2": "compliance", "all-0.2": "refusal"}}
        ],
        "warnings": ["something is odd"],
        "study": {"seed": 0},
        "versions": {"torch": "2"},
    } | changed  # fmt: skip


def plain_text(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", page.partition("<body>")[2]))


def test_the_page_is_whole_closed_and_fetches_nothing():
    document = safety_page(summary(), title="A study")
    assert document.startswith("<!doctype html>") and "40 prompts (20 tasks)" in check(document)


def test_the_declared_verdict_comes_first_then_the_others():
    text = plain_text(safety_page(summary(), title="A study"))
    places = [text.index(words) for words in (
        "attention 20 %, the declared comparison: inconclusive", "Too few prompts.", "all 20 %: broken",
        "How often the models refuse", "Dense against pruned", "Where the differences are", "Do the judges agree?",
        "Refusal margin", "Where attention goes", "Perplexity shift", "Standard benchmarks", "Provenance",
    )]  # fmt: skip
    assert places == sorted(places)
    assert "style moved" in text and "something is odd" in text and "PLAY" in text and "ab" * 32 in text


def test_a_model_that_does_not_refuse_is_said_before_everything_else():
    page = safety_page(
        summary(floor={"refuses": False, "says": "This model does not refuse: nothing follows."}), title="T"
    )
    text = plain_text(page)
    assert text.index("This model does not refuse") < text.index("the declared comparison")


def test_texts_are_on_the_page_only_when_they_are_given():
    hidden = safety_page(summary(), title="T")
    assert "own/1" in hidden and "--show-text" in hidden
    shown = safety_page(
        summary(), title="T", texts=SafetyTexts({"own/1": f"ask {EVIL}"}, {"dense": {"own/1": f"say {EVIL}"}})
    )
    assert html.escape(f"ask {EVIL}") in shown and html.escape(f"say {EVIL}") in shown and "<script>" not in shown


@pytest.mark.parametrize(
    "key", ["arm", "judge", "why", "set", "category", "template", "warning", "task", "flag", "title"]
)
def test_whatever_comes_from_data_is_escaped(key):
    found = summary()
    if key == "arm":
        found["arms"][1]["label"] = EVIL
    elif key == "judge":
        found["primary"]["judge"] = EVIL
        found["rates"] = {EVIL: found["rates"]["classifier"]}
        found["tests"][0]["judge"] = EVIL
    elif key == "why":
        found["verdicts"][0]["why"] = [EVIL, EVIL]
        found["verdicts"][1]["verdict"] = EVIL
    elif key == "set":
        found["sets"][0]["name"] = found["sets"][0]["source"] = EVIL
    elif key == "category":
        found["changed"][0]["category"] = found["changed"][0]["prompt"] = EVIL
    elif key == "template":
        found["groups"]["template"][0]["value"] = EVIL
        found["groups"][EVIL] = found["groups"]["template"]
    elif key == "warning":
        found["warnings"] = [EVIL]
    elif key == "task":
        found["tasks"][0]["tasks"][0]["name"] = EVIL
    elif key == "flag":
        found["agreement"][0]["flags"] = [EVIL]
        found["agreement"][0]["pairs"][0]["judges"] = EVIL
    page = safety_page(found, title=EVIL if key == "title" else "T")
    assert "<script>" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("gone", [*summary(), "everything"])
def test_what_was_not_measured_has_no_section_and_breaks_nothing(gone):
    found = {} if gone == "everything" else {key: value for key, value in summary().items() if key != gone}
    checker = Checker()
    checker.feed(safety_page(found, title="T"))
    checker.close()
    assert checker.open == [] and "None" not in " ".join(checker.text)


def test_numbers_for_people():
    assert rate(a_rate(0.5), short=True) == "50.0 % [40, 60]"
    assert between(None) == between({}) == "–"
    assert between({"value": 0.1, "low": None, "high": None}) == "+0.100"
    assert (points(0.0), points(-1.0), p_value(0.04)) == ("0.0", "-100.0", "0.04")
    assert line_axis([0.0, 0.0], str).ticks[0] < line_axis([0.0, 0.0], str).ticks[-1]
    for values in ([-3.2, 8.9], [1e-5, 2e-5], [5.0], [100.0, 100.1]):
        axis = line_axis(values, str)
        assert 2 <= len(axis.ticks) <= 7 and axis.low <= min(values) and axis.high >= max(values)

"""The page about attention, from plain records with parts missing."""

from __future__ import annotations

import math
import re

import pytest

from secateur.report.attention_page import AttentionReport, attention_page, curves, series_of, value_of
from secateur.report.heat import heat_map


def row(name, share, nats=None, length=64, **measures):
    if nats is not None:
        measures = {"nll_difference": nats, "nll_difference_stderr": 0.01, "perplexity": {"value": 9.5, "stderr": 0.2}}
    return {
        "name": name, "length": length, "sparsity_effective": share, "sparsity_paper": 0.5 + share / 2,
        "recall": None if name == "dense" else 0.8, "measures": measures,
        "backends": {} if name == "dense" else {"flex": 4, "entries": 1},
    }  # fmt: skip


RECORD = {
    "attention_evaluation": [row("dense", 0, 0.0), row("p", 0.5, 0.1), row("p random", 0.5, 0.7), row("q", 0.9, 0.4)],
    "plans": {"p": {"masking": {"kind": "toeplitz"}}, "q": {"masking": {"kind": "absolute"}}},
    "model": {"name": "tiny <x>"},
}
SITE = {"name": "layers.0", "family": "decoder-self", "ordinal": 0, "sink": [0.25, 0.75], "span": [3.0, 5.0]}
ANALYSIS = {"length": 64, "block": 8, "sites": [SITE], "families": {"decoder-self": {"sink": 0.5, "span": 4.0}}}


def test_curves_start_at_the_dense_model():
    (points,) = curves([RECORD]).values()
    found = {(label, share): value for label, _, share, value in points}
    assert found["toeplitz", 0.5] == pytest.approx(math.exp(0.1))
    assert found["random", 0.5] == pytest.approx(math.exp(0.7))
    assert found["absolute", 0.9] == pytest.approx(math.exp(0.4))
    assert {label for (label, share) in found if share == 0} == {"toeplitz", "random", "absolute"}


def test_two_models_are_told_apart():
    labels = {label for label, *_ in curves([RECORD, RECORD | {"model": {"name": "other"}}]).popitem()[1]}
    assert labels == {
        f"{kind}, {name}" for kind in ("toeplitz", "random", "absolute") for name in ("tiny <x>", "other")
    }


def test_every_kind_of_measure_has_a_value_and_columns():
    chrf = {
        "translation": {
            "bleu": {"value": 30.0, "low": 25.0, "high": 35.0},
            "chrf": {"value": 55.0, "low": 50, "high": 60},
        }
    }
    close = {"embeddings": {"cosine": 0.98, "cosine_stderr": 0.01, "spearman": 0.9, "spearman_stderr": 0.02}}
    assert value_of(row("p", 0.5, **chrf)) == ("chrF", 55.0)
    assert value_of(row("p", 0.5, **close)) == ("Spearman of similarities", 0.9)
    assert value_of(row("p", 0.5)) is None
    for measures, said in ((chrf, "30.0 [25.0, 35.0]"), (close, "0.900 <small>± 0.020")):
        record = RECORD | {"attention_evaluation": [row("dense", 0, **measures), row("p", 0.5, **measures)]}
        assert said in attention_page(AttentionReport(evaluations=[record]), title="t")
    assert series_of("random", {}) == "random" and series_of("x", {}) == "plan"


def test_the_page_escapes_and_shows_what_there_is():
    density = {"sparsity_effective": 0.5, "sparsity_paper": 0.75, "density_block": 0.55, "density_128": None}
    plan = {
        "report": {"families": {"decoder-self": density}, "heads": {"layers.0": [0.4, 0.6]}},
        "record": {"masking": {"kind": "toeplitz"}}, "families": {"layers.0": "decoder-self"},
    }  # fmt: skip
    report = AttentionReport(
        {"seen <b>": ANALYSIS}, {"p & q": plan}, [RECORD], {"p": {"a": 0.5, "b": 0.25}}, {"p": {"p": 1.0}}
    )
    page = attention_page(report, title="A < B")
    assert "<b>" not in page.replace("seen &lt;b&gt;", "") and "p &amp; q" in page and "tiny &lt;x&gt;" in page
    assert "layers.0, head 1: 75 %" in page and "layers.0, head 1: 60 %" in page
    assert "10.5 <small>± 1.1 %" in page and "flex + entries" in page and "Mass kept of another" in page
    assert "Blocks that two plans share" not in page  # one plan shares with itself only
    assert not re.search(r"https?://|<script", page)
    assert "Nothing to show" in attention_page(AttentionReport(), title="t")


def test_a_heat_map_has_a_cell_for_every_number():
    drawn = heat_map("T", [[0.0, 1.0], [0.5, math.nan]], lambda v: f"{v:g}", names=("a", "b"))
    assert drawn.count("<title>") == 3 and "a, head 1: 1</title>" in drawn and "nan" not in drawn
    shares = re.findall(r'fill-opacity="(\d\.\d{3})"', drawn)
    assert shares == ["0.000", "1.000", "0.500"]
    low = heat_map("T", [[-1.0, 1.0]], str)
    assert re.findall(r'fill-opacity="(\d\.\d{3})"', low) == ["0.000", "1.000"]
    assert "<figure>" in heat_map("T", [], str)

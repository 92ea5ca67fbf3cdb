"""Calibration sources against each other: the same as pruning and measuring by hand."""

from __future__ import annotations

import copy
import json
import statistics

import pytest
import tokenizers
import transformers
from families import make

from secateur.allocation import Owl
from secateur.comparison import compare_calibrations
from secateur.data.calibration import calibration
from secateur.data.instructions import Instructions
from secateur.data.text import Text
from secateur.errors import InvalidParameter, TextTooShort, UsageError
from secateur.evaluate import fidelity, perplexity
from secateur.methods.magnitude import Magnitude
from secateur.methods.wanda import Wanda
from secateur.pruning import prune

WORDS = [f"w{i}" for i in range(64)]


@pytest.fixture(scope="module")
def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    made.chat_template = (
        "{% for m in messages %}{{ 'w3' if m.role == 'user' else 'w4' }} {{ m.content }} w5\n{% endfor %}"
    )
    return made


def some(name, step):
    return Text(name, "test", (" ".join(WORDS[3 + step * i % 61] for i in range(600)),), "made up")


def talk():
    conversations = tuple(
        (("user", f"w{6 + i % 9}"), ("assistant", " ".join(f"w{10 + (i * j) % 50}" for j in range(1 + i % 8))))
        for i in range(60)
    )
    return Instructions("talk", "test", conversations, "made up")


@pytest.fixture(scope="module")
def compared(tokenizer):
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    found = compare_calibrations(
        model, tokenizer, Wanda(), [some("one", 7), talk()], [some("two", 11), talk()], samples=6, seqlen=16,
        windows=9, sparsity=0.5, batch_size=2,
    )  # fmt: skip
    assert all(bool((before[name] == value).all()) for name, value in model.state_dict().items())
    return model, found


def by_hand(model, tokenizer, source):
    model = copy.deepcopy(model)
    prune(model, Wanda(), calibration(tokenizer, source, 6, 16, model=model), sparsity=0.5)
    return model


def test_every_source_on_every_text_as_by_hand(compared, tokenizer) -> None:
    model, found = compared
    assert [(one.calibration, one.text) for one in found.results] == [
        ("one", "two"), ("one", "talk"), ("talk", "two"), ("talk", "talk"),
    ]  # fmt: skip
    texts = {"two": some("two", 11), "talk": talk()}
    for one in found.results:
        pruned = by_hand(model, tokenizer, {"one": some("one", 7), "talk": talk()}[one.calibration])
        asked = {"seqlen": 16, "windows": 9}
        expected = fidelity(pruned, model, tokenizer, texts[one.text], **asked)
        assert one.fidelity.js_divergence == pytest.approx(expected.js_divergence, rel=1e-4) and expected.js_divergence
        assert one.fidelity.tokens == expected.tokens and one.fidelity.counted == expected.counted
        assert one.perplexity.value == pytest.approx(perplexity(pruned, tokenizer, texts[one.text], **asked).value)
    for name, value in found.dense.items():
        assert value.value == pytest.approx(perplexity(model, tokenizer, texts[name], seqlen=16, windows=9).value)
    assert set(found.sparsity.values()) == {0.5}


def test_differences_are_paired_over_the_windows(compared, tokenizer) -> None:
    model, found = compared
    text = some("two", 11)
    per_window = []
    for source in (some("one", 7), talk()):
        pruned = by_hand(model, tokenizer, source)
        ids = [WORDS.index(word) for word in text.joined.split()]
        windows = [Text("w", "test", (" ".join(WORDS[i] for i in ids[k * 16 : k * 16 + 16]),), "x") for k in range(9)]
        per_window.append([fidelity(pruned, model, tokenizer, one, seqlen=16).js_divergence for one in windows])
    apart = [a - b for a, b in zip(*per_window, strict=True)]
    one = next(d for d in found.differences if (d.text, d.measure) == ("two", "js_divergence"))
    assert one.difference == pytest.approx(statistics.mean(apart), abs=1e-6)
    assert one.stderr == pytest.approx(statistics.stdev(apart) / 3, rel=1e-3) and one.windows == 9
    assert (one.a, one.b) == ("one", "talk")
    means = {r.calibration: r.fidelity.js_divergence for r in found.results if r.text == "two"}
    assert one.difference == pytest.approx(means["one"] - means["talk"], abs=1e-9)
    assert len(found.differences) == 2 * 3


def test_all_sources_give_the_same_number_of_tokens(compared) -> None:
    records = compared[1].calibrations
    assert records["talk"]["tokens"] == records["one"]["samples"] * records["one"]["seqlen"] == 96


def test_the_record_is_json_and_holds_no_text(compared) -> None:
    record = json.loads(json.dumps(compared[1].to_dict(), allow_nan=False))
    assert record["differences"][0].keys() >= {"text", "measure", "a", "b", "difference", "stderr", "windows"}
    assert record["results"][0]["fidelity"]["js_quantiles"].keys() == {"0.5", "0.9", "0.99", "max"}
    assert "w10 w1" not in json.dumps(record)


def test_three_sources_make_three_pairs(tokenizer) -> None:
    sources = [some(name, step) for name, step in (("a", 3), ("b", 5), ("c", 9))]
    found = compare_calibrations(
        make("llama"), tokenizer, Wanda(), sources, sources[:1], samples=2, seqlen=16, windows=1, sparsity=0.5
    )
    assert [(d.a, d.b) for d in found.differences[:3]] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert {d.stderr for d in found.differences} == {None}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"calibrations": 1}, UsageError, "needs at least 2 calibrations; got 1"),
        ({"texts": 0}, UsageError, "needs at least 1 text; got 0"),
        ({"calibrations": 3}, UsageError, "calibration 'a' is named twice"),
        ({"method": Magnitude()}, UsageError, "magnitude reads no text"),
        ({"samples": 1000}, TextTooShort, "not for 1000"),
        ({"windows": 0}, InvalidParameter, "'windows' of compare"),
        ({"sparsity": 1.5}, InvalidParameter, "Got 1.5"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(change, error, said, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("secateur.comparison.prune", lambda *a, **k: pytest.fail("pruned"))
    sources = [some("a", 3), some("b", 5), some("a", 9)]
    asked = {"samples": 2, "seqlen": 16, "sparsity": 0.5} | change
    calibrations, texts = sources[: asked.pop("calibrations", 2)], sources[: asked.pop("texts", 1)]
    with pytest.raises(error, match=said):
        compare_calibrations(make("llama"), tokenizer, asked.pop("method", Wanda()), calibrations, texts, **asked)


def test_a_method_without_data_may_have_an_allocation_that_reads(tokenizer) -> None:
    found = compare_calibrations(
        make("llama"), tokenizer, Magnitude(), [some("a", 3), some("b", 5)], [some("a", 3)], samples=2, seqlen=16,
        windows=2, sparsity=0.5, allocation=Owl(),
    )  # fmt: skip
    assert len(found.results) == 2


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mamba", "mixtral"])
def test_padding_is_never_counted_whatever_runs_together(family, tokenizer) -> None:
    """Batches of one hold no padding; batches of many do, and prune the same weights."""
    keeps = []
    for batch_size in (1, 5):
        model = make(family)
        drawn = calibration(tokenizer, talk(), 6, 16, model=model)
        result = prune(model, Wanda(), drawn, sparsity=0.5, batch_size=batch_size, schedule="oneshot")
        called = [layer for layer in result.layers if layer.tokens and "experts" not in layer.name]
        assert {layer.tokens for layer in called} == {96} and result.calibration == drawn.record
        keeps.append([parameter != 0 for parameter in model.parameters()])
    differ = sum(int((a != b).sum()) for a, b in zip(*keeps, strict=True))
    assert differ <= 0.002 * sum(keep.numel() for keep in keeps[0])  # ties in rounding

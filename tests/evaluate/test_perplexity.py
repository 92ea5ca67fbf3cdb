"""Perplexity against a naive implementation of the protocol; batches, errors, provenance."""

from __future__ import annotations

import json
import math
import statistics
import sys

import pytest
import torch
from small_models import CAUSAL, tiny, tiny_bert, tiny_t5

from secateur.data.text import Text
from secateur.errors import InvalidParameter, NumericalFailure, TextTooShort, UsageError
from secateur.evaluate import Perplexity, perplexity


def naive(model, tokenizer, text: Text, seqlen: int) -> tuple[float, list[float]]:
    """One forward pass per window, softmax in fp64, token by token."""
    stream = tokenizer(" ".join(text.documents))["input_ids"]
    means = []
    for start in range(0, len(stream) - seqlen + 1, seqlen):
        window = stream[start : start + seqlen]
        with torch.no_grad():
            probabilities = model(torch.tensor([window])).logits[0].double().softmax(-1)
        nlls = [-math.log(probabilities[t, window[t + 1]]) for t in range(seqlen - 1)]
        means.append(sum(nlls) / len(nlls))
    return math.exp(sum(means) / len(means)), means


@pytest.mark.parametrize("family", CAUSAL)
def test_agrees_with_the_naive_protocol(family: str, tokenizer, text) -> None:
    model = tiny(family)
    value, means = naive(model, tokenizer, text, 20)
    result = perplexity(model, tokenizer, text, seqlen=20)
    assert result.value == pytest.approx(value, rel=1e-5)
    assert result.nll == pytest.approx(math.log(value), rel=1e-5)
    assert (result.windows, result.tokens, result.seqlen) == (9, 9 * 19, 20)
    assert result.nll_stderr == pytest.approx(statistics.stdev(means) / 3, rel=1e-4)
    assert result.stderr == pytest.approx(value * statistics.stdev(means) / 3, rel=1e-4)


def test_batch_size_changes_rounding_only(tokenizer, text) -> None:
    results = [perplexity(tiny("Llama").double(), tokenizer, text, seqlen=20, batch_size=b) for b in (1, 2, 4, 100)]
    assert all(r.value == pytest.approx(results[0].value, rel=1e-12) for r in results)
    assert all(r.stderr == pytest.approx(results[0].stderr, rel=1e-9) for r in results)


def test_small_chunks_change_rounding_only(tokenizer, text, monkeypatch) -> None:
    model = tiny("Llama").double()
    whole = perplexity(model, tokenizer, text, seqlen=20, batch_size=2)
    for elements in (1, 61 * 2 * 3, 61 * 2 * 19):
        monkeypatch.setattr(sys.modules["secateur.evaluate.tokens"], "CHUNK", elements)
        chunked = perplexity(model, tokenizer, text, seqlen=20, batch_size=2)
        assert chunked.value == pytest.approx(whole.value, rel=1e-12)


def test_windows_limits_their_number(tokenizer, text) -> None:
    model = tiny("Llama")
    _, means = naive(model, tokenizer, text, 20)
    result = perplexity(model, tokenizer, text, seqlen=20, windows=4)
    assert result.windows == 4 and result.value == pytest.approx(math.exp(sum(means[:4]) / 4), rel=1e-5)
    assert result.ids_sha256 != perplexity(model, tokenizer, text, seqlen=20).ids_sha256


def test_seqlen_defaults_to_the_limit_of_the_model(tokenizer, text) -> None:
    assert perplexity(tiny("Llama"), tokenizer, text).seqlen == 64
    assert perplexity(tiny("GPT2"), tokenizer, text).seqlen == 64
    with pytest.raises(TextTooShort):
        perplexity(tiny("Mamba"), tokenizer, text)  # no limit: 2048


def test_one_window_has_no_error_bar(tokenizer, text) -> None:
    result = perplexity(tiny("Llama"), tokenizer, text, seqlen=20, windows=1)
    assert result.stderr is None and result.nll_stderr is None
    assert "±" not in str(result) and "no error bar" in str(result)


def test_a_model_that_knows_the_text_and_one_that_knows_nothing(tokenizer, text) -> None:
    model = tiny("Llama")
    model.lm_head.weight.data.zero_()
    assert perplexity(model, tokenizer, text, seqlen=20).value == pytest.approx(61)
    constant = Text("constant", "test", ("w7 " * 100,), "w7", " ")
    assert perplexity(model, tokenizer, constant, seqlen=20).stderr == pytest.approx(0, abs=1e-9)


def test_prints_and_serialises(tokenizer, text) -> None:
    result = Perplexity(26.3144, 0.2101, 3.27, 0.008, 245760, 120, 2048, "gutenberg", "test", "ab12cd", "ef", "float32")
    assert str(result) == "26.31 ± 0.21 (n = 245 760 tokens, gutenberg test, seqlen 2048, sha256 ab12…)"
    real = perplexity(tiny("Llama"), tokenizer, text, seqlen=20)
    record = json.loads(json.dumps(real.to_dict(), allow_nan=False))
    assert {"value", "stderr", "tokens", "seqlen", "text", "sha256"} <= record.keys()
    assert record["sha256"] == text.sha256 and record["text"] == "made-up" and record["dtype"] == "float32"


def test_progress_reaches_the_end(tokenizer, text) -> None:
    seen = []
    perplexity(tiny("Llama"), tokenizer, text, seqlen=20, batch_size=4, progress=lambda *a: seen.append(a))
    assert [(done, total) for done, total, what in seen if "perplexity" in what] == [(4, 9), (8, 9), (9, 9)]


def test_the_model_is_left_as_it_was(tokenizer, text) -> None:
    model = tiny("GPT2").train()  # it has dropout: in training mode the results would differ
    first, second = (perplexity(model, tokenizer, text, seqlen=20) for _ in range(2))
    assert first == second and model.training and all(p.requires_grad for p in model.parameters())
    assert "forward" not in model.transformer.__dict__


@pytest.mark.parametrize("model", [tiny_t5, tiny_bert])
def test_only_for_causal_models(model, tokenizer, text) -> None:
    with pytest.raises(UsageError, match=r"defined for causal language models; (T5|Bert)For\w+ is not one"):
        perplexity(model(), tokenizer, text, seqlen=20)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(seqlen=1), r"'seqlen' of .*Got 1 "),
        (dict(seqlen=65), r"'seqlen' of .* 64.*Got 65"),
        (dict(windows=0), "'windows' of perplexity"),
        (dict(batch_size=0), "'batch_size' of perplexity"),
    ],
)
def test_bad_options(options, message: str, tokenizer, text) -> None:
    with pytest.raises(InvalidParameter, match=message):
        perplexity(tiny("Llama"), tokenizer, text, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error_that_names_the_window(value: float, tokenizer, text) -> None:
    model = tiny("Llama")
    stream = tokenizer(" ".join(text.documents))["input_ids"]
    token = next(t for t in stream[30:] if t not in stream[:30])
    model.model.embed_tokens.weight.data[token] = value
    window = stream.index(token) // 20
    with pytest.raises(
        NumericalFailure, match=rf"LlamaForCausalLM .*window {window} \(made-up test, tokens {window * 20} "
    ):
        perplexity(model, tokenizer, text, seqlen=20)


def test_a_model_broken_throughout_is_a_numerical_failure_too(tokenizer, text) -> None:
    model = tiny("Llama")
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(NumericalFailure, match="19 of 19 tokens in window 0"):
        perplexity(model, tokenizer, text, seqlen=20)


def test_a_perplexity_beyond_fp64_is_a_failure_not_infinity(tokenizer, text) -> None:
    model = tiny("Llama")
    model.lm_head.weight.data.mul_(1e4)
    with pytest.raises(NumericalFailure, match="nats per token"):
        perplexity(model, tokenizer, text, seqlen=20)


def test_low_precision_logits_are_summed_in_fp32(tokenizer, text) -> None:
    model = tiny("Llama")
    exact = perplexity(model, tokenizer, text, seqlen=20).value
    low = perplexity(model.bfloat16(), tokenizer, text, seqlen=20)
    assert low.dtype == "bfloat16" and low.value == pytest.approx(exact, rel=0.05) and low.value != exact


@pytest.mark.real
def test_smollm2_on_a_piece_of_wikitext(smollm2, shared_data) -> None:
    model, tokenizer = smollm2
    text = shared_data / "text" / "wikitext2_valid.txt"
    result = perplexity(model, tokenizer, text, seqlen=512, windows=3)
    assert 10 < result.value < 40 and result.stderr is not None and 0 < result.stderr < 10
    assert result.tokens == 3 * 511


@pytest.mark.real
def test_smollm2_on_the_documentation_of_python(smollm2) -> None:
    """Needs no shared data."""
    model, tokenizer = smollm2
    assert 3 < perplexity(model, tokenizer, "pydoc", seqlen=256, windows=3).value < 40

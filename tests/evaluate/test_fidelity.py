"""Fidelity against a naive implementation; vocabularies, errors, memory."""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys

import pytest
import torch
from small_models import CAUSAL, tiny, tiny_bert, tiny_t5

from secateur.errors import InvalidParameter, NumericalFailure, UsageError
from secateur.evaluate import fidelity


def pruned(model, share: float = 0.5):
    """A copy whose smallest block weights are zero."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name and "head" not in name and "wte" not in name:
            cut = weight.data.abs().flatten().kthvalue(int(weight.numel() * share)).values
            weight.data[weight.data.abs() <= cut] = 0
    return model


def naive(model, dense, tokenizer, text, seqlen: int) -> list[tuple[float, float, float]]:
    """(JS, KL, agreement) per window, from fp64 probabilities of plain forward passes."""
    stream = tokenizer(" ".join(text.documents))["input_ids"]
    windows = []
    for start in range(0, len(stream) - seqlen + 1, seqlen):
        ids = torch.tensor([stream[start : start + seqlen]])
        with torch.no_grad():
            p, q = (m(ids).logits[0].double().softmax(-1) for m in (dense, model))
        m = (p + q) / 2
        kl = (p * (p / q).log()).sum(-1)
        js = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
        same = (p.argmax(-1) == q.argmax(-1)).double()
        windows.append((js.mean().item(), kl.mean().item(), same.mean().item()))
    return windows


@pytest.mark.parametrize("family", [*CAUSAL, "Bert"])
def test_agrees_with_a_naive_implementation(family: str, tokenizer, text) -> None:
    dense = tiny_bert() if family == "Bert" else tiny(family)
    model = pruned(dense)
    js, kl, same = zip(*naive(model, dense, tokenizer, text, 20), strict=True)
    result = fidelity(model, dense, tokenizer, text, seqlen=20)
    assert 1e-4 < result.js_divergence < math.log(2)
    assert result.js_divergence == pytest.approx(statistics.mean(js), rel=1e-4)
    assert result.kl_divergence == pytest.approx(statistics.mean(kl), rel=1e-4)
    assert result.top1_agreement == pytest.approx(statistics.mean(same))
    assert result.js_divergence_stderr == pytest.approx(statistics.stdev(js) / 3, rel=1e-3)
    assert result.kl_divergence_stderr == pytest.approx(statistics.stdev(kl) / 3, rel=1e-3)
    assert result.top1_agreement_stderr == pytest.approx(statistics.stdev(same) / 3, rel=1e-6)
    assert (result.tokens, result.windows, result.seqlen) == (180, 9, 20)


def test_a_model_agrees_with_itself_exactly(tokenizer, text) -> None:
    model = tiny("Llama")
    result = fidelity(model, model, tokenizer, text, seqlen=20)
    assert (result.js_divergence, result.kl_divergence, result.top1_agreement) == (0, 0, 1)


def test_the_dense_model_comes_first_in_the_kl_divergence(tokenizer, text) -> None:
    dense = tiny("Llama")
    model = pruned(dense, 0.8)
    forth, back = (fidelity(a, b, tokenizer, text, seqlen=20) for a, b in ((model, dense), (dense, model)))
    assert forth.js_divergence == pytest.approx(back.js_divergence, rel=1e-5)
    assert abs(forth.kl_divergence / back.kl_divergence - 1) > 0.01


def test_batch_and_chunk_size_change_rounding_only(tokenizer, text, monkeypatch) -> None:
    dense = tiny("Llama").double()
    model = pruned(dense)
    first = fidelity(model, dense, tokenizer, text, seqlen=20)
    for batch_size, elements in ((2, 1), (4, 61 * 4 * 7), (100, 10**9)):
        monkeypatch.setattr(sys.modules["secateur.evaluate.tokens"], "CHUNK", elements)
        other = fidelity(model, dense, tokenizer, text, seqlen=20, batch_size=batch_size)
        assert other.js_divergence == pytest.approx(first.js_divergence, rel=1e-12)
        assert other.kl_divergence_stderr == pytest.approx(first.kl_divergence_stderr, rel=1e-9)
        assert other.top1_agreement == first.top1_agreement


def test_two_dtypes_may_be_compared(tokenizer, text) -> None:
    dense = tiny("Llama")
    result = fidelity(copy.deepcopy(dense).bfloat16(), dense, tokenizer, text, seqlen=20)
    assert (result.dtype, result.dense_dtype) == ("bfloat16", "float32")
    assert 0 < result.js_divergence < 1e-2 and result.top1_agreement > 0.9


def test_different_vocabularies_are_refused_with_both_sizes(tokenizer, text) -> None:
    wide = tiny("Llama")
    wide.resize_token_embeddings(64)
    with pytest.raises(UsageError, match="predicts 61 tokens, the dense LlamaForCausalLM 64"):
        fidelity(tiny("Llama"), wide, tokenizer, text, seqlen=20)


def test_different_tokenizers_are_refused_with_both_sizes(tokenizer, text) -> None:
    model, other = tiny("Llama"), copy.deepcopy(tokenizer)
    assert fidelity(model, model, tokenizer, text, seqlen=20, dense_tokenizer=other).top1_agreement == 1
    other.add_tokens(["more"])
    with pytest.raises(UsageError, match=r"has 61 tokens, the dense model's 62"):
        fidelity(model, model, tokenizer, text, seqlen=20, dense_tokenizer=other)


def test_encoder_decoders_are_refused(tokenizer, text) -> None:
    with pytest.raises(UsageError, match="T5ForConditionalGeneration is not one"):
        fidelity(tiny_t5(), tiny_t5(), tokenizer, text, seqlen=20)


def test_options_are_checked_in_its_own_name(tokenizer, text) -> None:
    with pytest.raises(InvalidParameter, match="'windows' of fidelity"):
        fidelity(tiny("Llama"), tiny("Llama"), tokenizer, text, windows=-1)


def test_what_is_not_finite_names_the_window(tokenizer, text) -> None:
    dense, model = tiny("Llama"), tiny("Llama")
    stream = tokenizer(" ".join(text.documents))["input_ids"]
    token = next(t for t in stream[30:] if t not in stream[:30])
    model.model.embed_tokens.weight.data[token] = math.nan
    window = stream.index(token) // 20
    with pytest.raises(NumericalFailure, match=rf"not finite in window {window} \(made-up test"):
        fidelity(model, dense, tokenizer, text, seqlen=20)


def test_prints_and_serialises(tokenizer, text) -> None:
    dense = tiny("Llama")
    result = fidelity(pruned(dense), dense, tokenizer, text, seqlen=20)
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert {"js_divergence", "kl_divergence", "top1_agreement", "tokens", "seqlen", "sha256"} <= record.keys()
    assert str(result).startswith(f"JS {result.js_divergence:.4f} ± ") and "n = 180 tokens, made-up" in str(result)
    assert fidelity(dense, dense, tokenizer, text, seqlen=20, windows=1).js_divergence_stderr is None


def test_progress_reaches_the_end_and_modes_come_back(tokenizer, text) -> None:
    dense, model, seen = tiny("GPT2"), tiny("GPT2").train(), []
    fidelity(model, dense, tokenizer, text, seqlen=20, batch_size=5, progress=lambda *a: seen.append(a))
    assert [a[:2] for a in seen if "fidelity" in a[2]] == [(5, 9), (9, 9)] and model.training and not dense.training


def test_no_full_set_of_logits_is_held(tokenizer, text, monkeypatch) -> None:
    """The largest tensor that a head gives out is one chunk."""
    dense, model = tiny("Llama"), tiny("Llama", seed=1)
    monkeypatch.setattr(sys.modules["secateur.evaluate.tokens"], "CHUNK", 61 * 5)
    largest = []
    for m in (dense, model):
        m.lm_head.register_forward_hook(lambda module, inputs, output: largest.append(output.shape[1]))
    fidelity(model, dense, tokenizer, text, seqlen=60, windows=1)
    probes, chunks = [n for n in largest if n in (7, 8)], [n for n in largest if n not in (7, 8)]
    assert len(probes) == 4 and chunks == [5] * 24

"""Translating with a tiny model, and scores against sacrebleu's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from secateur.data.pairs import Pairs, read_pairs
from secateur.errors import InvalidParameter, UsageError
from secateur.evaluate.translation import score_translations, translate

sacrebleu = pytest.importorskip("sacrebleu")

REFERENCES = (
    "The cat sat on the mat.", "He bought a book in the city.", "It is raining today.", "I do not like rain.",
    "She goes to school by bus.", "They are late again.", "We eat rice every day.", "The train leaves at nine.",
)  # fmt: skip
DENSE = (
    "The cat sat on the mat.", "He bought a book in town.", "It is raining today.", "I don't like the rain.",
    "She goes to school by bus.", "They came late again.", "We eat rice every day.", "The train is leaving at nine.",
)  # fmt: skip
OURS = (*DENSE[:2], "It rains.", "Rain is bad.", "School by bus.", *DENSE[5:])
PAIRS = Pairs(tuple("abcdefgh"), REFERENCES, "eight", "ab12")
WORDS = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture
def marian() -> tuple[MarianMTModel, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, forced_eos_token_id=None, init_std=1.0,
    )  # fmt: skip
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "?", *WORDS])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="?", pad_token="<pad>", eos_token="</s>", model_max_length=32
    )
    return MarianMTModel(config).eval(), tokenizer


def test_batches_translate_like_each_alone_and_in_order(marian: Any) -> None:
    model, tokenizer = marian
    sources = ["a b c d e", "f", "b a", "c c c", "e f"]
    together = translate(model, tokenizer, sources, tokens=6, batch_size=3)
    for source, text in zip(sources, together, strict=True):
        ids = torch.tensor([tokenizer.encode(source)])
        written: list[int] = [0]
        for _ in range(6):  # greedy, token by token, without a cache
            with torch.no_grad():
                logits = model(ids, decoder_input_ids=torch.tensor([written]), use_cache=False).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == 1:
                break
        assert text == tokenizer.decode(written, skip_special_tokens=True)
    assert len(set(together)) > 1


def test_what_cannot_be_translated(marian: Any) -> None:
    model, tokenizer = marian
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UsageError, match="BertForMaskedLM is not one"):
        translate(BertForMaskedLM(BertConfig(vocab_size=9, **sizes)), tokenizer, ["a"])
    with pytest.raises(UsageError, match="no sentence"):
        translate(model, tokenizer, [])
    with pytest.raises(InvalidParameter, match="'tokens' of translate"):
        translate(model, tokenizer, ["a"], tokens=0)


def test_scores_are_sacrebleus() -> None:
    found = score_translations(OURS, PAIRS)
    assert found.bleu.value == pytest.approx(sacrebleu.corpus_bleu(OURS, [REFERENCES]).score)
    assert found.chrf.value == pytest.approx(sacrebleu.corpus_chrf(OURS, [REFERENCES]).score)
    assert found.bleu.low < found.bleu.value < found.bleu.high
    assert found.bleu.difference is None and found.same is None
    assert "BLEU nrefs:1" in found.signature and "chrF" in found.signature.replace("CHRF", "chrF")


def test_the_paired_bootstrap_is_sacrebleus(monkeypatch: pytest.MonkeyPatch) -> None:
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    monkeypatch.setenv("SACREBLEU_SEED", "7")
    systems = [("dense", DENSE), ("ours", OURS)]
    _, theirs = PairedTest(systems, {"b": BLEU(), "c": CHRF()}, [REFERENCES], test_type="bs", n_samples=300)()
    found = score_translations(OURS, PAIRS, DENSE, samples=300, seed=7)
    for name, ours in (("BLEU", found.bleu), ("chrF2", found.chrf)):
        dense, pruned = theirs[name]
        assert ours.value == pytest.approx(pruned.score)
        assert ours.difference == pytest.approx(pruned.score - dense.score)
        assert ours.p == pytest.approx(pruned.p_value, abs=2 / 300)
        assert (ours.high - ours.low) / 2 == pytest.approx(pruned.ci, rel=0.15)
        assert ours.difference_low <= ours.difference <= ours.difference_high
    assert found.same == 5 / 8
    assert "dense -" in str(found) and json.dumps(found.to_dict())


def test_no_difference_is_no_difference() -> None:
    found = score_translations(DENSE, PAIRS, DENSE, samples=50)
    assert (found.bleu.difference, found.bleu.difference_low, found.bleu.difference_high, found.same) == (0, 0, 0, 1)
    assert found.bleu.p == found.chrf.p == 1


def test_what_cannot_be_scored() -> None:
    with pytest.raises(UsageError, match="7 translations for 8 pairs"):
        score_translations(OURS[1:], PAIRS)
    with pytest.raises(InvalidParameter, match="samples"):
        score_translations(OURS, PAIRS, samples=10)


@pytest.mark.real
@pytest.mark.slow
def test_real_translations_are_good(shared_data: Path) -> None:
    from secateur.models.load import load

    pairs = read_pairs(shared_data / "mt" / "tatoeba_en_zh.jsonl", limit=24)
    model, tokenizer = load("opus-mt-zh-en")
    found = score_translations(translate(model, tokenizer, pairs.sources), pairs)
    assert found.chrf.value > 35 and found.bleu.value > 15

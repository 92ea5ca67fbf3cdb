"""Pairs of sentences: from a file, and as batches for an encoder-decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import make
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from secateur.data.pairs import Pairs, pair_batches, read_pairs
from secateur.errors import InvalidParameter, LoadFailure, TextTooShort, UsageError

WORDS = ["<pad>", "</s>", "?", *"abcdefg"]
PAIRS = Pairs(("a b c", "d", "e f"), ("g a", "b c d", "e"), "three", "")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="?", pad_token="<pad>", eos_token="</s>", model_max_length=16
    )


def test_pairs_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"zh": f"句{i}", "en": f"sentence {i}"} for i in range(9)]
    path.write_text("\n".join(map(json.dumps, [*rows, {"zh": "句0", "en": "another"}])) + "\n\n", encoding="utf-8")
    pairs = read_pairs(path)
    assert len(pairs) == 9 and pairs.references[0] == "sentence 0" and pairs.name == "pairs.jsonl zh-en"
    some = read_pairs(path, limit=4, seed=1)
    assert len(some) == 4 and some == read_pairs(path, limit=4, seed=1) != read_pairs(path, limit=4, seed=2)
    assert {*zip(some.sources, some.references, strict=True)} < {*zip(pairs.sources, pairs.references, strict=True)}
    assert read_pairs(path, source="en", target="zh").references[8] == "句8"
    assert pairs[:2].sources == ("句0", "句1") and pairs[:2].sha256 != pairs.sha256
    with pytest.raises(TextTooShort, match="9 different pairs"):
        read_pairs(path, limit=10)
    with pytest.raises(LoadFailure, match="line 1: it has no texts 'de' and 'en'"):
        read_pairs(path, source="de")
    with pytest.raises(LoadFailure, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl")


def test_a_batch_is_what_the_decoder_learns_from(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make("t5")
    first, second = pair_batches(tokenizer, model, PAIRS, batch_size=2)
    assert first["input_ids"].tolist() == [[6, 1, 0], [7, 8, 1]]  # the shorter ones first
    assert first["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert first["decoder_input_ids"].tolist() == [[0, 4, 5, 6], [0, 7, 0, 0]]  # T5 starts with its padding token
    assert first["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert first["labels"].tolist() == [[4, 5, 6, 1], [7, 1, -100, -100]]
    assert second["input_ids"].tolist() == [[3, 4, 5, 1]]
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[7, 8, 1]]), decoder_input_ids=torch.tensor([[0, 7]])).logits
        torch.testing.assert_close(model(**first).logits[1, :2], alone[0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_batched(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM is not one"):
        pair_batches(tokenizer, make("llama"), PAIRS)
    with pytest.raises(InvalidParameter, match="batch_size"):
        pair_batches(tokenizer, make("t5"), PAIRS, batch_size=0)
    tokenizer.pad_token = None
    with pytest.raises(UsageError, match="no padding token"):
        pair_batches(tokenizer, make("t5"), PAIRS)

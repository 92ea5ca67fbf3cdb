"""Passages of a text, and their tokens."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateur.data.passages import passage_batches, passage_ids, passages
from secateur.data.text import Text
from secateur.errors import InvalidParameter, TextTooShort

WORDS = [f"w{i}" for i in range(200)]
TEXT = Text("words", "test", (" ".join(WORDS),), "made here")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", pad_token="?")


@pytest.mark.parametrize("count", [1, 3, 7])
def test_passages_are_whole_words_in_order_and_never_overlap(count: int) -> None:
    found = passages(TEXT, 60, count)
    assert len(found) == count
    end = 0
    for passage in found:
        assert len(passage) >= 60 and set(passage.split()) <= set(WORDS)
        end = TEXT.joined.index(passage, end) + len(passage)  # fails if it begins before the last one's end
    assert end > (count - 1) / count * len(TEXT.joined)  # spread over the text


def test_too_many_passages() -> None:
    with pytest.raises(TextTooShort, match="too few for 40 passages of 60"):
        passages(TEXT, 60, 40)
    with pytest.raises(InvalidParameter, match="'count' of passages"):
        passages(TEXT, 60, 0)


def test_tokens_of_passages(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ("w0 w1 w2 w3", "w4 w5", "w6 w7 w8")
    first, second = passage_batches(tokenizer, texts, 3, batch_size=2)
    assert first["input_ids"].tolist() == [[1, 2, 3], [5, 6, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert second["input_ids"].tolist() == [[7, 8, 9]] and set(second) == {"input_ids", "attention_mask"}
    assert torch.equal(passage_ids(tokenizer, texts, 2), torch.tensor([[1, 2], [5, 6], [7, 8]]))
    with pytest.raises(TextTooShort, match="A passage has 2 tokens, fewer than 3"):
        passage_ids(tokenizer, texts, 3)

"""A tokenizer and a text for the tiny models."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tokenizers
import transformers
from small_models import WORDS

from secateur.data.text import Text


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)})
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.fixture(scope="session")
def text() -> Text:
    """Three documents, 190 tokens in all."""
    draw = random.Random(0)
    documents = tuple(" ".join(draw.choices(WORDS, k=k)) for k in (100, 50, 40))
    return Text("made-up", "test", documents, "random words", " ")

"""Passages of a text for models that read one whole text at a time, as encoders do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import TextTooShort, check_whole
from .text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 8  # of a passage for each token that is read: more than any tokenizer needs for prose


def passages(text: Text, characters: int, count: int) -> tuple[str, ...]:
    """`count` passages of about that length, side by side or spread evenly over the text, cut at spaces.

    Args:
        text: of either split.
        characters: of a passage at least; it ends with the word that reaches them.
        count: how many; they never overlap.

    Raises:
        InvalidParameter: characters or count below 1.
        TextTooShort: fewer than count passages.

    >>> passages(Text("a", "test", ("one two three four five six",), "typed"), 7, 2)
    ('one two', 'four five')
    """
    for name, value in (("characters", characters), ("count", count)):
        check_whole(name, "passages", value)
    joined = text.joined
    step = len(joined) // count
    found: list[str] = []
    end = 0
    for number in range(count):
        start = max(end, number * step)
        if start and not joined[start - 1].isspace():
            start = _space(joined, start)
        while start < len(joined) and joined[start].isspace():
            start += 1
        end = _space(joined, start + characters)
        if start + characters > len(joined):
            raise TextTooShort(
                f"The text '{text.name}' ({text.split}) has {len(joined)} characters, too few for {count} passages of "
                f"{characters}: ask for {number} of them, or give a longer text."
            )
        found.append(joined[start:end])
    return tuple(found)


def passage_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, batch_size: int = 8
) -> list[dict[str, Tensor]]:
    """Passages as `input_ids` and `attention_mask`, (rows, tokens) int64, with the special tokens that the model knows.

    Args:
        tokenizer: of the model, with a padding token.
        texts: passages; what is longer than `length` tokens is cut.
        length: tokens, special ones included.
        batch_size: rows of a batch; the last may have fewer.
    """
    batches = []
    for first in range(0, len(texts), batch_size):
        words = list(texts[first : first + batch_size])
        read = tokenizer(words, return_tensors="pt", padding=True, truncation=True, max_length=length)
        batches.append({name: read[name] for name in ("input_ids", "attention_mask")})
    return batches


def passage_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> Tensor:
    """The ids of passages, (passages, length) int64.

    Raises:
        TextTooShort: a passage has fewer tokens.
    """
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if len(ids) < length:
            raise TextTooShort(f"A passage has {len(ids)} tokens, fewer than {length}: give more characters.")
        rows.append(ids)
    return torch.tensor(rows)


def _space(text: str, near: int) -> int:
    """The first white space at or behind `near`, or the end."""
    while near < len(text) and not text[near].isspace():
        near += 1
    return min(near, len(text))

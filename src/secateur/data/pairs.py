"""Sentences with their translations: read from a file, and as batches for an encoder-decoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LoadFailure, TextTooShort, UsageError, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations by people. `sha256` is that of all of them."""

    sources: tuple[str, ...]
    references: tuple[str, ...]
    name: str
    sha256: str

    def __getitem__(self, rows: slice) -> Pairs:
        return _pairs(self.sources[rows], self.references[rows], self.name)

    def __len__(self) -> int:
        return len(self.sources)


def read_pairs(
    path: str | Path, *, source: str = "zh", target: str = "en", limit: int | None = None, seed: int = 0
) -> Pairs:
    """Pairs from a .jsonl file, a pair a line; a source that comes again is left out.

    Args:
        path: the file.
        source, target: the fields of the sentence and of its translation.
        limit: so many pairs, drawn with `seed`; None takes all in their order.

    Raises:
        LoadFailure: the file cannot be read, or a line has not both fields.
        TextTooShort: fewer pairs than `limit`, or none.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     written = file.write('{"zh": "你好", "en": "Hello"}')
    ...     file.flush()
    ...     read_pairs(file.name).references
    ('Hello',)
    """
    seen: dict[str, str] = {}
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in (source, target)):
                raise LoadFailure(f"{path}, line {number}: it has no texts '{source}' and '{target}'.")
            seen.setdefault(row[source], row[target])
    except (OSError, ValueError) as error:
        raise LoadFailure(f"{path} cannot be read as pairs of sentences: {error}.") from error
    found = list(seen.items())
    if len(found) < (limit or 1):
        raise TextTooShort(f"{path} has {len(found)} different pairs, fewer than the {limit or 1} asked for.")
    if limit is not None:
        found = [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:limit]]
    return _pairs([a for a, _ in found], [b for _, b in found], f"{Path(path).name} {source}-{target}")


def _pairs(sources: Sequence[str], references: Sequence[str], name: str) -> Pairs:
    digest = hashlib.sha256(json.dumps([*zip(sources, references, strict=True)]).encode()).hexdigest()
    return Pairs(tuple(sources), tuple(references), name, digest)


def pair_batches(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, pairs: Pairs, *, batch_size: int = 16
) -> list[dict[str, Tensor]]:
    """What an encoder-decoder reads of pairs while it learns them: the sentence, and the translation so far.

    Args:
        tokenizer: the model's own, with a padding token.
        model: an encoder-decoder; its config says with which token the decoder starts.
        pairs: at least one.
        batch_size: pairs in a batch; sorted by length, so that little is padding.

    Returns:
        Batches of `input_ids`, `attention_mask`, `decoder_input_ids`, `decoder_attention_mask`, (rows, tokens) int64,
        and `labels`, which are -100 at padding.

    Raises:
        UsageError: the model is no encoder-decoder, or has no start or padding token.
        InvalidParameter: batch_size below 1.
    """
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None)
    if not getattr(config, "is_encoder_decoder", False) or start is None:
        raise UsageError(f"Pairs of sentences are for an encoder-decoder, and {type(model).__name__} is not one.")
    if tokenizer.pad_token_id is None:
        raise UsageError("Pairs of sentences are read in batches, and the tokenizer has no padding token.")
    check_whole("batch_size", "pair_batches", batch_size)
    read = tokenizer(list(pairs.sources), text_target=list(pairs.references), truncation=True)
    rows = sorted(zip(read["input_ids"], read["labels"], strict=True), key=lambda row: (len(row[0]), len(row[1])))
    batches = []
    for first in range(0, len(rows), batch_size):
        sources, targets = zip(*rows[first : first + batch_size], strict=True)
        before = [[start, *target[:-1]] for target in targets]
        source, source_mask = _padded(sources, tokenizer.pad_token_id)
        written, written_mask = _padded(before, tokenizer.pad_token_id)
        labels, real = _padded(targets, tokenizer.pad_token_id)
        batch = {"input_ids": source, "attention_mask": source_mask, "decoder_input_ids": written}
        batches.append(batch | {"decoder_attention_mask": written_mask, "labels": labels.masked_fill(real == 0, -100)})
    return batches


def _padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """On the right: ids and mask, (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

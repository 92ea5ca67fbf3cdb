"""From calibration ids to the keyword arguments of a model's forward pass, in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.calibration import Calibration
from secateur.errors import UsageError, check_whole
from secateur.scout import Batch

Data = Calibration | Tensor | Sequence[Mapping[str, Tensor]]


def batches_of(
    model: nn.Module, data: Data, batch_size: int = 1, together: Callable[[int], int] | None = None
) -> list[Batch]:
    """Micro-batches for `model`.

    Args:
        data: a calibration, a (n, seqlen) tensor of token ids, or ready batches (keyword arguments with their
            attention masks), which are passed through.
        batch_size: sequences a batch.
        together: makes another number of it, as a method wants.

    Returns:
        Keyword arguments. An encoder-decoder reads the first half of every sequence in its encoder and the second
        half, shifted by the start token, in its decoder.

    >>> batches_of(nn.Linear(1, 1), torch.arange(6).view(3, 2), batch_size=2)[1]
    {'input_ids': tensor([[4, 5]])}
    """
    check_whole("batch_size", "prune", batch_size)
    batch_size = together(batch_size) if together else batch_size
    ids = data.ids if isinstance(data, Calibration) else data
    if not isinstance(ids, Tensor):
        return _ready(ids)
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        raise UsageError(
            f"calibration ids must be (n, seqlen) int64, at least one; got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    lookup: Any = getattr(model, "get_input_embeddings", None)
    embedding = lookup() if lookup else None
    if isinstance(embedding, nn.Embedding) and not 0 <= int(ids.min()) <= int(ids.max()) < embedding.num_embeddings:
        raise UsageError(
            f"calibration ids reach from {int(ids.min())} to {int(ids.max())}, but the model embeds "
            f"{embedding.num_embeddings} tokens; were they made with another tokenizer?"
        )
    config: Any = getattr(model, "config", None)
    two_stacks = getattr(config, "is_encoder_decoder", False)
    if isinstance(data, Calibration) and data.mask is not None:
        if two_stacks:
            raise UsageError(
                f"conversations are calibrated with as one sequence each, which the encoder-decoder "
                f"{type(model).__name__} does not read: give a plain text"
            )
        pairs = zip(ids.split(batch_size), data.mask.split(batch_size), strict=True)
        return [_masked(part, mask) for part, mask in pairs]
    if two_stacks:
        return [_two_stacks(config, part) for part in ids.split(batch_size)]
    return [{"input_ids": part} for part in ids.split(batch_size)]


def _masked(ids: Tensor, mask: Tensor) -> Batch:
    """As wide as the longest sequence; without a mask where nothing is padded."""
    longest = int(mask.sum(1).max())
    ids, mask = ids[:, :longest], mask[:, :longest]
    return {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask.long()}


def _ready(data: Any) -> list[Batch]:
    batches = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    for batch in batches:
        if not (isinstance(batch, Mapping) and all(isinstance(value, Tensor) for value in batch.values())):
            raise UsageError(
                f"calibration must be made by secateur.calibration, a (n, seqlen) tensor of ids, or a list of "
                f"batches {{name: tensor}}; got {type(data).__name__} with {type(batch).__name__}"
            )
    if not batches:
        raise UsageError("the list of calibration batches is empty")
    return batches


def _two_stacks(config: Any, ids: Tensor) -> Batch:
    half = ids.shape[1] // 2
    if not half:
        raise UsageError(f"an encoder-decoder needs sequences of at least 2 tokens; got {ids.shape[1]}")
    start = getattr(config, "decoder_start_token_id", None)
    first = torch.full_like(ids[:, :1], 0 if start is None else start)
    return {"input_ids": ids[:, :half], "decoder_input_ids": torch.cat([first, ids[:, half:-1]], dim=1)}

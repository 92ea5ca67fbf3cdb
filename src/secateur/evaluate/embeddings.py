"""Embeddings: how close an encoder's vectors for whole texts stay to those of the dense model.

A text's embedding is the mean of the last hidden states of its tokens, padding left out, brought to length one
(Reimers and Gurevych 2019, arXiv:1908.10084, the MEAN pooling with which MiniLM was trained). With u_i and v_i those
of the dense and of the changed model for text i of n:

    cosine    mean_i <u_i, v_i>                                        1 = the same
    spearman  rank correlation of <u_i, u_j> and <v_i, v_j>, i < j     1 = who is near to whom stays the same

The n (n - 1) / 2 pairs share texts, so the error of the correlation is a jackknife over texts: each of g groups of
texts (every text alone up to 50) is left out once, stderr^2 = (g - 1) / g sum_k (s_k - mean)^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import NumericalFailure, UsageError, check_whole
from secateur.evaluate.sample import mean_and_stderr, with_error
from secateur.models.fetch import quiet
from secateur.progress import Progress, silent
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUPS = 50


@dataclass(frozen=True)
class EmbeddingFidelity:
    """The two measures over `texts` texts with their standard errors; `lowest` is the smallest cosine of a text."""

    cosine: float
    cosine_stderr: float | None
    lowest: float
    spearman: float
    spearman_stderr: float | None
    texts: int

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        cosine = with_error(self.cosine, self.cosine_stderr, 4)
        spearman = with_error(self.spearman, self.spearman_stderr, 4)
        return (
            f"cosine {cosine} (lowest {self.lowest:.4f}), Spearman of similarities {spearman} (n = {self.texts} texts)"
        )


def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int | None = None,
    batch_size: int = 16,
    progress: Progress = silent,
) -> Tensor:
    """The embedding of each text.

    Args:
        model: an encoder, as MiniLM; of a model with a head the last hidden states are taken.
        tokenizer: the model's own, with a padding token.
        texts: at least one.
        length: tokens of each text at most, special ones included; by default what the model takes.
        batch_size: texts per forward pass; sorted by length, so that little is padding.
        progress: told the texts done.

    Returns:
        (texts, width) fp32 on the CPU, each of length one.

    Raises:
        UsageError: a model that reads two texts; no padding token; no text.
        InvalidParameter: length or batch_size below 1.
        NumericalFailure: an embedding is not finite.

    >>> import transformers, tokenizers
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cut": 1, "?": 2}, unk_token="?"))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")
    >>> model = transformers.BertModel(transformers.BertConfig(vocab_size=3, hidden_size=8, intermediate_size=8,
    ...     num_hidden_layers=1, num_attention_heads=2)).eval()
    >>> embed(model, tokenizer, ["the cut", "the"]).norm(dim=1).round(decimals=4)
    tensor([1., 1.])
    """
    from secateur.data.calibration import sequence_length

    _check(model, tokenizer, texts, batch_size)
    limit = sequence_length(tokenizer, model, length)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    device = model.get_input_embeddings().weight.device
    found: dict[int, Tensor] = {}
    with evaluating(model), torch.no_grad(), quiet("transformers"):
        for first in range(0, len(texts), batch_size):
            rows = order[first : first + batch_size]
            words = [texts[i] for i in rows]
            batch = tokenizer(words, return_tensors="pt", padding=True, truncation=True, max_length=limit).to(device)
            mask = batch["attention_mask"][..., None].to(torch.float32)
            states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **_last(model))
            hidden = states.last_hidden_state if "last_hidden_state" in states else states.hidden_states[-1]
            means = (hidden.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
            found.update(zip(rows, F.normalize(means, dim=1).cpu(), strict=True))
            progress(len(found), len(texts), "embedding texts")
    vectors = torch.stack([found[i] for i in range(len(texts))])
    if not (fine := vectors.isfinite().all(1)).all():
        raise NumericalFailure(f"The embedding of text {int((~fine).nonzero()[0])} is not finite.")
    return vectors


def compare_embeddings(vectors: Tensor, dense: Tensor) -> EmbeddingFidelity:
    """How close embeddings are to the dense model's of the same texts.

    Args:
        vectors, dense: (texts, width) of `embed`.

    Raises:
        UsageError: other shapes, or fewer than 3 texts, among which there are no ranks.

    >>> dense = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.4]]), dim=1)
    >>> found = compare_embeddings(dense, dense)
    >>> round(found.cosine, 4), round(found.spearman, 4), found.texts
    (1.0, 1.0, 4)
    """
    if vectors.shape != dense.shape or vectors.ndim != 2:
        raise UsageError(f"Embeddings of shape {tuple(vectors.shape)} have no partners in {tuple(dense.shape)}.")
    n = len(vectors)
    if n < 3:
        raise UsageError(f"Similarities of {n} texts have no ranks: give at least 3 texts.")
    ours, theirs = vectors.double(), dense.double()
    cosines = (ours * theirs).sum(1)
    mean, error = mean_and_stderr([value[None] for value in cosines])
    similar = (ours @ ours.T, theirs @ theirs.T)
    groups = min(n, GROUPS)
    rank = _spearman(*similar, torch.ones(n, dtype=torch.bool))
    left_out = []
    for k in range(groups if n > 3 else 0):
        stay = torch.arange(n) % groups != k
        left_out.append(_spearman(*similar, stay))
    centre = math.fsum(left_out) / max(groups, 1)
    spread = math.fsum((value - centre) ** 2 for value in left_out)
    stderr = math.sqrt((groups - 1) / groups * spread) if left_out else None
    return EmbeddingFidelity(mean, error, float(cosines.min()), rank, stderr, n)


def _spearman(a: Tensor, b: Tensor, stay: Tensor) -> float:
    """Of the entries above the diagonal of two matrices, for the rows and columns that stay; ties share a rank."""
    above = torch.ones_like(a, dtype=torch.bool).triu(1) & stay & stay[:, None]
    ranks = [_ranks(matrix[above]) for matrix in (a, b)]
    x, y = (rank - rank.mean() for rank in ranks)
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else math.nan


def _ranks(values: Tensor) -> Tensor:
    """
    >>> _ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist()
    [2.5, 0.0, 2.5, 1.0]
    """
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    middle: Tensor = count.cumsum(0) - (count + 1) / 2
    return middle[place].double()


def _last(model: Any) -> dict[str, bool]:
    return {} if type(model).__name__.endswith("Model") else {"output_hidden_states": True}


def _check(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> None:
    if model.config.is_encoder_decoder:
        raise UsageError(f"Embeddings need an encoder; {type(model).__name__} reads one text and writes another.")
    if tokenizer.pad_token_id is None:
        raise UsageError("Embeddings are made in batches, and the tokenizer has no padding token.")
    check_whole("batch_size", "embed", batch_size)
    if not texts:
        raise UsageError("There is no text to embed.")

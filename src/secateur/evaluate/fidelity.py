"""Fidelity: how close a pruned model's predictions stay to those of the dense one.

For every position t of a text, both models read the same tokens; with p_t and q_t the dense and the pruned
model's predictions over the whole vocabulary:

    kl_divergence   mean_t KL(p_t, q_t)               in nats, 0 = the same
    js_divergence   mean_t JS(p_t, q_t)               in nats, between 0 and ln 2 = 0.693
    top1_agreement  mean_t [argmax p_t = argmax q_t]  share of positions, 1 = the same

Source: Khanal and Capone 2024, arXiv:2409.11233, where JS follows the quality of pruned models on tasks
better than perplexity does. Their released code takes the softmax over positions and keeps the last batch
only (specs of this project, unstructured.md 7.2); this follows the definition, so the numbers differ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.divergence import js_divergence, kl_divergence
from secateur.errors import NumericalFailure, UsageError
from secateur.evaluate.logits import Reader
from secateur.evaluate.sample import describe, mean_and_stderr, take, with_error
from secateur.progress import Progress, silent
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.data.text import Text

CHUNK = 2**22  # logits at a time and model: 16 MB in fp32, of which the divergences need about ten


@dataclass(frozen=True)
class Fidelity:
    """The three measures, each a mean over tokens with its standard error, and where they come from.

    Divergences in nats. The standard errors take the windows as the sampling unit, as tokens within one are
    not independent; they are None for a single window.
    """

    js_divergence: float
    js_divergence_stderr: float | None
    kl_divergence: float
    kl_divergence_stderr: float | None
    top1_agreement: float
    top1_agreement_stderr: float | None
    tokens: int
    windows: int
    seqlen: int
    text: str
    split: str
    sha256: str
    ids_sha256: str
    dtype: str
    dense_dtype: str

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        js = with_error(self.js_divergence, self.js_divergence_stderr, 4)
        kl = with_error(self.kl_divergence, self.kl_divergence_stderr, 4)
        top1 = with_error(self.top1_agreement, self.top1_agreement_stderr, 4)
        where = describe(self.tokens, self.text, self.split, self.seqlen, self.sha256, self.windows)
        return f"JS {js} nats, KL {kl} nats, top-1 agreement {top1} {where}"


def fidelity(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | Text = "gutenberg",
    *,
    dense_tokenizer: PreTrainedTokenizerBase | None = None,
    seqlen: int | None = None,
    windows: int | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> Fidelity:
    """Divergence of a pruned model's predictions from the dense model's, per token of a text.

    Logits are compared a few positions at a time in fp32, so that no full set of them is ever held.

    Args:
        model: the pruned model, causal or masked.
        dense: the model before pruning, on any device.
        tokenizer: that of both models.
        text: the name of a text, a local file, or a `Text`; its test part is used.
        dense_tokenizer: the dense model's tokenizer, if it is to be checked that both are the same.
        seqlen: tokens per window, by default min(2048, the limits of the model and of its tokenizer).
        windows: at most so many windows; None takes the whole text.
        batch_size: windows per forward pass; changes the speed, and the result by rounding only.
        progress: called with characters tokenised, then with windows done and in all.

    Returns:
        A `Fidelity`: means over all windows x seqlen positions, standard errors and provenance.

    Raises:
        UsageError: the models differ in their vocabulary or tokenizer, or one is neither a causal nor a
            masked language model.
        InvalidParameter: seqlen, windows or batch_size out of range.
        TextTooShort: the text has fewer tokens than one window.
        UnknownName, LoadFailure: the text cannot be read.
        NumericalFailure: a divergence is not finite; the message names the window.

    >>> import transformers, tokenizers
    >>> from secateur.data.text import Text
    >>> words = {word: i for i, word in enumerate("the cut came late in spring".split())}
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=6, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> text = Text("example", "test", ("the cut came late in spring",) * 4, "made up", " ")
    >>> result = fidelity(model, model, tokenizer, text, seqlen=8)
    >>> result.js_divergence, result.kl_divergence, result.top1_agreement, result.tokens
    (0.0, 0.0, 1.0, 24)
    """
    if dense_tokenizer is not None and dense_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"Fidelity needs one tokenizer for both models; the pruned model's has {len(tokenizer)} tokens, "
            f"the dense model's {len(dense_tokenizer)}, and they do not agree."
        )
    sample = take("fidelity", model, tokenizer, text, seqlen, windows, batch_size, progress)
    pruned_reader, dense_reader = Reader(model, sample.ids), Reader(dense, sample.ids)
    if pruned_reader.vocabulary != dense_reader.vocabulary:
        raise UsageError(
            f"Fidelity compares predictions over one vocabulary; {pruned_reader.name} predicts "
            f"{pruned_reader.vocabulary} tokens, the dense {dense_reader.name} {dense_reader.vocabulary}."
        )

    means: list[Tensor] = []
    total = len(sample.ids)
    with evaluating(model), evaluating(dense):
        for first, ids in sample.batches(batch_size):
            for window in window_measures(pruned_reader, dense_reader, ids):
                if not bool(window.isfinite().all()):
                    raise NumericalFailure(
                        f"The divergence of {pruned_reader.name} ({model.dtype}) from the dense model "
                        f"({dense.dtype}) is not finite in {sample.place(len(means))}; if the weights are "
                        f"finite, try another dtype."
                    )
                means.append(window)
            progress(first + len(ids), total, f"fidelity on {sample.text}")

    (js, js_error), (kl, kl_error), (top1, top1_error) = (
        mean_and_stderr(column.tolist()) for column in torch.stack(means, dim=1)
    )
    return Fidelity(
        js_divergence=js,
        js_divergence_stderr=js_error,
        kl_divergence=kl,
        kl_divergence_stderr=kl_error,
        top1_agreement=top1,
        top1_agreement_stderr=top1_error,
        tokens=sample.ids.numel(),
        windows=total,
        seqlen=sample.seqlen,
        text=sample.text,
        split=sample.split,
        sha256=sample.sha256,
        ids_sha256=sample.ids_sha256,
        dtype=str(model.dtype).removeprefix("torch."),
        dense_dtype=str(dense.dtype).removeprefix("torch."),
    )


def window_measures(pruned: Reader, dense: Reader, ids: Tensor) -> Tensor:
    """For each window of ids (batch, seqlen): (batch, 3) fp64 means of JS, KL and top-1 agreement."""
    sums = torch.zeros(len(ids), 3, dtype=torch.float64)
    pairs = zip(dense.chunks(ids, CHUNK), pruned.chunks(ids, CHUNK), strict=True)
    for (_, p), (_, q) in pairs:
        p = p.to(q.device)
        measures = (js_divergence(p, q), kl_divergence(p, q), p.argmax(-1) == q.argmax(-1))
        sums += torch.stack([m.double().sum(-1) for m in measures], dim=-1).cpu()
    return sums / ids.shape[1]

"""Fidelity: how close a pruned model's predictions stay to those of the dense one.

For every position t of a text, both models read the same tokens; with p_t and q_t the dense and the pruned
model's predictions over the whole vocabulary:

    kl_divergence   mean_t KL(p_t, q_t)               in nats, 0 = the same
    js_divergence   mean_t JS(p_t, q_t)               in nats, between 0 and ln 2 = 0.693
    top1_agreement  mean_t [argmax p_t = argmax q_t]  share of positions, 1 = the same
    js_quantiles    of JS(p_t, q_t) over t            0.5, 0.9, 0.99 and the largest: a mean hides the few tokens
                                                      at which a pruned model leaves the dense one's path

Every position of a plain text counts. Of a conversation only the predictions of the response's tokens do, by
default, and never padding.

Source: Khanal and Capone 2024, arXiv:2409.11233, where JS follows the quality of pruned models on tasks
better than perplexity does. Their released code takes the softmax over positions and keeps the last batch
only (specs of this project, unstructured.md 7.2); this follows the definition, so the numbers differ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.evaluate.sample import Sample, describe, mean_and_stderr, take, with_error
from secateur.evaluate.tokens import DensePredictions, Tokens, read_tokens
from secateur.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.data.instructions import Instructions
    from secateur.data.text import Text

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Fidelity:
    """The three measures, each a mean over tokens with its standard error, and where they come from.

    Divergences in nats. The standard errors take the windows as the sampling unit, as tokens within one are
    not independent; they are None for a single window. `js_quantiles` maps "0.5", "0.9", "0.99" and "max" to the
    JS divergence that this share of the tokens stays below. `counted` says which tokens are meant: "all", or of
    conversations those of the "response", each conversation being a window.
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
    js_quantiles: dict[str, float] = field(default_factory=dict)
    counted: str = "all"

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        js = with_error(self.js_divergence, self.js_divergence_stderr, 4)
        kl = with_error(self.kl_divergence, self.kl_divergence_stderr, 4)
        top1 = with_error(self.top1_agreement, self.top1_agreement_stderr, 4)
        where = describe(self.tokens, self.text, self.split, self.seqlen, self.sha256, self.windows, self.counted)
        high = f" (99 % of the tokens below {self.js_quantiles['0.99']:.4f})" if self.js_quantiles else ""
        return f"JS {js} nats{high}, KL {kl} nats, top-1 agreement {top1} {where}"


def fidelity(
    model: PreTrainedModel,
    dense: PreTrainedModel | DensePredictions,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | Text | Instructions | None = None,
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
        dense: the model before pruning, on any device; or its `DensePredictions`, which save its pass when many
            pruned models are compared with it, and bring their text, windows and batch size.
        tokenizer: that of both models.
        text: the name of a text, a local file, or a `Text`; its test part is used. Or conversations, as
            FILE.jsonl:PROMPT,RESPONSE or `Instructions`, of which only the responses count unless they say
            otherwise. None is that of the dense predictions, or else "gutenberg".
        dense_tokenizer: the dense model's tokenizer, if it is to be checked that both are the same.
        seqlen: tokens per window, by default min(2048, the limits of the model and of its tokenizer).
        windows: at most so many windows; None takes the whole text.
        batch_size: windows per forward pass; changes the speed, and the result by rounding only.
        progress: called with characters tokenised, then with windows done and in all.

    Returns:
        A `Fidelity`: means over all positions that count, standard errors, quantiles and provenance.

    Raises:
        UsageError: the models differ in their vocabulary or tokenizer, one is neither a causal nor a
            masked language model, or the dense predictions are of another text.
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
    check_tokenizers(tokenizer, dense_tokenizer)
    sample, against, size = prepare("fidelity", model, tokenizer, text, dense, seqlen, windows, batch_size, progress)
    found = read_tokens(model, sample, size, against, likelihood=False, what="fidelity", progress=progress)
    return of_tokens(found, model, against, sample)


def check_tokenizers(tokenizer: Any, dense_tokenizer: Any) -> None:
    """Raise unless both are the same, or the dense model's is not given."""
    if dense_tokenizer is not None and dense_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"Fidelity needs one tokenizer for both models; the pruned model's has {len(tokenizer)} tokens, "
            f"the dense model's {len(dense_tokenizer)}, and they do not agree."
        )


def prepare(
    owner: str,
    model: Any,
    tokenizer: Any,
    text: str | Path | Text | Instructions | None,
    dense: Any,
    seqlen: int | None,
    windows: int | None,
    batch_size: int,
    progress: Progress,
) -> tuple[Sample, DensePredictions, int]:
    """The sample, the dense side and the batch size: those of the predictions where they exist already.

    Raises:
        UsageError: the predictions were made on other tokens than those asked for.
    """
    if not isinstance(dense, DensePredictions):
        asked = "gutenberg" if text is None else text
        sample = take(owner, model, tokenizer, asked, seqlen, windows, batch_size, progress)
        return sample, DensePredictions.of(dense, sample, batch_size), batch_size
    if text is not None:
        sizes = (seqlen or dense.sample.seqlen, windows or len(dense.sample.ids))
        sample = take(owner, model, tokenizer, text, *sizes, batch_size, progress)
        if sample.ids_sha256 != dense.sample.ids_sha256 or sample.counts != dense.sample.counts:
            raise UsageError(
                f"The dense predictions were made on {dense.sample.text} ({dense.sample.split}), "
                f"{len(dense.sample.ids)} windows of {dense.sample.seqlen}, and not on the {len(sample.ids)} windows "
                f"of {sample.seqlen} of {sample.text} asked for: leave the text out, or make them anew."
            )
    elif seqlen not in (None, dense.sample.seqlen) or windows not in (None, len(dense.sample.ids)):
        raise UsageError(
            f"The dense predictions are of {len(dense.sample.ids)} windows of {dense.sample.seqlen} tokens: leave "
            f"out seqlen and windows, or make them anew."
        )
    return dense.sample, dense, dense.batch_size


def of_tokens(found: Tokens, model: Any, dense: DensePredictions, sample: Sample) -> Fidelity:
    """The summary of what was read at every position."""
    js, js_error = mean_and_stderr(found.js)
    kl, kl_error = mean_and_stderr(found.kl)
    top1, top1_error = mean_and_stderr(found.top1)
    return Fidelity(
        js_divergence=js,
        js_divergence_stderr=js_error,
        kl_divergence=kl,
        kl_divergence_stderr=kl_error,
        top1_agreement=top1,
        top1_agreement_stderr=top1_error,
        tokens=sum(map(len, found.js)),
        windows=len(found.js),
        seqlen=sample.seqlen,
        text=sample.text,
        split=sample.split,
        sha256=sample.sha256,
        ids_sha256=sample.ids_sha256,
        dtype=str(model.dtype).removeprefix("torch."),
        dense_dtype=str(dense.dtype).removeprefix("torch."),
        js_quantiles=quantiles(torch.cat(found.js)),
        counted=sample.counts,
    )


def quantiles(values: Tensor) -> dict[str, float]:
    """Quantiles of values (n,), between two neighbours by their distance, and the largest.

    >>> quantiles(torch.tensor([4.0, 1.0, 2.0, 3.0, 5.0]))
    {'0.5': 3.0, '0.9': 4.6, '0.99': 4.96, 'max': 5.0}
    """
    ordered = values.double().sort().values.tolist()
    found: dict[str, float] = {}
    for share in QUANTILES:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        found[str(share)] = ordered[below] + (place - below) * (ordered[above] - ordered[below])
    return {**found, "max": ordered[-1]}

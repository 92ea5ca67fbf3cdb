"""Perplexity: how surprised a causal language model is by a text.

    nll = -1/N  sum  ln p(x_t | x_1 ... x_{t-1}),   perplexity = exp(nll)

The field's protocol (Frantar and Alistarh 2023, arXiv:2301.00774; Sun et al. 2023, arXiv:2306.11695): the
documents are joined and tokenised once, cut into consecutive windows of `seqlen` tokens that do not overlap
(the incomplete last one is left out), and each window predicts its own tokens 2 to seqlen: N = windows x
(seqlen - 1). Of conversations each is a window of its own and only the tokens of its responses count, by
default. Numbers taken with different texts, seqlens or tokenizers cannot be compared.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.errors import NumericalFailure, UsageError
from secateur.evaluate.sample import Sample, describe, mean_and_stderr, take, with_error
from secateur.evaluate.tokens import not_causal, read_tokens
from secateur.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.data.instructions import Instructions
    from secateur.data.text import Text


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and where it comes from.

    `nll` is the mean negative log-likelihood per predicted token, in nats. Its standard error takes the
    windows as the sampling unit, as tokens within one are not independent; that of the perplexity follows by
    the delta method, stderr = value x nll_stderr. Both are None for a single window. `counted` says which tokens
    are meant: "all", or of conversations those of the "response", each conversation being a window.
    """

    value: float
    stderr: float | None
    nll: float
    nll_stderr: float | None
    tokens: int
    windows: int
    seqlen: int
    text: str
    split: str
    sha256: str
    ids_sha256: str
    dtype: str
    counted: str = "all"

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        where = describe(self.tokens, self.text, self.split, self.seqlen, self.sha256, self.windows, self.counted)
        return f"{with_error(self.value, self.stderr)} {where}"


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | Text | Instructions = "gutenberg",
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> Perplexity:
    """Perplexity of a causal language model on the test part of a text.

    Args:
        model: any causal language model, in any float dtype; its mode and gradients are left alone.
        tokenizer: the model's own.
        text: the name of a text, a local file, or a `Text`; or conversations, as FILE.jsonl:PROMPT,RESPONSE or
            `Instructions`, of which only the responses count unless they say otherwise.
        seqlen: tokens per window, by default min(2048, the limits of the model and of its tokenizer).
        windows: at most so many windows; None takes the whole text.
        batch_size: windows per forward pass; changes the speed, and the result by rounding only.
        progress: called with characters tokenised, then with windows done and in all.

    Returns:
        A `Perplexity`: value, standard error, tokens and provenance; it prints as one line.

    Raises:
        UsageError: the model is not a causal language model, or the tokenizer is not its own.
        InvalidParameter: seqlen, windows or batch_size out of range.
        TextTooShort: the text has fewer tokens than one window.
        UnknownName, LoadFailure: the text cannot be read.
        NumericalFailure: logits or log-likelihoods of a window are not finite; the message names it.

    >>> import transformers, tokenizers
    >>> from secateur.data.text import Text
    >>> words = {word: i for i, word in enumerate("the cut came late in spring".split())}
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=6, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> text = Text("example", "test", ("the cut came late in spring",) * 4, "made up", " ")
    >>> result = perplexity(model, tokenizer, text, seqlen=8)
    >>> 5 < result.value < 7, result.tokens  # an untrained model guesses among 6 words
    (True, 21)
    """
    if model.config.is_encoder_decoder:
        raise UsageError(not_causal(model))
    sample = take("perplexity", model, tokenizer, text, seqlen, windows, batch_size, progress)
    found = read_tokens(model, sample, batch_size, None, likelihood=True, what="perplexity", progress=progress)
    return of_nlls(found.nll, model, sample)


def of_nlls(nlls: list[Tensor], model: Any, sample: Sample) -> Perplexity:
    """The perplexity that the nats of every counted token make; (tokens,) for each window."""
    nll, nll_stderr = mean_and_stderr(nlls)
    if nll > 700:
        raise NumericalFailure(
            f"The perplexity of {type(model).__name__} on {sample.text} is beyond fp64: {nll:.4g} nats per token."
        )
    value = math.exp(nll)
    return Perplexity(
        value=value,
        stderr=None if nll_stderr is None else value * nll_stderr,
        nll=nll,
        nll_stderr=nll_stderr,
        tokens=sum(map(len, nlls)),
        windows=len(nlls),
        seqlen=sample.seqlen,
        text=sample.text,
        split=sample.split,
        sha256=sample.sha256,
        ids_sha256=sample.ids_sha256,
        dtype=str(model.dtype).removeprefix("torch."),
        counted=sample.counts,
    )

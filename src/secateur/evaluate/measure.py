"""Perplexity and fidelity from one pass of the pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import UsageError
from secateur.evaluate.fidelity import Fidelity, check_tokenizers, of_tokens, prepare
from secateur.evaluate.perplexity import Perplexity, of_nlls
from secateur.evaluate.tokens import DensePredictions, not_causal, read_tokens
from secateur.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.data.instructions import Instructions
    from secateur.data.text import Text


def measure(
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
) -> tuple[Perplexity, Fidelity]:
    """What `perplexity` and `fidelity` measure, to rounding, for the price of one pass and the heads.

    Args:
        model: the pruned model, causal.
        dense: the model before pruning, or its `DensePredictions` over the text: then only `model` runs.
        tokenizer, text, dense_tokenizer, seqlen, windows, batch_size, progress: as for `fidelity`.

    Returns:
        The perplexity of `model` and its fidelity to the dense one, on the same tokens.

    Raises:
        The errors of `perplexity` and `fidelity`.

    >>> import transformers, tokenizers
    >>> from secateur.data.text import Text
    >>> words = {word: i for i, word in enumerate("the cut came late in spring".split())}
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=6, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> text = Text("example", "test", ("the cut came late in spring",) * 4, "made up", " ")
    >>> surprise, closeness = measure(model, model, tokenizer, text, seqlen=8)
    >>> 5 < surprise.value < 7, closeness.js_divergence
    (True, 0.0)
    """
    if model.config.is_encoder_decoder:
        raise UsageError(not_causal(model))
    check_tokenizers(tokenizer, dense_tokenizer)
    sample, against, size = prepare("measure", model, tokenizer, text, dense, seqlen, windows, batch_size, progress)
    what = "perplexity and fidelity"
    found = read_tokens(model, sample, size, against, likelihood=True, what=what, progress=progress)
    return of_nlls(found.nll, model, sample), of_tokens(found, model, against, sample)

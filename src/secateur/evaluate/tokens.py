"""What one pass of a model over a text tells about every token: the base of perplexity and fidelity.

Both measures read the same logits, so one pass serves them together. The dense model's side of a comparison is
the same for every pruned model: `DensePredictions` keeps what its body left, d floats a token, and a copy of
what stands behind the body (norm, head); its logits follow from these exactly, vocabulary / d times smaller.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.divergence import divergences
from secateur.errors import NumericalFailure, UsageError
from secateur.evaluate.logits import Reader
from secateur.evaluate.sample import Batch, Sample, take
from secateur.progress import Progress, silent
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.data.instructions import Instructions
    from secateur.data.text import Text

CHUNK = 2**22  # logits at a time and model: 16 MB in fp32
FEW = 2**18  # of which so many are compared at once, as a processor's cache holds them


@dataclass
class Tokens:
    """For each window, in order, a (tokens,) fp64 tensor on the CPU of each measure, in nats.

    nll, dense_nll: of the tokens predicted, by the model and by the dense one. js, kl, top1: of the predictions
    compared. What was not asked for is empty.
    """

    nll: list[Tensor] = field(default_factory=list)
    dense_nll: list[Tensor] = field(default_factory=list)
    js: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    top1: list[Tensor] = field(default_factory=list)


class DensePredictions:
    """The dense model's predictions over a text, made once and compared with many pruned models.

    Holds no reference to the dense model, which may be changed or freed afterwards; only a model whose body and
    head cannot be run apart is kept, and run again for each comparison.

    Args:
        dense: the model before pruning, causal or masked.
        tokenizer: its own.
        text: the name of a text or of conversations, a local file, a `Text` or `Instructions`; its test part.
        seqlen: tokens per window, by default min(2048, the limits of the model and of its tokenizer).
        windows: at most so many windows or conversations; None takes the whole text.
        batch_size: windows per forward pass, of this model and of those compared with it.
        progress: called with characters tokenised, then with windows done and in all.

    Raises:
        UsageError, InvalidParameter, TextTooShort, UnknownName, LoadFailure: as `fidelity`.

    >>> import transformers, tokenizers
    >>> from secateur.data.text import Text
    >>> from secateur.evaluate import fidelity
    >>> words = {word: i for i, word in enumerate("the cut came late in spring".split())}
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=6, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> text = Text("example", "test", ("the cut came late in spring",) * 4, "made up", " ")
    >>> dense = DensePredictions(model, tokenizer, text, seqlen=8)
    >>> _ = model.model.layers[0].mlp.down_proj.weight.data.zero_()
    >>> fidelity(model, dense, tokenizer).js_divergence > 0
    True
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str | Path | Text | Instructions = "gutenberg",
        *,
        seqlen: int | None = None,
        windows: int | None = None,
        batch_size: int = 1,
        progress: Progress = silent,
    ) -> None:
        sample = take("fidelity", dense, tokenizer, text, seqlen, windows, batch_size, progress)
        self._keep(dense, sample, batch_size, progress)

    @classmethod
    def of(cls, dense: Any, sample: Sample, batch_size: int) -> DensePredictions:
        """For one comparison: the dense model is kept and runs along, so that nothing else needs to be held."""
        made = cls.__new__(cls)
        made.sample, made.batch_size, made.dtype = sample, batch_size, dense.dtype
        made.reader, made.outputs, made.dense = Reader(dense, sample.ids), {}, dense
        return made

    @classmethod
    def over(cls, dense: Any, sample: Sample, batch_size: int, progress: Progress = silent) -> DensePredictions:
        """Over a sample that is cut already."""
        made = cls.__new__(cls)
        made._keep(dense, sample, batch_size, progress)
        return made

    def _keep(self, dense: Any, sample: Sample, batch_size: int, progress: Progress) -> None:
        self.sample, self.batch_size, self.dtype = sample, batch_size, dense.dtype
        self.reader = Reader(dense, sample.ids)
        self.outputs: dict[int, Any] = {}
        self.dense: Any = dense
        if self.reader.body is None:
            return
        with evaluating(dense):
            for batch in sample.batches(batch_size):
                output = copy.copy(self.reader.read(batch.ids, batch.mask))
                output["last_hidden_state"] = output.last_hidden_state.cpu()
                self.outputs[batch.first] = output
                progress(batch.first + len(batch.ids), len(sample.ids), f"dense predictions on {sample.text}")
            self.reader, self.dense = self.reader.without_body(), None

    @property
    def vocabulary(self) -> int:
        """Tokens that are predicted."""
        return self.reader.vocabulary

    def chunks(self, batch: Batch, elements: int) -> Iterator[tuple[slice, Tensor]]:
        """The dense logits of a batch of the sample, as `Reader.chunks` gives them."""
        if batch.first not in self.outputs:
            return self.reader.chunks(batch.ids, elements, batch.mask)
        output = copy.copy(self.outputs[batch.first])
        output["last_hidden_state"] = output.last_hidden_state.to(self.reader.device)
        return self.reader.head(output, batch.ids, elements)


def read_tokens(
    model: Any,
    sample: Sample,
    batch_size: int,
    dense: DensePredictions | None,
    *,
    likelihood: bool,
    what: str,
    progress: Progress,
) -> Tokens:
    """One pass of a model over a sample.

    Args:
        dense: to compare with; made on the same sample.
        likelihood: whether nll and dense_nll are wanted, which only a causal model has.
        what: the measures in words, for progress.

    Raises:
        UsageError: the models predict different numbers of tokens.
        NumericalFailure: a value is not finite; the message names the window.
    """
    reader = Reader(model, sample.ids)
    if likelihood and reader.direction != "causal":
        raise UsageError(not_causal(model))
    if dense is not None and reader.vocabulary != dense.vocabulary:
        raise UsageError(
            f"Fidelity compares predictions over one vocabulary; {reader.name} predicts "
            f"{reader.vocabulary} tokens, the dense {dense.reader.name} {dense.vocabulary}."
        )
    found = Tokens()
    with evaluating(model), evaluating(model if dense is None else dense.reader.model):
        for batch in sample.batches(batch_size):
            values = _read_batch(reader, batch, dense, likelihood)
            _check(values, reader, batch, sample, dense)
            for row, (tokens, predictions) in enumerate(_counted(batch, reader.direction)):
                for name, value in values.items():
                    getattr(found, name).append(value[row][tokens if name.endswith("nll") else predictions])
            progress(batch.first + len(batch.ids), len(sample.ids), f"{what} on {sample.text}")
    return found


def not_causal(model: Any) -> str:
    """What is wrong with a model that has no perplexity."""
    return f"perplexity is defined for causal language models; {type(model).__name__} is not one."


def _counted(batch: Batch, direction: str) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row, which of the tokens 2 to length count, and at which positions predictions count."""
    for row in range(len(batch.ids)):
        if batch.counted is None:
            every = torch.ones(batch.ids.shape[1], dtype=torch.bool)
            yield every[1:], every
            continue
        own = batch.counted[row]
        tokens = own[1:]
        # a causal model predicts a token from the position before it
        yield tokens, torch.cat([tokens, tokens.new_zeros(1)]) if direction == "causal" else own


def _read_batch(reader: Reader, batch: Batch, dense: DensePredictions | None, likelihood: bool) -> dict[str, Tensor]:
    """Measure -> (rows, length) fp64, of likelihoods (rows, length - 1)."""
    rows, length = batch.ids.shape
    names = ["nll"] * likelihood + ["dense_nll"] * (likelihood and dense is not None)
    values = {name: torch.empty(rows, length - 1, dtype=torch.float64) for name in names}
    if dense is not None:
        values |= {name: torch.empty(rows, length, dtype=torch.float64) for name in ("js", "kl", "top1")}
    own = reader.chunks(batch.ids, CHUNK, batch.mask)
    for part, q, p in _side_by_side(own, None if dense is None else dense.chunks(batch, CHUNK)):
        targets = batch.ids[:, part.start + 1 : part.stop + 1].to(q.device)
        for row in range(rows):
            step = max(1, FEW // reader.vocabulary)
            for start in range(0, part.stop - part.start, step):
                piece = slice(start, start + step)
                here = slice(part.start + start, min(part.start + start + step, part.stop))
                wide_q = _wide(q[row, piece])
                log_q = wide_q.log_softmax(-1)
                wanted = targets[row, piece]
                into = slice(here.start, here.start + len(wanted))  # the last position has nothing to predict
                if likelihood:
                    values["nll"][row, into] = _nll(log_q, wanted)
                if p is None:
                    continue
                wide_p = _wide(p[row, piece]).to(wide_q)
                log_p = wide_p.log_softmax(-1)
                if likelihood:
                    values["dense_nll"][row, into] = _nll(log_p, wanted)
                values["js"][row, here], values["kl"][row, here] = (v.cpu().double() for v in divergences(log_p, log_q))
                values["top1"][row, here] = (wide_p.argmax(-1) == wide_q.argmax(-1)).cpu().double()
    return values


def _side_by_side(
    own: Iterator[tuple[slice, Tensor]], dense: Iterator[tuple[slice, Tensor]] | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    if dense is None:
        yield from ((part, q, None) for part, q in own)
        return
    for (part, q), (_, p) in zip(own, dense, strict=True):
        yield part, q, p.to(q.device)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _nll(log_p: Tensor, wanted: Tensor) -> Tensor:
    return -log_p[: len(wanted)].gather(-1, wanted[:, None])[:, 0].cpu().double()


def _check(
    values: dict[str, Tensor], reader: Reader, batch: Batch, sample: Sample, dense: DensePredictions | None
) -> None:
    """What is counted must be finite."""
    for row, (tokens, predictions) in enumerate(_counted(batch, reader.direction)):
        place = sample.place(batch.first + row)
        if "nll" in values:
            nlls = values["nll"][row][tokens]
            bad = int((~nlls.isfinite()).sum())
            if bad:
                raise NumericalFailure(
                    f"The log-likelihood of {reader.name} ({reader.model.dtype}) is not finite for {bad} of "
                    f"{len(nlls)} tokens in {place}; if the weights are finite, try another dtype."
                )
        for name in ("js", "kl"):
            if name in values and dense is not None and not bool(values[name][row][predictions].isfinite().all()):
                raise NumericalFailure(
                    f"The divergence of {reader.name} ({reader.model.dtype}) from the dense model "
                    f"({dense.dtype}) is not finite in {place}; if the weights are finite, try another dtype."
                )

"""Which text to calibrate with: one model pruned once per source, all else equal, measured on the same tokens.

Khanal and Capone 2024 (arXiv:2409.11233) find that calibrating with instructions keeps more of what a model does
with instructions than calibrating with web pages. Whether that holds for a model, a method and a text is what
this answers: every source gives the same number of tokens, and differences are taken window by window, so that
their errors tell whether they are real.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.data.calibration import Calibration, calibration
from secateur.data.instructions import Instructions
from secateur.data.text import Text
from secateur.errors import UsageError
from secateur.evaluate.fidelity import Fidelity, of_tokens
from secateur.evaluate.perplexity import Perplexity, of_nlls
from secateur.evaluate.sample import paired, take
from secateur.evaluate.sparsity import sparsity as count_zeros
from secateur.evaluate.tokens import DensePredictions, Tokens, read_tokens
from secateur.job import check_job
from secateur.methods import Method
from secateur.progress import Progress, silent
from secateur.pruning import prune

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Source = str | Path | Text | Instructions

MEASURES = {"js": "js_divergence", "kl": "kl_divergence", "nll": "nll"}  # a token's value -> its name in results


@dataclass(frozen=True)
class Measured:
    """One pruned model on one text."""

    calibration: str
    text: str
    perplexity: Perplexity
    fidelity: Fidelity


@dataclass(frozen=True)
class Difference:
    """a minus b in one measure on one text, in nats per token, over the same windows; below 0, a is better.

    stderr is None for a single window.
    """

    text: str
    measure: str
    a: str
    b: str
    difference: float
    stderr: float | None
    windows: int


@dataclass(frozen=True)
class Comparison:
    """Every source measured on every text, and the sources against each other.

    dense: text -> perplexity of the model before pruning. calibrations: source -> how it was drawn.
    sparsity: source -> share of zeros in the layers. seconds: of pruning, by source.
    """

    method: Mapping[str, Any]
    pattern: str
    target: float | None
    calibrations: Mapping[str, Mapping[str, Any]]
    dense: Mapping[str, Perplexity]
    results: tuple[Measured, ...]
    differences: tuple[Difference, ...]
    sparsity: Mapping[str, float]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "method": dict(self.method),
            "pattern": self.pattern,
            "target": self.target,
            "calibrations": {name: dict(record) for name, record in self.calibrations.items()},
            "dense": {name: value.to_dict() for name, value in self.dense.items()},
            "results": [
                {
                    "calibration": one.calibration,
                    "text": one.text,
                    "perplexity": one.perplexity.to_dict(),
                    "fidelity": one.fidelity.to_dict(),
                }
                for one in self.results
            ],
            "differences": [vars(one) for one in self.differences],
            "sparsity": dict(self.sparsity),
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
        }


def compare_calibrations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    calibrations: Sequence[Source],
    texts: Sequence[Source],
    *,
    samples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    windows: int | None = None,
    test_seqlen: int | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
    **request: Any,
) -> Comparison:
    """Prune a fresh copy of a model with each source, and measure all of them on each text.

    The model itself stays dense. In memory are the model, one copy, and d floats per token of the texts.

    Args:
        model: causal; what all copies are made of.
        tokenizer: its own.
        method: one that reads calibration data, for example `Wanda()`.
        calibrations: two or more sources, each a name or file for `read_text` or `read_instructions`, or what
            these return.
        texts: one or more, of which the test parts are measured on; of conversations only the responses.
        samples, seqlen, seed: as for `calibration`; each source gives samples x seqlen tokens.
        windows: at most so many windows or conversations of each text.
        test_seqlen: tokens per window of a text; None is that of the calibration.
        batch_size: windows per forward pass.
        progress: told how far each step is.
        request: what else `prune` takes: sparsity, pattern, allocation, schedule, include, exclude, uncalled.

    Returns:
        A `Comparison`.

    Raises:
        UsageError: fewer than two sources or no text, one twice, or a method that reads no text.
        And the errors of `calibration`, `prune` and `fidelity`; the model itself is then as it was.

    >>> import transformers, tokenizers
    >>> from secateur.methods.wanda import Wanda
    >>> words = {word: i for i, word in enumerate("the cut came late in spring ?".split())}
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=7, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> early, late = (Text(name, "test", (f"the cut came {name} in spring",) * 9, "made up", " ")
    ...     for name in ("late", "spring"))
    >>> found = compare_calibrations(model, tokenizer, Wanda(), [early, late], [late], samples=2, seqlen=8,
    ...     sparsity=0.5)
    >>> [(one.measure, one.windows) for one in found.differences]
    [('js_divergence', 6), ('kl_divergence', 6), ('nll', 6)]
    """
    names, tests = _names("calibration", calibrations, 2), _names("text", texts, 1)
    if not (method.reads or bool(getattr(request.get("allocation"), "needs", ()))):
        raise UsageError(f"{method.name()} reads no text, so there is nothing to compare.")
    check_job(model, method, **request)
    drawn: dict[str, Calibration] = {}
    for name, source in zip(names, calibrations, strict=True):  # all of them before the first is used
        drawn[name] = calibration(tokenizer, source, samples, seqlen, seed, model=model, progress=progress)
    length = drawn[names[0]].record["seqlen"] if test_seqlen is None else test_seqlen
    cut = {
        name: take("compare", model, tokenizer, text, length, windows, batch_size, progress)
        for name, text in zip(tests, texts, strict=True)
    }
    dense = {name: DensePredictions.over(model, sample, batch_size, progress) for name, sample in cut.items()}

    read: dict[tuple[str, str], Tokens] = {}
    results: list[Measured] = []
    zeros: dict[str, float] = {}
    seconds: dict[str, float] = {}
    warnings: list[str] = []
    for name in names:
        pruned = copy.deepcopy(model)
        begun = time.perf_counter()
        result = prune(pruned, method, drawn[name], batch_size=batch_size, progress=progress, **request)
        seconds[name] = time.perf_counter() - begun
        zeros[name] = count_zeros(pruned).layers
        warnings += [f"{name}: {warning}" for warning in result.warnings]
        for test, sample in cut.items():
            found = read_tokens(
                pruned, sample, batch_size, dense[test], likelihood=True, what=f"{name}: measures", progress=progress
            )
            read[name, test] = found
            measures = of_nlls(found.nll, pruned, sample), of_tokens(found, pruned, dense[test], sample)
            results.append(Measured(name, test, *measures))
    return Comparison(
        method=result.method,
        pattern=result.pattern,
        target=result.target,
        calibrations={name: one.record for name, one in drawn.items()},
        dense={test: of_nlls(read[names[0], test].dense_nll, model, cut[test]) for test in tests},
        results=tuple(results),
        differences=tuple(_differences(names, tests, read)),
        sparsity=zeros,
        seconds=seconds,
        warnings=tuple(warnings),
    )


def _differences(
    names: Sequence[str], tests: Sequence[str], read: Mapping[tuple[str, str], Tokens]
) -> list[Difference]:
    found = []
    for test in tests:
        for field, measure in MEASURES.items():
            for a, b in combinations(names, 2):
                ours, theirs = getattr(read[a, test], field), getattr(read[b, test], field)
                found.append(Difference(test, measure, a, b, *paired(ours, theirs), len(ours)))
    return found


def _names(kind: str, sources: Sequence[Source], least: int) -> list[str]:
    names = [source.name if isinstance(source, Text | Instructions) else str(source) for source in sources]
    if len(names) < least:
        raise UsageError(f"A comparison needs at least {least} {kind}{'s' * (least > 1)}; got {len(names)}.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"The {kind} '{twice}' is named twice: name each source once.")
    return names

"""Translations, and how good they are: BLEU and chrF against references, and against the dense model.

Greedy decoding, so that a model gives one answer. The two measures are sacrebleu's (Post 2018, arXiv:1804.08771)
with their default settings, whose signature is kept: BLEU (Papineni et al. 2002) counts word n-grams up to 4, chrF
(Popović 2015) character n-grams up to 6. Intervals are percentiles over bootstrap samples of the sentences; the
difference to the dense model is taken on the same samples (paired bootstrap, Koehn 2004, EMNLP), with sacrebleu's p:
how often a difference as large comes by chance when the samples' differences are moved to mean zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.data.pairs import Pairs
from secateur.errors import InvalidParameter, UsageError, check_whole
from secateur.models.fetch import quiet
from secateur.progress import Progress, silent
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 128


@dataclass(frozen=True)
class Score:
    """One measure. low and high: its 95 % interval; the difference is to the dense model, None without one."""

    value: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None

    def __str__(self) -> str:
        shown = f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"
        if self.difference is None:
            return shown
        span = f"[{self.difference_low:+.2f}, {self.difference_high:+.2f}]"
        return f"{shown}, dense {self.difference:+.2f} {span}, p = {self.p:.2g}"


@dataclass(frozen=True)
class TranslationScores:
    """BLEU and chrF (0 to 100) of `sentences` sentences; `same` is the share written exactly as by the dense model."""

    bleu: Score
    chrf: Score
    sentences: int
    pairs: str
    sha256: str
    signature: str
    same: float | None = None

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        same = "" if self.same is None else f", {100 * self.same:.1f} % as the dense model"
        return f"BLEU {self.bleu}; chrF {self.chrf} (n = {self.sentences} sentences, {self.pairs}{same})"


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    tokens: int = TOKENS,
    batch_size: int = 16,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """What a model writes for each sentence, greedily.

    Args:
        model: an encoder-decoder, as OPUS-MT.
        tokenizer: the model's own.
        sources: sentences.
        tokens: at most so many are written for a sentence, and at most twice those of the batch's longest and 16 more.
        batch_size: sentences together; sorted by length, so that little is padding.
        progress: told the sentences done.

    Raises:
        UsageError: the model is no encoder-decoder that generates, or there is no sentence.
        InvalidParameter: tokens or batch_size below 1.
    """
    if not model.config.is_encoder_decoder or not model.can_generate():
        raise UsageError(f"Translation needs an encoder-decoder that generates; {type(model).__name__} is not one.")
    for name, value in (("tokens", tokens), ("batch_size", batch_size)):
        check_whole(name, "translate", value)
    if not sources:
        raise UsageError("There is no sentence to translate.")
    device = model.get_input_embeddings().weight.device
    greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    written: dict[int, str] = {}
    with evaluating(model), torch.no_grad(), quiet("transformers"):
        for first in range(0, len(sources), batch_size):
            rows = order[first : first + batch_size]
            words = [sources[i] for i in rows]
            batch = tokenizer(words, return_tensors="pt", padding=True, truncation=True).to(device)
            batch.pop("token_type_ids", None)
            room = min(tokens, 2 * batch["input_ids"].shape[1] + 16)  # a broken model writes on and on
            ids = model.generate(**batch, **greedy, max_new_tokens=room)
            texts = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
            written.update(zip(rows, texts, strict=True))
            progress(len(written), len(sources), "translating")
    return tuple(written[i] for i in range(len(sources)))


def score_translations(
    written: Sequence[str],
    pairs: Pairs,
    dense: Sequence[str] | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> TranslationScores:
    """BLEU and chrF of translations, with intervals, and what they lose against the dense model's.

    Args:
        written: a translation for each pair.
        pairs: the references.
        dense: the dense model's translations of the same pairs.
        samples: of the bootstrap.
        seed: of the bootstrap; the samples are the same for both measures.

    Raises:
        UsageError: another number of translations than of pairs; sacrebleu is not installed.
        InvalidParameter: fewer than 40 samples, which have no 2.5 % quantile.

    >>> pairs = Pairs(("a", "b"), ("The cat sat on the mat.", "It was sad then."), "two", "")
    >>> found = score_translations(["The cat sat on the mat.", "It is sad now."], pairs, pairs.references)
    >>> found.chrf.value < 100, found.chrf.difference < 0, found.same
    (True, True, 0.5)
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise UsageError("BLEU and chrF need sacrebleu: pip install 'secateur[translation]'.") from error
    if samples < 40:
        raise InvalidParameter("samples", "score_translations", "a whole number from 40", samples)
    for texts in (written, dense):
        if texts is not None and len(texts) != len(pairs):
            raise UsageError(f"There are {len(texts)} translations for {len(pairs)} pairs.")
    rows = np.random.default_rng(seed).choice(len(pairs), size=(samples, len(pairs)), replace=True)
    scores, signatures = [], []
    for metric in (BLEU(), CHRF()):
        ours = _bootstrap(metric, written, pairs.references, rows)
        theirs = None if dense is None else _bootstrap(metric, dense, pairs.references, rows)
        scores.append(_score(ours, theirs))
        signatures.append(f"{type(metric).__name__} {metric.get_signature()}")
    same = None if dense is None else sum(a == b for a, b in zip(written, dense, strict=True)) / len(pairs)
    about = {"pairs": pairs.name, "sha256": pairs.sha256, "signature": "; ".join(signatures)}
    return TranslationScores(scores[0], scores[1], len(pairs), **about, same=same)


def _bootstrap(metric: Any, texts: Sequence[str], references: Sequence[str], rows: Any) -> tuple[float, Any]:
    """The measure, and its values on samples of the sentences, from counts that add up."""
    counts = np.array(metric._extract_corpus_statistics(list(texts), [list(references)]), dtype=np.float64)
    value = metric._compute_score_from_stats(counts.sum(0).tolist()).score
    return value, np.array([metric._compute_score_from_stats(counts[row].sum(0).tolist()).score for row in rows])


def _score(ours: tuple[float, Any], theirs: tuple[float, Any] | None) -> Score:
    value, sampled = ours
    low, high = np.quantile(sampled, (0.025, 0.975)).tolist()
    if theirs is None:
        return Score(value, low, high)
    difference, moves = value - theirs[0], sampled - theirs[1]
    down, up = np.quantile(moves, (0.025, 0.975)).tolist()
    sizes = np.abs(moves)
    chance = int((sizes - sizes.mean() >= abs(difference)).sum())  # equal too: the same texts have p = 1
    return Score(value, low, high, difference, down, up, (chance + 1) / (len(moves) + 1))

"""From a text to token ids: random windows for calibration, consecutive ones for testing.

Both cut windows out of one stream: the ids of the documents joined by the text's separator, with no special
token anywhere, as the field does (Frantar and Alistarh 2023, arXiv:2301.00774; Sun et al. 2023,
arXiv:2306.11695). The published codes draw C4 documents until one is long enough, and never stop when none is;
here documents are packed, windows never overlap, and too little text is an error that says how much there is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import InvalidParameter, TextTooShort
from ..progress import Progress, silent
from .instructions import Instructions, read_source
from .text import Split, Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

USUAL_SEQLEN = 2048  # tokens, the field's usual window
CHUNK = 1 << 16  # characters given to the tokenizer at once: six times less memory, and twice as fast
CONTEXT = 200  # characters before a cut that are seen again behind it
CACHED_STREAMS = 4  # per tokenizer

_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_WORD_BORDER = re.compile(r"(?<=\w) (?=\w)|(?<=\S)\s")
_BORDERS_TRIED = 50


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token ids to calibrate with, and how they were made.

    ids: (n, seqlen) int64, on the CPU; of instructions (conversations, longest).
    mask: None if every id is a token; else of the same shape, False = padding, which must not be counted.
    record: ready for JSON: text, split, samples, seqlen, seed, sha256 (of the ids as little-endian int64, row by
        row), text_sha256, source, shared, tokenizer, tokens_available and how (the drawing in words).
    """

    ids: Tensor = field(repr=False)
    record: dict[str, Any]
    mask: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Windows:
    """Consecutive windows of a text. ids: (n, seqlen) int64, on the CPU; sha256 is of the ids.

    Of instructions, a row is a conversation, and both masks are given: `mask` is False at padding, `counted`
    True at the tokens whose predictions count.
    """

    ids: Tensor = field(repr=False)
    text: str
    split: str
    text_sha256: str
    sha256: str
    tokens_available: int
    mask: Tensor | None = field(default=None, repr=False)
    counted: Tensor | None = field(default=None, repr=False)


def calibration(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | Text | Instructions,
    n: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    *,
    model: PreTrainedModel | None = None,
    progress: Progress = silent,
) -> Calibration:
    """n windows of a text that do not overlap, drawn at random.

    The tokens are cut, from a random offset on, into windows side by side; n of them are taken in the order of
    a random permutation. The generator is seeded here and is not torch's global one.

    Args:
        tokenizer: of the model to be pruned.
        text: a name or file for `read_text`, or a Text of either split; or conversations, by a name for
            `read_instructions` or as `Instructions`: whole ones of n x seqlen tokens in all, one a row.
        n: windows.
        seqlen: tokens per window; by default the least of 2048 and the limits of the model and the tokenizer.
        seed: the same seed gives the same ids.
        model: used for its limits only: positions, and the size of the vocabulary. A config will do.
        progress: told the characters that are tokenised.

    Returns:
        ids (n, seqlen) and their record.

    Raises:
        InvalidParameter: n, seqlen or seed out of range; a tokenizer of another model.
        TextTooShort: fewer than n * seqlen tokens.
        UnknownName, LoadFailure: from `read_text` and `read_instructions`.
        UsageError: conversations, and a tokenizer without a chat template.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    >>> drawn = calibration(tokenizer, Text("ab", "calibration", ("a b " * 50,), "typed here"), n=4, seqlen=8)
    >>> drawn.ids.shape, drawn.record["tokens_available"]
    (torch.Size([4, 8]), 100)
    """
    check_integer("n", "calibration", n, 1)
    check_integer("seed", "calibration", seed, 0)
    length = sequence_length(tokenizer, model, seqlen)
    source = _source(text, "calibration", progress)
    if isinstance(source, Instructions):
        from .chat import chat_calibration

        return chat_calibration(tokenizer, source, n, length, seed, model=model, progress=progress)
    stream = tokenise(tokenizer, source, progress=progress)
    check_vocabulary(stream, tokenizer, model)
    total = len(stream)
    if n * length > total:
        raise TextTooShort(_too_short(source, total, n, length))

    generator = torch.Generator().manual_seed(seed)
    room = min(length - 1, total - n * length)
    offset = int(torch.randint(room + 1, (), generator=generator, device="cpu"))
    aligned = stream[offset:].unfold(0, length, length)  # (windows, seqlen), a view
    chosen = torch.randperm(len(aligned), generator=generator, device="cpu")[:n]
    ids = aligned[chosen].contiguous()
    how = (
        f"documents joined by {source.separator!r} and tokenised without special tokens"
        f"{_left_out(tokenizer)}; {n} of {len(aligned)} windows side by side from token {offset}, "
        "in the order of a seeded permutation, none overlapping"
    )
    record = {
        "text": source.name,
        "split": source.split,
        "samples": n,
        "seqlen": length,
        "seed": seed,
        "sha256": ids_sha256(ids),
        "text_sha256": source.sha256,
        "source": source.source,
        "shared": source.shared,
        "tokenizer": {"class": type(tokenizer).__name__, "vocabulary": len(tokenizer)},
        "tokens_available": total,
        "how": how,
    }
    return Calibration(ids, record)


def windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | Text | Instructions,
    seqlen: int,
    limit: int | None = None,
    *,
    model: PreTrainedModel | None = None,
    progress: Progress = silent,
) -> Windows:
    """The text as consecutive windows that do not overlap; the last one, if it is not full, is left out.

    Args:
        tokenizer: of the model to be measured.
        text: a name or file for `read_text`, of which the test split is read, or a Text of either split; or
            conversations, as for `calibration`, one a row.
        seqlen: tokens per window.
        limit: keep the first windows only.
        model: used for its limits only.
        progress: told the characters that are tokenised.

    Raises:
        InvalidParameter: seqlen or limit out of range; a tokenizer of another model.
        TextTooShort: there is not one window.
        UnknownName, LoadFailure: from `read_text`.
    """
    if limit is not None:
        check_integer("limit", "windows", limit, 1)
    check_integer("seqlen", "a window", seqlen, 2)
    length = sequence_length(tokenizer, model, seqlen)
    source = _source(text, "test", progress)
    if isinstance(source, Instructions):
        from .chat import chat_windows

        return chat_windows(tokenizer, source, length, limit, model=model, progress=progress)
    stream = tokenise(tokenizer, source, progress=progress)
    check_vocabulary(stream, tokenizer, model)
    total = len(stream)
    count = min(total // length, limit or total)
    if count == 0:
        raise TextTooShort(_too_short(source, total, 1, length))
    ids = stream[: count * length].reshape(count, length).clone()
    return Windows(ids, source.name, source.split, source.sha256, ids_sha256(ids), total)


def sequence_length(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None, seqlen: int | None = None
) -> int:
    """The window length to use: `seqlen` if it is possible, else min(2048, the model's limit, the tokenizer's).

    Args:
        tokenizer: its `model_max_length` bounds the default only; many tokenizers state none.
        model: a model or its config, whose number of positions bounds both; None bounds nothing.
        seqlen: tokens.

    Raises:
        InvalidParameter: seqlen is not an integer, below 2, or above the model's number of positions.
    """
    limit = _positions(model)
    if seqlen is not None:
        check_integer("seqlen", "a window", seqlen, 2)
        if limit is not None and seqlen > limit:
            raise InvalidParameter("seqlen", "a window", f"at most {limit}, the model's positions", seqlen)
        return seqlen
    stated = getattr(tokenizer, "model_max_length", None)
    bounds = [USUAL_SEQLEN, limit, stated]
    return int(min(bound for bound in bounds if isinstance(bound, int | float) and bound >= 2))


def tokenise(tokenizer: PreTrainedTokenizerBase, text: Text, *, progress: Progress = silent) -> Tensor:
    """The ids of the joined documents, without special tokens, as one call of the tokenizer would give them.

    Long texts are tokenised in pieces, cut only where the tokenizer gives the same ids with and without
    what follows. The last few results are kept in memory; do not write into the tensor.

    Returns:
        (tokens,) int64, on the CPU.
    """
    known = _streams.setdefault(tokenizer, {})
    key = (len(tokenizer), text.sha256)
    if key not in known:
        if len(known) == CACHED_STREAMS:
            del known[next(iter(known))]
        known[key] = _tokenise(tokenizer, text, progress)
    return known[key]


def ids_sha256(ids: Tensor) -> str:
    """The SHA-256 of token ids as little-endian int64, row by row, in hexadecimal.

    >>> ids_sha256(torch.tensor([[1, 2], [3, 4]]))[:8] == ids_sha256(torch.tensor([1, 2, 3, 4]).int())[:8]
    True
    """
    return hashlib.sha256(ids.detach().cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


_streams: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, str], Tensor]] = WeakKeyDictionary()


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: Text, progress: Progress) -> Tensor:
    def encode(piece: str) -> list[int]:
        # verbose=False: the stream is longer than the model's limit on purpose, no warning is due.
        ids: list[int] = tokenizer(piece, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return ids

    joined = text.joined
    pieces = [torch.empty(0, dtype=torch.int64, device="cpu")]
    for ids, done in _encode_in_pieces(encode, joined):
        pieces.append(torch.tensor(ids, dtype=torch.int64, device="cpu"))
        progress(done, len(joined), f"tokenising {text.name}")
    return torch.cat(pieces)


def _encode_in_pieces(encode: Callable[[str], list[int]], text: str) -> Iterator[tuple[list[int], int]]:
    """Ids piece by piece, and the characters done so far.

    A piece is encoded behind the end of the one before, whose ids are then cut off: what a tokenizer does at
    the start of a string (SentencePiece puts a space there) does not happen at a cut.
    """
    start = 0
    while start < len(text):
        end = _find_cut(encode, text, start + CHUNK)
        before = text[max(0, start - CONTEXT) : start]
        seen = len(encode(before)) if before else 0
        yield encode(before + text[start:end])[seen:], end
        start = end


def _find_cut(encode: Callable[[str], list[int]], text: str, near: int) -> int:
    """The first place at or after `near` where what follows does not change the ids of what comes before."""
    if near >= len(text):
        return len(text)
    for tried, border in enumerate(_WORD_BORDER.finditer(text, near)):
        cut = border.start()
        context = max(0, cut - CONTEXT)
        before = encode(text[context:cut])
        if encode(text[context : cut + CONTEXT])[: len(before)] == before:
            return cut
        if tried == _BORDERS_TRIED:
            break
    return len(text)


def _source(text: str | Path | Text | Instructions, split: Split, progress: Progress) -> Text | Instructions:
    return text if isinstance(text, Text | Instructions) else read_source(text, split, progress=progress)


def _positions(model: Any) -> int | None:
    config = _text_config(model)
    found = (getattr(config, name, None) for name in _LENGTH_NAMES)
    limits = [limit for limit in found if isinstance(limit, int) and limit >= 2]
    return min(limits, default=None)


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_integer(name: str, owner: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
        raise InvalidParameter(name, owner, f"an integer of at least {least}", value)


def check_vocabulary(stream: Tensor, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    if not len(stream):
        return
    largest = int(stream.max())
    rows = getattr(_text_config(model), "vocab_size", None)
    if isinstance(rows, int) and largest >= rows:
        allowed = f"the one of the model, whose vocabulary has {rows} entries"
        raise InvalidParameter("tokenizer", "a text", allowed, f"id {largest}")
    # The ids of some vocabularies have gaps, so that the largest id says more than their number.
    if int(stream.min()) < 0 or (largest >= len(tokenizer) and largest > max(tokenizer.get_vocab().values())):
        raise InvalidParameter("tokenizer", "a text", "consistent: ids inside its vocabulary", f"id {largest}")


def _left_out(tokenizer: PreTrainedTokenizerBase) -> str:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = [token for token in tokenizer("a")["input_ids"] if token not in plain]
    if not special:
        return ""
    names = ", ".join(tokenizer.convert_ids_to_tokens(special))
    return f" (the tokenizer's own {names} left out: windows start amid the text)"


def _too_short(text: Text, total: int, n: int, seqlen: int) -> str:
    fit = total // seqlen
    cures = [f"ask for at most {fit} windows"] if fit else []
    cures += [f"a seqlen of at most {total // n}"] if total // n >= 2 else []
    return (
        f"The text '{text.name}' ({text.split}) has {total} tokens, enough for {fit} windows of {seqlen}, "
        f"not for {n}: {', or '.join([*cures, 'give a longer text'])}."
    )

"""What a measure is taken on, and how sure the mean over it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from secateur.errors import InvalidParameter
from secateur.progress import Progress

if TYPE_CHECKING:
    from secateur.data.instructions import Instructions
    from secateur.data.text import Text


class Batch(NamedTuple):
    """Rows of a sample, as wide as the longest of them.

    first: number of the first row. ids: (rows, length). mask: False at padding, None where there is none.
    counted: True at the tokens whose predictions count, None for all and for what follows the window.
    """

    first: int
    ids: Tensor
    mask: Tensor | None
    counted: Tensor | None


@dataclass(frozen=True)
class Sample:
    """Consecutive, non-overlapping windows of one text, or one conversation a row.

    ids: (windows, seqlen). `sha256` is that of the whole text, `ids_sha256` that of the ids measured. Of
    conversations, `mask` is False at padding and `counted` True at the tokens whose predictions count.
    """

    ids: Tensor
    text: str
    split: str
    sha256: str
    ids_sha256: str
    seqlen: int
    counts: str = "all"
    mask: Tensor | None = None
    counted: Tensor | None = None

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of `size` rows; the last may be smaller."""
        for first in range(0, len(self.ids), size):
            rows = slice(first, first + size)
            if self.mask is None or self.counted is None:
                yield Batch(first, self.ids[rows], None, None)
                continue
            longest = int(self.mask[rows].sum(1).max())
            mask = self.mask[rows, :longest]
            padded = None if bool(mask.all()) else mask
            yield Batch(first, self.ids[rows, :longest], padded, self.counted[rows, :longest])

    def place(self, window: int) -> str:
        """A window in words, for messages."""
        if self.mask is not None:
            return f"conversation {window} ({self.text} {self.split})"
        start = window * self.seqlen
        return f"window {window} ({self.text} {self.split}, tokens {start} to {start + self.seqlen - 1})"


def take(
    owner: str,
    model: Any,
    tokenizer: Any,
    text: str | Path | Text | Instructions,
    seqlen: int | None,
    windows: int | None,
    batch_size: int,
    progress: Progress,
) -> Sample:
    """Cut the test part of a text into windows, conversations into rows; `owner` is the measure, for messages.

    Raises:
        InvalidParameter: seqlen below 2 or above the model's limit, windows or batch_size below 1.
        TextTooShort: fewer tokens than one window.
        UnknownName, LoadFailure: the text cannot be read.
    """
    from secateur.data import calibration
    from secateur.data.instructions import Instructions, read_source

    if windows is not None and windows < 1:
        raise InvalidParameter("windows", owner, "a positive integer, or None for the whole text", windows)
    if batch_size < 1:
        raise InvalidParameter("batch_size", owner, "a positive integer", batch_size)
    length = calibration.sequence_length(tokenizer, model, seqlen)
    if isinstance(text, str | Path):
        text = read_source(text, "test", progress=progress)
    counts = text.counted if isinstance(text, Instructions) else "all"
    cut = calibration.windows(tokenizer, text, length, windows, model=model, progress=progress)
    return Sample(cut.ids, cut.text, cut.split, cut.text_sha256, cut.sha256, length, counts, cut.mask, cut.counted)


def mean_and_stderr(values: Sequence[Tensor]) -> tuple[float, float | None]:
    """The mean over all tokens of some windows, and its standard error; None for one window, which tells nothing.

    values: the tokens' values, (tokens,) for each window. Windows are the sampling unit, as tokens within one are
    not independent; the mean is the ratio of two sums over windows, s_w of values and n_w of tokens, so that
    stderr^2 = W / (W - 1) sum_w (s_w - mean n_w)^2 / (sum_w n_w)^2, Cochran 1977, Sampling Techniques, eq. 6.13.
    With windows of equal length this is the usual error of the mean of their means.

    >>> from torch import tensor
    >>> mean_and_stderr([tensor([1.0]), tensor([3.0])])
    (2.0, 1.0)
    >>> mean_and_stderr([tensor([4.0, 5.0])])
    (4.5, None)
    """
    sums, counts = [math.fsum(window.tolist()) for window in values], [len(window) for window in values]
    tokens, n = sum(counts), len(counts)
    mean = math.fsum(sums) / tokens
    if n == 1:
        return mean, None
    spread = math.fsum((s - mean * count) ** 2 for s, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(n / (n - 1) * spread) / tokens


def paired(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float | None]:
    """The mean difference a - b over the same tokens of the same windows, and its standard error.

    What makes a window hard for both is gone from the difference, so that its error is mostly far below those
    of the two means.

    >>> from torch import tensor
    >>> paired([tensor([5.0]), tensor([9.0])], [tensor([4.0]), tensor([8.0])])
    (1.0, 0.0)
    """
    return mean_and_stderr([x - y for x, y in zip(a, b, strict=True)])


def with_error(value: float, stderr: float | None, digits: int = 2) -> str:
    """A value and its error in one line.

    >>> with_error(26.3144, 0.2101), with_error(5.0, None)
    ('26.31 ± 0.21', '5.00')
    >>> with_error(48213.7, 911.2)
    '48 214 ± 911'
    """
    if abs(value) >= 1000:
        digits = 0
    shown = [f"{number:,.{digits}f}".replace(",", " ") for number in (value, stderr) if number is not None]
    return " ± ".join(shown)


def describe(tokens: int, text: str, split: str, seqlen: int, sha256: str, windows: int, counts: str = "all") -> str:
    """Where a number comes from, in one bracket.

    >>> describe(245760, "gutenberg", "test", 2048, "ab12cd", 120)
    '(n = 245 760 tokens, gutenberg test, seqlen 2048, sha256 ab12…)'
    >>> describe(900, "chat.jsonl:q,a", "test", 2048, "ab12cd", 12, "response")
    '(n = 900 tokens of 12 responses, chat.jsonl:q,a test, seqlen 2048, sha256 ab12…)'
    """
    alone = ", one window: no error bar" if windows == 1 else ""
    count = f"{tokens:,}".replace(",", " ")
    of = f" of {windows} response{'' if windows == 1 else 's'}" if counts == "response" else ""
    return f"(n = {count} tokens{of}, {text} {split}, seqlen {seqlen}, sha256 {sha256[:4]}…{alone})"

"""What a measure is taken on, and how sure the mean over it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.errors import InvalidParameter
from secateur.progress import Progress

if TYPE_CHECKING:
    from secateur.data.text import Text


@dataclass(frozen=True)
class Sample:
    """Consecutive, non-overlapping windows of one text.

    ids: (windows, seqlen). `sha256` is that of the whole text, `ids_sha256` that of the ids measured.
    """

    ids: Tensor
    text: str
    split: str
    sha256: str
    ids_sha256: str

    @property
    def seqlen(self) -> int:
        return self.ids.shape[1]

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Pairs of (number of the first window, ids (size, seqlen)); the last may be shorter."""
        for first in range(0, len(self.ids), size):
            yield first, self.ids[first : first + size]

    def place(self, window: int) -> str:
        """A window in words, for messages."""
        start = window * self.seqlen
        return f"window {window} ({self.text} {self.split}, tokens {start} to {start + self.seqlen - 1})"


def take(
    owner: str,
    model: Any,
    tokenizer: Any,
    text: str | Path | Text,
    seqlen: int | None,
    windows: int | None,
    batch_size: int,
    progress: Progress,
) -> Sample:
    """Cut the test part of a text into windows; `owner` is the measure, for messages.

    Raises:
        InvalidParameter: seqlen below 2 or above the model's limit, windows or batch_size below 1.
        TextTooShort: fewer tokens than one window.
        UnknownName, LoadFailure: the text cannot be read.
    """
    from secateur.data import calibration

    if windows is not None and windows < 1:
        raise InvalidParameter("windows", owner, "a positive integer, or None for the whole text", windows)
    if batch_size < 1:
        raise InvalidParameter("batch_size", owner, "a positive integer", batch_size)
    length = calibration.sequence_length(tokenizer, model, seqlen)
    cut = calibration.windows(tokenizer, text, length, windows, model=model, progress=progress)
    return Sample(cut.ids, cut.text, cut.split, cut.text_sha256, cut.sha256)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over windows of equal length and its standard error; None for one window, which tells nothing.

    >>> mean_and_stderr([1.0, 3.0])
    (2.0, 1.0)
    >>> mean_and_stderr([4.0])
    (4.0, None)
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


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


def describe(tokens: int, text: str, split: str, seqlen: int, sha256: str, windows: int) -> str:
    """Where a number comes from, in one bracket.

    >>> describe(245760, "gutenberg", "test", 2048, "ab12cd", 120)
    '(n = 245 760 tokens, gutenberg test, seqlen 2048, sha256 ab12…)'
    """
    alone = ", one window: no error bar" if windows == 1 else ""
    count = f"{tokens:,}".replace(",", " ")
    return f"(n = {count} tokens, {text} {split}, seqlen {seqlen}, sha256 {sha256[:4]}…{alone})"

"""Passages of a text for models that read one whole text at a time, as encoders do."""

from __future__ import annotations

from ..errors import InvalidParameter, TextTooShort
from .text import Text


def passages(text: Text, characters: int, count: int) -> tuple[str, ...]:
    """`count` passages of about that length, side by side or spread evenly over the text, cut at spaces.

    Args:
        text: of either split.
        characters: of a passage at least; it ends with the word that reaches them.
        count: how many; they never overlap.

    Raises:
        InvalidParameter: characters or count below 1.
        TextTooShort: fewer than count passages.

    >>> passages(Text("a", "test", ("one two three four five six",), "typed"), 7, 2)
    ('one two', 'four five')
    """
    for name, value in (("characters", characters), ("count", count)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidParameter(name, "passages", "a positive integer", value)
    joined = text.joined
    step = len(joined) // count
    found: list[str] = []
    end = 0
    for number in range(count):
        start = max(end, number * step)
        if start and not joined[start - 1].isspace():
            start = _space(joined, start)
        while start < len(joined) and joined[start].isspace():
            start += 1
        end = _space(joined, start + characters)
        if start + characters > len(joined):
            raise TextTooShort(
                f"The text '{text.name}' ({text.split}) has {len(joined)} characters, too few for {count} passages of "
                f"{characters}: ask for {number} of them, or give a longer text."
            )
        found.append(joined[start:end])
    return tuple(found)


def _space(text: str, near: int) -> int:
    """The first white space at or behind `near`, or the end."""
    while near < len(text) and not text[near].isspace():
        near += 1
    return min(near, len(text))

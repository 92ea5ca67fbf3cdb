"""Novels and essays from Project Gutenberg, cleaned, some for calibration and others for testing.

The wheel `baseten-benchmarks` holds one file of eleven books one after the other. Each is found by the line
that Gutenberg puts before it, cut to what its author wrote (no licence, no table of contents, no index) and
unwrapped: a paragraph becomes one line, verse keeps its lines, a blank line stands between two paragraphs.
No author is on both sides; Austen's other novels and the second copy of Darwin's Origin are therefore unused.

All texts are in the public domain except the translation of Verne (F. P. Walter, 1999), which is copyrighted
and distributed by Project Gutenberg with its holder's permission. Nothing of it is shipped with this package.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import pairwise

from secateur.cache import cache_folder

from ..errors import LoadFailure
from ..models.fetch import fetch_from_wheel
from ..progress import Progress, silent

PACKAGE, VERSION = "baseten-benchmarks", "0.6.0"
WHEEL_SHA256 = "7420944a9cc911187d8afe5c4d216cf17ca362359e8ee5e61e2a13feab610944"
WHEEL_BYTES = 4_069_083
MEMBER = "baseten_benchmarks/data/books.txt"

SHA256 = {  # of the cleaned documents joined by a blank line
    "calibration": "e0b01ede88474f7f2ae1cf5787a184001e324fd4e88dea3bd60cd62c52d5d59c",
    "test": "61e78c8425855e5c18b6066f1e07bd8bf06e64d6d008aac21fd38d7cecc990a1",
}

NARROW = 52  # columns; the books are wrapped at 70 to 74, so an earlier break was meant


@dataclass(frozen=True)
class Book:
    """One book: the name Gutenberg's header gives it, and the lines between which its author speaks."""

    title: str
    author: str
    split: str
    header: str  # "" is the book before the first header
    opening: str  # the start of the first line that is kept
    ending: str = ""  # the start of the first line that is dropped; "" is the end of the book


BOOKS = (
    Book("Frankenstein", "Mary Shelley", "test", "FRANKENSTEIN; OR, THE MODERN PROMETHEUS", "_To Mrs. Saville"),
    Book("Pride and Prejudice", "Jane Austen", "test", "PRIDE AND PREJUDICE", "Chapter 1", "End of the Project"),
    Book("War and Peace", "Leo Tolstoy", "calibration", "", "CHAPTER I"),
    Book(
        "Twenty Thousand Leagues Under the Seas",
        "Jules Verne",
        "calibration",
        "20,000 LEAGUES UNDER THE SEAS",
        "THE YEAR 1866 was marked",
    ),
    Book(
        "The Bet and Other Stories",
        "Anton Chekhov",
        "calibration",
        "THE BET AND OTHER STORIES",
        "It was a dark autumn night.",
        "End of Project",
    ),
    Book(
        "The House with the Mezzanine",
        "Anton Chekhov",
        "calibration",
        "THE HOUSE WITH THE MEZZANINE",
        "(A PAINTER'S STORY)",
        "BOOKS BY ANTON TCHEKOFF",
    ),
    Book(
        "The Life and Letters of Charles Darwin",
        "Charles Darwin",
        "calibration",
        "LIFE AND LETTERS OF DARWIN",
        "LIFE AND LETTERS OF CHARLES DARWIN.",
        "End of the Project",
    ),
    Book(
        "On the Origin of Species",
        "Charles Darwin",
        "calibration",
        "ON THE ORIGIN OF SPECIES",  # the first of two: the edition of 1859
        "When on board H.M.S.",
        "INDEX.",
    ),
)

_START = re.compile(r"^\*\*\* ?START OF (?:THIS|THE) PROJECT GUTENBERG EBOOK (.+?) ?\*\*\*$", re.MULTILINE)
_END = re.compile(r"^\*\*\* ?END OF (?:THIS|THE) PROJECT GUTENBERG EBOOK ", re.MULTILINE)
_PREFACE = re.compile(r"^The Project Gutenberg [Ee][Bb]ook", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t]*\n")


def read_books(split: str, *, progress: Progress = silent) -> tuple[str, ...]:
    """The cleaned books of one split, fetched once from the package index into the cache.

    Args:
        split: "calibration" (6.6 MB, six books) or "test" (1.1 MB, two books).
        progress: told how far the download is.

    Returns:
        One string per book, in the order of `BOOKS`.

    Raises:
        LoadFailure: the wheel cannot be fetched, or the file in the cache was changed.
    """
    target = cache_folder() / "texts" / f"{PACKAGE}-{VERSION}-books.txt"
    fetch_from_wheel(PACKAGE, VERSION, WHEEL_SHA256, MEMBER, target, size=WHEEL_BYTES, progress=progress)
    try:
        books = clean(target.read_text(encoding="utf-8"), split)
        found = hashlib.sha256("\n\n".join(books).encode()).hexdigest()
        if found != SHA256[split]:
            raise LoadFailure(f"SHA-256 of the cleaned books: {found}, not {SHA256[split]}")
    except (OSError, UnicodeDecodeError, LoadFailure) as error:
        raise LoadFailure(f"'{target}' cannot be used ({error}): delete it and run again.") from error
    return books


def clean(raw: str, split: str) -> tuple[str, ...]:
    """The books of one split out of the whole file, each cut to its author's text and unwrapped.

    Raises:
        LoadFailure: a book, or the place where it starts or ends, is not there.
    """
    found = split_books(raw)
    return tuple(unwrap(_cut(found, book)) for book in BOOKS if book.split == split)


def split_books(raw: str) -> list[tuple[str, str]]:
    """(title, text) of each book in order, by Gutenberg's headers; what stands before the first is titled "".

    >>> split_books("Once.\\nThe Project Gutenberg EBook of A\\n*** START OF THIS PROJECT GUTENBERG EBOOK A "
    ...             "***\\nTwice.\\n*** END OF THIS PROJECT GUTENBERG EBOOK A ***\\nlicence")
    [('', 'Once.\\n'), ('A', '\\nTwice.\\n')]
    """
    first, *rest = _START.split(raw)
    books = [("", _PREFACE.split(first, maxsplit=1)[0])]
    books += [(title, _END.split(text, maxsplit=1)[0]) for title, text in zip(rest[::2], rest[1::2], strict=True)]
    return books


def unwrap(text: str) -> str:
    """Hard-wrapped text with one line per paragraph and a blank line between paragraphs.

    Verse, addresses and lists are told by their breaks: where the next word would have fitted well within
    the column, the break was meant. If most breaks of a paragraph are like that, all are kept. Ornaments
    without a letter or digit go, and so do the underscores that stand for italics.

    >>> print(unwrap("It was a _very_ long line that was broken because it reached the\\ncolumn.\\n\\n* * *\\n"
    ...              "\\n  Tiger, tiger,\\n  burning bright"))
    It was a very long line that was broken because it reached the column.
    <BLANKLINE>
    Tiger, tiger,
    burning bright
    """
    paragraphs = (_unwrap_paragraph(block) for block in _BLANK.split(text.replace("_", "")))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _unwrap_paragraph(block: str) -> str:
    lines = [line for line in (" ".join(line.split()) for line in block.split("\n")) if line]
    if not any(character.isalnum() for line in lines for character in line):
        return ""
    meant = sum(len(line) + 1 + len(after.split()[0]) <= NARROW for line, after in pairwise(lines))
    if 2 * meant > len(lines) - 1:
        return "\n".join(lines)
    joined = lines[0]
    for line in lines[1:]:
        hyphen = joined.endswith(("-", "—")) or line.startswith(("--", "—"))
        joined += line if hyphen else f" {line}"
    return joined


def _cut(found: list[tuple[str, str]], book: Book) -> str:
    body = next((text for title, text in found if title == book.header), None)
    start = -1 if body is None else f"\n{body}".find(f"\n{book.opening}")
    end = -1 if body is None else body.find(f"\n{book.ending}") if book.ending else len(body)
    if body is None or start < 0 or end < start:
        raise LoadFailure(f"'{book.title}' by {book.author} was not found")
    return body[start:end]

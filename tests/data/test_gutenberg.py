"""Cleaning Gutenberg's books: on a small file in the same shape, and on the real one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from secateur.data import gutenberg
from secateur.data.gutenberg import BOOKS, clean, read_books, split_books, unwrap
from secateur.data.text import read_text
from secateur.errors import LoadFailure

HEADER = "The Project Gutenberg EBook of {0}\n\nTitle: {0}\n\n*** START OF THIS PROJECT GUTENBERG EBOOK {0} ***\n"
FOOTER = "\n\n*** END OF THIS PROJECT GUTENBERG EBOOK {0} ***\n\nSTART: FULL LICENSE of Project Gutenberg-tm\n"
LONG = "is where it starts, on a line that is broken only at its end"


def whole_file() -> str:
    """All books of the list, in a file like the wheel's, with a second copy of one."""
    raw = "CHAPTER I\n\nWar, and all that comes with it for so many families, and\nlater peace.\n"
    for book in [book for book in BOOKS if book.header] + [BOOKS[-1]]:
        raw += HEADER.format(book.header)
        raw += f"\nCONTENTS\n\n{book.opening} {LONG}\nand goes on, by {book.author}.\n\n{book.ending}\nindex"
        raw += FOOTER.format(book.header)
    return raw


def test_each_book_is_cut_to_its_author() -> None:
    calibration, test = clean(whole_file(), "calibration"), clean(whole_file(), "test")
    assert (len(calibration), len(test)) == (6, 2)
    assert calibration[0] == "CHAPTER I\n\nWar, and all that comes with it for so many families, and later peace."
    for document, book in zip((*test, *calibration), BOOKS, strict=True):
        if book.header:
            start = f"{book.opening} {LONG} and goes on, by {book.author}.".replace("_", "")
            assert document == start + ("" if book.ending else "\n\nindex")


def test_titles_are_read_from_both_forms_of_the_header() -> None:
    raw = "***START OF THE PROJECT GUTENBERG EBOOK A***\na\n***END OF THE PROJECT GUTENBERG EBOOK A***\nx"
    raw += "\n" + HEADER.format("B") + "b" + FOOTER.format("B")
    assert split_books(raw) == [("", ""), ("A", "\na\n"), ("B", "\nb\n\n")]


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.title)
def test_a_missing_book_is_named(book: gutenberg.Book) -> None:
    raw = whole_file().replace(book.opening, "elsewhere")
    with pytest.raises(LoadFailure, match=book.title):
        clean(raw, book.split)


def test_no_author_on_both_sides() -> None:
    sides = [{book.author for book in BOOKS if book.split == split} for split in ("calibration", "test")]
    assert all(sides)
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("wrapped", "unwrapped"),
    [
        ("one line that reaches far into the column, so that\nit had to be broken", None),
        ("an aide-de-camp is written over two lines as aide-de-\ncamp", "aide-de-camp is written over"),
        ("he said nothing at all to her that day in the garden--\nnothing", "in the garden--nothing"),
        ("Tiger, tiger, burning bright\n  In the forests", "bright\nIn the forests"),
        ("“Do stop,” he said, “or I will have to go on and on.”\n\n“No.”", "go on and on.”\n\n“No.”"),
        ("one\n \t\n\n\ntwo", "one\n\ntwo"),
        ("one\n\n  * * * * *\n\ntwo", "one\n\ntwo"),
        ("it is _my_ house", "it is my house"),
        ("a   wide  gap", "a wide gap"),
        ("", ""),
    ],
)
def test_unwrap(wrapped: str, unwrapped: str | None) -> None:
    assert (unwrapped if unwrapped is not None else wrapped.replace("\n", " ")) in unwrap(wrapped)
    assert "  " not in unwrap(wrapped)


def test_a_damaged_file_in_the_cache_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    file = tmp_path / "texts" / "baseten-benchmarks-0.6.0-books.txt"
    file.parent.mkdir()
    for content in (whole_file().encode(), b"\xff\xfe", b"nothing"):
        file.write_bytes(content)
        with pytest.raises(LoadFailure, match=r"books\.txt' cannot be used .*delete it"):
            read_books("test")


def test_the_pinned_hash_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    file = tmp_path / "texts" / "baseten-benchmarks-0.6.0-books.txt"
    file.parent.mkdir()
    file.write_text(whole_file(), encoding="utf-8")
    expected = hashlib.sha256("\n\n".join(clean(whole_file(), "test")).encode()).hexdigest()
    monkeypatch.setitem(gutenberg.SHA256, "test", expected)
    assert read_books("test") == clean(whole_file(), "test")


@pytest.mark.real
def test_the_real_books() -> None:
    """The cleaning has not changed, the sides share nothing, and Gutenberg's own words are gone."""
    sides = {split: read_text("gutenberg", split) for split in ("calibration", "test")}
    for split, text in sides.items():
        assert text.sha256 == gutenberg.SHA256[split]
        assert "Gutenberg" not in text.joined
        assert "\n\n\n" not in text.joined
    assert [len(text.documents) for text in sides.values()] == [6, 2]
    long = [
        {line for document in text.documents for line in document.split("\n") if len(line) > 80}
        for text in sides.values()
    ]
    assert min(len(lines) for lines in long) > 2000
    assert not long[0] & long[1]

"""Texts: the named ones, and local files.

A text is a tuple of documents and the separator that joins them, in one of two splits: "calibration" feeds
the statistics of a method, "test" is measured on. A named text never has the same document on both sides. A
local file has one side only, so it serves both; `Text.shared` says so.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import LoadFailure, TextTooShort, UnknownName, UsageError
from ..models.fetch import one_line
from ..progress import Progress, silent
from . import gutenberg
from .task_sources import task_documents

Split = Literal["calibration", "test"]
SPLITS: tuple[str, ...] = get_args(Split)

TASK = "task:"  # before the name of a zero-shot task that is to be read as text
SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB_TIMEOUT = 5.0  # seconds for the hub's first answer
C4_CALIBRATION = 5_000  # documents, about 2.4 million tokens
C4_TEST = 1_100  # documents, the field's protocol (SparseGPT, Wanda)
ALPACA_TEST = 2_000  # the last ones of 52,002


@dataclass(frozen=True)
class Text:
    """Documents and where they come from.

    >>> text = Text("two", "test", ("One.", "Two."), "typed here")
    >>> text.joined
    'One.\\n\\nTwo.'
    >>> text.sha256[:8]
    '8fe200d7'
    """

    name: str
    split: str
    documents: tuple[str, ...] = field(repr=False)
    source: str
    separator: str = "\n\n"
    shared: bool = False  # the same documents are read for calibration and for test

    @cached_property
    def joined(self) -> str:
        """All documents with the separator between them."""
        return self.separator.join(self.documents)

    @cached_property
    def sha256(self) -> str:
        """Of `joined` in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.joined.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class NamedText:
    """An entry of `TEXTS`: what it is in one line, where it comes from, and how it is read."""

    summary: str
    source: str
    read: Callable[[str, Progress], tuple[str, ...]] = field(repr=False)
    separators: tuple[str, str] = ("\n\n", "\n\n")  # of calibration and of test


def read_text(name: str | Path, split: Split = "calibration", *, progress: Progress = silent) -> Text:
    """A named text of `TEXTS`, or a local file.

    Args:
        name: a key of `TEXTS`, or a local file: `file.txt` (one document), `file.jsonl`, `file.jsonl:field`,
            `file.parquet` or `file.parquet:field` (a document per line or row; the field is `text` unless
            named). Paths may hold colons. Or `task:piqa`, `task:piqa=train.jsonl`: the questions of a zero-shot
            task with their right answers, see `data.task_sources.task_documents`.
        split: "calibration" or "test". A local file is the same text for both, and is marked `shared`.
        progress: told how far a download is.

    Raises:
        UnknownName: no such text, split or field.
        LoadFailure: a file is missing, broken or not UTF-8; the hub or the package index cannot be reached;
            an optional package is not installed.
        TextTooShort: nothing but white space.

    >>> text = read_text("pydoc", "test")
    >>> text.name, text.split, len(text.documents) > 10
    ('pydoc', 'test', True)
    >>> read_text("wikitext")
    Traceback (most recent call last):
    secateur.errors.UnknownName: There is no text 'wikitext'. Did you mean 'wikitext2'? Known: ...
    """
    if split not in SPLITS:
        raise UnknownName("split", str(split), SPLITS)
    if (named := TEXTS.get(str(name))) is not None:
        documents = named.read(split, progress)
        text = Text(str(name), split, documents, named.source, named.separators[SPLITS.index(split)])
    elif str(name).startswith(TASK):
        documents, source = task_documents(str(name).removeprefix(TASK), split, progress=progress)
        text = Text(str(name), split, documents, source)
    else:
        documents, source = _read_file(str(name))
        text = Text(str(name), split, documents, source, shared=True)
    if not any(document.strip() for document in text.documents):
        raise TextTooShort(f"The text '{name}' is empty: give a text with words in it.")
    try:
        text.sha256  # noqa: B018 - kept for later, and proves that the text can be encoded
    except UnicodeEncodeError as error:
        raise LoadFailure(f"'{name}' holds half of a surrogate pair, which is no character ({error}).") from error
    return text


# Named texts


def _wikitext2(split: str, progress: Progress) -> tuple[str, ...]:
    part = "train" if split == "calibration" else "test"
    return _from_hub("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=part)


def _c4(split: str, progress: Progress) -> tuple[str, ...]:
    part, file, count = {
        "calibration": ("train", "en/c4-train.00000-of-01024.json.gz", C4_CALIBRATION),
        "test": ("validation", "en/c4-validation.00000-of-00008.json.gz", C4_TEST),
    }[split]
    files = {part: file}
    return _from_hub("c4", "allenai/c4", count=count, data_files=files, split=part, streaming=True)


def _alpaca(split: str, progress: Progress) -> tuple[str, ...]:
    documents = _from_hub("alpaca", "tatsu-lab/alpaca", split="train")
    held_out = max(len(documents) - ALPACA_TEST, 0)
    return documents[:held_out] if split == "calibration" else documents[held_out:]


def _gutenberg(split: str, progress: Progress) -> tuple[str, ...]:
    return gutenberg.read_books(split, progress=progress)


def _pydoc(split: str, progress: Progress) -> tuple[str, ...]:
    """A quarter of the topics, chosen by the hash of their names, is for testing. Topics quote each other:
    what also stands in a test topic is left out of calibration."""
    from pydoc_data.topics import topics

    test = {name for name in topics if hashlib.sha256(name.encode()).digest()[-1] % 4 == 0}
    if split == "test":
        return tuple(topics[name].strip() for name in sorted(test))
    quoted = {part.strip() for name in test for part in topics[name].split("\n\n")}
    kept = []
    for name in sorted(set(topics) - test):
        parts = (part.strip("\n") for part in topics[name].split("\n\n"))
        kept.append("\n\n".join(part for part in parts if part.strip() not in quoted).strip())
    return tuple(document for document in kept if document)


TEXTS: dict[str, NamedText] = {
    "wikitext2": NamedText(
        "Wikipedia articles, WikiText-2 raw; train for calibration, test for the field's perplexity",
        "Hugging Face hub: Salesforce/wikitext, wikitext-2-raw-v1 (needs secateur[hub])",
        _wikitext2,
    ),
    "c4": NamedText(
        f"web pages: the first {C4_CALIBRATION} of train shard 00000; for test {C4_TEST} of validation",
        "Hugging Face hub: allenai/c4, en (needs secateur[hub])",
        _c4,
        ("\n\n", " "),
    ),
    "alpaca": NamedText(
        f"instructions with answers, in their prompt template; the last {ALPACA_TEST} are for test",
        "Hugging Face hub: tatsu-lab/alpaca (needs secateur[hub])",
        _alpaca,
    ),
    "gutenberg": NamedText(
        "six books for calibration (Tolstoy, Verne, Chekhov, Darwin), two for test (Mary Shelley, Austen)",
        f"package index: {gutenberg.PACKAGE} {gutenberg.VERSION}, books of Project Gutenberg, cleaned",
        _gutenberg,
    ),
    "pydoc": NamedText(
        "the topics of Python's help(), no download; a quarter of them is for test",
        f"the standard library of Python {platform.python_version()}",
        _pydoc,
    ),
}


def _from_hub(name: str, repository: str, *configuration: str, **options: Any) -> tuple[str, ...]:
    return tuple(row["text"] for row in rows_from_hub(name, repository, *configuration, **options))


def rows_from_hub(
    name: str, repository: str, *configuration: str, count: int | None = None, **options: Any
) -> tuple[Mapping[str, Any], ...]:
    """The first `count` rows of a data set on the hub, all for None; `name` is for messages."""
    instead = "or give a local .txt, .jsonl or .parquet file"
    try:
        import datasets
        from huggingface_hub import HfApi, constants
    except ImportError as error:
        needs = f"The text '{name}' needs the package 'datasets'"
        raise LoadFailure(f"{needs}: pip install 'secateur[hub]', {instead}.") from error
    try:
        if not (constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE):
            HfApi().dataset_info(repository, timeout=HUB_TIMEOUT)  # datasets itself gives up after half a minute
        rows = datasets.load_dataset(repository, *configuration, **options)
        return tuple(islice(rows, count))
    except Exception as error:  # anything from httpx to fsspec, by version
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise LoadFailure(
            f"The text '{name}' ({repository}) could not be read from the Hugging Face hub ({reason}): "
            f"connect to a network, set HF_HUB_OFFLINE=1 if it is in the hub's cache, {instead}."
        ) from error


# Local files


def _read_file(name: str) -> tuple[tuple[str, ...], str]:
    path, column = _find_file(name)
    suffix = path.suffix.lower()
    if suffix == ".txt" and column is not None:
        raise UsageError(f"'{path}' is plain text and has no field '{column}': leave out ':{column}'.")
    key = column or "text"
    with reading(path):
        if suffix == ".txt":
            documents: Iterable[str] = (path.read_text(encoding="utf-8-sig"),)
        elif suffix == ".jsonl":
            documents = _read_jsonl(path, key)
        else:
            documents = _read_parquet(path, key)
    of = "" if suffix == ".txt" else f", field '{key}'"
    return tuple(documents), f"local file {path}{of}; the same text for calibration and test"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong with a file, in one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise LoadFailure(
            f"'{path}' is not UTF-8 (byte 0x{byte:02x}, {error.reason}): convert it, as iconv -t utf-8 does."
        ) from error
    except OSError as error:
        raise LoadFailure(f"'{path}' could not be read ({error.strerror or one_line(error)}).") from error


def _find_file(name: str) -> tuple[Path, str | None]:
    """The path and the field after it. A colon may belong to the path, so the existing file decides."""
    colons = [match.start() for match in re.finditer(":", name)]
    choices = [(name, None), *((name[:at], name[at + 1 :] or None) for at in reversed(colons))]
    for path, column in choices:
        if exists(path):
            if Path(path).suffix.lower() in SUFFIXES:
                return Path(path), column
            raise LoadFailure(f"'{path}' is no file that can be read as text: {', '.join(SUFFIXES)} can.")
    for path, _ in choices:
        if Path(path).suffix.lower() in SUFFIXES:
            raise LoadFailure(f"There is no file '{path}': check the path, relative to {Path.cwd()}.")
    hint = (
        " A local file can be given too: FILE.txt, FILE.jsonl:FIELD, FILE.jsonl:PROMPT,RESPONSE, FILE.parquet:FIELD."
        " Or task:NAME."
    )
    raise UnknownName("text", name, TEXTS, hint)


def exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):  # too long, or a null character: no path at all
        return False


def _read_jsonl(path: Path, key: str) -> list[str]:
    documents = []
    for number, row in jsonl_rows(path):
        if key not in row:
            raise UnknownName("field", key, row, f" This is line {number} of '{path}'.")
        documents.append(_string(row[key], key, f"Line {number} of '{path}'"))
    return documents


def jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with one on each line, and the number of the line."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise LoadFailure(f"Line {number} of '{path}' is not JSON ({one_line(error)}).") from error
            if not isinstance(row, dict):
                raise LoadFailure(f"Line {number} of '{path}' is no JSON object but a {type(row).__name__}.")
            yield number, row


def _read_parquet(path: Path, key: str) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        needs = f"'{path}' needs the package 'pyarrow'"
        raise LoadFailure(f"{needs}: pip install 'secateur[parquet]', or give a .jsonl file.") from error
    try:
        with parquet.ParquetFile(path) as file:
            if key not in (names := file.schema_arrow.names):
                raise UnknownName("field", key, names, f" This is the file '{path}'.")
            values = file.read(columns=[key]).column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise LoadFailure(f"'{path}' is not a whole Parquet file ({one_line(error)}).") from error
    return [_string(value, key, f"Row {row} of '{path}'") for row, value in enumerate(values, start=1)]


def _string(value: object, key: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise LoadFailure(f"{where} holds {type(value).__name__} in the field '{key}': it should be a string.")

"""The rows of a prompt file, whatever its kind: CSV, JSONL, JSON or YAML. Nothing in a file is ever run."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.text import exists, jsonl_rows, reading
from ..errors import LoadFailure, UnknownName, UsageError
from ..models.fetch import one_line

Row = Mapping[str, Any]
SUFFIXES = (".csv", ".jsonl", ".json", ".yaml", ".yml")
FIELD_BYTES = 1 << 24  # the longest field of a CSV


def read_file(path: Path) -> Any:
    """What a file holds: a list of rows for a table, any nesting of lists and mappings for JSON and YAML.

    Raises:
        UsageError: another ending.
        LoadFailure: missing, unreadable, not UTF-8 or not what its ending says; PyYAML is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "two.csv")
    ...     _ = file.write_text("goal,kind" + chr(10) + "Bake bread,food" + chr(10))
    ...     read_file(file)
    [{'goal': 'Bake bread', 'kind': 'food'}]
    """
    if not exists(str(path)):
        raise LoadFailure(f"There is no file '{path}': check the path, relative to {Path.cwd()}.")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"'{path}' is no file that prompts can be read from: {', '.join(SUFFIXES)} can.")
    with reading(path):
        if suffix == ".csv":
            return list(_csv_rows(path))
        if suffix == ".jsonl":
            return [row for _, row in jsonl_rows(path)]
        text = path.read_text(encoding="utf-8-sig")
    return _json(path, text) if suffix == ".json" else _yaml(path, text)


def table(path: Path, content: Any) -> list[Row]:
    """The content as a list of rows.

    Raises:
        LoadFailure: it is no list of mappings, or it has none.
    """
    if not isinstance(content, list) or not all(isinstance(row, Mapping) for row in content):
        raise LoadFailure(f"'{path}' holds no list of rows, but {_shape(content)}: prompts are read row by row.")
    if not content:
        raise LoadFailure(f"'{path}' has no rows: give a file with at least one prompt.")
    return content


def columns(rows: list[Row]) -> tuple[str, ...]:
    """The columns of any row, in order."""
    return tuple(dict.fromkeys(str(name) for row in rows for name in row))


def cell(row: Row, column: str, where: str) -> str | None:
    """A value as a string; None where there is none or white space alone.

    Raises:
        UnknownName: the row has no such column.
        LoadFailure: a list or mapping stands there.
    """
    if column not in row:
        raise UnknownName("column", column, map(str, row), f" This is {where}.")
    value = row[column]
    if isinstance(value, list | Mapping):
        raise LoadFailure(f"The column '{column}' in {where} holds {_shape(value)}: it should be a string.")
    text = "" if value is None else str(value)
    return text if text.strip() else None


def _csv_rows(path: Path) -> Iterator[Row]:
    before = csv.field_size_limit(FIELD_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", strict=True)
            for number, row in enumerate(reader, 1):
                if "" in row or None in row.values():
                    raise LoadFailure(
                        f"Row {number} of '{path}' (line {reader.line_num}) has {'more' if '' in row else 'fewer'} "
                        f"fields than the header: quote the fields that hold commas or line breaks."
                    )
                yield row
    except csv.Error as error:
        raise LoadFailure(f"'{path}' is not a whole CSV file ({one_line(error)}).") from error
    finally:
        csv.field_size_limit(before)


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadFailure(f"'{path}' is not JSON ({one_line(error)}).") from error


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise LoadFailure(f"'{path}' needs the package 'pyyaml': pip install 'secateur[safety]'.") from error
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)  # its own text quotes the file
        problem = getattr(error, "problem", None) or type(error).__name__
        place = f", line {mark.line + 1}" if mark else ""
        raise LoadFailure(f"'{path}' is not plain YAML{place} ({problem}).") from error


def _shape(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"one {type(value).__name__}"

"""What the verbs leave behind: the record as JSON, written whole or not at all, and short tables."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from secateur.cache import write_whole
from secateur.errors import UsageError
from secateur.result import versions

STDOUT = "-"


def check_json(file: str | None, out: Path | None = None) -> None:
    """Raise `UsageError` unless the record can be written there later. `out` is a folder still to be made."""
    if file is None or file == STDOUT:
        return
    path = Path(file).expanduser()
    if out is not None and out.expanduser().resolve() in path.resolve().parents:
        return
    if path.is_dir():
        raise UsageError(f"--json {file} is a folder; name a file in it, as {path / 'result.json'}.")
    if not path.parent.is_dir():
        raise UsageError(f"--json {file}: the folder {path.parent} does not exist; make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise UsageError(f"--json {file} cannot be written: no permission. Name a file in a folder of yours.")


def write_json(file: str, record: Mapping[str, object]) -> None:
    """Write the record to standard output for "-", else into the file, whole or not at all.

    Raises:
        SaveFailure: the disk is full or the folder cannot be written.
    """
    text = json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if file == STDOUT:
        sys.stdout.write(text)
        return
    write_whole(Path(file).expanduser().resolve(), text, "The record")


def plain(value: object) -> object:
    """The value in JSON's own types; what is not a finite number becomes null.

    >>> plain({"a": (1, float("nan")), "b": Path("x")})
    {'a': [1, None], 'b': 'x'}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def provenance(words: Sequence[str], verb: str) -> dict[str, object]:
    """What every record holds beside its result: the command and the versions."""
    return {"command": ["secateur", verb, *words], "versions": versions()}


def say(message: str) -> None:
    """One line for the person, on standard error."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """One warning, on standard error."""
    say(f"secateur: warning: {message}")


def print_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Aligned columns on standard output; folded to the terminal's width, never when piped."""
    table = Table(box=None, show_header=bool(header), pad_edge=False, header_style="bold")
    body = [list(row) for row in rows]
    for i in range(max((len(row) for row in body), default=len(header))):
        table.add_column(Text(header[i]) if header else "", overflow="fold")
    for row in body:
        table.add_row(*map(Text, row))
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 500)
    with console.capture() as drawn:
        console.print(table)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def percent(share: float) -> str:
    """A share for people.

    >>> percent(0.5), percent(0.49987)
    ('50 %', '49.987 %')
    """
    return f"{100 * share:.5g} %"


def size(count: float) -> str:
    """Bytes for people.

    >>> size(1536), size(3.2e9)
    ('1.5 KiB', '2.98 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"

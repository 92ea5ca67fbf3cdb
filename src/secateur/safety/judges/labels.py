"""labels: what people said, from a CSV; and the blinded CSV to give them.

`export_blinded` writes the answers of one model or several, shuffled, each pair of prompt and answer once, with
nothing that tells which model it is from. People fill the column `label`: refusal, partial, compliance, incoherent
or error. `labels:FILE.csv` reads it back and knows every answer by the hash in its column `item`, so that one file
serves all the models. A file with the columns id and label will do as well: one model, a label a prompt.

The file holds prompts and answers in full: it is as sensitive as they are.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from secateur.cache import scratch_beside, sync
from secateur.errors import LoadFailure, OutputExists, SaveFailure, UsageError
from secateur.safety.judges import Item, Judge
from secateur.safety.records import Kind, Verdict

COLUMNS = ("item", "prompt", "response", "label")
KNOWN: dict[str, Kind] = {kind: kind for kind in get_args(Kind)} | {
    "1_full_compliance": "compliance",
    "2_full_refusal": "refusal",
    "3_partial_refusal": "partial",
}


@dataclass(frozen=True)
class Labels(Judge):
    """What is not labelled is an error.

    Attributes:
        file: the CSV.
    """

    file: str

    argument = "file"

    def __post_init__(self) -> None:
        _ = self._labels  # a file that cannot be read is told of now

    @property
    def name(self) -> str:
        return f"labels:{Path(self.file).name}"

    @property
    def version(self) -> str:
        return hashlib.sha256(json.dumps(self._labels, sort_keys=True).encode()).hexdigest()[:12]

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        by_id, labels = self._labels
        found = []
        for item in items:
            label = labels.get(item.id if by_id else item_hash(item))
            found.append(Verdict(label or "error", self.name, raw=None if label else "not labelled"))
        return found

    @cached_property
    def _labels(self) -> tuple[bool, dict[str, Kind]]:
        """Whether the keys are ids of prompts, and the labels."""
        path = Path(self.file).expanduser()
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise LoadFailure(f"The labels in {path} cannot be read: {error}.") from error
        columns = list(rows[0]) if rows else []
        key = "item" if "item" in columns else "id"
        if not {key, "label"} <= set(columns):
            raise UsageError(
                f"{path} must have the columns label and item or id. Its columns: {', '.join(map(str, columns))}."
            )
        labels: dict[str, Kind] = {}
        for line, row in enumerate(rows, 2):
            word, name = (row["label"] or "").strip().lower(), (row[key] or "").strip()
            if not word:
                continue
            if word not in KNOWN:
                raise UsageError(f"{path}, row {line}: '{word}' is no label. Known: {', '.join(get_args(Kind))}.")
            if labels.setdefault(name, KNOWN[word]) != KNOWN[word]:
                raise UsageError(f"{path}, row {line}: '{name}' has two labels, {labels[name]} and {KNOWN[word]}.")
        if not labels:
            raise UsageError(f"{path} has no labels yet: its column label is empty.")
        return key == "id", labels


def export_blinded(items: Iterable[Item], file: str | Path, *, seed: int = 0) -> int:
    """Write answers to be labelled by people.

    Args:
        items: of all the models together.
        file: a new CSV.
        seed: of the order.

    Returns:
        How many rows: pairs of prompt and answer, each once.

    Raises:
        OutputExists, SaveFailure: the file is there already, or cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_blinded([Item("Hi", "Hello", "0"), Item("Hi", "Hello", "0")], f"{folder}/to-label.csv")
    1
    """
    path = Path(file).expanduser()
    if path.exists():
        raise OutputExists(f"{path} exists: labels in it would be lost. Take another name.")
    unique = {item_hash(item): item for item in items}
    order = sorted(unique)
    random.Random(seed).shuffle(order)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([name, _cell(unique[name].prompt), _cell(unique[name].response), ""] for name in order)
    try:
        with scratch_beside(path) as scratch:
            made = scratch / "labels.csv"
            made.write_text(text.getvalue(), encoding="utf-8", newline="")
            sync(made)
            made.replace(path)
    except OSError as error:
        raise SaveFailure(f"{path} cannot be written: {error}.") from error
    return len(order)


def item_hash(item: Item) -> str:
    """Of the prompt and the answer; says nothing of the model."""
    return hashlib.sha256(json.dumps([item.prompt, item.response], ensure_ascii=False).encode()).hexdigest()[:16]


def _cell(text: str) -> str:
    """Not a formula for a spreadsheet."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text

"""`secateur list`: what there is to choose from, with one line and the source of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from secateur.cli.options import choose, parse
from secateur.cli.output import STDOUT, check_json, print_table, write_json


@dataclass(frozen=True)
class ListOptions:
    """Show what there is to choose from: a name, one line and the source of each.

    secateur list methods
    """

    kind: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="KIND", help_behavior_hint="(everything)")] = "all"
    """methods, refinements, patterns, allocations, texts, tasks or models."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the lists there as JSON; - or nothing is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def run(words: list[str]) -> int:
    """The whole verb; returns the exit code."""
    options = parse(ListOptions, words, verb="list")
    if options.kind != "all":
        choose("list", options.kind, KINDS)
    check_json(options.json)
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    lists = {kind: KINDS[kind]() for kind in kinds}
    if options.json:
        write_json(options.json, lists)
    if options.json != STDOUT:
        for i, (kind, rows) in enumerate(lists.items()):
            if len(lists) > 1:
                print(f"{'' if i == 0 else chr(10)}{kind.upper()}")
            print_table([tuple(row.values()) for row in rows], ("name", "what", "source"))
    return 0


def _row(name: str, entry: Any) -> dict[str, str]:
    """A name with its line and its source, from what the registries hold: classes, records, or a sentence."""
    summary, source = (entry, "") if isinstance(entry, str) else (entry.summary, entry.source)
    return {
        "name": name,
        "summary": str(summary() if callable(summary) else summary).rstrip("."),
        "source": str(source),
    }


def _rows(table: Mapping[str, Any]) -> list[dict[str, str]]:
    return [_row(name, table[name]) for name in sorted(table)]


def _methods() -> list[dict[str, str]]:
    from secateur.methods import find_methods

    return _rows(find_methods())


def _refinements() -> list[dict[str, str]]:
    from secateur.refinements import find_refinements

    return _rows(find_refinements())


def _patterns() -> list[dict[str, str]]:
    from secateur.masks import PATTERNS

    return [_row(name, line) for name, line in PATTERNS.items()]


def _allocations() -> list[dict[str, str]]:
    from secateur.allocation import ALLOCATIONS

    return _rows({"FILE.json" if name == "table" else name: kind for name, kind in ALLOCATIONS.items()})


def _texts() -> list[dict[str, str]]:
    from secateur.data.text import TEXTS

    task = (
        "the questions of a zero-shot task with their right answers",
        "secateur list tasks; or task:NAME=FILE.jsonl",
    )
    return [*_rows(TEXTS), {"name": "task:NAME", "summary": task[0], "source": task[1]}]


def _tasks() -> list[dict[str, str]]:
    from secateur.data.tasks import TASKS

    return _rows(TASKS)


def _models() -> list[dict[str, str]]:
    from secateur.models.builtin import BUILT_IN

    return _rows(BUILT_IN)


KINDS: dict[str, Callable[[], list[dict[str, str]]]] = {
    "methods": _methods,
    "refinements": _refinements,
    "patterns": _patterns,
    "allocations": _allocations,
    "texts": _texts,
    "tasks": _tasks,
    "models": _models,
}

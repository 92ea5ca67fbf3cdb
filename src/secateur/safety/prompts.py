"""Prompt sets: requests from the user's disk, or the harmless ones that come with the package.

A set is named in one string: `builtin`, `FILE` where the columns tell the format, `FORMAT=FILE` where it is told,
or `FILE:text=goal,category=kind,label=harmful` with the columns of any other table. Known formats are the
published ones (`FORMATS`); their counts are checked, and what differs is a warning of the set.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

from ..data.calibration import check_integer
from ..data.instructions import ROLES
from ..data.text import exists
from ..errors import InvalidParameter, LoadFailure, UnknownName, UsageError
from ..models.fetch import file_sha256
from . import rows as files
from .records import Label, Prompt
from .rows import Row, cell

LABELS: tuple[str, ...] = get_args(Label)
OTHER_LABELS = {"safe": "benign", "unsafe": "harmful", "harmless": "benign"}
KEYS = ("text", "messages", "id", "label", "category", "subcategory", "severity", "template", "task")
COUNTED = ("label", "category", "severity", "template")
_MAPPED = re.compile(r"(?P<path>.+?):(?P<map>\w+=[^:/\\]+)", re.DOTALL)


@dataclass(frozen=True)
class PromptSet:
    """Prompts with unique ids, and where they are from.

    Args:
        name: of the set.
        prompts: in the order of the file.
        source: the file and its format.
        file_sha256: of the file, in hexadecimal; None for a set made in memory.
        warnings: one line each: counts that are not the published ones, repeated texts.

    Raises:
        LoadFailure: no prompt, two of one id, or an empty one.

    >>> one = PromptSet("mine", (Prompt("0", "mine", "How are you?", "benign"),), "typed here")
    >>> len(one), one.counts["label"], one.sha256[:8]
    (1, {'benign': 1}, '...')
    """

    name: str
    prompts: tuple[Prompt, ...] = field(repr=False)
    source: str
    file_sha256: str | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise LoadFailure(f"The prompt set '{self.name}' is empty: give at least one prompt.")
        seen: set[str] = set()
        for number, prompt in enumerate(self.prompts, 1):
            try:
                "".join((prompt.id, *(content for _, content in prompt.turns))).encode()
            except UnicodeEncodeError as error:
                raise LoadFailure(f"Prompt {number} of '{self.name}' holds half of a surrogate pair.") from error
            if prompt.id in seen:
                raise LoadFailure(f"The id '{prompt.id}' stands twice in '{self.name}': give every prompt its own.")
            seen.add(prompt.id)
            if not any(content.strip() for role, content in prompt.turns if role == "user"):
                raise LoadFailure(
                    f"Prompt {number} of '{self.name}' (id '{prompt.id}') is empty: fill it or leave it out."
                )
            if prompt.span and not 0 <= prompt.span[0] < prompt.span[1] <= len(prompt.text):
                raise LoadFailure(
                    f"The span {prompt.span} of prompt '{prompt.id}' in '{self.name}' is outside of its "
                    f"{len(prompt.text)} characters."
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @cached_property
    def sha256(self) -> str:
        """Of the ids, labels and conversations in their order: two runs over the same prompts agree in it."""
        lines = "\n".join(f"{prompt.id}\t{prompt.label}\t{prompt.sha256}" for prompt in self.prompts)
        return hashlib.sha256(lines.encode("utf-8")).hexdigest()

    @cached_property
    def counts(self) -> Mapping[str, Mapping[str, int]]:
        """How many prompts have each label, category, severity and template ("none" for bare)."""
        return {key: dict(Counter(str(getattr(prompt, key) or "none") for prompt in self.prompts)) for key in COUNTED}

    def where(
        self,
        *,
        labels: Sequence[str] = (),
        categories: Sequence[str] = (),
        severities: Sequence[str] = (),
        templates: Sequence[str] = (),
    ) -> PromptSet:
        """The prompts with one of each of these; an empty sequence keeps all. The bare template is "none".

        Raises:
            UnknownName: no prompt has such a value.

        >>> from secateur.safety.prompts import read_prompts
        >>> read_prompts("builtin").where(labels=["benign"]).counts["label"]
        {'benign': 40}
        """
        kept: Iterable[Prompt] = self.prompts
        for key, chosen in zip(COUNTED, (labels, categories, severities, templates), strict=True):
            for value in chosen:
                if value not in self.counts[key]:
                    raise UnknownName(key, value, self.counts[key], f" This is the prompt set '{self.name}'.")
            if chosen:
                kept = [prompt for prompt in kept if (getattr(prompt, key) or "none") in chosen]
        return replace(self, prompts=tuple(kept))

    def sample(self, tasks: int, seed: int = 0) -> PromptSet:
        """All prompts of so many tasks, drawn in turn from every label and category; in the order of the file.

        Raises:
            InvalidParameter: tasks below 1.

        >>> from secateur.safety.prompts import read_prompts
        >>> read_prompts("builtin").sample(6).counts["label"]
        {'benign': 2, 'borderline': 2, 'harmful': 2}
        """
        check_integer("tasks", "a sample of prompts", tasks, 1)
        groups: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for prompt in self.prompts:
            groups[prompt.label, prompt.category or ""][prompt.cluster].append(prompt.id)
        chance = random.Random(seed)
        by_label: dict[str, list[list[str]]] = defaultdict(list)
        for (label, _), members in groups.items():
            by_label[label].append(chance.sample(sorted(members), len(members)))
        turns = [_in_turn(stacks) for stacks in by_label.values()]
        chosen = set(_in_turn(turns)[:tasks])
        return replace(self, prompts=tuple(prompt for prompt in self.prompts if prompt.cluster in chosen))


def read_prompts(spec: str | Path, *, label: str | None = None, name: str | None = None) -> PromptSet:
    """Read a prompt set.

    Args:
        spec: `builtin`; `FILE`; `FORMAT=FILE` with a key of `FORMATS`; or `FILE:KEY=COLUMN,...` with KEY one of
            text, messages, id, label, category, subcategory, severity, template, task. `label=` takes a label
            for all rows, or a column that holds one a row. Files are .csv, .jsonl, .json, .yaml.
        label: "harmful", "benign" or "borderline" for all prompts, in place of the format's own.
        name: of the set; by default the format's, or that of the file.

    Raises:
        UnknownName: no such format, column or label.
        UsageError: the columns tell no format, or the map is not one.
        LoadFailure: the file is missing or broken; two prompts of one id, an empty one, a template that does
            not hold its task.

    >>> found = read_prompts("builtin")
    >>> found.counts["label"]
    {'benign': 40, 'borderline': 40, 'harmful': 40}
    """
    from .published import FORMATS, recognise
    from .templates import builtin_prompts

    if label is not None and label not in LABELS:
        raise UnknownName("label", label, LABELS)
    text = str(spec)
    if text == "builtin":
        found = builtin_prompts()
    elif not exists(text) and (mapped := _MAPPED.fullmatch(text)) is not None:
        found = _mapped(Path(mapped["path"]), _column_map(text, mapped["map"]), label)
    else:
        chosen, _, path = text.partition("=")
        if exists(text) or not path:
            chosen, path = "", text
        elif chosen not in FORMATS:
            raise UnknownName("prompt format", chosen, FORMATS)
        file = Path(path)
        if not chosen and not exists(path) and file.suffix.lower() not in files.SUFFIXES:
            hint = " Or a file: FILE, FORMAT=FILE, FILE:text=COLUMN,label=harmful."
            raise UnknownName("prompt set", text, ("builtin",), hint)
        content = files.read_file(file)
        chosen = chosen or recognise(content)
        if chosen == "records":
            found = _read_table(file, files.table(file, content), None, label)
        elif chosen:
            found = _checked(FORMATS[chosen], chosen, file, content)
        else:
            raise UsageError(_unrecognised(file, content, FORMATS))
    if label is not None:
        chosen_label = cast(Label, label)
        found = replace(found, prompts=tuple(replace(prompt, label=chosen_label) for prompt in found.prompts))
    if name is not None:
        found = replace(found, name=name, prompts=tuple(replace(prompt, set=name) for prompt in found.prompts))
    return found


def differing_tasks(a: PromptSet, b: PromptSet) -> tuple[str, ...]:
    """The ids of the tasks that both sets have, worded differently (white space at the ends aside).

    The two YAML files of eval-safety share all 225 ids and differ in 75 texts: join them by id, never by text.
    """
    one, other = _task_texts(a), _task_texts(b)
    return tuple(task for task in one if task in other and one[task] != other[task])


def _task_texts(prompts: PromptSet) -> dict[str, str]:
    texts: dict[str, str] = {}
    for prompt in prompts:
        start, end = prompt.span or (0, len(prompt.text))
        texts.setdefault(prompt.cluster, prompt.text[start:end].strip())
    return texts


def _checked(reader: Any, chosen: str, file: Path, content: Any) -> PromptSet:
    prompts, expected = reader.read(content, file)
    found = PromptSet(chosen, tuple(prompts), f"{file}, as {chosen}", file_sha256(file))
    warnings = [*_repeated(found), *reader.notes]
    for what, published in expected.items():
        have = {"prompts": len(found), "tasks": len({prompt.cluster for prompt in found})}.get(what)
        have = found.counts["label"].get(what, 0) if have is None else have
        if have != published:
            warnings.append(f"'{file}' has {have} {what}, where {chosen} as published has {published}.")
    return replace(found, warnings=tuple(warnings))


def _repeated(found: PromptSet) -> Iterator[str]:
    again = len(found) - len({prompt.sha256 for prompt in found})
    if again:
        yield f"{again} of {len(found)} prompts of '{found.name}' repeat the text of another: they are not independent."


def _unrecognised(file: Path, content: Any, formats: Iterable[str]) -> str:
    has = "no rows"
    if isinstance(content, list) and content and all(isinstance(row, Mapping) for row in content):
        has = f"the columns {', '.join(files.columns(content))}"
    return (
        f"'{file}' has {has}, which are of no format known here ({', '.join(formats)}): name the columns, "
        f"as {file}:text=COLUMN,label=harmful."
    )


def _column_map(spec: str, text: str) -> dict[str, str]:
    pairs = [part.strip().partition("=") for part in text.split(",")]
    found = {key.strip(): value.strip() for key, _, value in pairs}
    for key in found:
        if key not in KEYS:
            raise UnknownName("key of a column map", key, KEYS)
    if len(found) != len(pairs) or not all(found.values()) or ("text" in found) == ("messages" in found):
        raise UsageError(
            f"'{spec}' is no column map: give FILE:text=COLUMN (or messages=COLUMN) and others, each key once, "
            f"as FILE:text=goal,label=harmful."
        )
    return found


def _mapped(file: Path, columns: dict[str, str], label: str | None) -> PromptSet:
    return _read_table(file, files.table(file, files.read_file(file)), columns, label)


def _read_table(file: Path, rows: list[Row], columns: dict[str, str] | None, label: str | None) -> PromptSet:
    known = files.columns(rows)
    if columns is None:
        columns = {key: key for key in KEYS if key in known}
        if "messages" in columns:
            columns.pop("text", None)
    fixed = label
    if (named := columns.get("label")) and named not in known and named in LABELS:
        fixed = fixed or named
        columns = {key: value for key, value in columns.items() if key != "label"}
    for column in columns.values():
        if column not in known:
            raise UnknownName("column", column, known, f" This is the file '{file}'.")
    if fixed is None and "label" not in columns:
        raise UsageError(
            f"'{file}' does not say whether its prompts are harmful: add label=harmful, benign or borderline, or "
            f"label=COLUMN, to the column map."
        )
    prompts = [_prompt(file, number, row, columns, fixed) for number, row in enumerate(rows, 1)]
    found = PromptSet(file.stem, tuple(prompts), f"{file}, {len(columns)} columns mapped", file_sha256(file))
    return replace(found, warnings=tuple(_repeated(found)))


def _prompt(file: Path, number: int, row: Row, columns: Mapping[str, str], fixed: str | None) -> Prompt:
    where = f"row {number} of '{file}'"
    given = {key: cell(row, column, where) for key, column in columns.items() if key != "messages"}
    messages = _messages(row, columns["messages"], where) if "messages" in columns else None
    label = fixed or given.get("label") or ""
    label = OTHER_LABELS.get(label, label)
    if label not in LABELS:
        short = label if len(label) <= 20 else f"{label[:12]}…"  # it may be a prompt
        raise UnknownName("label", short, (*LABELS, *OTHER_LABELS), f" This is {where}.")
    text = given.get("text") or (messages or (("", ""),))[-1][1]
    return Prompt(
        given.get("id") or str(number - 1),
        file.stem,
        text,
        cast(Label, label),
        messages=messages,
        span=(0, len(text)) if text and not messages and not given.get("template") else None,
        source=str(file),
        **{key: given.get(key) for key in ("category", "subcategory", "severity", "template", "task")},
    )


def _messages(row: Row, column: str, where: str) -> tuple[tuple[str, str], ...]:
    value = row.get(column)
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise LoadFailure(f"The column '{column}' in {where} should be a list of {{role, content}}.")
    turns = tuple((str(turn.get("role")), str(turn.get("content") or "")) for turn in value)
    for role, _ in turns:
        if role not in ROLES:
            raise UnknownName("role", role, ROLES, f" This is {where}.")
    if turns[-1][0] != "user":
        raise InvalidParameter("messages", where, "a conversation that ends with the user", f"role {turns[-1][0]}")
    return turns


def _in_turn(stacks: Sequence[Sequence[str]]) -> list[str]:
    """
    >>> _in_turn(["ab", "c", "def"])
    ['a', 'c', 'd', 'b', 'e', 'f']
    """
    longest = max(map(len, stacks), default=0)
    taken = (stack[place] for place in range(longest) for stack in stacks if place < len(stack))
    return list(dict.fromkeys(taken))

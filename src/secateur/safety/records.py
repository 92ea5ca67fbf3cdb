"""What the safety measurements pass to one another: prompts, answers, verdicts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

Label = Literal["harmful", "benign", "borderline"]
Kind = Literal["refusal", "partial", "compliance", "incoherent", "error"]


@dataclass(frozen=True)
class Prompt:
    """One request, as the model gets it.

    Args:
        id: unique in its set.
        set: the name of the set.
        text: the request, template included.
        label: a harmful request is to be refused, a benign or borderline one (looks harmful, is not) answered.
        messages: (role, content) turns in place of `text` where the conversation has several.
        category, subcategory, severity: as published, None where the set has none.
        template: the name of the template around the task; None = bare.
        task: the task's id, the same in all templates: the cluster of the statistics.
        span: characters [start, end) of the task in `text`; None = not known.
        source: the file it was read from.

    >>> Prompt("0", "mine", "How are you?", "benign").sha256[:8]
    '107e4dd1'
    """

    id: str
    set: str
    text: str
    label: Label
    messages: tuple[tuple[str, str], ...] | None = None
    category: str | None = None
    subcategory: str | None = None
    severity: str | None = None
    template: str | None = None
    task: str | None = None
    span: tuple[int, int] | None = None
    source: str = ""

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The conversation as (role, content)."""
        return self.messages or (("user", self.text),)

    @property
    def sha256(self) -> str:
        """Of the conversation: two logs are over the same prompts if these agree."""
        return hashlib.sha256(json.dumps(self.turns, ensure_ascii=False).encode()).hexdigest()

    @property
    def cluster(self) -> str:
        """What the prompt is not independent of: its task, or itself."""
        return self.task or self.id


@dataclass(frozen=True)
class Answer:
    """What a model wrote to a prompt; `finish` is "stop", or "length" where it was cut."""

    prompt: str
    sha256: str
    text: str
    tokens: int
    finish: str
    sample: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer; `p` is its probability of a refusal where it has one."""

    label: Kind
    judge: str
    p: float | None = None
    raw: str | None = None

    @property
    def refused(self) -> bool:
        """Full and partial refusals."""
        return self.label in ("refusal", "partial")

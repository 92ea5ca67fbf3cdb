"""Instructions: conversations that end with a response, from a file or the hub, on two sides.

A record holds a prompt and a response, or a whole list of messages. Records are divided by the hash of their
first question: half of them feed the statistics of a method ("calibration"), the others are measured on
("test"), so that a question never stands on both sides, whatever the order of the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import LoadFailure, TextTooShort, UnknownName, UsageError
from ..progress import Progress, silent
from .text import ALPACA_TEST, SPLITS, Split, Text, exists, jsonl_rows, read_text, reading, rows_from_hub

Template = Literal["chat", "plain"]
Counted = Literal["response", "all"]
TEMPLATES: tuple[str, ...] = get_args(Template)
COUNTED: tuple[str, ...] = get_args(Counted)

Message = tuple[str, str]  # role, content

_SPECIFIED = re.compile(r"(?P<path>.+):(?P<fields>[^:/\\]+)", re.DOTALL)
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Instructions:
    """Conversations, each a tuple of (role, content) whose last role is the assistant.

    template: "chat" renders through the model's own chat template, "plain" joins the contents by blank lines.
    counted: the tokens a measure counts: those of the responses, or all.
    left_out: records without a question or an answer.

    >>> one = Instructions("one", "test", ((("user", "1 + 1?"), ("assistant", "2")),), "typed here")
    >>> one.counted, one.sha256[:8]
    ('response', 'eb86c7f0')
    """

    name: str
    split: str
    conversations: tuple[tuple[Message, ...], ...] = field(repr=False)
    source: str
    template: Template = "chat"
    counted: Counted = "response"
    shared: bool = False  # the same conversations are read for calibration and for test
    left_out: int = 0

    @cached_property
    def sha256(self) -> str:
        """Of the conversations as one line of JSON each, in UTF-8; in hexadecimal."""
        lines = "\n".join(json.dumps(conversation, ensure_ascii=False) for conversation in self.conversations)
        return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def read_instructions(
    name: str | Path,
    split: Split = "calibration",
    *,
    template: Template = "chat",
    counted: Counted = "response",
    progress: Progress = silent,
) -> Instructions:
    """Prompts with their responses, from a local file or from the hub.

    Args:
        name: `file.jsonl:prompt,response` with the names of the two fields (a field `input` beside
            `instruction`, Alpaca's layout, is added to the prompt); `file.jsonl:messages` with the name of a
            field that holds a list of {"role", "content"}; or `alpaca:instruction,output` from the hub. With
            `,all` at the end every record serves both sides, and the result is marked `shared`.
        split: "calibration" or "test". Of a file, half of the records, by the hash of the first question; of
            alpaca, the last 2000 are for test.
        template: "chat" or "plain"; see `Instructions`.
        counted: "response" or "all"; see `Instructions`.
        progress: unused so far; told how far a download is.

    Raises:
        UnknownName: no such split, template or field.
        UsageError: the name has no two fields.
        LoadFailure: the file is missing or broken, a value is no string, or the hub cannot be reached.
        TextTooShort: no conversation is left on this side.

    >>> import tempfile
    >>> rows = [{"q": f"What is {i} + {i}?", "a": str(2 * i)} for i in range(40)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "sums.jsonl")
    ...     _ = file.write_text("".join(json.dumps(row) + chr(10) for row in rows))
    ...     sides = [read_instructions(f"{file}:q,a", split).conversations for split in ("calibration", "test")]
    >>> [len(side) for side in sides], set(sides[0]) & set(sides[1])
    ([16, 24], set())
    """
    for kind, value, known in (
        ("split", split, SPLITS),
        ("template", template, TEMPLATES),
        ("count", counted, COUNTED),
    ):
        if value not in known:
            raise UnknownName(kind, str(value), known)
    path, fields, whole = _parse(str(name))
    if path == "alpaca":
        rows: Iterable[tuple[str, Mapping[str, Any]]] = _alpaca()
        origin = "Hugging Face hub: tatsu-lab/alpaca"
    else:
        rows, origin = _file_rows(Path(path)), f"local file {path}"
    with reading(Path(path)):
        every = [_conversation(row, fields, where) for where, row in rows]
    good = [one for one in every if one is not None]
    kept, how = _side(good, split, by_place=path == "alpaca", whole=whole)
    if not kept:
        raise TextTooShort(
            f"The {split} side of '{name}' has no conversation with a question and an answer, of {len(every)} "
            f"records: give more of them, or put ',all' behind the fields to use each on both sides."
        )
    source = f"{origin}, {' and '.join(fields)}; {how}"
    found = Instructions(
        str(name), split, tuple(kept), source, template, counted, shared=whole, left_out=len(every) - len(good)
    )
    try:
        found.sha256  # noqa: B018 - kept for later, and proves that the text can be encoded
    except UnicodeEncodeError as error:
        raise LoadFailure(f"'{name}' holds half of a surrogate pair, which is no character ({error}).") from error
    return found


def are_instructions(name: str | Path) -> bool:
    """Whether a name asks for conversations: two fields behind the colon, or one that holds lists.

    >>> are_instructions("chat.jsonl:prompt,response"), are_instructions("chat.jsonl:text"), are_instructions("c4")
    (True, False, False)
    """
    found = _SPECIFIED.fullmatch(str(name))
    if found is None or exists(str(name)):
        return False
    path, fields = found["path"], found["fields"].split(",")
    if len(fields) > 1:
        return path == "alpaca" or Path(path).suffix.lower() in (".jsonl", ".parquet")
    if Path(path).suffix.lower() != ".jsonl" or not exists(path):
        return False
    with reading(Path(path)):
        _, first = next(jsonl_rows(Path(path)), (0, {}))
    return isinstance(first.get(fields[0]), list)


def read_source(
    name: str | Path,
    split: Split,
    *,
    template: Template | None = None,
    counted: Counted | None = None,
    progress: Progress = silent,
) -> Text | Instructions:
    """A text or instructions, by the form of the name. None: "chat", "response".

    Raises:
        UsageError: a template or a count is asked of a plain text.
    """
    if are_instructions(name):
        return read_instructions(
            name, split, template=template or "chat", counted=counted or "response", progress=progress
        )
    for option, value in (("template", template), ("count", counted)):
        if value is not None:
            raise UsageError(
                f"'{name}' is a plain text, and --{option} is for conversations, as FILE.jsonl:PROMPT,RESPONSE: "
                f"leave --{option} {value} out."
            )
    return read_text(name, split, progress=progress)


def _parse(name: str) -> tuple[str, tuple[str, ...], bool]:
    """The path, one or two fields, and whether every record serves both sides."""
    found = _SPECIFIED.fullmatch(name)
    fields = tuple(part.strip() for part in found["fields"].split(",")) if found else ()
    whole = len(fields) > 1 and fields[-1] == "all"
    fields = fields[:-1] if whole else fields
    if found is None or len(fields) not in (1, 2) or not all(fields):
        raise UsageError(
            f"'{name}' names no conversations: give FILE.jsonl:PROMPT,RESPONSE with the names of two fields, or "
            f"FILE.jsonl:MESSAGES with one that holds lists of messages."
        )
    path = found["path"]
    if path == "alpaca":
        return path, fields, whole
    if Path(path).suffix.lower() != ".jsonl":
        raise LoadFailure(f"'{path}' is no .jsonl file: conversations are read from those only.")
    if not exists(path):
        raise LoadFailure(f"There is no file '{path}': check the path, relative to {Path.cwd()}.")
    return path, fields, whole


def _file_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in jsonl_rows(path):
        yield f"line {number} of '{path}'", row


def _alpaca() -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(rows_from_hub("alpaca", "tatsu-lab/alpaca", split="train"), start=1):
        yield f"row {number} of tatsu-lab/alpaca", row


def _conversation(row: Mapping[str, Any], fields: tuple[str, ...], where: str) -> tuple[Message, ...] | None:
    """None without a question or an answer."""
    for name in fields:
        if name not in row:
            raise UnknownName("field", name, row, f" This is {where}.")
    if len(fields) == 1:
        return _messages(row[fields[0]], fields[0], where)
    prompt, response = (_string(row[name], name, where) for name in fields)
    if fields[0] == "instruction" and "input" in row:
        prompt = "\n\n".join(part for part in (prompt, _string(row["input"], "input", where)) if part.strip())
    if not (prompt.strip() and response.strip()):
        return None
    return ("user", prompt), ("assistant", response)


def _messages(value: object, name: str, where: str) -> tuple[Message, ...] | None:
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise LoadFailure(
            f"The field '{name}' in {where} should be a list of {{role, content}}; for a prompt and a "
            f"response in two fields, name both: FILE.jsonl:PROMPT,RESPONSE."
        )
    messages = []
    for message in value:
        role, content = (_string(message.get(key), f"{name}.{key}", where) for key in ("role", "content"))
        if role not in ROLES:
            raise UnknownName("role", role, ROLES, f" This is {where}.")
        messages.append((role, content))
    while messages and messages[-1][0] != "assistant":  # a last question without an answer
        messages.pop()
    answered = any(role == "user" and content.strip() for role, content in messages[:-1])
    return tuple(messages) if answered and messages[-1][1].strip() else None


def _string(value: object, name: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise LoadFailure(f"The field '{name}' in {where} holds {type(value).__name__}: it should be a string.")


def _side(
    good: list[tuple[Message, ...]], split: Split, *, by_place: bool, whole: bool
) -> tuple[list[tuple[Message, ...]], str]:
    if whole:
        return good, "every record serves calibration and test"
    if by_place:
        test = good[max(len(good) - ALPACA_TEST, 0) :]
        asked = {_question(one) for one in test}
        rest = [one for one in good[: len(good) - len(test)] if _question(one) not in asked]
        return (test if split == "test" else rest), f"the last {ALPACA_TEST} are for test"
    side = [
        one
        for one in good
        if (hashlib.sha256(_question(one).encode("utf-8", "replace")).digest()[-1] % 2 == 0) == (split == "test")
    ]
    return side, "divided between calibration and test by the hash of the question"


def _question(conversation: tuple[Message, ...]) -> str:
    return next(content for role, content in conversation if role == "user").strip()

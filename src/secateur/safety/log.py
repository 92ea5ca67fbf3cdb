"""The log of a run: one JSON line about the run, then one a answer, so that a run cut off goes on where it was.

Prompts are named by id and hash; what the model wrote is there in full: treat a log as sensitive.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from secateur.cache import scratch_beside, sync

from ..errors import LoadFailure, SaveFailure, UsageError
from ..models.fetch import one_line
from .prompts import PromptSet
from .records import Answer

FORMAT = "secateur_answers"
FORMAT_VERSION = 1
BEGINNING = f'{{"{FORMAT}"'.encode()
Key = tuple[str, int]  # prompt id, sample


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("secateur", "torch", "transformers")}


@dataclass(frozen=True)
class Header:
    """What a run is of. Two runs go on with each other only if `model`, `generation` and the prompts' hash agree.

    Args:
        model: "name" for people, and "sha256" of config and weights, or "url" of an endpoint.
        generation: everything that decides what is written: template hash, length, samples, temperature, seed.
        prompts: "name", "sha256" and "count" of the prompt set.
        versions: for people.
    """

    model: Mapping[str, Any]
    generation: Mapping[str, Any]
    prompts: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=_versions)

    @classmethod
    def of(cls, model: Mapping[str, Any], generation: Mapping[str, Any], prompts: PromptSet) -> Header:
        """With the facts of a prompt set."""
        about = {"name": prompts.name, "sha256": prompts.sha256, "count": len(prompts)}
        return cls(dict(model), dict(generation), about)

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree, flat."""
        parts = {"prompts": self.prompts, "model": self.model, "generation": self.generation}
        flat = {f"{part} {key}": value for part, facts in parts.items() for key, value in facts.items()}
        names = ("model name",) if "model sha256" in flat else ()
        return {key: value for key, value in flat.items() if key not in (*names, "prompts name")}

    @property
    def samples(self) -> int:
        """Answers a prompt."""
        return int(self.generation["samples"])


@dataclass(frozen=True)
class Log:
    """A log read back: its header, and the answers in the order they were written."""

    path: Path
    header: Header
    answers: tuple[Answer, ...] = field(repr=False)

    def of(self, prompts: PromptSet) -> list[Answer]:
        """The answers in the order of the prompts, samples of one prompt together.

        Raises:
            UsageError: the log is over other prompts.
            LoadFailure: answers are missing.
        """
        if self.header.prompts["sha256"] != prompts.sha256:
            raise UsageError(
                f"The log {self.path} is over the {self.header.prompts['count']} prompts of "
                f"'{self.header.prompts['name']}', not over these {len(prompts)} of '{prompts.name}': "
                f"read the set it was made with."
            )
        found = {(one.prompt, one.sample): one for one in self.answers}
        wanted = keys(prompts, self.header.samples)
        if missing := sum(key not in found for key in wanted):
            raise LoadFailure(f"The log {self.path} lacks {missing} of {len(wanted)} answers: resume its run first.")
        return [found[key] for key in wanted]


def keys(prompts: PromptSet, samples: int) -> list[Key]:
    """(prompt id, sample) of every answer of a run."""
    return [(prompt.id, sample) for prompt in prompts for sample in range(samples)]


def read_log(path: str | Path) -> Log:
    """Read a log; a last line that was cut off is left out.

    Raises:
        LoadFailure: there is no such file, it is no log, or a line of it is damaged.
    """
    file = Path(path)
    header, answers, _ = _read(file)
    return Log(file, header, tuple(answers))


def check_same_prompts(a: Log, b: Log) -> None:
    """Refuse to compare logs over different prompts, or with different numbers of samples.

    Raises:
        UsageError: they are.
    """
    for what, one, other in (
        ("over the prompts", a.header.prompts["sha256"], b.header.prompts["sha256"]),
        ("with the number of samples", a.header.samples, b.header.samples),
    ):
        if one != other:
            name, theirs = a.header.prompts["name"], b.header.prompts["name"]
            raise UsageError(
                f"{a.path} ('{name}', {a.header.prompts['count']} prompts) and {b.path} ('{theirs}', "
                f"{b.header.prompts['count']}) are not {what} of each other ({str(one)[:8]}, {str(other)[:8]}): only "
                f"answers to the same prompts can be compared."
            )


class Writer:
    """An open log: what it already had, and how to add to it."""

    def __init__(self, path: Path | None, answers: Iterable[Answer] = (), file: IO[bytes] | None = None) -> None:
        self.path, self._file = path, file
        self.answers: dict[Key, Answer] = {(one.prompt, one.sample): one for one in answers}

    def add(self, answers: Iterable[Answer]) -> None:
        """Write answers through to the file, one a line.

        Raises:
            SaveFailure: the disk is full or gone.
        """
        new = list(answers)
        if self._file is not None:
            try:
                self._file.write(b"".join(_line(asdict(one)) for one in new))
                self._file.flush()
            except OSError as error:
                raise SaveFailure(f"The log {self.path} could not be written ({one_line(error)}).") from error
        self.answers |= {(one.prompt, one.sample): one for one in new}


@contextmanager
def writing(path: str | Path | None, header: Header, known: Iterable[Answer] = ()) -> Iterator[Writer]:
    """A log to add to: made if it is not there, continued if it is of the same run. None: kept in memory only.

    Args:
        known: answers from elsewhere that need not be written again.

    Raises:
        UsageError: the file is of another model, generation or prompts; the message names what differs.
        LoadFailure: the file is no log, or damaged elsewhere than in its last line.
        SaveFailure: it cannot be written.
    """
    if path is None:
        yield Writer(None, known)
        return
    file = Path(path)
    answers: list[Answer] = []
    end = 0
    if file.exists() and not _cut_at_once(file):
        theirs, answers, end = _read(file)
        check_identity(file, theirs, header)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("r+b" if end else "wb")
        opened.truncate(end)
        opened.seek(end)
        if not end:
            opened.write(_line({FORMAT: FORMAT_VERSION, **asdict(header)}))
            opened.flush()
    except OSError as error:
        raise SaveFailure(f"The log {file} could not be written ({one_line(error)}).") from error
    with opened:
        yield Writer(file, (*known, *answers), opened)


def check_identity(file: Path, theirs: Header, ours: Header) -> None:
    """Raise for the first thing in which two runs differ.

    Raises:
        UsageError: they differ.
    """
    one, other = theirs.identity, json.loads(json.dumps(ours.identity))
    for key in dict.fromkeys((*other, *one)):
        if one.get(key) != other.get(key):
            raise UsageError(
                f"The log {file} is of a run with {key} {_short(one.get(key))}, and this one has "
                f"{_short(other.get(key))}: give another file, or delete it to begin anew."
            )


def share_of(path: Path, rank: int, world: int) -> Path:
    """The file of one rank.

    >>> share_of(Path("run.jsonl"), 1, 4).name
    'run.rank1of4.jsonl'
    """
    return path.with_name(f"{path.stem}.rank{rank}of{world}{path.suffix}")


def answers_of_shares(path: Path, header: Header) -> list[Answer]:
    """What any rank of this run has written so far, the merged log included.

    Raises:
        UsageError: one of the files is of another run.
    """
    found: list[Answer] = []
    for file in (path, *sorted(path.parent.glob(f"{path.stem}.rank*of*{path.suffix}"))):
        if file.exists() and not _cut_at_once(file):
            theirs, answers, _ = _read(file)
            check_identity(file, theirs, header)
            found += answers
    return found


def merge_shares(path: Path, header: Header, wanted: Sequence[Key]) -> bool:
    """Write the whole log from the ranks' files, in the order of `wanted`, if none is missing; whether it was."""
    found = {(one.prompt, one.sample): one for one in answers_of_shares(path, header)}
    if any(key not in found for key in wanted):
        return False
    try:
        with scratch_beside(path) as scratch:
            made = scratch / path.name
            lines = [_line({FORMAT: FORMAT_VERSION, **asdict(header)}), *(_line(asdict(found[key])) for key in wanted)]
            made.write_bytes(b"".join(lines))
            sync(made)
            made.replace(path)
    except OSError as error:
        raise SaveFailure(f"The log {path} could not be written ({one_line(error)}).") from error
    return True


def _cut_at_once(file: Path) -> bool:
    """Whether nothing but a part of the first line was written: there is nothing to go on with."""
    with file.open("rb") as opened:
        start = opened.readline()
    return not start.endswith(b"\n") and (start.startswith(BEGINNING) or BEGINNING.startswith(start))


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode("ascii") + b"\n"


def _read(file: Path) -> tuple[Header, list[Answer], int]:
    """Header, answers, and the byte behind the last whole line."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise LoadFailure(f"The log {file} could not be read ({error.strerror or one_line(error)}).") from error
    first, *lines = content.split(b"\n")
    if not first.startswith(BEGINNING):
        raise LoadFailure(f"{file} is no log of answers: give a log that secateur wrote, or another file to write to.")
    if not lines:
        raise LoadFailure(f"The log {file} ends within its first line, and has no answers.")
    whole, end = lines[:-1], len(content) - len(lines[-1])
    try:
        about = json.loads(first)
        if about.pop(FORMAT) != FORMAT_VERSION:
            raise LoadFailure(f"The log {file} is of another version of secateur: make it anew.")
        header = Header(**about)
    except (ValueError, TypeError, KeyError) as error:
        raise LoadFailure(f"The first line of the log {file} is damaged ({one_line(error)}).") from error
    answers = []
    for number, line in enumerate(whole, 2):
        try:
            answers.append(Answer(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(whole) + 1:  # a last line may be half written even with its end
                return header, answers, end - len(line) - 1
            raise LoadFailure(
                f"Line {number} of the log {file} is damaged: delete the line, and it is redone."
            ) from error
    return header, answers, end


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"

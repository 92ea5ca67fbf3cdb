"""The folder of a study: one file a step, whole or not there, and no step mixed with that of another request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.cache import write_whole
from secateur.errors import LoadFailure, UsageError


@dataclass(frozen=True)
class StudyFolder:
    """Steps as files ARM/STEP.json, each with the request that it answers.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as place:
    ...     folder = StudyFolder(Path(place))
    ...     folder.write("dense", "margin", {"prompts": "ab12"}, [0.5])
    ...     folder.read("dense", "margin", {"prompts": "ab12"}), folder.read("dense", "focus", {})
    ([0.5], None)
    """

    path: Path

    def file(self, arm: str, step: str) -> Path:
        """Where a step's result stands."""
        return self.path / arm / f"{step}.json"

    def log(self, arm: str) -> Path:
        """Where an arm's answers stand: the only file of the folder with texts of a model."""
        return self.path / arm / "answers.jsonl"

    def read(self, arm: str, step: str, request: Mapping[str, Any]) -> Any:
        """The result of a step, None if it has not been done.

        Raises:
            UsageError: what is there answers another request; the first value that differs is named.
            LoadFailure: the file cannot be read.
        """
        record = self.record(arm, step)
        if record is None:
            return None
        if record["request_sha256"] != hash_of(request):
            raise UsageError(
                f"{self.file(arm, step)} was made with another request ({_difference(record['request'], request)}): "
                f"name another --out, or delete it to have that step done again."
            )
        return record["result"]

    def record(self, arm: str, step: str) -> dict[str, Any] | None:
        """A step's file with everything in it; None if there is none."""
        return _read(self.file(arm, step))

    def write(self, arm: str, step: str, request: Mapping[str, Any], result: Any, **more: Any) -> None:
        """Keep a step's result, with `more` about how it was made.

        Raises:
            SaveFailure: the disk is full or the folder cannot be written.
        """
        record = {"arm": arm, "step": step, "request": request, "request_sha256": hash_of(request), **more}
        write_whole(self.file(arm, step), json.dumps(record | {"result": result}, ensure_ascii=False) + "\n", "A step")


def hash_of(request: Mapping[str, Any]) -> str:
    """SHA-256 of a request; the order of its keys does not matter.

    >>> hash_of({"a": 1, "b": (2,)}) == hash_of({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LoadFailure(
            f"{path} cannot be read ({str(error).splitlines()[0]}): delete it to do the step again."
        ) from error
    if not isinstance(record, dict) or not {"request", "request_sha256", "result"} <= set(record):
        raise LoadFailure(f"{path} is no step of a study: delete it to do the step again.")
    return record


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """
    >>> _difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    'b c: 2 then, 3 now'
    """
    now = json.loads(json.dumps(now))
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if old != new:
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                return f"{key} {_difference(old, new)}"
            return f"{key}: {_short(old)} then, {_short(new)} now"
    return "it has been edited"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

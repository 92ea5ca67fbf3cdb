"""The state of a training run in one file that survives a kill: safetensors, with its JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.cache import scratch_beside, sync
from secateur.errors import LoadFailure, SaveFailure, UsageError

FORMAT = "secateur recovery 1"


@dataclass
class State:
    """Where a run is. `tensors` holds parts, moments and the best parts, by name; `facts` are plain values."""

    identity: Mapping[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def write(file: Path, state: State) -> None:
    """Replace the file in one step; a kill leaves the old one or the new one.

    Raises:
        SaveFailure: the disk is full or the folder cannot be written; the old file is still there.
    """
    header = {"format": FORMAT, "identity": json.dumps(state.identity), "facts": json.dumps(state.facts)}
    try:
        with scratch_beside(file) as scratch:
            made = scratch / "state"
            save_file({name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}, made, header)
            sync(made)
            made.replace(file)
            if file.parent.is_dir():
                sync_folder(file.parent)
    except (OSError, SafetensorError) as error:
        raise SaveFailure(f"The checkpoint could not be written to {file}: {error}.") from error


def sync_folder(folder: Path) -> None:
    """Keep the rename itself."""
    import os

    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(file: Path, identity: Mapping[str, Any]) -> State:
    """The state of a run that was asked for in the same way.

    Raises:
        UsageError: there is no such file, or it is of another run; the message names what differs.
        LoadFailure: it is damaged.
    """
    if not file.is_file():
        raise UsageError(f"There is no checkpoint {file} to resume from: leave out --resume to begin.")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            if header.get("format") != FORMAT:
                raise UsageError(f"{file} is no checkpoint of secateur recover.")
            theirs, facts = json.loads(header["identity"]), json.loads(header["facts"])
            check_identity(file, theirs, identity)
            names: list[str] = opened.keys()  # it is no dict, and cannot be iterated itself
            tensors = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise LoadFailure(f"The checkpoint {file} is damaged ({error}): delete it and begin again.") from error
    return State(identity, tensors, facts)


def check_identity(file: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise for the first key that differs.

    >>> check_identity(Path("c"), {"lr": 0.1}, {"lr": 0.2})
    Traceback (most recent call last):
    secateur.errors.UsageError: The checkpoint c is of a run with lr 0.1, and this one asks for 0.2: ...
    """
    plain = json.loads(json.dumps(ours))
    for key in sorted(set(theirs) | set(plain)):
        if theirs.get(key) != plain.get(key):
            raise UsageError(
                f"The checkpoint {file} is of a run with {key} {_short(theirs.get(key))}, and this one asks for "
                f"{_short(plain.get(key))}: ask for the same, or begin anew without --resume."
            )


def _short(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"

"""Where downloads and conversions are kept, and how a folder or file appears there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import SaveFailure


def cache_folder() -> Path:
    """The folder for everything fetched or converted; it may not exist yet.

    `SECATEUR_CACHE`, else `XDG_CACHE_HOME/secateur`, else `~/.cache/secateur`.

    >>> import os
    >>> os.environ["SECATEUR_CACHE"] = "/tmp/somewhere"
    >>> cache_folder().as_posix()
    '/tmp/somewhere'
    >>> del os.environ["SECATEUR_CACHE"]
    """
    if chosen := os.environ.get("SECATEUR_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "secateur"


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """An empty folder on the file system of `target`, removed at the end with whatever is left in it.

    What is moved out of it with `os.replace` or `Path.rename` appears at `target` in one step.

    Raises:
        OSError: the parent folder cannot be made or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Ask the disk to keep a file, or every file of a folder and the folder's list, before it is renamed."""
    members = sorted(path.rglob("*")) if path.is_dir() else []
    for member in (*members, path):
        if member.is_dir() and os.name == "nt":
            continue  # folders cannot be opened there
        handle = os.open(member, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: Path, text: str, what: str) -> None:
    """The file appears with all of the text, or stays as it was. `what` names it in the error.

    Raises:
        SaveFailure: the disk is full or the folder cannot be written.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device cannot be renamed over
            path.write_text(text, encoding="utf-8")
            return
        with scratch_beside(path) as scratch:
            (scratch / "whole").write_text(text, encoding="utf-8")
            (scratch / "whole").replace(path)
    except OSError as error:
        raise SaveFailure(f"{what} could not be written to {path}: {error.strerror or error}.") from error


def put_in_place(new: Path, target: Path) -> None:
    """Rename a folder to `target`; what stood there is kept beside `new`, and comes back if that fails.

    Raises:
        OSError: it fails.
    """
    old = new.with_name("old")
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise

"""Where downloads and conversions are kept, and how a folder or file appears there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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

"""The C++ compiler of this machine, for backends that are built where they run."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache

from secateur.errors import UsageError


class CannotCompile(UsageError):
    """A backend could not be built on this machine."""


def compiler() -> str:
    """The command that CXX names, or the usual one."""
    return os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "g++")


def no_compiler(what: str) -> str | None:
    """Why `what` cannot be built here: there is no compiler; None if there is one.

    >>> no_compiler("this") is None or "needs a C++ compiler" in no_compiler("this")
    True
    """
    if _found(compiler()):
        return None
    return f"{what} needs a C++ compiler, and there is no {compiler()}: install one, or set CXX"


@cache
def _found(command: str) -> bool:
    """Every layer of a model asks for it."""
    return shutil.which(command) is not None

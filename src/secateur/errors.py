"""Every error this package raises on purpose.

    SecateurError
    ├── UsageError              what was asked for cannot be done: the command line exits with 2
    │   ├── InvalidParameter    a value outside its range
    │   ├── UnknownName         a method, pattern, text, model or option that does not exist
    │   ├── ModelNotSupported   the model has no blocks or layers that can be pruned
    │   ├── TextTooShort        fewer tokens than one window
    │   └── OutputExists        a folder or file would be overwritten
    └── RunFailure              the attempt failed on the way: the command line exits with 1
        ├── LoadFailure         broken, missing or unreachable files
        ├── SaveFailure         the disk is full, the folder not writable
        ├── LowCoverage         the engine did not see enough of the model
        └── NumericalFailure    a score or a statistic is not finite

Each message is one line: what, where, which value or shape, and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """The root. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(SecateurError, ValueError):
    """The request itself is wrong."""

    exit_code = 2


class InvalidParameter(UsageError):
    """A value outside its range, always said in one form.

    >>> raise InvalidParameter("sparsity", "prune", "a number in [0, 1)", 1.5)
    Traceback (most recent call last):
    secateur.errors.InvalidParameter: The 'sparsity' of prune must be a number in [0, 1). Got 1.5 instead.
    """

    def __init__(self, name: str, owner: str, allowed: str, got: object) -> None:
        super().__init__(f"The '{name}' of {owner} must be {allowed}. Got {got!r} instead.")


def check_whole(name: str, owner: str, value: object, least: int = 1) -> None:
    """Raise `InvalidParameter` unless a value is a whole number of at least `least`.

    >>> check_whole("steps", "besa", True)
    Traceback (most recent call last):
    secateur.errors.InvalidParameter: The 'steps' of besa must be a whole number of at least 1. Got True instead.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidParameter(name, owner, f"a whole number of at least {least}", value)


class UnknownName(UsageError):
    """A name that is not in a list; the nearest known one is offered.

    >>> raise UnknownName("method", "wnada", ["magnitude", "wanda"])
    Traceback (most recent call last):
    secateur.errors.UnknownName: There is no method 'wnada'. Did you mean 'wanda'? Known: magnitude, wanda.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        offer = f" Did you mean '{near[0]}'?" if near else ""
        super().__init__(f"There is no {kind} '{name}'.{offer} Known: {', '.join(names)}.{hint}")


class ModelNotSupported(UsageError):
    """No blocks or layers were found; the message names what was looked for."""


class TextTooShort(UsageError):
    """The text has fewer tokens than were asked for."""


class OutputExists(UsageError):
    """Nothing that exists is overwritten unless asked."""


class RunFailure(SecateurError, RuntimeError):
    """The request was fine, the attempt failed."""


class LoadFailure(RunFailure):
    """A model or text could not be read."""


class SaveFailure(RunFailure):
    """An output could not be written; nothing half-written is left."""


class LowCoverage(RunFailure):
    """Too few of the model's block parameters are in layers that the engine sees."""


class NumericalFailure(RunFailure):
    """A statistic, score or measure is not finite."""

"""Kinds of things that are one small file each: the folder is the list, entry points add to it."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from secateur.errors import UnknownName, UsageError

T = TypeVar("T")


class Named:
    """What lists and records call a class that has a file of its own."""

    @classmethod
    def name(cls) -> str:
        """The name of the file, or of the entry point's last module."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def summary(cls) -> str:
        """The first line of the file's docstring, after the name."""
        first = (sys.modules[cls.__module__].__doc__ or cls.__name__).strip().splitlines()[0]
        return first.partition(": ")[2] or first


def find_kinds(package: str, path: Iterable[str], contract: type[T], word: str) -> dict[str, type[T]]:
    """The subclasses of `contract` by name: the files of a package, then the entry points of its name.

    Args:
        word: what one of them is called in messages, as "method".
    """
    found: dict[str, type[T]] = {}
    for info in pkgutil.iter_modules(path):
        module = importlib.import_module(f"{package}.{info.name}")
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, contract) and item.__module__ == module.__name__:
                found[info.name] = item
    for point in entry_points(group=package):
        if point.name in found:
            raise UsageError(f"{point.value} registers the {word} '{point.name}', which exists already")
        found[point.name] = point.load()
    return found


def make_kind(found: Mapping[str, type[T]], word: str, name: str, options: Mapping[str, object]) -> T:
    """The one of that name with these options; unknown words are errors that offer the nearest."""
    if name not in found:
        raise UnknownName(word, name, found)
    known = getattr(found[name], "__dataclass_fields__", {})
    for option in options:
        if option not in known:
            raise UnknownName(f"option of {name}", option, known)
    return found[name](**options)

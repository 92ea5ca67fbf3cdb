"""Command-line words -> a frozen dataclass, through tyro; every mistake is one line of ours.

Only tyro's documented interface is used: it parses, converts and writes the help page, hands back the words
it does not know, and exits with its own boxed message, which is read here for the option it names.
docs/decisions/002-command-line-library.md says why tyro.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from secateur.errors import SecateurError, UnknownName, UsageError

Form = TypeVar("Form")

# The form's help says which of these exist; the field's other toolkits call the same things so.
ALIASES = {"--nsamples": "--samples", "--sparsity-ratio": "--sparsity"}


def parse(form: type[Form], words: list[str], *, verb: str, aliases: Mapping[str, str] | None = None) -> Form:
    """An instance of `form` filled from the words after the verb.

    Args:
        form: a frozen dataclass; nested dataclasses are groups of options, `--group.option`.
        words: as the shell gave them.
        verb: for the messages.
        aliases: other names of options, beside `ALIASES`.

    Raises:
        UsageError: a word or value that cannot be; the message is one line and names the nearest option.
        SystemExit: with code 0 after `--help`.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Cut:
    ...     sparsity: float = 0.5
    >>> parse(Cut, ["--sparsity", "0.25"], verb="cut")
    Cut(sparsity=0.25)
    >>> parse(Cut, ["--sparsty", "0.25"], verb="cut")
    Traceback (most recent call last):
    secateur.errors.UsageError: There is no option '--sparsty' in secateur cut. Did you mean '--sparsity'? ...
    """
    words = _spell(words, {**ALIASES, **(aliases or {})})
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(
                form,
                args=words,
                prog=f"secateur {verb}",
                return_unknown_args=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        for cause in _chain(stop):
            if isinstance(cause, SecateurError):  # a dataclass's own check of its values
                raise cause from None
        _explain(form, words, verb, said.getvalue())
    if unknown:
        _refuse_unknown(form, words, verb, unknown)
    return parsed


def given(words: Iterable[str], option: str) -> bool:
    """Whether an option, or with a trailing dot any option of a group, stands among the words.

    >>> given(["--sparsegpt.damping=0.1"], "--sparsegpt.")
    True
    """
    names = (word.split("=")[0].replace("_", "-") for word in words if word.startswith("--"))
    return any(name.startswith(option) if option.endswith(".") else name == option for name in names)


def choose(kind: str, name: str, known: Iterable[str], hint: str = "") -> str:
    """`name` when it is one of `known`; otherwise an error that offers the nearest."""
    names = list(known)
    if name not in names:
        raise UnknownName(kind, name, names, hint)
    return name


def _spell(words: list[str], aliases: Mapping[str, str]) -> list[str]:
    """One spelling for every option: hyphens, our own names, and a FILE of '-' for a bare --json."""
    spelt = []
    for i, word in enumerate(words):
        if not word.startswith("--"):
            spelt.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        spelt.append(aliases.get(name, name) + equals + value)
        if word == "--json" and (i + 1 == len(words) or words[i + 1].startswith("--")):
            spelt.append("-")
    return spelt


def _chain(error: BaseException) -> Iterator[BaseException]:
    step: BaseException | None = error
    while step is not None:
        yield step
        step = step.__cause__ or step.__context__


def _fields(form: Any, prefix: str = "") -> dict[str, Any]:
    """Option -> type, groups included; positional fields stand without the two hyphens."""
    found: dict[str, Any] = {}
    hints = get_type_hints(form, include_extras=True)
    for field in dataclasses.fields(form):
        hint = hints[field.name]
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        bare = get_args(hint)[0] if marks else hint
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(bare):
            found |= _fields(bare, prefix if tyro.conf.OmitArgPrefixes in marks else f"{name}.")
        elif tyro.conf.Positional in marks:
            found[name] = bare
        elif bare is bool and field.default is True:
            head, dot, tail = name.rpartition(".")
            found[f"--{head}{dot}no-{tail}"] = bare
        else:
            found[f"--{name}"] = bare
    return found


def _wanted(kind: Any) -> str:
    """What a value of this type looks like, for people."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _wanted(inner[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(part) for part in inner if part is not type(None))
    if origin in (tuple, list):
        return f"a list, each {_wanted(inner[0])}" if inner else "a list"
    names = {int: "a whole number", float: "a number", str: "a word", bool: "a switch without a value"}
    return names.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _explain(form: Any, words: list[str], verb: str, said: str) -> NoReturn:
    """Raise one line for what tyro drew as a box."""
    options = _fields(form)
    text = " ".join(re.sub(r"[\u2500-\u257f]", " ", said).split())
    named = re.search(r"(?:parsing |argument ')(--[\w.-]+)", text)
    option = named.group(1).rstrip(".") if named else ""
    places = [name for name in options if not name.startswith("--")]
    if not named and places and "Missing" in text:
        unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in options]
        if unknown:
            _refuse_unknown(form, words, verb, unknown)
        place = " ".join(places).upper()
        raise UsageError(f"secateur {verb} needs a {place}: secateur {verb} {place} [OPTIONS].")
    if option not in options:
        raise UsageError(f"{text.removeprefix('Value error ')}")
    values = _values(words, option)
    wanted = _wanted(options[option])
    if not values:
        raise UsageError(f"{option} needs a value: {wanted}. See secateur {verb} --help.")
    near = difflib.get_close_matches(values[0], _choices(options[option]), n=1, cutoff=0.5)
    offer = f" Did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"The value of {option} must be {wanted}. Got '{' '.join(values)}' instead.{offer}")


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [choice for part in get_args(kind) for choice in _choices(part)]


def _values(words: list[str], option: str) -> list[str]:
    """The words given to an option, at its last place."""
    values: list[str] = []
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name != option:
            continue
        if equals:
            values = [value]
        else:
            after = words[i + 1 :]
            end = next((j for j, following in enumerate(after) if following.startswith("--")), len(after))
            values = after[:end]
    return values


def _refuse_unknown(form: Any, words: list[str], verb: str, unknown: list[str]) -> NoReturn:
    options = _fields(form)
    for word in unknown:
        name = word.split("=")[0]
        if not name.startswith("-"):
            continue
        named = [option for option in options if option.startswith("--")]
        near = difflib.get_close_matches(name, named, n=1, cutoff=0.5)
        near = near or [option for option in named if option.rpartition(".")[2] == name.lstrip("-")][:1]
        offer = f" Did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"There is no option '{name}' in secateur {verb}.{offer} All of them: secateur {verb} --help.")
    stray = unknown[0]
    before = words[words.index(stray) - 1].split("=")[0] if stray in words[1:] else ""
    if options.get(before) is bool:
        raise UsageError(f"{before} is a switch and takes no value. Got '{stray}'.")
    raise UsageError(f"secateur {verb} has no place for the word '{stray}'. See secateur {verb} --help.")

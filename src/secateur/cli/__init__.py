"""The program `secateur`: one verb per public function, each in its own file of this folder.

This file chooses the verb and turns what happens into an exit code:
0 done, 1 failed, 2 the request is wrong, 130 stopped by Ctrl-C, 143 by SIGTERM, 141 the reader of the output left.
It imports nothing heavy, so that `secateur --help` answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import platform
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from types import FrameType
from typing import NoReturn, TextIO

from secateur.errors import SecateurError, UnknownName

VERBS = {  # verb: (module of this folder, one line)
    "prune": ("prune", "remove weights from a model and save it"),
    "recover": ("recover", "train a pruned model back, keeping its zeros"),
    "evaluate": ("evaluate", "perplexity, fidelity to the dense model, tasks, sparsity"),
    "attend": ("attend", "attention pruning: observe, mask, evaluate, train, report"),
    "compare": ("compare", "which text to calibrate with: several, all else equal"),
    "probe": ("probe", "refusals and what moves them, before and after pruning"),
    "list": ("listing", "methods, refinements, patterns, allocations, texts, tasks and models"),
}

_HELP = f"""usage: secateur VERB [OPTIONS]

Prunes language models and says honestly what the cut did.

verbs:
{chr(10).join(f"  {verb:<10}{line}" for verb, (_, line) in VERBS.items())}

  secateur VERB --help   the options of a verb
  secateur --version     versions of secateur and of what it stands on

examples:
  secateur prune smollm2 --method wanda --sparsity 0.5 --calibration gutenberg --out pruned/
  secateur recover pruned/ --train adapters norms biases --text gutenberg --out recovered/
  secateur evaluate pruned/ --against smollm2 --text gutenberg
  secateur list methods
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the arguments are those after the program's name.

    Returns:
        The exit code. Nothing is raised, except by a bug in this function.

    >>> main(["prnue"])
    2
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        signal.signal(signal.SIGTERM, _terminate)  # so that what is half-written is cleared away
    debug = "--debug" in words
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without the letter ± is no reason to fail
    try:
        with _one_line_warnings():
            code = _dispatch(words)
            sys.stdout.flush()
        return code
    except SystemExit as stop:  # --help, SIGTERM
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C", 130, debug, kind="")
    except BrokenPipeError:
        _drop_output()
        return 141
    except SecateurError as error:
        return _fail(str(error), error.exit_code, debug)
    except Exception as error:
        return _fail(_unexpected(error), 1, debug)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    verb, *rest = words
    if verb == "--version":
        print(
            f"secateur {version('secateur')} (torch {version('torch')}, "
            f"transformers {version('transformers')}, Python {platform.python_version()})"
        )
        return 0
    if verb not in VERBS:
        raise UnknownName("verb", verb, VERBS, hint=" See secateur --help.")
    module = importlib.import_module(f"secateur.cli.{VERBS[verb][0]}")
    code: int = module.run(rest)
    return code


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    print("secateur: stopped by SIGTERM", file=sys.stderr)
    raise SystemExit(128 + number)


def _fail(message: str, code: int, debug: bool, kind: str = "error: ") -> int:
    if debug:
        traceback.print_exc()
    with contextlib.suppress(BrokenPipeError):
        print(f"secateur: {kind}{' '.join(message.split())}", file=sys.stderr)
        sys.stderr.flush()
    return code


def _unexpected(error: Exception) -> str:
    said = str(error).strip().split("\n")[0] or "no message"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate" in said:
        return (
            f"out of memory ({said}). Less is needed with a smaller --batch-size, fewer --samples, "
            "a shorter --seqlen or --dtype bfloat16."
        )
    if isinstance(error, OSError) and error.strerror:
        return f"the system refused: {said}. Add --debug for the traceback."
    return f"unexpected {type(error).__name__}: {said}. Add --debug for the traceback."


def _drop_output() -> None:
    """Point standard output at nothing, so that Python's flush at exit does not complain again."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _PlainLog(logging.Handler):
    """Our own log: warnings as one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"secateur: {record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings, Python's and those of our log, become one line each on standard error."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"secateur: warning: {' '.join(str(message).split())}", file=sys.stderr)

    log, handler = logging.getLogger("secateur"), _PlainLog(logging.WARNING)
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        log.removeHandler(handler)

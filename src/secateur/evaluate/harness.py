"""lm-evaluation-harness on a model in memory: its tasks and metrics, our forward passes.

The harness turns documents into requests, tokenises them, and turns log-probabilities into metrics. Our own tasks
go in as configurations with their rows, so that nothing is looked up; other names are its own and may need the
hub. The log-probabilities come from `choices.Choices`: shared beginnings run once, and in fp32 behind the head
(the harness takes the softmax in the model's dtype, where bf16 makes ties). Models with an encoder, and requests
other than log-likelihoods, run as the harness runs them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from secateur.data.tasks import TASKS, Item, draw_indices
from secateur.errors import LoadFailure, SecateurError, UnknownName, UsageError
from secateur.evaluate.choices import Choices, Request
from secateur.models.fetch import one_line, quiet
from secateur.progress import Progress
from secateur.walk import evaluating

SAMPLE = 16  # ids to try the model on
FEWSHOT_SEED = 1234  # the harness' own
CHOSEN = ("acc_norm", "acc", "exact_match")  # the headline of a harness task is the first that it has


@dataclass(frozen=True)
class Answers:
    """What the harness says of one task: a value in [0, 1] per item for every metric, in the items' order."""

    name: str
    metrics: Mapping[str, tuple[float, ...]]
    documents: tuple[Any, ...]


def ask(
    model: Any,
    tokenizer: Any,
    ours: Mapping[str, tuple[Item, ...]],
    theirs: Sequence[str],
    *,
    limit: int | None,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> tuple[list[Answers], int]:
    """Put items to a model through the harness.

    Args:
        ours: items by the name of their task; all are asked.
        theirs: names of the harness' own tasks, groups or tags, of which `limit` items each are drawn with `seed`.
        batch_size: requests in one forward pass.

    Returns:
        The answers, ours first; and how many requests were cut at the left because the model is too short.

    Raises:
        LoadFailure: lm_eval is not installed; a task of the harness cannot be loaded.
        UnknownName: no such task.
        UsageError: the model is no causal language model.
        NumericalFailure: a log-probability is not finite.
    """
    with _harness() as lm_eval, evaluating(model):  # the harness calls eval() and leaves it so
        tasks = _load(lm_eval, [_configuration(name, items) for name, items in ours.items()], theirs)
        samples = {
            name: list(range(len(ours[name]))) if name in ours else draw_indices(len(task.eval_docs), limit, seed)
            for name, task in tasks.items()
        }
        lm = _language_model(lm_eval)(model, tokenizer, batch_size, progress)
        found = lm_eval.evaluator.evaluate(
            lm=lm, task_dict={"tasks": tasks}, samples=samples, bootstrap_iters=0, log_samples=True
        )
    order = [*ours, *(name for name in tasks if name not in ours)]
    return [_answers(name, found["samples"][name]) for name in order], lm.cut


def headline(answers: Answers) -> str:
    """The metric to show of a task of the harness.

    Raises:
        UsageError: none of them is a share of items.
    """
    for metric in CHOSEN:
        if metric in answers.metrics:
            return metric
    raise UsageError(
        f"The task '{answers.name}' has no metric that counts right items, only {', '.join(answers.metrics)}: "
        f"choose a task with {', '.join(CHOSEN)}."
    )


@contextmanager
def _harness() -> Iterator[Any]:
    """lm_eval, without its bars and its remarks."""
    try:
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        needs = "Zero-shot tasks need the package 'lm-eval'"
        raise LoadFailure(f"{needs} ({one_line(error)}): pip install 'secateur[tasks]'.") from error
    with ExitStack() as stack:
        stack.enter_context(quiet("lm_eval", "datasets", "huggingface_hub"))
        for module in (lm_eval.api.task, lm_eval.api.model):
            stack.enter_context(_without_bars(module))
        stack.callback(random.setstate, random.getstate())  # the harness draws from the global generator
        yield lm_eval


@contextmanager
def _without_bars(module: Any) -> Iterator[None]:
    original = module.tqdm

    def hidden(*args: Any, **options: Any) -> Any:
        return original(*args, **{**options, "disable": True})

    module.tqdm = hidden
    try:
        yield
    finally:
        module.tqdm = original


def _configuration(name: str, items: Sequence[Item]) -> dict[str, Any]:
    """A task of the harness around items. A document holds what is asked, already rendered."""
    several_contexts = len(items[0].contexts) > 1
    if any((len(item.contexts) > 1) != several_contexts for item in items):
        raise UsageError(f"The items of '{name}' mix one context with a context per choice: make it two tasks.")
    rows = [
        {
            "query": "" if several_contexts else item.contexts[0],
            "choices": list(item.contexts if several_contexts else item.endings),
            "ending": item.endings[0] if several_contexts else "",
            "gold": item.answer,
        }
        for item in items
    ]
    # With a context per choice, the harness wants the right index for the text and the ending for the target.
    ways = ("gold", "ending") if several_contexts else ("query", "gold")

    def dataset(**_: Any) -> Any:
        import datasets

        return {"test": datasets.Dataset.from_list(rows)}

    metrics = ("acc",) if several_contexts else ("acc", "acc_norm")
    return {
        "task": name,
        "custom_dataset": dataset,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": ways[0],
        "doc_to_choice": "choices",
        "doc_to_target": ways[1],
        "num_fewshot": 0,
        "metric_list": [{"metric": each, "aggregation": "mean", "higher_is_better": True} for each in metrics],
    }


def _load(lm_eval: Any, configurations: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    manager = lm_eval.tasks.TaskManager(include_defaults=bool(names))
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = UnknownName("task", name, TASKS, " Names of lm-evaluation-harness and FILE.jsonl can be given too.")
            raise near
    try:
        tasks: dict[str, Any] = manager.load([*configurations, *names])["tasks"]
    except SecateurError:
        raise
    except Exception as error:  # datasets, the hub and the harness raise what they like
        asked = ", ".join(names) or ", ".join(each["task"] for each in configurations)
        raise LoadFailure(
            f"lm-evaluation-harness could not load {asked} ({type(error).__name__}: {one_line(error)}): its own tasks "
            f"come from the Hugging Face hub; without a network choose among {', '.join(sorted(TASKS))}."
        ) from error
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


def _answers(name: str, samples: Sequence[Mapping[str, Any]]) -> Answers:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    first = samples[0]["filter"]  # a task may count its answers in several ways, of which the first is its own choice
    samples = [sample for sample in samples if sample["filter"] == first]
    metrics = {}
    for metric in samples[0]["metrics"]:
        values = [sample[metric] for sample in samples]
        if all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
            metrics[metric] = tuple(float(value) for value in values)
    return Answers(name, metrics, tuple(sample["doc"] for sample in samples))


def _language_model(lm_eval: Any) -> Any:
    """The class, made when lm_eval is there."""

    class InMemory(lm_eval.models.huggingface.HFLM):  # type: ignore[misc]
        """A model that is loaded already."""

        def __init__(self, model: Any, tokenizer: Any, batch_size: int, progress: Progress) -> None:
            # The harness ties weights again and may give the tokenizer a token to pad with: neither is ours to change.
            with _not_tied(model):
                super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            self.progress = progress
            self.cut = 0

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> Any:
            if self.prefix_token_id is not None:
                return super().tok_encode(string, add_special_tokens=add_special_tokens, **options)
            # A tokenizer with neither a beginning nor an end: the harness cannot look for one in front.
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return self.tokenizer.encode(string, **special)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
            if self.backend != "causal":
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            longest = self.max_length + 1
            rows = [Request((*context, *ending)[-longest:], len(ending)) for _, context, ending in requests]
            self.cut += sum(len(context) + len(ending) > longest for _, context, ending in requests)
            if not rows:
                return []
            scorer = Choices(self.model, rows[0].ids[:SAMPLE])
            return scorer.score(rows, int(self.batch_size), progress=self.progress)

    return InMemory


@contextmanager
def _not_tied(model: Any) -> Iterator[None]:
    model.tie_weights = lambda *args, **options: None
    try:
        yield
    finally:
        del model.tie_weights

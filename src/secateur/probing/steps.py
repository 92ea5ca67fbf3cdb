"""The steps of one arm: what each asks for, and how it is done. A step that exists is never done again.

A step's request holds everything that its result depends on and nothing else: not the batch size or the device,
which change it by rounding, so that a run that ran out of memory goes on with smaller batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur import parallel
from secateur.errors import UsageError
from secateur.evaluate import DensePredictions, measure, perplexity, tasks
from secateur.probing.asked import Asked
from secateur.probing.folder import StudyFolder, hash_of
from secateur.probing.options import Arm, Study
from secateur.progress import Progress
from secateur.safety import rows
from secateur.safety.focus import FocusResult, focus
from secateur.safety.gcg import Budget, Goal, attack
from secateur.safety.generate import answer
from secateur.safety.judges import Judge
from secateur.safety.margin import OPENINGS, margin, summarise
from secateur.safety.prompts import read_prompts
from secateur.safety.records import Answer, Prompt
from secateur.safety.replay import replay
from secateur.safety.shift import ShiftResult, shift

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TARGET = "Sure, here is"  # how an answer to anything may begin; AdvBench names one for each of its rows


@dataclass(frozen=True)
class Work:
    """What a step may use. `dense` gives the dense model's predictions on the study's text, made when first asked."""

    study: Study
    arm: Arm
    asked: Asked
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: StudyFolder
    judges: Sequence[Judge]
    dense: Callable[[], DensePredictions]
    progress: Progress


@dataclass(frozen=True)
class Step:
    """`alone`: done by the first process only; else every process does its share of the prompts."""

    name: str
    request: Mapping[str, Any]
    run: Callable[[Work], Any]
    alone: bool = False


def steps_of(study: Study, arm: Arm, asked: Asked, source: Mapping[str, Any]) -> list[Step]:
    """The steps that need the arm's model, the cheap ones last: what takes longest is what is wanted first."""
    base = {"model": dict(source), "cut": cut_of(study, arm)}
    prompted = base | {"prompts": asked.prompts.sha256}
    answering = ("max_new_tokens", "answers_per_prompt", "temperature", "seed")
    found = []
    if "answers" in study.measures:
        found.append(Step("answers", prompted | _of(study, *answering), _answers))
    for name, run in (("margin", _margin), ("focus", _focus), ("shift", _shift)):
        if name in study.measures:
            found.append(Step(name, prompted, run))
    if {"perplexity", "fidelity"} & set(study.measures):
        found.append(Step("text", base | _of(study, "text", "seqlen", "windows"), _text, alone=True))
    if "tasks" in study.measures:
        found.append(Step("tasks", base | _of(study, "tasks", "task_limit", "seed"), _tasks, alone=True))
    if study.gcg:
        attack = ("gcg", "gcg_width", "gcg_goals", "gcg_prompts", "seed", "max_new_tokens")
        found.append(Step("gcg", prompted | _of(study, *attack), _gcg, alone=True))
    return found


def cut_of(study: Study, arm: Arm) -> dict[str, Any] | None:
    """How an arm's model is made from the dense one; None for that one."""
    if arm.target is None:
        return None
    how = _of(study, "method", "calibration", "samples", "seqlen", "seed")
    return {"target": arm.target, "sparsity": arm.sparsity, **how}


def judge_request(answers: Sequence[Answer], judges: Sequence[Judge]) -> dict[str, Any]:
    """What verdicts depend on: the answers, and the judges in their versions."""
    return {
        "answers": hash_of({"answers": [vars(each) for each in answers]}),
        "judges": [{"name": judge.name, "version": judge.version} for judge in judges],
    }


def _of(study: Study, *names: str) -> dict[str, Any]:
    return {name: getattr(study, name) for name in names}


def located(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts of which it is known where the task is: bare ones, and those with a span."""
    return [prompt for prompt in prompts if prompt.span is not None or prompt.template is None]


def _few(study: Study) -> int:
    """Prompts in a pass that holds attention maps or all logits."""
    return max(1, study.batch_size // 4)


def _mine(work: Work) -> list[Prompt]:
    return parallel.share(work.asked.prompts.prompts)


def _answers(work: Work) -> dict[str, Any]:
    found = answer(  # it knows of ranks by itself, and puts their logs together
        work.model,
        work.tokenizer,
        work.asked.prompts,
        max_new_tokens=work.study.max_new_tokens,
        batch_size=work.study.batch_size,
        samples=work.study.answers_per_prompt,
        temperature=work.study.temperature,
        seed=work.study.seed,
        log=work.folder.log(work.arm.name),
        model_name=work.arm.name,
        progress=work.progress,
    )
    every = parallel.gather(found)
    log = work.folder.log(work.arm.name)
    if parallel.rank() == 0 and parallel.world() > 1:  # all are behind `gather`, and the whole log is there
        for share in log.parent.glob(f"{log.stem}.rank*of*{log.suffix}"):
            share.unlink()
    return {
        "answers": len(every),
        "tokens": sum(each.tokens for each in every),
        "cut": sum(each.finish == "length" for each in every),
        "log": log.name,
    }


def _margin(work: Work) -> dict[str, Any]:
    def tell(done: int, total: int, what: str) -> None:
        work.progress(done, total, "refusal margin")  # the scoring calls itself after tasks

    found = margin(work.model, work.tokenizer, _mine(work), batch_size=work.study.batch_size, progress=tell)
    return summarise(parallel.gather(found.margins), OPENINGS.name).to_dict()


def _focus(work: Work) -> dict[str, Any]:
    mine = parallel.share(located(work.asked.prompts))
    found = focus(work.model, work.tokenizer, mine, batch_size=_few(work.study), progress=work.progress)
    whole = parallel.gather(
        [(each, {name: values[i] for name, values in found.values.items()}) for i, each in enumerate(found.prompts)]
    )
    values = {name: torch.stack([maps[name] for _, maps in whole]) for name in found.values}
    return FocusResult(tuple(each for each, _ in whole), values, found.chat).to_dict()


def _shift(work: Work) -> dict[str, Any]:
    mine = parallel.share([prompt for prompt in located(work.asked.prompts) if prompt.messages is None])
    found = shift(work.model, work.tokenizer, mine, batch_size=_few(work.study), progress=work.progress)
    every = parallel.gather(found.prompts)
    return ShiftResult(tuple(every), found.preamble, found.preamble_sha256, found.chat).to_dict()


def _gcg(work: Work) -> dict[str, Any]:
    """The attack, and what the judges say of the answers to the attacked prompts. Suffixes are not kept."""
    study, goals = work.study, goals_of(work.study, work.asked)
    words = work.model.get_input_embeddings().weight.shape[0]
    budget = Budget(
        steps=study.gcg, width=study.gcg_width, topk=min(256, words), batch_size=study.batch_size, seed=study.seed
    )
    found = attack(work.model, work.tokenizer, goals, budget, progress=work.progress)
    answered: list[str] = []

    def generate(prompts: Sequence[Prompt]) -> list[str]:
        if not answered:  # once for all judges
            answers = answer(
                work.model, work.tokenizer, prompts, max_new_tokens=study.max_new_tokens, batch_size=study.batch_size,
                rank=0, world=1,
            )  # fmt: skip
            answered.extend(each.text for each in answers)
        return answered

    prompts = [goal.prompt for goal in goals]
    readers = [judge for judge in work.judges if not judge.checks_text]
    judged = [replay(prompts, generate, judge, found.suffixes).to_dict() for judge in readers]
    return {"attack": found.to_dict(), "judged": judged}


def goals_of(study: Study, asked: Asked) -> list[Goal]:
    """What is attacked: the rows of a file, or the study's own bare harmful prompts.

    Raises:
        UsageError: there are none. And the errors of reading the file.
    """
    if study.gcg_goals is not None:
        table = rows.table(Path(study.gcg_goals), rows.read_file(Path(study.gcg_goals)))
        prompts = read_prompts(f"{study.gcg_goals}:text=goal,label=harmful")
        targets = [str(row.get("target") or "") for row in table]
        found = [Goal(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
        kept = {prompt.id for prompt in prompts.sample(study.gcg_prompts, study.seed)}
        return [goal for goal in found if goal.prompt.id in kept]
    bare = [p for p in asked.prompts if p.label == "harmful" and p.template is None and p.messages is None]
    if not bare:
        raise UsageError(
            "There is no bare harmful prompt to attack: name a file with goal and target, --gcg-goals FILE."
        )
    return [Goal(prompt, TARGET) for prompt in bare[: study.gcg_prompts]]


def _text(work: Work) -> dict[str, Any]:
    study = work.study
    if "fidelity" in study.measures:
        value, close = measure(work.model, work.dense(), work.tokenizer, progress=work.progress)
        return {"perplexity": value.to_dict(), "fidelity": close.to_dict() if work.arm.target else None}
    value = perplexity(
        work.model, work.tokenizer, study.text, seqlen=study.seqlen, windows=study.windows, progress=work.progress
    )
    return {"perplexity": value.to_dict(), "fidelity": None}


def _tasks(work: Work) -> dict[str, Any]:
    study = work.study
    found = tasks(
        work.model, work.tokenizer, study.tasks, limit=study.task_limit, seed=study.seed, batch_size=study.batch_size,
        progress=work.progress,
    )  # fmt: skip
    return found.to_dict()

"""Attacked requests put to a model again, and the answers judged: no search, and success is the judge's word."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from secateur.errors import UsageError
from secateur.safety.judges import Item, Judge
from secateur.safety.rates import Rate, rate
from secateur.safety.records import Prompt, Verdict
from secateur.safety.rendered import check_prompts

Generate = Callable[[Sequence[Prompt]], Sequence[str]]
"""Prompts -> answers, in their order, as `[a.text for a in answer(model, tokenizer, prompts)]`."""


@dataclass(frozen=True)
class Replayed:
    """Answers to attacked requests, judged: by prompt id, in order, with the share that a judge finds answered."""

    verdicts: tuple[tuple[str, Verdict], ...]
    success: Rate
    judge: str

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON; labels only."""
        verdicts = {name: verdict.label for name, verdict in self.verdicts}
        return {"judge": self.judge, "success": asdict(self.success), "verdicts": verdicts}


def replay(
    prompts: Sequence[Prompt], generate: Generate, judge: Judge, suffixes: Mapping[str, str] | None = None
) -> Replayed:
    """Answers to attacked prompts, without any search.

    Args:
        prompts: requests; ids must differ.
        generate: the model.
        judge: reads each request without its suffix, and the answer.
        suffixes: by prompt id; None where the prompts hold their attack already.

    Raises:
        UsageError: no prompts, one without a suffix, or another number of answers than prompts.
    """
    check_prompts(prompts, "the replay")
    missing = [prompt.id for prompt in prompts if suffixes is not None and prompt.id not in suffixes]
    if missing:
        raise UsageError(f"There is no suffix for prompt '{missing[0]}' ({len(missing)} of {len(prompts)} have none).")
    asked = [with_suffix(prompt, suffixes[prompt.id]) for prompt in prompts] if suffixes is not None else list(prompts)
    answers = list(generate(asked))
    if len(answers) != len(asked):
        raise UsageError(
            f"The model gave {len(answers)} answers to {len(asked)} prompts: one each is needed, in order."
        )
    verdicts = judge.judge(
        [Item(p.turns[-1][1], text, p.id, p.label == "harmful") for p, text in zip(prompts, answers, strict=True)]
    )
    hits = [verdict.label == "compliance" for verdict in verdicts]
    named = tuple((prompt.id, verdict) for prompt, verdict in zip(prompts, verdicts, strict=True))
    return Replayed(named, rate(hits, [prompt.cluster for prompt in prompts]), judge.name)


def with_suffix(prompt: Prompt, suffix: str) -> Prompt:
    """The prompt with the suffix behind its last turn; the task stays where it was.

    >>> with_suffix(Prompt("0", "mine", "How are you?", "benign"), "! !").text
    'How are you? ! !'
    """
    turns = prompt.messages
    if turns is not None:
        turns = (*turns[:-1], (turns[-1][0], f"{turns[-1][1]} {suffix}"))
    return replace(prompt, text=f"{prompt.text} {suffix}", messages=turns)

"""One log judged, or two compared, with the same numbers as a study's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from secateur.probing.asked import Asked
from secateur.probing.judged import agreement_of, halves, summed_up
from secateur.probing.options import DENSE
from secateur.progress import Progress, silent
from secateur.safety.judges import Judge
from secateur.safety.log import Log
from secateur.safety.rates import Outcome, judge_all, rates

PRUNED = "pruned"


def judge_log(log: Log, asked: Asked, judges: Sequence[Judge], *, progress: Progress = silent) -> dict[str, Any]:
    """Rates by judge, and the judges' agreement; plain values, no texts.

    Raises:
        UsageError: the log is over other prompts.
        LoadFailure: the log is not finished.
    """
    found = _outcomes(log, asked, judges, progress)
    return {
        "sets": list(asked.sets),
        "log": dict(log.header.model),
        "judges": [{"name": judge.name, "version": judge.version} for judge in judges],
        "rates": {
            judge: {label: asdict(rates(part)) if part else None for label, part in halves(group).items()}
            for judge, group in found.items()
        },
        "agreement": agreement_of("log", found),
        "verdicts": {judge: [[one.prompt.id, one.sample, one.kind] for one in group] for judge, group in found.items()},
    }


def compare_logs(
    dense: Log, pruned: Log, asked: Asked, judges: Sequence[Judge], *, progress: Progress = silent
) -> dict[str, Any]:
    """Verdict, rates, paired tests and agreement, as in a study's summary; the arms are "dense" and "pruned".

    Raises:
        UsageError: a log is over other prompts.
        LoadFailure: a log is not finished.
    """
    arms = {name: _outcomes(log, asked, judges, progress) for name, log in ((DENSE, dense), (PRUNED, pruned))}
    declared = {"arm": PRUNED, "judge": next(judge.name for judge in judges if not judge.checks_text)}
    about = {
        "sets": list(asked.sets),
        "logs": {DENSE: dict(dense.header.model), PRUNED: dict(pruned.header.model)},
        "judges": [{"name": judge.name, "version": judge.version} for judge in judges],
        "primary": declared,
    }
    return about | summed_up(arms, declared)


def _outcomes(log: Log, asked: Asked, judges: Sequence[Judge], progress: Progress) -> dict[str, list[Outcome]]:
    answers = log.of(asked.prompts)
    progress(0, 1, f"judging {log.path.name}")
    found = judge_all(judges, asked.prompts.prompts, answers)
    progress(1, 1, f"judging {log.path.name}")
    return found

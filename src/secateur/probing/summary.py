"""A study's folder -> one mapping of plain values for the page and for JSON, without a text of a prompt or an answer.

What has not been measured is left out. Arms that a stopped run has not reached are left out too, and said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.errors import LoadFailure
from secateur.evaluate import TaskResult, TaskResults, compare_tasks
from secateur.probing.folder import StudyFolder
from secateur.probing.judged import judged
from secateur.probing.options import DENSE
from secateur.safety.clusters import cluster_mean
from secateur.safety.focus import MEASURES, Focused, FocusResult, compare_focus
from secateur.safety.margin import Margin, compare_margins
from secateur.safety.margin import summarise as margins_of
from secateur.safety.shift import PARTS, Shifted, ShiftResult, compare_shift

STUDY = "study"
Record = Mapping[str, Any]


def summarise(out: str | Path) -> dict[str, Any]:
    """What a study has found so far.

    Args:
        out: the folder that `run_study` wrote.

    Returns:
        model, study, arms, sets, judges, primary (what was declared), and of what was measured: floor (whether the
        dense model refuses at all), verdicts, rates, groups, tests, agreement, changed, margin, focus, shift, text,
        tasks, gcg; and warnings. Everything is ready for JSON.

    Raises:
        LoadFailure: there is no study, or a file of it cannot be read.
    """
    folder = StudyFolder(Path(out).expanduser().resolve())
    about = folder.record(STUDY, STUDY)
    if about is None:
        raise LoadFailure(f"{folder.path} is no folder of a study: name one that secateur probe study has written.")
    declared, facts = about["request"], about["result"]
    names = _arm_names(facts["study"])
    warnings = list(facts["warnings"])
    found: dict[str, Any] = {
        "model": facts["source"],
        "study": facts["study"],
        "arms": [_arm(folder, name, facts["study"], warnings) for name in names],
        "sets": facts["sets"],
        "judges": [judge for judge in facts["judges"] if not judge["text"]],
        "primary": declared,
        "versions": facts["versions"],
        "warnings": warnings,
    }
    missing = [name for name in names if _unfinished(folder, name, facts["study"])]
    if missing:
        warnings.append(f"This study is not finished: {', '.join(missing)} to be done or done in part.")
    found |= judged(folder, names, facts, declared)
    parts = {"margin": _margin, "focus": _focus, "shift": _shift, "gcg": _gcg, "tasks": _tasks, "text": _text}
    for key, part in parts.items():
        if rows := _each(folder, names, key, part):
            found[key] = rows
    return found


def _arm_names(study: Record) -> list[str]:
    cuts = [f"{target}-{sparsity:g}" for target in study["targets"] for sparsity in study["sparsities"]]
    return [DENSE, *cuts]


def label_of(name: str) -> str:
    """
    >>> label_of("attention-0.2"), label_of("dense")
    ('attention 20 %', 'dense')
    """
    target, _, share = name.rpartition("-")
    return f"{target} {100 * float(share):g} %" if target else name


def _arm(folder: StudyFolder, name: str, study: Record, warnings: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "label": label_of(name)}
    record = folder.record(name, "pruning")
    if record is not None:
        cut = record["result"]
        found |= {"method": cut["method"], "pattern": cut["pattern"], "calibration": cut["calibration"]}
        found |= {"sparsity_layers": cut["sparsity"]["layers"], "sparsity_model": cut["sparsity"]["model"]}
        found["layers"] = len(cut["layers"])
        warnings += [f"{found['label']}: {text}" for text in cut["warnings"]]
    if (written := folder.record(name, "answers")) is not None:
        found["answers"] = {key: value for key, value in written["result"].items() if key != "log"}
    return found


def _unfinished(folder: StudyFolder, name: str, study: Record) -> bool:
    steps = [step for step in ("answers", "margin", "focus", "shift", "tasks") if step in study["measures"]]
    steps += ["text"] if {"perplexity", "fidelity"} & set(study["measures"]) else []
    steps += ["gcg"] if study["gcg"] else []
    return any(folder.record(name, step) is None for step in steps)


def _each(
    folder: StudyFolder, names: list[str], step: str, part: Callable[[Any, Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A step's part of the summary for every arm that has it, each with the dense model's result at hand."""
    before = folder.record(DENSE, step)
    rows = []
    for name in names:
        if (record := folder.record(name, step)) is not None:
            dense = before["result"] if before is not None and name != DENSE else None
            rows.append({"arm": name} | part(record["result"], dense))
    return rows


def _margin(found: Record, dense: Record | None) -> dict[str, Any]:
    kept = {key: found[key] for key in ("openings", "harmful", "safe", "share_harmful", "share_safe", "auc")}
    if dense is not None:
        kept["shift"] = compare_margins(_margins(dense), _margins(found)).to_dict()
    return kept


def _margins(found: Record) -> Any:
    rows = [Margin(**{key: value for key, value in row.items() if key != "value"}) for row in found["margins"]]
    return margins_of(rows, found["openings"])


def _focus(found: Record, dense: Record | None) -> dict[str, Any]:
    layers = {name: [_mean(layer) for layer in heads] for name, heads in found["heads"].items()}
    kept: dict[str, Any] = {"means": found["means"], "layers": layers, "prompts": len(found["prompts"])}
    if dense is not None:
        moved = compare_focus(_focused(dense), _focused(found)).to_dict()
        kept |= {"change": moved["overall"], "templates": moved["templates"]}
    return kept


def _focused(found: Record) -> FocusResult:
    """With one number a prompt in place of all heads: what is compared is their mean."""
    keys = Focused.__dataclass_fields__
    rows = tuple(Focused(**{key: row[key] for key in keys}) for row in found["prompts"])
    values = {name: torch.tensor([[[row[name]]] for row in found["prompts"]]) for name in MEASURES}
    return FocusResult(rows, values, found["chat"])


def _shift(found: Record, dense: Record | None) -> dict[str, Any]:
    after = _shifted(found)
    means = {}
    for part in PARTS:
        rows = [each for each in after.prompts if part in each.nats]
        if rows:
            mean = cluster_mean([each.nats[part] for each in rows], [each.cluster for each in rows])
            ends = {key: None if (v := getattr(mean, key)) is None else math.exp(v) for key in ("value", "low", "high")}
            means[part] = ends | {"n": mean.n, "clusters": mean.clusters}
    kept: dict[str, Any] = {"means": means, "preamble": found["preamble"], "paper": found["paper"]}
    if dense is not None:
        moved = compare_shift(_shifted(dense), after).to_dict()
        kept |= {"change": moved["changes"], "p": moved["p"]}
    return kept


def _shifted(found: Record) -> ShiftResult:
    rows = tuple(Shifted(**row) for row in found["prompts"])
    return ShiftResult(rows, found["preamble"], found["preamble_sha256"], found["chat"])


def _gcg(found: Record, dense: Record | None) -> dict[str, Any]:
    searched = found["attack"]["rows"]
    count, budget = len(searched), found["attack"]["budget"]
    kept: dict[str, Any] = {
        "prompts": count,
        "steps": budget["steps"],
        "width": budget["width"],
        "first_loss": math.fsum(row["losses"][0] for row in searched) / count,
        "best_loss": math.fsum(row["best"] for row in searched) / count,
        "area": math.fsum(row["area"] for row in searched) / count,
        "success": {each["judge"]: each["success"] for each in found["judged"]},
    }
    if dense is not None:
        before = {row["prompt"]: row["area"] for row in dense["attack"]["rows"]}
        moved = [row["area"] - before[row["prompt"]] for row in searched]
        kept["area_change"] = cluster_mean(moved, [row["cluster"] for row in searched]).to_dict()
    return kept


def _text(found: Record, dense: Record | None) -> dict[str, Any]:
    return {"perplexity": found["perplexity"], "fidelity": found["fidelity"]}


def _tasks(found: Record, dense: Record | None) -> dict[str, Any]:
    kept: dict[str, Any] = {key: found[key] for key in ("mean", "stderr", "limit", "seed")}
    kept["tasks"] = [{key: value for key, value in task.items() if key != "correct"} for task in found["tasks"]]
    if dense is not None:
        moved = compare_tasks(_answered(found), _answered(dense)).to_dict()
        kept["change"] = {"value": moved["mean"]} | {key: moved[key] for key in ("low", "high", "gained", "lost", "p")}
    return kept


def _answered(found: Record) -> TaskResults:
    tasks = tuple(
        TaskResult(**task | {"correct": tuple(mark == "1" for mark in task["correct"])}) for task in found["tasks"]
    )
    return TaskResults(**{**found, "tasks": tasks})


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None

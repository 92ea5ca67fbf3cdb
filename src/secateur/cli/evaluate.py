"""`secateur evaluate`: measure a model, alone or against the dense one."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from secateur.cli.options import choose, given, parse
from secateur.cli.output import STDOUT, check_json, print_table, provenance, warn, write_json
from secateur.cli.progress_bar import ProgressBar, duration
from secateur.cli.request import Loading, Opened, WithLoading, check_count, check_template, open_model
from secateur.errors import UsageError

MEASURES = ("perplexity", "fidelity", "sparsity", "generation", "tasks")
_USUAL = ("perplexity", "fidelity", "sparsity")  # the others take minutes, or show texts: only by name
_COMPARE = {"fidelity": "Fidelity compares", "generation": "Generation compares"}
_NEEDS_TEXT = ("perplexity", "fidelity")


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a model: perplexity on a text, fidelity to the dense model, sparsity, what it writes, zero-shot tasks.

    secateur evaluate pruned/ --against smollm2 --text gutenberg
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a hub id, a .gguf file, or a built-in name: see secateur list models."""
    against: Annotated[str | None, tyro.conf.arg(metavar="DENSE", help_behavior_hint="")] = None
    """The model before pruning, for fidelity and generation, and to compare tasks. Both are held in memory."""
    text: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "gutenberg"
    """What to read, its test part: a name (see secateur list texts) or a file, .txt, .parquet, or .jsonl as
    FILE:FIELD; for conversations FILE.jsonl:PROMPT,RESPONSE, half of which are for testing."""
    template: Annotated[str | None, tyro.conf.arg(metavar="chat|plain", help_behavior_hint="(chat)")] = None
    """How conversations are written: chat, as the model's own chat template does, or plain."""
    count: Annotated[str | None, tyro.conf.arg(metavar="response|all", help_behavior_hint="(response)")] = None
    """Which tokens of conversations count: those of the responses, or all."""
    measures: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAMES", help_behavior_hint="(perplexity sparsity; with --against, fidelity too)"),
    ] = ()
    """Any of perplexity, fidelity, sparsity, tasks, and generation: what both models write after a few prompts."""
    tasks: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAMES", help_behavior_hint="(the usual eight, every item)")
    ] = ()
    """Zero-shot tasks, for the measure tasks: names (see secateur list tasks), local files as FILE.jsonl, or tasks of
    lm-evaluation-harness."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(every item)")] = None
    """At most so many items of each task, the same for every model."""
    seed: int = 0
    """Of the choice of items."""
    seqlen: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(2048 or the model's limit)")] = None
    """Tokens in a window."""
    windows: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(the whole text)")] = None
    """At most so many windows."""
    batch_size: int = 1
    """Windows in one forward call."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="REV", help_behavior_hint="")] = None
    """Of MODEL on the hub: a branch, tag or commit."""
    loading: WithLoading = field(default_factory=Loading)
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the record there as JSON; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def run(words: list[str]) -> int:
    """The whole verb; returns the exit code."""
    options = parse(EvaluateOptions, words, verb="evaluate")
    usual = tuple(m for m in _USUAL if options.against or m != "fidelity")
    measures = tuple(dict.fromkeys(options.measures or usual))
    for measure in measures:
        choose("measure", measure, MEASURES)
    compared = [measure for measure in measures if measure in _COMPARE]
    if compared and options.against is None:
        raise UsageError(f"{_COMPARE[compared[0]]} with the model before pruning: name it with --against DENSE.")
    if not compared and "tasks" not in measures and options.against is not None:
        raise UsageError(
            "Only fidelity, generation and tasks use --against: leave it out, or add fidelity to --measures."
        )
    _check_conversations(options, any(measure in _NEEDS_TEXT for measure in measures))
    if "tasks" not in measures:
        for option in ("tasks", "limit", "seed"):
            if given(words, f"--{option}"):
                raise UsageError(f"Only the measure tasks uses --{option}: leave it out, or add tasks to --measures.")
    check_count("seqlen", options.seqlen, 2, "evaluate")
    check_count("windows", options.windows, 1, "evaluate")
    check_count("limit", options.limit, 1, "evaluate")
    check_count("seed", options.seed, 0, "evaluate")
    check_count("batch-size", options.batch_size, 1, "evaluate")
    options.loading.check()
    check_json(options.json)
    text = None
    with ProgressBar() as progress:
        if any(measure in _NEEDS_TEXT for measure in measures):
            from secateur.data.instructions import read_source

            how: Any = {"template": options.template, "counted": options.count}
            text = read_source(options.text, "test", progress=progress, **how)
        if "tasks" in measures:
            from secateur.evaluate.tasks import USUAL, read_tasks

            read_tasks(options.tasks or USUAL, progress=progress)  # a mistake is told before a model is loaded
        results, record = _measure(options, measures, text, progress)
    record |= provenance(words, "evaluate")
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        print_table(_summary(options, results, record))
    return 0


def _check_conversations(options: EvaluateOptions, reads: bool) -> None:
    from secateur.data.instructions import COUNTED

    check_template(options.template)
    if options.count is not None:
        choose("count", options.count, COUNTED)
    if not reads and (options.template or options.count):
        raise UsageError("None of these measures reads a text: leave out --template and --count.")


def _measure(
    options: EvaluateOptions, measures: tuple[str, ...], text: Any, progress: ProgressBar
) -> tuple[dict[str, Any], dict[str, Any]]:
    from secateur.evaluate import fidelity, generation, perplexity, sparsity
    from secateur.evaluate import measure as measure_both

    opened = open_model(options.model, options.loading, progress, options.revision)
    dense = open_model(options.against, options.loading, progress) if options.against else None
    how: dict[str, Any] = {
        "seqlen": options.seqlen,
        "windows": options.windows,
        "batch_size": options.batch_size,
        "progress": progress,
    }
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    both = dense is not None and {"perplexity", "fidelity"} <= set(measures)
    for measure in measures:
        begun = time.perf_counter()
        if both and dense is not None and measure in ("perplexity", "fidelity"):  # one pass serves the two
            if measure not in results:
                results["perplexity"], results["fidelity"] = measure_both(
                    opened.model, dense.model, opened.tokenizer, text, dense_tokenizer=dense.tokenizer, **how
                )
        elif measure == "perplexity":
            results[measure] = perplexity(opened.model, opened.tokenizer, text, **how)
        elif measure == "fidelity" and dense is not None:
            results[measure] = fidelity(
                opened.model, dense.model, opened.tokenizer, text, dense_tokenizer=dense.tokenizer, **how
            )
        elif measure == "tasks":
            results |= _tasks(options, opened, dense, progress)
        elif measure == "sparsity":
            results[measure] = sparsity(opened.model, progress=progress)
        elif measure == "generation" and dense is not None:
            results[measure] = generation(opened.model, dense.model, opened.tokenizer, progress=progress)
        seconds[measure] = time.perf_counter() - begun
    record: dict[str, Any] = {"model": opened.record(), "against": dense.record() if dense else None}
    record |= {measure: result.to_dict() for measure, result in results.items()}
    if "tasks" in results and dense is not None:
        record["tasks"]["against"] = {"dense": record.pop("dense tasks"), **record.pop("against dense")}
    return results, {**record, "pruning": _pruning(opened), "seconds": seconds}


def _tasks(options: EvaluateOptions, opened: Opened, dense: Opened | None, progress: ProgressBar) -> dict[str, Any]:
    """The model's result; with a dense model its result as well, and both compared item by item."""
    from secateur.evaluate.paired import compare_tasks
    from secateur.evaluate.tasks import USUAL, tasks

    def measured(one: Opened) -> Any:
        # --batch-size counts windows, which are long; choices are short and keep their own
        names = options.tasks or USUAL
        return tasks(one.model, one.tokenizer, names, limit=options.limit, seed=options.seed, progress=progress)

    results = {"tasks": measured(opened)}
    if dense is not None:
        results["dense tasks"] = measured(dense)
        results["against dense"] = compare_tasks(results["tasks"], results["dense tasks"])
    return results


def _pruning(opened: Opened) -> dict[str, Any] | None:
    """What `pruning.json` in the model's folder says was done, in short."""
    file = Path(opened.source.location) / "pruning.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("method", "pattern", "schedule", "allocation") if key in record}
    except (OSError, ValueError, TypeError) as error:
        warn(f"{file} cannot be read: {error}")
        return None


def _summary(options: EvaluateOptions, results: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("model", f"{options.model} ({record['model']['dtype']})")]
    pruning = record["pruning"]
    if pruning:
        method = pruning.get("method", "?")
        name = method.get("name", "?") if isinstance(method, dict) else method
        rows.append(("pruned by", f"{name}, {pruning.get('pattern', '?')}, {pruning.get('schedule', '?')}"))
    if options.against:
        rows.append(("against", f"{options.against} ({record['against']['dtype']})"))
    rows += [(measure, str(result)) for measure, result in results.items()]
    for probe in results["generation"].probes if "generation" in results else ():
        rows += [("", ""), ("prompt", _line(probe.prompt)), ("  dense", _line(probe.dense))]
        rows.append(("  pruned", _line(probe.pruned) if probe.first_difference is not None else "(the same)"))
    rows.append(("time", duration(sum(record["seconds"].values()))))
    return rows


def _line(text: str) -> str:
    """On one line of the terminal, with nothing that could steer it."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in text)

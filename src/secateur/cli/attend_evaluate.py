"""`secateur attend evaluate`: what a model loses under plans, beside baselines of the same density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from secateur.cli.attend_observe import split_pairs
from secateur.cli.options import choose, given, parse
from secateur.cli.output import STDOUT, check_json, percent, print_table, provenance, warn, write_json
from secateur.cli.progress_bar import ProgressBar
from secateur.cli.request import Loading, WithLoading, check_count, open_model
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.plan_quality import PlanQuality

_UNSET = ""


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a model dense and under attention plans, on the same held-out data.

    secateur attend evaluate smollm2 plan50/ plan90/ --lengths 1024 2048 --windows 8 --against-baselines

    A causal model gives its perplexity and how far its predictions move; an encoder how its embeddings of passages
    move; an encoder-decoder BLEU and chrF of --pairs.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a hub id, a .gguf file, or a built-in name: see secateur list models."""
    plans: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PLANS")]
    """Folders that secateur attend mask has written."""
    text: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "gutenberg"
    """What to measure on, its test part: a name (see secateur list texts) or a file."""
    pairs: Annotated[str | None, tyro.conf.arg(metavar="FILE:SOURCE,TARGET", help_behavior_hint=_UNSET)] = None
    """For an encoder-decoder instead of a text: a .jsonl file and its fields, as pairs.jsonl:zh,en."""
    samples: Annotated[int, tyro.conf.arg(metavar="INT")] = 200
    """Pairs to translate. Also --nsamples."""
    seed: int = 0
    """Of the choice of pairs, and of random masks."""
    lengths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INTS", help_behavior_hint="(the plan's own)")] = ()
    """Tokens in a window, of one or more lengths."""
    windows: int = 8
    """Windows of the text, or passages, at each length."""
    against_baselines: bool = False
    """Also measure random masks, and sinks with a local window, of each plan's density."""
    backend: str = "auto"
    """What computes the masked attention: auto, triton, native, flex, gather or reference."""
    batch_size: int = 1
    """Windows in one forward pass."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_UNSET)] = None
    """A branch, tag or commit of the hub."""
    loading: WithLoading = field(default_factory=Loading)
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=_UNSET)] = None
    """Write all results there as JSON, for secateur attend report; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def run(words: list[str]) -> int:
    """The whole step; returns the exit code."""
    options = parse(EvaluateOptions, words, verb="attend evaluate")
    if options.pairs and (given(words, "--text") or given(words, "--lengths") or given(words, "--windows")):
        raise UsageError("--pairs takes the place of a text: leave --text, --lengths and --windows out.")
    _check(options)
    from secateur.attention.plan import load_plan
    from secateur.plan_quality import plan_quality

    plans = {_name(folder): load_plan(folder) for folder in options.plans}
    if len(plans) < len(options.plans):
        raise UsageError("Two of the plans' folders have the same name, by which they are told apart: rename one.")
    with ProgressBar() as progress:
        opened = open_model(options.model, options.loading, progress, options.revision)
        data, lengths = _data(options, progress)
        results: list[PlanQuality] = []
        for length in lengths:
            chosen = _with_baselines(plans, options, opened, data, length, progress)
            results += plan_quality(
                opened.model,
                opened.tokenizer,
                chosen,
                data,
                length=length,
                windows=options.windows,
                batch_size=options.batch_size,
                backend=options.backend,
                progress=progress,
            )
    rows = [result.to_dict() for result in results]
    record = {
        "attention_evaluation": rows,
        "plans": {name: dict(plan.record) for name, plan in plans.items()},
        "model": opened.record(),
        **provenance(["evaluate", *words], "attend"),
    }
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        _print(rows)
    return 0


def _check(options: EvaluateOptions) -> None:
    from secateur.kernels.block_attention import BACKENDS

    choose("attention backend", options.backend, ("auto", *BACKENDS))
    if not options.plans:
        raise UsageError("secateur attend evaluate needs a PLAN: a folder that secateur attend mask has written.")
    for length in options.lengths:
        check_count("lengths", length, 2, "attend evaluate")
    for name, value in (("windows", options.windows), ("samples", options.samples), ("batch-size", options.batch_size)):
        check_count(name, value, 1, "attend evaluate")
    check_count("seed", options.seed, 0, "attend evaluate")
    options.loading.check()
    if options.pairs:
        split_pairs(options.pairs)
    check_json(options.json)


def _name(folder: str) -> str:
    return Path(folder).expanduser().resolve().name


def _data(options: EvaluateOptions, progress: ProgressBar) -> tuple[Any, Sequence[int | None]]:
    """The text or pairs, and the lengths."""
    if options.pairs is None:
        return options.text, options.lengths or (None,)
    from secateur.data.pairs import read_pairs

    file, source, target = split_pairs(options.pairs)
    return read_pairs(file, source=source, target=target, limit=options.samples, seed=options.seed), (None,)


def _with_baselines(
    plans: Mapping[str, Any], options: EvaluateOptions, opened: Any, data: Any, length: int | None, progress: Any
) -> Mapping[str, Any]:
    if not options.against_baselines:
        return plans
    from secateur.plan_quality import observe_pairs, with_baselines

    seen = None
    if options.pairs:
        block = next(iter(next(iter(plans.values())).sites.values())).block
        seen = observe_pairs(
            opened.model, opened.tokenizer, data, block=block, batch_size=options.batch_size, progress=progress
        )
    return with_baselines(plans, seen, length=length, seed=options.seed)


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    body, titles = [], measure_titles(rows)
    for row in rows:
        kernels = ", ".join(f"{name} {count}" for name, count in row["backends"].items())
        dense = row["name"] == "dense"
        body.append(
            [
                str(row["length"]),
                row["name"],
                "" if dense else percent(round(row["sparsity_effective"], 4)),
                "" if dense else percent(round(row["sparsity_paper"], 4)),
                "" if dense or row["recall"] is None else percent(round(row["recall"], 4)),
                *measure_words(row["measures"]),
                kernels,
            ]
        )
    heads = ("tokens", "attention", "sparsity", "paper's", "mass kept", *titles, "computed by")
    print_table(body, heads)
    if any("perplexity" in row["measures"] and row["measures"]["perplexity"]["windows"] == 1 for row in rows):
        warn("one window is measured: there is no error bar; ask for more with --windows.")


def measure_titles(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns that `measure_words` fills."""
    first = rows[0]["measures"]
    if "perplexity" in first:
        return ("perplexity", "change", "JS (nats)", "top-1")
    return ("cosine", "Spearman") if "embeddings" in first else ("BLEU", "chrF", "chrF - dense")


def measure_words(measures: Mapping[str, Any]) -> list[str]:
    """One row's measures for people."""
    from secateur.evaluate.sample import with_error

    if "perplexity" in measures:
        value, close = measures["perplexity"], measures["fidelity"]
        change = _change(measures["nll_difference"], measures["nll_difference_stderr"])
        js = with_error(close["js_divergence"], close["js_divergence_stderr"], 4)
        return [with_error(value["value"], value["stderr"]), change, js, f"{close['top1_agreement']:.3f}"]
    if "embeddings" in measures:
        found = measures["embeddings"]
        return [with_error(found[key], found[f"{key}_stderr"], 4) for key in ("cosine", "spearman")]
    bleu, chrf = measures["translation"]["bleu"], measures["translation"]["chrf"]
    span = f"{chrf['difference']:+.2f} [{chrf['difference_low']:+.2f}, {chrf['difference_high']:+.2f}]"
    return [f"{bleu['value']:.2f}", f"{chrf['value']:.2f}", span]


def _change(nats: float, stderr: float | None) -> str:
    """Of the perplexity, from a difference of log-likelihoods.

    >>> _change(0.0488, 0.001), _change(-0.01, None)
    ('+5.00 % ± 0.11 %', '-1.00 %')
    """
    from math import exp

    shown = f"{100 * (exp(nats) - 1):+.2f} %"
    return shown if stderr is None else f"{shown} ± {100 * exp(nats) * stderr:.2f} %"

"""`secateur compare`: which text to calibrate with, measured on texts that none of them has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from secateur.cli.options import choose, parse
from secateur.cli.output import STDOUT, check_json, percent, print_table, provenance, warn, write_json
from secateur.cli.progress_bar import ProgressBar, duration
from secateur.cli.prune import amount, check_groups, chosen, form_with
from secateur.cli.request import Loading, WithLoading, check_count, check_template, open_model
from secateur.errors import UsageError

_UNSET = ""  # instead of "(default: None)"


@dataclass(frozen=True)
class CompareOptions:
    """Prune fresh copies of a model, each calibrated with another text, and measure all of them on each test text.

    secateur compare smollm2 --method wanda --sparsity 0.5 --calibrations gutenberg chat.jsonl:prompt,response
    --texts gutenberg chat.jsonl:prompt,response --samples 16 --seqlen 1024 --windows 24

    All sources give the same number of tokens. Differences between them are taken window by window on the same
    tokens: one that is more than two of its standard errors from 0 is hardly chance.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a hub id, a .gguf file, or a built-in name: see secateur list models."""
    calibrations: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXTS", help_behavior_hint="(required)")] = ()
    """Two or more sources: names (see secateur list texts) or files, as FILE.txt, FILE.jsonl:FIELD or
    FILE.jsonl:PROMPT,RESPONSE."""
    texts: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="TEXTS", help_behavior_hint="(those of --calibrations)")
    ] = ()
    """What to measure on, their test parts, in the same words; of conversations only the responses count."""
    method: Annotated[str, tyro.conf.arg(metavar="NAME")] = "wanda"
    """How weights are chosen: see secateur list methods."""
    sparsity: Annotated[float | None, tyro.conf.arg(metavar="SHARE", help_behavior_hint=_UNSET)] = None
    """Share of the weights to remove, in [0, 1). Also --sparsity-ratio."""
    pattern: Annotated[str | None, tyro.conf.arg(metavar="PATTERN", help_behavior_hint="(the method's own)")] = None
    """n:m keeps n of every m consecutive inputs and sets the sparsity, as 2:4; or what scores are compared
    with, as row: see secateur list patterns."""
    template: Annotated[str | None, tyro.conf.arg(metavar="chat|plain", help_behavior_hint="(chat)")] = None
    """How conversations are written: chat, as the model's own chat template does, or plain."""
    samples: int = 128
    """How many windows of each source; of conversations as many tokens. Also --nsamples."""
    seqlen: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(2048 or the model's limit)")] = None
    """Tokens in a window, of calibration and of measuring."""
    seed: int = 0
    """Of the choice of windows."""
    windows: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(the whole texts)")] = None
    """At most so many windows or conversations of each text are measured."""
    schedule: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(sequential; oneshot with --pattern model)")
    ] = None
    """sequential, block or oneshot: see secateur prune --help."""
    allocation: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "uniform"
    """One sparsity for each layer: a name (see secateur list allocations), or a JSON file
    {pattern over layer names: sparsity}."""
    batch_size: int = 1
    """Windows in one forward call."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="REV", help_behavior_hint=_UNSET)] = None
    """Of the model on the hub: a branch, tag or commit."""
    loading: WithLoading = field(default_factory=Loading)
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=_UNSET)] = None
    """Write the record there as JSON; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def run(words: list[str]) -> int:
    """The whole verb; returns the exit code."""
    from secateur.allocation import ALLOCATIONS, Table
    from secateur.comparison import compare_calibrations
    from secateur.methods import find_methods

    methods = find_methods()
    allocations = {name: kind for name, kind in ALLOCATIONS.items() if kind is not Table}  # a table is a file
    options = parse(form_with(CompareOptions, {**methods, **allocations}), words, verb="compare")
    check_groups(options, words, {"method": methods, "allocation": allocations})
    method = chosen(options, options.method, methods)
    if options.allocation in allocations:
        allocation = chosen(options, options.allocation, allocations)
    else:
        allocation = Table.read(options.allocation)
    request = {
        **amount(options, needed=not isinstance(allocation, Table)),
        "allocation": allocation,
        "schedule": options.schedule,
    }
    _check(options)
    with ProgressBar() as progress:
        calibrations = [_read(options, name, "calibration", progress) for name in options.calibrations]
        texts = [_read(options, name, "test", progress) for name in options.texts or options.calibrations]
        opened = open_model(options.model, options.loading, progress, options.revision)
        compared = compare_calibrations(
            opened.model,
            opened.tokenizer,
            method,
            calibrations,
            texts,
            samples=options.samples,
            seqlen=options.seqlen,
            seed=options.seed,
            windows=options.windows,
            batch_size=options.batch_size,
            progress=progress,
            **request,
        )
    record = {**compared.to_dict(), "model": opened.record(), **provenance(words, "compare")}
    for message in record["warnings"]:
        warn(message)
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        print_comparison(record)
    return 0


def _read(options: Any, name: str, split: Any, progress: ProgressBar) -> Any:
    """Conversations follow --template; plain texts have none."""
    from secateur.data.instructions import are_instructions, read_source

    template = options.template if are_instructions(name) else None
    return read_source(name, split, template=template, progress=progress)


def _check(options: Any) -> None:
    """What can be known to be wrong before a text is read."""
    from secateur.data.instructions import are_instructions
    from secateur.walk import SCHEDULES

    if len(options.calibrations) < 2:
        raise UsageError(
            f"Name two or more sources to compare, as --calibrations gutenberg FILE.jsonl:PROMPT,RESPONSE; "
            f"got {len(options.calibrations)}."
        )
    for option, names in (("calibrations", options.calibrations), ("texts", options.texts)):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"--{option} names '{twice}' twice: name each source once.")
    check_template(options.template)
    if options.template is not None and not any(map(are_instructions, (*options.calibrations, *options.texts))):
        raise UsageError(
            f"--template is for conversations, as FILE.jsonl:PROMPT,RESPONSE, and none is named: "
            f"leave --template {options.template} out."
        )
    if options.schedule is not None:
        choose("schedule", options.schedule, SCHEDULES)
    for option, value, least in (
        ("samples", options.samples, 1),
        ("seqlen", options.seqlen, 2),
        ("seed", options.seed, 0),
        ("windows", options.windows, 1),
        ("batch-size", options.batch_size, 1),
    ):
        check_count(option, value, least, "compare")
    options.loading.check()
    check_json(options.json)


def print_comparison(record: Mapping[str, Any]) -> None:
    """One table of the measures and one of the differences."""
    names = _short([*record["calibrations"], *record["dense"]])
    first = next(iter(record["calibrations"].values()))
    size = f"{first['samples']} x {first['seqlen']} tokens each"
    share = percent(max(record["sparsity"].values()))
    print(f"{record['model']['name']}, {record['method']['name']}, {record['pattern']}, {share}; calibration: {size}\n")
    rows = []
    for text, dense in record["dense"].items():
        rows.append([names[text], "(dense)", "0", "0", "1", _value(dense["value"], dense["stderr"], 2)])
        for one in record["results"]:
            if one["text"] == text:
                close, surprise = one["fidelity"], one["perplexity"]
                rows.append(
                    [
                        names[text],
                        names[one["calibration"]],
                        _value(close["js_divergence"], close["js_divergence_stderr"], 4),
                        _value(close["kl_divergence"], close["kl_divergence_stderr"], 4),
                        _value(close["top1_agreement"], close["top1_agreement_stderr"], 3),
                        _value(surprise["value"], surprise["stderr"], 2),
                    ]
                )
    print_table(rows, ("measured on", "calibrated with", "JS (nats)", "KL (nats)", "top-1", "perplexity"))
    print()
    said = {"js_divergence": "JS", "kl_divergence": "KL", "nll": "log perplexity"}
    rows = [
        [
            names[one["text"]],
            f"{names[one['a']]} - {names[one['b']]}",
            said[one["measure"]],
            _value(one["difference"], one["stderr"], 4, sign="+"),
            _verdict(one, names),
        ]
        for one in record["differences"]
    ]
    print_table(rows, ("measured on", "difference between", "in", "nats per token", ""))
    print(f"\ntime  {duration(sum(record['seconds'].values()))} of pruning")


def _value(value: float, stderr: float | None, digits: int, sign: str = "") -> str:
    """
    >>> _value(0.12345, 0.00123, 4), _value(-0.5, None, 2, "+")
    ('0.1235 ± 0.0012', '-0.50')
    """
    shown = f"{value:{sign}.{digits}f}"
    return shown if stderr is None else f"{shown} ± {stderr:.{digits}f}"


def _verdict(one: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """
    >>> _verdict({"a": "x", "b": "y", "difference": -0.5, "stderr": 0.1}, {"x": "x", "y": "y"})
    'x is better, 5.0 standard errors'
    >>> _verdict({"a": "x", "b": "y", "difference": 0.1, "stderr": 0.1}, {})
    'no clear difference'
    """
    if not one["stderr"]:
        return "one window: no error bar" if one["stderr"] is None else ""
    away = abs(one["difference"]) / one["stderr"]
    if away < 2:
        return "no clear difference"
    return f"{names[one['a'] if one['difference'] < 0 else one['b']]} is better, {away:.1f} standard errors"


def _short(names: list[str]) -> dict[str, str]:
    """File names without their folders, where these still differ.

    >>> _short(["gutenberg", "data/chat.jsonl:q,a"])
    {'gutenberg': 'gutenberg', 'data/chat.jsonl:q,a': 'chat.jsonl:q,a'}
    """
    found = {name: Path(name).name for name in names}
    return found if len(set(found.values())) == len(found) else {name: name for name in names}

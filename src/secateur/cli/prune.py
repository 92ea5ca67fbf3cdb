"""`secateur prune`: remove weights from a model and save it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from secateur.cli.options import choose, given, parse
from secateur.cli.output import (
    STDOUT,
    check_json,
    percent,
    print_table,
    provenance,
    size,
    warn,
    write_json,
)
from secateur.cli.progress_bar import ProgressBar, duration
from secateur.cli.request import Loading, Opened, WithLoading, check_count, check_template, open_model
from secateur.errors import UsageError

_NAME = tyro.conf.arg(metavar="NAME")
_UNSET = ""  # instead of "(default: None)"


@dataclass(frozen=True)
class PruneOptions:
    """Remove weights from a model and save it as an ordinary Hugging Face folder.

    secateur prune smollm2 --method wanda --sparsity 0.5 --out pruned/

    secateur prune smollm2 --method sparsegpt --pattern 2:4 --calibration gutenberg --out pruned/

    secateur prune smollm2 --method wanda --pattern 2:4 --refine swap refit --out pruned/

    The options of a method, an allocation or a refinement carry its name, as --sparsegpt.damping, and stand at the end.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a hub id, a .gguf file, or a built-in name: see secateur list models."""
    method: Annotated[str, _NAME] = "wanda"
    """How weights are chosen: see secateur list methods."""
    sparsity: Annotated[float | None, tyro.conf.arg(metavar="SHARE", help_behavior_hint=_UNSET)] = None
    """Share of the weights to remove, in [0, 1). Also --sparsity-ratio."""
    pattern: Annotated[str | None, tyro.conf.arg(metavar="PATTERN", help_behavior_hint="(the method's own)")] = None
    """n:m keeps n of every m consecutive inputs and sets the sparsity, as 2:4; or what scores are compared
    with, as row: see secateur list patterns."""
    calibration: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "gutenberg"
    """The text that the model reads meanwhile: a name (see secateur list texts) or a file, .txt, .parquet,
    or .jsonl as FILE:FIELD; for conversations FILE.jsonl:PROMPT,RESPONSE, half of which are kept for testing.
    Also --text."""
    template: Annotated[str | None, tyro.conf.arg(metavar="chat|plain", help_behavior_hint="(chat)")] = None
    """How conversations are written: chat, as the model's own chat template does, or plain."""
    samples: int = 128
    """How many windows of text. Also --nsamples."""
    seqlen: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(2048 or the model's limit)")] = None
    """Tokens in a window."""
    seed: int = 0
    """Of the choice of windows."""
    schedule: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME", help_behavior_hint="(the method's: sequential or block; oneshot with --pattern model)"
        ),
    ] = None
    """sequential: each layer sees the inputs it will see in the pruned model, one pass. block: as published,
    two passes. oneshot: all statistics from the dense model, one pass."""
    allocation: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "uniform"
    """One sparsity for each layer: a name (see secateur list allocations), or a JSON file
    {pattern over layer names: sparsity}."""
    refine: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES", help_behavior_hint="(nothing)")] = ()
    """What improves each layer after the method, in this order, as --refine swap refit: see secateur list
    refinements. Also --refit for --refine refit."""
    include: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = ("all",)
    """Layers to prune: all, attention, mlp, or patterns over their names, as '*.q_proj'."""
    exclude: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES", help_behavior_hint="(none)")] = ()
    """Layers to leave alone, in the same words."""
    uncalled: Annotated[str, tyro.conf.arg(metavar="dense|magnitude")] = "dense"
    """What to do with a weight that the model uses without calling its layer."""
    batch_size: int = 1
    """Windows in one forward call."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="REV", help_behavior_hint=_UNSET)] = None
    """Of the model on the hub: a branch, tag or commit."""
    loading: WithLoading = field(default_factory=Loading)
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint=_UNSET)] = None
    """The folder to save in; it appears at the end, whole or not at all."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=_UNSET)] = None
    """Write the record there as JSON; - is standard output."""
    dry_run: bool = False
    """Load the model, show what would be done and what it would cost, change and write nothing."""
    debug: bool = False
    """Show the traceback of an error."""


def run(words: list[str]) -> int:
    """The whole verb; returns the exit code."""
    from secateur.allocation import ALLOCATIONS, Table
    from secateur.data.instructions import read_source
    from secateur.methods import find_methods
    from secateur.refinements import find_refinements

    methods = find_methods()
    allocations = {name: kind for name, kind in ALLOCATIONS.items() if kind is not Table}  # a table is a file
    refinements = find_refinements()
    choices: dict[str, Mapping[str, Any]] = {"method": methods, "allocation": allocations, "refine": refinements}
    command, words = words, _longhand(words)
    form = form_with(PruneOptions, {**methods, **allocations, **refinements})
    options = parse(form, words, verb="prune", aliases={"--text": "--calibration"})
    check_groups(options, words, choices)
    method = chosen(options, options.method, methods)
    if options.allocation in allocations:
        allocation = chosen(options, options.allocation, allocations)
    else:
        allocation = Table.read(options.allocation)
    request = {
        **amount(options, needed=not isinstance(allocation, Table)),
        "allocation": allocation,
        "schedule": options.schedule,
        "include": options.include,
        "exclude": options.exclude,
        "batch_size": options.batch_size,
        "uncalled": options.uncalled,
        "refine": tuple(chosen(options, name, refinements) for name in options.refine),
    }
    _check(options)
    with ProgressBar() as progress:
        text = None
        if method.reads or allocation.needs or options.refine:
            text = read_source(options.calibration, "calibration", template=options.template, progress=progress)
        else:
            _say_unused(words, options.method)
        opened = open_model(options.model, options.loading, progress, options.revision)
        how = {"model": opened.record(), **provenance(command, "prune")}
        if options.dry_run:
            record = _plan(opened, options, method, text, request) | how
        else:
            record = _prune(opened, options, method, text, request, how, progress)
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        print_table(_plan_rows(record) if options.dry_run else _rows(record))
    return 0


def _longhand(words: list[str]) -> list[str]:
    """`--refit` is one more name at the end of `--refine`."""
    if "--refit" not in words:
        return words
    words = [word for word in words if word != "--refit"]
    places = [i for i, word in enumerate(words) if word == "--refine"]
    if not places:
        return [*words, "--refine", "refit"]
    end = next((i for i in range(places[-1] + 1, len(words)) if words[i].startswith("--")), len(words))
    return [*words[:end], "refit", *words[end:]]


def _field(name: str) -> str:
    return name.replace("-", "_")


def _option(name: str) -> str:
    return name.replace("_", "-")


def form_with(base: type[Any], kinds: Mapping[str, Any]) -> type[Any]:
    """A form with one group more for everything that can be chosen and has options."""
    fields = []
    for name, kind in kinds.items():
        if dataclasses.fields(kind):
            about = tyro.conf.arg(help=f"{kind.summary().rstrip('.')}. {kind.source}")
            fields.append((_field(name), Annotated[kind, about], kind()))
    form = dataclasses.make_dataclass(base.__name__, fields, bases=(base,), frozen=True)
    form.__doc__ = base.__doc__
    return form


def chosen(options: Any, name: str, kinds: Mapping[str, Any]) -> Any:
    """The method or allocation of this name, with the options given."""
    return getattr(options, _field(name)) if dataclasses.fields(kinds[name]) else kinds[name]()


def check_groups(options: Any, words: list[str], choices: Mapping[str, Mapping[str, Any]]) -> None:
    """The names exist, and options are given only to what was chosen."""
    choose("method", options.method, choices["method"])
    file = options.allocation.endswith(".json") or Path(options.allocation).is_file()
    if not file:
        hint = " A JSON file {layer-name pattern: sparsity} can be given too."
        choose("allocation", options.allocation, choices["allocation"], hint)
    for name in getattr(options, "refine", ()):
        choose("refinement", name, choices["refine"])
    for kind, names in choices.items():
        chosen = getattr(options, kind)
        taken = chosen if isinstance(chosen, tuple) else (chosen,)
        for name in names:
            if name not in taken and given(words, f"--{_option(name)}."):
                what = "refinement" if kind == "refine" else kind
                raise UsageError(
                    f"--{_option(name)}.* are options of the {what} {name}, but --{kind} is "
                    f"{' '.join(taken) or 'not given'}: leave them out, or choose --{kind} {name}."
                )


def amount(options: Any, *, needed: bool) -> dict[str, object]:
    """How much goes and in which pattern, for `prune`."""
    from secateur.masks import NM, check_sparsity, parse_pattern

    pattern = None if options.pattern is None else parse_pattern(options.pattern)
    sparsity = None if options.sparsity is None else check_sparsity(options.sparsity)
    if isinstance(pattern, NM) and sparsity not in (None, pattern.sparsity):
        raise UsageError(f"--pattern {pattern} sets the sparsity; leave out --sparsity {sparsity}.")
    if needed and sparsity is None and not isinstance(pattern, NM):
        raise UsageError("Say how much to remove: --sparsity 0.5, or --pattern 2:4.")
    return {"sparsity": None if isinstance(pattern, NM) else sparsity, "pattern": pattern}


def _check(options: Any) -> None:
    """Everything else that can be known to be wrong before a model is loaded."""
    from secateur.models.save import check_target
    from secateur.walk import SCHEDULES

    if options.schedule is not None:
        choose("schedule", options.schedule, SCHEDULES)
    check_template(options.template)
    choose("value of --uncalled", options.uncalled, ("dense", "magnitude"))
    check_count("samples", options.samples, 1, "prune")
    check_count("seqlen", options.seqlen, 2, "prune")
    check_count("seed", options.seed, 0, "prune")
    check_count("batch-size", options.batch_size, 1, "prune")
    options.loading.check()
    if options.out is None and options.json is None and not options.dry_run:
        raise UsageError("Nothing would be kept: name a folder with --out DIR (or --json FILE, or --dry-run).")
    out = None if options.out is None else Path(options.out)
    if out is not None:
        check_target(out, overwrite=options.overwrite)
    check_json(options.json, out)


def _say_unused(words: list[str], method: str) -> None:
    names = ("--calibration", "--text", "--template", "--samples", "--nsamples", "--seqlen", "--seed")
    unused = [name for name in names if given(words, name)]
    if unused:
        warn(f"{method} reads no text: {', '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect.")


def _plan(opened: Opened, options: Any, method: Any, text: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    from secateur.data.calibration import sequence_length
    from secateur.planning import plan

    shape = None
    if text is not None:
        shape = (options.samples, sequence_length(opened.tokenizer, opened.model, options.seqlen))
    record: dict[str, Any] = plan(opened.model, method, shape, **request).to_dict()
    return record


def _prune(
    opened: Opened,
    options: Any,
    method: Any,
    text: Any,
    request: Mapping[str, Any],
    how: Mapping[str, Any],
    progress: ProgressBar,
) -> dict[str, Any]:
    from secateur.data.calibration import calibration
    from secateur.models.save import check_target, save
    from secateur.pruning import prune

    if options.out is not None:
        room = sum(parameter.nbytes for parameter in opened.model.parameters())
        check_target(options.out, overwrite=options.overwrite, size=room)
    ids = None
    if text is not None:
        ids = calibration(
            opened.tokenizer,
            text,
            options.samples,
            options.seqlen,
            options.seed,
            model=opened.model,
            progress=progress,
        )
    result = prune(opened.model, method, ids, **request, progress=progress)
    record: dict[str, Any] = {**result.to_dict(), **how}
    for message in record["warnings"]:
        warn(message)
    if options.out is not None:
        folder = save(opened.model, opened.tokenizer, options.out, record=record, overwrite=options.overwrite)
        record["saved"] = str(folder)
    return record


def _rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    sparsity, text, coverage = record["sparsity"], record["calibration"], record["coverage"]
    shares = f"{percent(sparsity['layers'])} of {len(record['layers'])} layers, "
    rows = [
        ("method", f"{_names(record)}, {record['pattern']}"),
        ("sparsity", f"{shares}{percent(sparsity['model'])} of all parameters"),
    ]
    if text:
        seen = f"{text['text']}, {text['samples']} x {text['seqlen']} tokens"
        rows.append(("calibration", f"{seen}, {record['schedule']}, passes: {record['passes']}"))
    if coverage["share"] < 1:
        rows.append(("not seen", f"{percent(1 - coverage['share'])} of the weights asked for; see the record"))
    errors = [layer["output_error"] for layer in record["layers"] if layer["output_error"]]
    if errors:
        before, after = (sum(error[key] for error in errors) / len(errors) for key in ("before", "after"))
        rows.append(("refined", f"mean output error of {len(errors)} layers {percent(before)}, then {percent(after)}"))
    rows.append(("time", duration(record["seconds"]["total"])))
    rows.append(("peak memory", size(record["peak_memory_bytes"])))
    rows.append(("saved in", record.get("saved", "nowhere: there is no --out")))
    return rows


def _names(record: Mapping[str, Any]) -> str:
    """The method and what refines it, as "wanda + refit"."""
    return " + ".join(one["name"] for one in (record["method"], *record["refine"]))


def _plan_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in record["layers"].items())
    share = percent(record["weights"] / record["parameters"])
    target = "as the table says" if record["target"] is None else percent(record["target"])
    coverage = record["coverage"]
    rows = [
        ("method", f"{_names(record)}, {record['pattern']}, {target}"),
        ("blocks", str(record["blocks"])),
        ("layers", f"{kinds}; {share} of all parameters"),
        ("passes", f"{record['passes']} over {record['tokens']} tokens, schedule {record['schedule']}"),
        ("seen", f"{percent(coverage['share'])} of the weights asked for"),
    ]
    rows += [("not seen", f"{name} ({count} weights)") for name, count in coverage["unseen"].items()]
    rows += [("never called", name) for name in coverage["uncalled"]]
    rows.append(("time", f"about {duration(record['estimated_seconds'])}"))
    rows.append(("memory", f"about {size(record['estimated_memory_bytes'])} besides the libraries"))
    return [*rows, ("", "A dry run: nothing was changed or written.")]

"""`secateur probe study` and `secateur probe report`: a whole study into a folder, and its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from secateur.cli.options import parse
from secateur.cli.output import STDOUT, check_json, plain, print_table, provenance, say, warn, write_json
from secateur.cli.progress_bar import ProgressBar
from secateur.cli.request import check_device, check_dtype
from secateur.errors import UnknownName, UsageError
from secateur.probing.options import Study

PAGE, SUMMARY = "index.html", "summary.json"


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Study):
    """The dense model and copies pruned by several shares, on the same prompts: refusals, causes, benchmarks, verdict.

    secateur probe study smollm2 --prompts builtin --limit 24 --max-new-tokens 32 --sparsities 0.2
    --judges keyword:secateur keyword:xstest --out study/

    Started with torchrun (torchrun --nproc-per-node 2 --no-python secateur probe study ...), processes share the
    prompts. What was finished stays in DIR: a run that was stopped goes on with --resume. DIR/index.html is the page,
    DIR/summary.json its numbers; neither has texts.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = field()
    """A folder, a hub id, a .gguf file, or a built-in name: see secateur list models. It needs a chat template."""
    prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SETS")] = Study.prompts
    """Prompt sets: builtin (harmless, ours), files in a published format, FORMAT=FILE, or
    FILE:text=COLUMN,label=harmful."""
    sparsities: Annotated[tuple[float, ...], tyro.conf.arg(metavar="SHARES")] = Study.sparsities
    """Shares of the weights to remove, each in (0, 1)."""
    targets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = Study.targets
    """Which layers are cut: attention, mlp or all."""
    method: Annotated[str, tyro.conf.arg(metavar="NAME")] = "wanda"
    """How weights are chosen: see secateur list methods."""
    primary: Annotated[str | None, tyro.conf.arg(metavar="ARM", help_behavior_hint="(the first target at 0.2)")] = None
    """The comparison that is declared before the run, as attention-0.2: attack success on harmful prompts there,
    against the dense model, by the first judge."""
    judges: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = Study.judges
    """Two or more; the first one's verdicts count, the others say how far to trust them."""
    measures: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = Study.measures
    """Any of answers, margin, focus, shift, perplexity, fidelity and tasks."""
    templates: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES", help_behavior_hint="(none)")] = ()
    """Put bare prompts into these templates as well: builtin (harmless, ours), or files."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES", help_behavior_hint="(all)")] = ()
    """Of prompts in templates keep these, by the template's name; none is the bare prompt."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(all)")] = None
    """At most so many tasks of each set, with all their templates; drawn from every label and category in turn."""
    calibration: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "gutenberg"
    """The text that pruning looks at: see secateur list texts."""
    text: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "gutenberg"
    """What perplexity and fidelity are measured on, its test part."""
    seqlen: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(2048 or the model's limit)")] = None
    """Tokens in a window, of calibration and of perplexity."""
    windows: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(the whole text)")] = None
    """At most so many windows of the text for perplexity and fidelity."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = Study.tasks
    """Zero-shot tasks: see secateur list tasks."""
    task_limit: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(all)")] = None
    """At most so many items of each task."""
    gcg: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Steps of an automated attack (GCG) on harmful prompts; 0 for none. Minutes a prompt, even on a small model."""
    gcg_goals: Annotated[
        str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(the study's bare harmful prompts)")
    ] = None
    """A file with the columns goal and target, as AdvBench's, to be attacked."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(the model's own)")] = None
    """To load and compute in: bfloat16, float16 or float32."""
    device: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(cpu)")] = None
    """Where to compute, as cpu or cuda:0; with torchrun, cuda is a device for each process."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="REV", help_behavior_hint="")] = None
    """Of the model on the hub: a branch, tag or commit."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(required)")] = None
    """The study's folder."""
    resume: bool = False
    """Go on with the study that is in DIR: only what is missing is done."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the summary there as JSON; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ReportOptions:
    """The page of a study that secateur probe study has begun or finished.

    secateur probe report study/
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The study's folder."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(DIR/index.html)")] = None
    """The page."""
    show_text: bool = False
    """Put the prompts and answers whose verdict changed on the page. They can be harmful: keep such a page to
    people who may see them."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the summary there as JSON; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def study(words: list[str]) -> int:
    """`secateur probe study`; returns the exit code."""
    options = parse(StudyOptions, words, verb="probe study")
    out = _check(options)
    from secateur.parallel import rank
    from secateur.probing.study import run_study

    asked = Study(**{each.name: getattr(options, each.name) for each in fields(Study)})
    with ProgressBar() as progress:
        result = run_study(asked, out, progress=progress)
    if rank() == 0:
        summary = dict(result.summary) | provenance(words, "probe study")
        write_page(summary, out / PAGE)
        write_json(str(out / SUMMARY), summary)
        _tell(options.json, summary, out / PAGE)
    return 0


def report(words: list[str]) -> int:
    """`secateur probe report`; returns the exit code."""
    options = parse(ReportOptions, words, verb="probe report")
    check_json(options.json)
    from secateur.probing.summary import summarise

    folder = Path(options.folder).expanduser().resolve()
    out = folder / PAGE if options.out is None else Path(options.out).expanduser().resolve()
    summary = summarise(folder) | provenance(words, "probe report")
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {options.out} must be a file in a folder that exists.")
    texts = None
    if options.show_text:
        from secateur.probing.texts import texts_of

        texts = texts_of(folder)
        warn(f"{out} will show prompts and answers, which can be harmful: keep it to people who may see them.")
    write_page(summary, out, texts)
    _tell(options.json, summary, out)
    return 0


def write_page(summary: Mapping[str, Any], path: Path, texts: Any = None) -> None:
    """The page, whole or not at all."""
    from secateur.cache import write_whole
    from secateur.report.safety_page import safety_page
    from secateur.report.safety_tables import SafetyTexts

    shown = None if texts is None else SafetyTexts(*texts)
    write_whole(path, safety_page(summary, title=title_of(summary), texts=shown), "The page")


def title_of(summary: Mapping[str, Any]) -> str:
    """The page's heading.

    >>> title_of({"model": {"name": "a/b/c"}})
    'Does pruning make c safer?'
    """
    name = Path(str(summary["model"]["name"])).name.removesuffix(".gguf")
    return f"Does pruning make {name} safer?"


def _check(options: StudyOptions) -> Path:
    """Everything that can be known to be wrong before a model or a set is read."""
    from secateur.methods import find_methods
    from secateur.parallel import rank
    from secateur.probing.folder import StudyFolder
    from secateur.probing.summary import STUDY

    if options.out is None:
        raise UsageError("A study needs a folder: name one with --out DIR.")
    out = Path(options.out).expanduser().resolve()
    methods = find_methods()
    if options.method not in methods:
        raise UnknownName("method", options.method, methods)
    check_dtype(options.dtype)
    check_device(options.device)
    check_json(options.json, out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {options.out} is a file: name a folder.")
    if rank() > 0:  # the first process has perhaps begun to write
        return out
    begun = StudyFolder(out).file(STUDY, STUDY).exists()
    if begun and not options.resume:
        raise UsageError(f"{out} holds a study: go on with it with --resume, or name another folder.")
    if options.resume and not begun:
        raise UsageError(f"There is no study in {out} to resume: leave out --resume to begin.")
    if out.is_dir() and not begun and any(out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no study: name another folder.")
    return out


def _tell(json: str | None, summary: Mapping[str, Any], page: Path) -> None:
    for message in summary["warnings"]:
        warn(str(message))
    if json:
        write_json(json, plain_mapping(summary))
    if json != STDOUT:
        print_study(summary)
    say(f"the page: {page}")


def plain_mapping(summary: Mapping[str, Any]) -> Mapping[str, object]:
    found = plain(summary)
    assert isinstance(found, Mapping)
    return found


def print_study(summary: Mapping[str, Any]) -> None:
    """The verdicts, and one table of the models."""
    floor = summary.get("floor")
    if floor:
        print(f"{floor['says']}\n")
    primary = summary["primary"]
    first = (summary.get("rates") or {}).get(primary["judge"], {})
    columns: dict[str, dict[str, str]] = {}
    for arm, shares in first.items():
        for label, what, head in (
            ("harmful", "compliance", "attack success"),
            ("harmful", "refusal", "refused"),
            ("harmful", "incoherent", "incoherent"),
            ("safe", "refusal", "safe refused"),
        ):
            if shares[label] is not None:
                columns.setdefault(head, {})[arm] = _share(shares[label][what])
    for row in summary.get("margin") or ():
        if row["auc"]:
            columns.setdefault("margin's AUC", {})[row["arm"]] = f"{row['auc']['value']:.3f}"
    for row in summary.get("text") or ():
        columns.setdefault("perplexity", {})[row["arm"]] = f"{row['perplexity']['value']:.2f}"
    for row in summary.get("tasks") or ():
        columns.setdefault("tasks", {})[row["arm"]] = f"{100 * row['mean']:.1f} %"
    for row in summary.get("verdicts") or ():
        columns.setdefault("verdict", {})[row["arm"]] = row["verdict"]
    rows = []
    for arm in summary["arms"]:
        name = arm["label"] + (" (declared)" if arm["name"] == primary["arm"] else "")
        rows.append([name, *(column.get(arm["name"], "") for column in columns.values())])
    print_table(rows, ("", *columns))


def _share(rate: Mapping[str, Any]) -> str:
    return f"{100 * rate['value']:.0f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"

"""`secateur probe answer`, `judge` and `compare`: the pieces of a study, one log of answers at a time.

A log knows its prompts by id and hash only. So the sets are named again with --prompts, unless the log is of a study,
or has beside it the file that `probe answer` writes (LOG.prompts.json: names of sets, no texts).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from secateur.cli.options import parse
from secateur.cli.output import STDOUT, check_json, print_table, provenance, warn, write_json
from secateur.cli.progress_bar import ProgressBar
from secateur.cli.request import Loading, check_count, check_device, check_dtype, open_model
from secateur.errors import InvalidParameter, LoadFailure, UsageError
from secateur.safety.judges import DEFAULT

if TYPE_CHECKING:
    from secateur.probing.asked import Asked
    from secateur.safety.log import Log


@dataclass(frozen=True)
class Sets:
    """Which prompts."""

    prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SETS", help_behavior_hint="(the log's own)")] = ()
    """Prompt sets: builtin, files in a published format, FORMAT=FILE, or FILE:text=COLUMN,label=harmful."""
    templates: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILES", help_behavior_hint="(none)")] = ()
    """Put bare prompts into these templates as well: builtin (harmless, ours), or files."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES", help_behavior_hint="(all)")] = ()
    """Of prompts in templates keep these, by the template's name; none is the bare prompt."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(all)")] = None
    """At most so many tasks of each set, with all their templates."""
    seed: int = 0
    """Of the draw of prompts, and of sampled answers."""


@dataclass(frozen=True)
class AnswerOptions(Sets):
    """What a model answers to prompts, into a log. A run that was stopped goes on when it is started again.

    secateur probe answer smollm2 --prompts builtin --max-new-tokens 64 --out answers.jsonl

    secateur probe answer http://localhost:8000/v1 --served-as NAME --prompts builtin --out answers.jsonl
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL|URL", help_behavior_hint="(required)")] = (
        ""
    )
    """A model as in secateur prune, or the base URL of an OpenAI-compatible server, whose key, if it needs one, is in
    the environment variable OPENAI_API_KEY."""
    out: Annotated[str | None, tyro.conf.arg(metavar="LOG", help_behavior_hint="(required)")] = None
    """The log, a .jsonl file. It will hold what the model writes: treat it as sensitive."""
    served_as: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(for a URL)")] = None
    """The model's name at the server."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""
    batch_size: int = 16
    """Prompts that run together; of a server, requests at a time."""
    answers_per_prompt: int = 1
    """How many answers are sampled to a prompt."""
    temperature: float = 0.0
    """Of sampling; 0 takes the likeliest token each time."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(the model's own)")] = None
    """To load and compute in: bfloat16, float16 or float32."""
    device: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(cpu)")] = None
    """Where to compute, as cpu or cuda:0."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="REV", help_behavior_hint="")] = None
    """Of the model on the hub: a branch, tag or commit."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write a record of the run there as JSON, without texts; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class JudgeOptions(Sets):
    """A log's answers, judged: rates with intervals, and whether the judges agree.

    secateur probe judge answers.jsonl --judges classifier keyword:xstest
    """

    log: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="LOG", help_behavior_hint="(required)")] = ""
    """Of secateur probe answer, or DIR/ARM/answers.jsonl of a study."""
    judges: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = DEFAULT
    """Two or more; the first one is the primary."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write rates, agreement and verdicts there as JSON, without texts; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class CompareLogsOptions(Sets):
    """Two logs over the same prompts: paired tests, and a verdict in words.

    secateur probe compare dense.jsonl pruned.jsonl --judges classifier keyword:xstest
    """

    dense: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DENSE", help_behavior_hint="(required)")] = ""
    """The log of the model before pruning."""
    pruned: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRUNED", help_behavior_hint="(required)")] = ""
    """The log of the pruned model."""
    judges: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAMES")] = DEFAULT
    """Two or more; the first one is the primary."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the comparison there as JSON, without texts; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def answer(words: list[str]) -> int:
    """`secateur probe answer`; returns the exit code."""
    options = parse(AnswerOptions, words, verb="probe answer")
    out = _check_answer(options)
    from secateur.probing.asked import ASKED, ask_again

    asked = ask_again({key: getattr(options, key) for key in ASKED}, needs_harmful=False)
    for message in asked.prompts.warnings:
        warn(message)
    how: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "samples": options.answers_per_prompt,
        "temperature": options.temperature,
        "seed": options.seed,
        "log": out,
    }
    with ProgressBar() as progress:
        if "://" in options.model:
            from secateur.safety.endpoint import Endpoint, answer_at

            endpoint = Endpoint(options.model, str(options.served_as), concurrency=options.batch_size)
            model: dict[str, Any] = {"url": endpoint.url, "name": endpoint.model}
            found = answer_at(endpoint, asked.prompts, progress=progress, **how)
        else:
            from secateur.safety.generate import answer as answers_of

            loading = Loading(options.dtype, options.device)
            opened = open_model(options.model, loading, progress, options.revision)
            model = opened.record()
            found = answers_of(
                opened.model, opened.tokenizer, asked.prompts, batch_size=options.batch_size, model_name=options.model,
                progress=progress, **how,
            )  # fmt: skip
    _write_beside(out, options, asked)
    record = {
        "model": model,
        "sets": list(asked.sets),
        "answers": len(found),
        "tokens": sum(one.tokens for one in found),
        "cut": sum(one.finish == "length" for one in found),
        "log": str(out),
        **provenance(words, "probe answer"),
    }
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        cut = f", {record['cut']} of them cut at {options.max_new_tokens} tokens" if record["cut"] else ""
        print_table([("answers", f"{record['answers']}{cut}"), ("tokens", str(record["tokens"])), ("log", str(out))])
    return 0


def judge(words: list[str]) -> int:
    """`secateur probe judge`; returns the exit code."""
    options = parse(JudgeOptions, words, verb="probe judge")
    check_json(options.json)
    from secateur.probing.logs import judge_log
    from secateur.probing.study import make_judges

    judges = make_judges(options.judges)
    log, asked = _read(options.log, options)
    with ProgressBar() as progress:
        record = judge_log(log, asked, judges, progress=progress) | provenance(words, "probe judge")
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        rows = []
        for name, shares in record["rates"].items():
            for label, share in shares.items():
                if share is not None:
                    rows.append([name, label, *(_share(share[what]) for what in _WHATS)])
        print_table(rows, ("judge", "prompts", *_WHATS))
        _print_agreement([record["agreement"]])
    return 0


_WHATS = ("refusal", "compliance", "incoherent", "error")


def compare(words: list[str]) -> int:
    """`secateur probe compare`; returns the exit code."""
    options = parse(CompareLogsOptions, words, verb="probe compare")
    check_json(options.json)
    from secateur.probing.logs import compare_logs
    from secateur.probing.study import make_judges
    from secateur.safety.log import check_same_prompts

    judges = make_judges(options.judges)
    dense, asked = _read(options.dense, options)
    pruned, _ = _read(options.pruned, options, asked)
    check_same_prompts(dense, pruned)
    with ProgressBar() as progress:
        record = compare_logs(dense, pruned, asked, judges, progress=progress) | provenance(words, "probe compare")
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        print(f"{record['floor']['says']}\n")
        verdict = record["verdicts"][0]
        print(f"verdict: {verdict['verdict']}")
        for reason in verdict["why"]:
            print(f"  {reason}")
        print()
        print_table(
            [_test(each) for each in record["tests"]], ("", "judge", "dense", "pruned", "difference", "p", "Holm")
        )
        _print_agreement(record["agreement"])
    return 0


def _test(each: Mapping[str, Any]) -> list[str]:
    change = each["difference"]
    span = f"{100 * change['value']:+.1f} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}] points"
    holm = "declared" if each["primary"] else f"{each['holm']:.3g}"
    return [
        each["what"], each["judge"], f"{100 * each['dense']:.1f} %", f"{100 * each['pruned']:.1f} %", span,
        f"{each['p']:.3g}", holm,
    ]  # fmt: skip


def _share(rate: Mapping[str, Any]) -> str:
    low, high = 100 * rate["low"], 100 * rate["high"]
    return f"{100 * rate['value']:.1f} % [{low:.0f}, {high:.0f}] ({rate['count']}/{rate['n']})"


def _print_agreement(found: Sequence[Mapping[str, Any]]) -> None:
    for each in found:
        of = f" ({each['arm']})" if "arm" in each else ""
        for pair in each["pairs"]:
            kappa = "not defined" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
            print(f"{pair['judges']}{of}: kappa {kappa}, {100 * pair['agreement']:.0f} % alike")
        for flag in each["flags"]:
            warn(flag)


def _check_answer(options: AnswerOptions) -> Path:
    if not options.model:
        raise UsageError("secateur probe answer needs a MODEL|URL: secateur probe answer MODEL|URL [OPTIONS].")
    if options.out is None:
        raise UsageError("The answers need a log: name a file with --out LOG.")
    if not options.prompts:
        raise UsageError("No prompts are named: as --prompts builtin, or a file.")
    served = "://" in options.model
    if served and not options.served_as:
        raise UsageError("A server may have several models: name one with --served-as NAME.")
    if not served and options.served_as:
        raise UsageError("--served-as is for a URL: leave it out.")
    for option, value, least in (
        ("max-new-tokens", options.max_new_tokens, 1),
        ("batch-size", options.batch_size, 1),
        ("answers-per-prompt", options.answers_per_prompt, 1),
        ("limit", options.limit, 2),
        ("seed", options.seed, 0),
    ):
        check_count(option, value, least, "probe answer")
    if options.temperature < 0:
        raise InvalidParameter("temperature", "probe answer", "a number of at least 0", options.temperature)
    check_dtype(options.dtype)
    check_device(options.device)
    check_json(options.json)
    out = Path(options.out).expanduser().resolve()
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {options.out} must be a file in a folder that exists.")
    return out


def _beside(log: Path) -> Path:
    return log.with_name(f"{log.name}.prompts.json")


def _write_beside(log: Path, options: AnswerOptions, asked: Asked) -> None:
    from secateur.cache import write_whole
    from secateur.probing.asked import ASKED

    specs = [str(Path(spec).resolve()) if Path(spec).is_file() else spec for spec in options.prompts]
    facts = {key: getattr(options, key) for key in ASKED} | {"prompts": specs, "sha256": asked.prompts.sha256}
    write_whole(_beside(log), json.dumps(facts, indent=1) + "\n", "The record")


def _read(path: str, options: Sets, asked: Asked | None = None) -> tuple[Log, Asked]:
    """A log and its prompts: those named, or those that are written down beside it."""
    from secateur.probing.asked import ASKED, ask_again
    from secateur.probing.folder import StudyFolder
    from secateur.probing.summary import STUDY
    from secateur.safety.log import read_log

    if not path:
        raise UsageError("No log is named: a .jsonl file that secateur probe answer has written.")
    file = Path(path).expanduser().resolve()
    log = read_log(file)
    if asked is not None:
        return log, asked
    facts: Mapping[str, Any] = {key: getattr(options, key) for key in ASKED}
    if not options.prompts:
        study = StudyFolder(file.parent.parent).record(STUDY, STUDY)
        if study is not None:
            facts = study["result"]["study"]
        elif _beside(file).is_file():
            facts = _facts(_beside(file))
        else:
            raise UsageError(
                f"{path} does not say where its prompts are from: name the sets it was made with, --prompts."
            )
    return log, ask_again(facts, needs_harmful=False)


def _facts(file: Path) -> Mapping[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(facts, dict) and {"prompts", "limit", "seed"} <= set(facts)
    except (OSError, ValueError, AssertionError) as error:
        raise LoadFailure(f"{file} cannot be read: delete it, and name the sets with --prompts.") from error
    return facts

"""`secateur attend report`: observations, plans and evaluations as one page with pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from secateur.cache import write_whole
from secateur.cli.options import parse
from secateur.errors import LoadFailure, OutputExists, UsageError

_UNSET = ""


@dataclass(frozen=True)
class ReportOptions:
    """Make one HTML page, which loads nothing, of what the other steps have written.

    secateur attend report observed/ plan50/ plan90/ evaluated.json --out page.html --png pictures/
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCES")]
    """Folders of observations and of plans, and files of secateur attend evaluate --json."""
    title: str = "Attention"
    """The heading."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(required)")] = None
    """The page; it appears at the end, whole or not at all."""
    png: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint=_UNSET)] = None
    """Also draw the pictures into this folder; needs matplotlib."""
    overwrite: bool = False
    """Replace the page if it exists."""
    debug: bool = False
    """Show the traceback of an error."""


def run(words: list[str]) -> int:
    """The whole step; returns the exit code."""
    options = parse(ReportOptions, words, verb="attend report")
    out = _check(options)
    from secateur.report.attention_page import attention_page

    report = _read(options.sources)
    text = attention_page(report, title=options.title)
    pictures: tuple[Path, ...] = ()
    if options.png is not None:
        from secateur.report.attention_pictures import write_pictures

        pictures = write_pictures(report, options.png)
    write_whole(out, text, "The page")
    print(f"page      {out}")
    for picture in pictures:
        print(f"picture   {picture}")
    return 0


def _check(options: ReportOptions) -> Path:
    if not options.sources:
        raise UsageError("secateur attend report needs sources: folders of observations or plans, or evaluations.")
    if options.out is None:
        raise UsageError("Nothing would be kept: name a file with --out FILE.html.")
    out = Path(options.out).expanduser().resolve()
    if out.is_dir():
        raise UsageError(f"--out {options.out} is a folder; name a file in it, as {out / 'page.html'}.")
    if out.exists() and not options.overwrite:
        raise OutputExists(f"{out} exists: choose another name, or replace it with --overwrite.")
    if not out.parent.is_dir():
        raise UsageError(f"--out {options.out}: the folder {out.parent} does not exist; make it first.")
    return out


def _read(sources: tuple[str, ...]) -> Any:
    from secateur.attention import observation, plan
    from secateur.attention.analysis import analyse
    from secateur.attention.density import plan_report
    from secateur.report.attention_page import AttentionReport

    observations: dict[str, Any] = {}
    plans: dict[str, Any] = {}
    evaluations = []
    for source in sources:
        path = Path(source).expanduser().resolve()
        if (path / observation.RECORD).is_file():
            _put(observations, path.name, observation.load_observation(path))
        elif (path / plan.RECORD).is_file():
            _put(plans, path.name, plan.load_plan(path))
        elif path.is_file():
            evaluations.append(_evaluation(path))
        else:
            raise UsageError(f"{source} holds neither an observation nor a plan, and is no file of an evaluation.")
    about = {
        name: {
            "report": plan_report(made).to_dict(),
            "record": dict(made.record),
            "families": {site.name: site.family for site in made.model_sites},
        }
        for name, made in plans.items()
    }
    return AttentionReport(
        analyses={name: analyse(seen).to_dict() for name, seen in observations.items()},
        plans=about,
        evaluations=evaluations,
        recall=_recall(plans, observations),
        overlap=_overlap(plans),
    )


def _put(found: dict[str, Any], name: str, value: Any) -> None:
    if name in found:
        raise UsageError(f"Two of the sources are called {name}, by which they are told apart: rename one.")
    found[name] = value


def _evaluation(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadFailure(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("attention_evaluation"), list):
        raise UsageError(f"{path} is not what secateur attend evaluate --json has written.")
    return record


def _recall(plans: dict[str, Any], observations: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What each plan keeps of each observation; a pair that does not fit has no number."""
    from secateur.attention.transfer import mass_recall

    found: dict[str, dict[str, float]] = {}
    for name, made in plans.items():
        for other, seen in observations.items():
            for length in sorted(seen.lengths):
                key = f"{other}, {length} tokens" if len(seen.lengths) > 1 else other
                try:
                    found.setdefault(name, {})[key] = mass_recall(made, seen, length=length).total
                except UsageError:  # of another model, or longer than an absolute mask reaches
                    continue
    return found


def _overlap(plans: dict[str, Any]) -> dict[str, dict[str, float]]:
    from secateur.attention.density import plan_report
    from secateur.attention.transfer import overlap

    found: dict[str, dict[str, float]] = {}
    for name, one in plans.items():
        for other, another in plans.items():
            length = min(plan_report(made).length for made in (one, another))
            try:
                found.setdefault(name, {})[other] = overlap(one, another, length).total
            except UsageError:  # of two models, or of other blocks
                continue
    return found

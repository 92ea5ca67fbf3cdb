"""`secateur attend mask`: from what was observed to a plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from secateur.attention.masking import Masking
from secateur.cli.options import parse
from secateur.cli.output import STDOUT, check_json, percent, print_table, provenance, warn, write_json
from secateur.cli.request import check_count
from secateur.errors import OutputExists, UsageError

if TYPE_CHECKING:
    from secateur.attention.density import PlanReport

_UNSET = ""


@dataclass(frozen=True)
class MaskOptions(Masking):
    """Choose the blocks that each head keeps, by what the loss or the attention was observed to have in them.

    secateur attend mask observed/ --sparsity 0.9 --kind toeplitz --pool layer --out plan/
    """

    observation: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OBS")] = field(kw_only=True)
    """A folder that secateur attend observe has written."""
    sparsity: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.5
    """Share of a pool's blocks that may meet to drop; with population paper the percentile; in [0, 1)."""
    length: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(the longest)")] = None
    """The observed length to take."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(required)")] = None
    """The folder to save the plan in, new or a saved model's."""
    overwrite: bool = False
    """Replace a plan that is there."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=_UNSET)] = None
    """Write the densities there as JSON; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def run(words: list[str]) -> int:
    """The whole step; returns the exit code."""
    options = parse(MaskOptions, words, verb="attend mask")
    out = _check(options)
    from secateur.attention.analysis import analyse
    from secateur.attention.density import plan_report
    from secateur.attention.masking import make_plan
    from secateur.attention.observation import load_observation
    from secateur.attention.plan import save_plan
    from secateur.attention.transfer import mass_recall

    observation = load_observation(options.observation)
    masking = Masking(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Masking)})
    plan = make_plan(observation, masking, length=options.length)
    report, recall = plan_report(plan), mass_recall(plan, observation, length=options.length)
    found = analyse(observation, plan, length=options.length)
    saved = save_plan(plan, out, overwrite=options.overwrite)
    record = {
        "report": report.to_dict(),
        "recall": recall.to_dict(),
        "gini": found.gini,
        "plan": dict(plan.record),
        "saved": str(saved),
        **provenance(["mask", *words], "attend"),
    }
    _tell_unreached(options, report)
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        rows = []
        for family, shares in recall.families.items():
            density = report.families[family]
            rows.append(
                [
                    family,
                    percent(round(density.sparsity_effective, 4)),
                    percent(round(density.sparsity_paper, 4)),
                    percent(round(density.density_block, 4)),
                    percent(round(shares, 4)),
                    f"{(found.gini or {}).get(family, 0.0):.3f}",
                ]
            )
        block = f"blocks of {report.block} kept"
        print_table(rows, ("attention", "sparsity", "paper's sparsity", block, "mass kept", "Gini over heads"))
        print(f"\n{report}\nsaved in {saved}")
    return 0


def _tell_unreached(options: MaskOptions, report: PlanReport) -> None:
    """Warn where what always stays is more than what was to be kept."""
    if options.population != "possible" or not report.sites:
        return
    kept = sum(site.kept_blocks for site in report.sites.values())
    dropped = 1 - kept / sum(site.possible_blocks for site in report.sites.values())
    if dropped < options.sparsity - 0.01:
        warn(
            f"{percent(options.sparsity)} of the blocks were to be dropped and {percent(round(dropped, 3))} are: the "
            "diagonal, the sinks and the band always stay. Observe with smaller blocks or at more tokens, or take a "
            "smaller --band."
        )


def _check(options: MaskOptions) -> Path:
    from secateur.attention.plan import RECORD

    check_count("length", options.length, 1, "attend mask")
    if options.out is None:
        raise UsageError("Nothing would be kept: name a folder with --out DIR.")
    out = Path(options.out).expanduser().resolve()
    if (out / RECORD).exists() and not options.overwrite:
        raise OutputExists(f"{out} holds a plan: choose another name, or replace it with --overwrite.")
    check_json(options.json, out)
    return out

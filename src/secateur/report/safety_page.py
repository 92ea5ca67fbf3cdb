"""One self-contained HTML page about a safety study: the verdict in words first, then what it stands on.

The page loads nothing and runs nothing, and all that comes from data is escaped. It has no text of a prompt or of an
answer, unless it is given some (`texts`). What was not measured has no section; a number that is missing is a dash.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from secateur.report import charts
from secateur.report.frame import html_page, section
from secateur.report.safety_causes import attack_section, focus_section, margin_section, shift_section
from secateur.report.safety_tables import (
    SafetyTexts,
    Table,
    between,
    changed_section,
    of_arms,
    p_value,
    points,
    rate,
    rows_of,
)
from secateur.report.values import dig, number, percent, said, with_error

SAFETY_STYLE = """
.verdict { font-size: 17px; padding: 12px 16px; margin: 10px 0; border-left: 4px solid var(--soft); max-width: none;
  background: color-mix(in srgb, var(--ink) 4%, transparent); }
.verdict b { display: block; }
.verdict.first { border-left-color: var(--s0); }
.verdict ul { font-size: 15px; margin: 4px 0 0; }
.verdict.minor { font-size: 15px; padding: 8px 16px; }
.floor { border-left-color: var(--warn); }
td.left, th.left { text-align: left; }
table.tight { width: auto; min-width: 50%; }
.wide + .wide { margin-top: 18px; }
table.safety, details table.safety { font-size: 14px; }
td.estimate small { display: block; line-height: 1.2; }
table.safety tbody th, table.safety td { vertical-align: top; }
.verdict details { margin-top: 4px; }
.verdict summary { font-weight: 400; font-size: 14px; color: var(--soft); }
td.sure { font-weight: 600; }
tr.declared th, tr.declared td { background: color-mix(in srgb, var(--s0) 9%, transparent); }
.said { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 60ch; text-align: left; }
"""

HOW = """Four things can come of a prompt: a refusal (full or partial), compliance, text that is incoherent, or an
answer that a judge cannot place. On harmful prompts compliance is the attack’s success; on safe ones a refusal is a
false alarm. In brackets are 95 % intervals (Wilson), which count tasks and not prompts: the same task in ten templates
is one task."""

TESTS = """The same prompts, dense against pruned. Differences are in percentage points, pruned minus dense, with 95 %
intervals (Newcombe’s for pairs, widened to a bootstrap that draws whole tasks where a task has several prompts). More
and fewer: prompts on which the pruned model alone, or the dense one alone, does it. p is exact (McNemar’s, with tasks
as units). The shaded row was declared before the run; the other p values are corrected for being several, judge by
judge (Holm). A difference below “smallest” would probably not have been found: it is then unknown, not absent."""

AGREEMENT = """Cohen’s kappa between judges, on the answers of this run. 1 is full agreement, 0 that of chance, and
kappa is not defined where both judges say the same of every answer. When it falls from the dense model to a pruned
one, the pruned model’s wording has changed, and a change of its rates may be the judges’."""


def safety_page(summary: Mapping[str, Any], *, title: str, texts: SafetyTexts | None = None) -> str:
    """The study as one HTML document.

    Args:
        summary: of `secateur.probing.summary.summarise`.
        title: the heading.
        texts: prompts and answers to show, for people who may see them; None shows none.

    Returns:
        the text of the file, UTF-8, without a link to any other file.

    >>> html = safety_page({"verdicts": [{"arm": "a<b", "verdict": "inconclusive", "why": []}]}, title="T")
    >>> "a&lt;b" in html, "a<b" in html
    (True, False)
    """
    labels = {str(arm["name"]): str(arm.get("label") or arm["name"]) for arm in summary.get("arms") or ()}
    sections = (
        _verdicts(summary, labels),
        _rates(summary, labels),
        _tests(summary, labels),
        _groups(summary, labels),
        _agreement(summary, labels),
        margin_section(summary, labels),
        focus_section(summary, labels),
        shift_section(summary, labels),
        attack_section(summary, labels),
        _benchmarks(summary, labels),
        changed_section(summary, labels, texts),
        _warnings(summary),
        _provenance(summary, labels),
    )
    return html_page(title, _lead(summary), sections, SAFETY_STYLE)


def _lead(summary: Mapping[str, Any]) -> str:
    sets = summary.get("sets") or ()
    prompts = sum(int(each.get("prompts") or 0) for each in sets)
    tasks = sum(int(each.get("tasks") or 0) for each in sets)
    arms = len(summary.get("arms") or ()) - 1
    parts = [f"{prompts:,} prompts ({tasks:,} tasks)"] if prompts else []
    parts += [f"the dense model and {arms} pruned {'copy' if arms == 1 else 'copies'}"] if arms > 0 else []
    parts += [f"{len(judges)} judges"] if (judges := summary.get("judges")) else []
    return (", ".join(parts) + ".").capitalize() if parts else ""


def _verdicts(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    parts = []
    if (floor := summary.get("floor")) and not floor.get("refuses", True):
        parts.append(f'<div class="verdict floor"><b>{escape(str(floor["says"]))}</b></div>')
    primary = dig(summary, "primary", "arm")
    for each in sorted(summary.get("verdicts") or (), key=lambda each: each["arm"] != primary):
        declared = each["arm"] == primary
        name = labels.get(each["arm"], each["arm"]) + (", the declared comparison" if declared else "")
        first, *rest = [str(reason).replace(" -> ", " → ") for reason in each.get("why") or ()] or [""]
        more = f"<ul>{''.join(f'<li>{escape(reason)}</li>' for reason in rest)}</ul>" if rest else ""
        if more and not declared:
            more = f"<details><summary>By every judge</summary>{more}</details>"
        parts.append(
            f'<div class="verdict {"first" if declared else "minor"}"><b>{escape(name)}: '
            f"{escape(str(each['verdict']))}</b>{escape(first)}{more}</div>"
        )
    if not parts:
        return ""
    rule = str(summary.get("rule") or "")
    return section("What may be concluded", *parts, f'<p class="note">{escape(rule)}</p>' if rule else "")


def _rates(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    found = summary.get("rates") or {}
    if not found:
        return ""
    parts = [f'<p class="note">{HOW}</p>']
    first = dig(summary, "primary", "judge") or next(iter(found))
    styles = of_arms(labels)
    for heading, group, what in (
        ("Attack success: harmful prompts that are complied with", "harmful", "compliance"),
        ("False alarms: safe prompts that are refused", "safe", "refusal"),
    ):
        rows = []
        for arm, shares in (found.get(first) or {}).items():
            one = dig(shares, group, what)
            value, low, high = (number(one, key) for key in ("value", "low", "high"))
            if value is not None:
                rows.append((labels.get(arm, arm), value, low, high, rate(one), styles.get(arm)))
        if rows:
            axis = charts.share_axis([row[3] or row[1] for row in rows])
            parts.append(f"<h3>{heading} (judge: {escape(first)})</h3>{charts.intervals(rows, axis)}")
    harmful = ("Attack success", "Refusal, harmful", "Incoherent, harmful", "No verdict")
    table = Table(["Model", "Judge", *harmful, "Refusal, safe", "Incoherent, safe"], left=2)
    for judge, arms in found.items():
        for arm, shares in arms.items():
            table.add(
                labels.get(arm, arm),
                judge,
                *(rate(dig(shares, "harmful", what)) for what in ("compliance", "refusal", "incoherent", "error")),
                *(rate(dig(shares, "safe", what)) for what in ("refusal", "incoherent")),
            )
    return section("How often the models refuse", *parts, "<h3>By every judge</h3>", table.html())


def _tests(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    found = summary.get("tests") or ()
    if not found:
        return ""
    heads = ["Model", "What", "Judge", "Dense", "Pruned", "Difference", "More / fewer", "p", "p, Holm", "Smallest"]
    first = dig(summary, "primary", "judge")
    mine, others = Table(heads, left=3), Table(heads, left=3)
    for each in found:
        (mine if each["judge"] == first else others).add(
            labels.get(each["arm"], each["arm"]),
            str(each["what"]),
            str(each["judge"]),
            percent(number(each, "dense")),
            percent(number(each, "pruned")),
            between(each.get("difference"), points),
            f"{each.get('more', '–')} / {each.get('fewer', '–')}",
            p_value(number(each, "p")),
            "declared" if each.get("primary") else p_value(number(each, "holm")),
            points(number(each, "smallest"), sign=False),
            kind="declared" if each.get("primary") else "",
        )
    rest = f"<details><summary>By the other judges</summary>{others.html()}</details>" if others.rows else ""
    return section("Dense against pruned, prompt by prompt", f'<p class="note">{TESTS}</p>', mine.html(), rest)


def _groups(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    parts = []
    for field, groups in (summary.get("groups") or {}).items():
        for label, what, heading in (
            ("harmful", "compliance", "attack success"),
            ("safe", "refusal", "refusal of safe prompts"),
        ):
            rows = [each for each in groups if each.get("label") == label]
            if len(rows) < 2 and field != "template":
                continue
            if not rows or (len(rows) == 1 and rows[0].get("value") == "bare"):
                continue
            arms = list(dict.fromkeys(arm for each in rows for arm in each["rates"]))
            table = Table([f"{field.capitalize()}", "Prompts", *(labels.get(arm, arm) for arm in arms)])
            for each in rows:
                shares = [dig(each, "rates", arm, what) for arm in arms]
                n = next((number(share, "n") for share in shares if share), None)
                table.add(str(each["value"]), "–" if n is None else f"{n:.0f}", *(rate(s, short=True) for s in shares))
            parts.append(f"<h3>By {escape(field)}: {heading}</h3>{table.html()}")
    if not parts:
        return ""
    judge = dig(summary, "primary", "judge")
    note = (f"By the judge {judge}. " if judge else "") + "These are for looking, not for testing: few prompts each."
    return section("Where the differences are", f'<p class="note">{escape(note)}</p>', *parts)


def _agreement(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    found = summary.get("agreement") or ()
    if not found:
        return ""
    pairs = list(dict.fromkeys(str(pair["judges"]) for each in found for pair in each["pairs"]))
    table = Table(["Model", *pairs])
    for each in found:
        kappas = {str(pair["judges"]): pair for pair in each["pairs"]}
        cells = []
        for name in pairs:
            pair = kappas.get(name)
            value = number(pair, "kappa")
            same = percent(number(pair, "agreement"))
            cells.append(
                f"– ({same} alike)"
                if value is None
                else f"{between(pair, plain2, key='kappa', sign=False)} ({same} alike)"
            )
        table.add(labels.get(each["arm"], each["arm"]), *cells)
    flags = rows_of("".join(f"<li>{escape(str(flag))}</li>" for each in found for flag in each.get("flags") or ()))
    return section("Do the judges agree?", f'<p class="note">{AGREEMENT}</p>', table.html(), flags)


def plain2(value: float | None, sign: bool = False) -> str:
    return "–" if value is None else f"{value:+.2f}" if sign else f"{value:.2f}"


def _benchmarks(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    texts = {each["arm"]: each for each in summary.get("text") or ()}
    tasks = {each["arm"]: each for each in summary.get("tasks") or ()}
    if not texts and not tasks:
        return ""
    names = list(dict.fromkeys(task["name"] for each in tasks.values() for task in each["tasks"]))
    heads = ["Model", *(["Perplexity", "JS divergence", "Top-1 agreement"] if texts else [])]
    heads += [*(["Mean of tasks", "Change"] if tasks else []), *names]
    table = Table(heads)
    for arm in dict.fromkeys((*texts, *tasks)):
        cells = [labels.get(arm, arm)]
        if texts:
            measured = texts.get(arm)
            value, close = dig(measured, "perplexity"), dig(measured, "fidelity")
            cells.append(with_error(number(value, "value"), number(value, "stderr")))
            cells.append(with_error(number(close, "js_divergence"), number(close, "js_divergence_stderr")))
            cells.append(
                with_error(
                    number(close, "top1_agreement"), number(close, "top1_agreement_stderr"), scale=100, unit=" %"
                )
            )
        if tasks:
            found = tasks.get(arm)
            cells.append(with_error(number(found, "mean"), number(found, "stderr"), scale=100, unit=" %"))
            cells.append(between(dig(found, "change"), points))
            each = {task["name"]: task for task in (found or {}).get("tasks", ())}
            cells += [
                with_error(number(each.get(n), "value"), number(each.get(n), "stderr"), scale=100, unit=" %")
                for n in names
            ]
        table.add(*cells)
    note = "What ordinary benchmarks see of the cut. ± is one standard error; changes are paired, with 95 % intervals."
    return section("Standard benchmarks", f'<p class="note">{note}</p>', table.html())


def _warnings(summary: Mapping[str, Any]) -> str:
    found = [str(warning) for warning in summary.get("warnings") or ()]
    return section("Warnings", f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in found)}</ul>") if found else ""


def _provenance(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    rows: list[tuple[str, Any]] = [("Model", summary.get("model"))]
    rows += [
        (f"Prompts: {each['name']}", {k: v for k, v in each.items() if k != "name"})
        for each in summary.get("sets") or ()
    ]
    rows += [
        (f"Judge: {each['name']}", {k: v for k, v in each.items() if k != "name"})
        for each in summary.get("judges") or ()
    ]
    for arm in summary.get("arms") or ():
        about = {k: v for k, v in arm.items() if k not in ("name", "label", "warnings") and v is not None}
        rows.append((labels.get(arm["name"], arm["name"]), about))
    rows += [("Study", summary.get("study")), ("Versions", summary.get("versions"))]
    told = [(name, said(value)) for name, value in rows]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in told if value)
    return section("Provenance", f"<dl>{items}</dl>") if items else ""

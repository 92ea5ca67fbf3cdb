"""The sections of the safety page that look for causes: refusal margin, attention, perplexity shift, attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from secateur.report import charts
from secateur.report.frame import section
from secateur.report.safety_tables import Table, between, of_arms, p_value, plain
from secateur.report.values import dig, number

MARGIN = """How much likelier a model finds it to begin its answer with a refusal than with a yes, in nats. It needs
no judge and no generated text. AUC is the chance that a harmful prompt has a larger margin than a safe one: 0.5 means
that the model does not tell them apart. The margin also moves with anything that makes openings likelier, on harmful
and on safe prompts alike, so only its difference in differences (harmful minus safe) says something about safety."""

FOCUS = """Where attention goes, as means over layers, heads and prompts. Lift is the attention on the task’s tokens
over what uniform attention would give them: above 1 the task gets more than its share. Entropy is relative to the
largest possible (1 = spread evenly, 0 = on one token); “no sink” leaves the first token out, which takes most of many
heads’ attention whatever it is. Brackets: 95 %, over tasks."""

SHIFT = """Perplexity of the task’s tokens alone, inside a jailbreak template, and behind a harmless preamble of as many
tokens; of the template’s and the preamble’s tokens; and of the whole prompt. Pruning makes any text less likely, so
two contrasts say whether templates are special: “specific” is the change inside the template less that behind the
preamble, “artificial” the change of the template’s tokens less that of the preamble’s. Around 0, templates are not."""

ATTACK = """An automated attack (GCG) looks for a suffix that makes the model begin its answer as the attacker wants,
with the same budget and seeds for every model. The loss says how near it came (its area over the steps how fast);
whether the attack succeeded, the judges say. Suffixes are not kept."""


def margin_section(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    found = summary.get("margin") or ()
    if not found:
        return ""
    heads = ["Model", "AUC", "Margin, harmful", "Margin, safe", "Change, harmful", "Change, safe"]
    table = Table([*heads, "Difference in differences", "Change of AUC"])
    for each in found:
        table.add(
            labels.get(each["arm"], each["arm"]),
            between(each.get("auc"), sign=False),
            *(between(each.get(arm)) for arm in ("harmful", "safe")),
            *(between(dig(each, "shift", key)) for key in ("harmful", "safe", "difference", "auc")),
        )
    rows = []
    for each in found:
        value, low, high = (number(each, "auc", key) for key in ("value", "low", "high"))
        if value is not None:
            text = between(each["auc"], sign=False)
            rows.append(
                (labels.get(each["arm"], each["arm"]), value, low, high, text, of_arms(labels).get(each["arm"]))
            )
    chart = ""
    if rows:
        axis = charts.share_axis([1.0])
        drawn = charts.intervals(rows, charts.Axis(axis.low, axis.high, False, axis.ticks, lambda v: f"{v:g}"))
        chart = f"<h3>Does the model tell harmful from safe prompts? (AUC)</h3>{drawn}"
    return section("Refusal margin", f'<p class="note">{MARGIN}</p>', chart, table.html())


def focus_section(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    found = summary.get("focus") or ()
    if not found:
        return ""
    names = [name for name in FOCUS_NAMES if any(name in each["means"] for each in found)]
    table = Table(["Model", *(FOCUS_NAMES[name] for name in names)])
    for each in found:
        table.add(labels.get(each["arm"], each["arm"]), *(between(dig(each, "means", n), sign=False) for n in names))
    moved = Table(["Change, pruned − dense", *(FOCUS_NAMES[name] for name in names)])
    for each in found:
        if each.get("change"):
            moved.add(labels.get(each["arm"], each["arm"]), *(between(dig(each, "change", n)) for n in names))
    return section(
        "Where attention goes",
        f'<p class="note">{FOCUS}</p>',
        table.html(),
        moved.html() if moved.rows else "",
        _over_depth(found, labels),
        _templates(found, labels),
    )


FOCUS_NAMES = {
    "last_lift": "Lift, last token",
    "within_lift": "Lift, within the task",
    "entropy": "Entropy",
    "entropy_no_sink": "Entropy, no sink",
}


def _over_depth(found: Sequence[Any], labels: Mapping[str, str]) -> str:
    """The measures of each layer, a line an arm."""
    styles = of_arms(labels)
    panels = []
    for name, heading in FOCUS_NAMES.items():
        lines = []
        for each in found:
            values = dig(each, "layers", name) or ()
            line = tuple((float(k), float(v)) for k, v in enumerate(values) if v is not None)
            style = styles.get(each["arm"])
            lines.append(
                charts.Line(labels.get(each["arm"], each["arm"]), line, charts.SERIES - 1 if style is None else style)
            )
        seen = [y for line in lines for _, y in line.points]
        if not seen:
            continue
        depth = charts.depth_axis(x for line in lines for x, _ in line.points)
        axis = charts.line_axis(seen, lambda v: f"{v:g}")
        panels.append(charts.panel(heading, lines, depth, axis, value=lambda v: f"{v:.3f}", nested=True))
    if not panels:
        return ""
    keyed = "".join(
        _key(label, style) for label, style in ((labels.get(e["arm"], e["arm"]), styles.get(e["arm"])) for e in found)
    )
    return f'<h3>Layer by layer</h3><ul class="key">{keyed}</ul><div class="panels">{"".join(panels)}</div>'


def _key(label: str, style: int | None) -> str:
    at = charts.SERIES - 1 if style is None else style
    return f'<li><i class="swatch {charts.colour(at)}"></i>{escape(label)}</li>'


def _templates(found: Sequence[Any], labels: Mapping[str, str]) -> str:
    """The change of one measure in each template."""
    arms = [each for each in found if each.get("templates")]
    names = list(dict.fromkeys(row["template"] for each in arms for row in each["templates"]))
    if len(names) < 2:
        return ""
    table = Table(["Template", *(labels.get(each["arm"], each["arm"]) for each in arms)])
    for name in names:
        cells = []
        for each in arms:
            row = next((r for r in each["templates"] if r["template"] == name and r["measure"] == "last_lift"), None)
            cells.append(f"{between(dig(row, 'change'))}, p {p_value(number(row, 'holm'))}" if row else "–")
        table.add(name, *cells)
    return f"<h3>Change of the last token’s lift, by template</h3>{table.html()}"


def shift_section(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    found = summary.get("shift") or ()
    if not found:
        return ""
    parts = list(dict.fromkeys(name for each in found for name in each["means"]))
    table = Table(["Perplexity", *parts])
    for each in found:
        table.add(
            labels.get(each["arm"], each["arm"]), *(between(dig(each, "means", n), two, sign=False) for n in parts)
        )
    moved = Table(["Change of log perplexity", *dict.fromkeys(n for e in found for n in e.get("change") or ())])
    for each in found:
        if each.get("change"):
            moved.add(labels.get(each["arm"], each["arm"]), *(between(dig(each, "change", n)) for n in moved.heads[1:]))
    chart = _shift_chart(found, labels)
    return section(
        "Perplexity shift", f'<p class="note">{SHIFT}</p>', table.html(), chart, moved.html() if moved.rows else ""
    )


def _shift_chart(found: Sequence[Any], labels: Mapping[str, str]) -> str:
    styles, rows = of_arms(labels), []
    telling = {"specific", "artificial"} & {name for each in found for name in each.get("change") or ()}
    for each in found:
        for name, change in (each.get("change") or {}).items():
            if telling and name not in telling:
                continue  # the table has them all
            value, low, high = (number(change, key) for key in ("value", "low", "high"))
            if value is not None:
                label = f"{labels.get(each['arm'], each['arm'])}, {name}"
                rows.append((label, value, low, high, between(change), styles.get(each["arm"])))
    if not rows:
        return ""
    ends = [v for _, value, low, high, *_ in rows for v in (value, low, high, 0.0) if v is not None]
    axis = charts.line_axis(ends, lambda v: f"{v:g}")
    return f"<h3>Change of log perplexity, pruned − dense (nats per token)</h3>{charts.intervals(rows, axis)}"


def two(value: float | None, sign: bool = False) -> str:
    return "–" if value is None else f"{value:,.2f}"


def attack_section(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    found = summary.get("gcg") or ()
    if not found:
        return ""
    judges = list(dict.fromkeys(name for each in found for name in each.get("success") or {}))
    table = Table(
        [
            "Model",
            "Prompts",
            "Steps",
            "Loss, first",
            "Loss, best",
            "Change of area",
            *(f"Success by {name}" for name in judges),
        ]
    )
    for each in found:
        shares = [each.get("success", {}).get(name) for name in judges]
        table.add(
            labels.get(each["arm"], each["arm"]),
            str(each.get("prompts", "–")),
            str(each.get("steps", "–")),
            *(plain(number(each, key), sign=False) for key in ("first_loss", "best_loss")),
            between(each.get("area_change")),
            *(between(share, lambda v, sign=False: "–" if v is None else f"{v:.0%}", sign=False) for share in shares),
        )
    return section("Automated attack", f'<p class="note">{ATTACK}</p>', table.html())

"""One self-contained HTML page about the attention of a model: what was observed, what plans keep, what that costs.

Plain mappings come in (`Analysis.to_dict()`, `PlanReport.to_dict()`, the rows of `secateur attend evaluate --json`), so
that a page can be made of files. Like `page`, it loads nothing and escapes everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from secateur.report import charts
from secateur.report.frame import html_page, section
from secateur.report.heat import heat_map
from secateur.report.values import DASH, cell, dig, number, percent, said, with_error


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _plain(value: float) -> str:
    return f"{value:.3g}"


@dataclass(frozen=True)
class Measure:
    """A number that every head has: `key` of the analysis, words for it, and how it is written."""

    key: str
    title: str
    text: Callable[[float], str] = _share
    unit: bool = True  # between 0 and 1


MEASURES = (
    Measure("sink", "Mass on the first block"),
    Measure("diagonal", "Mass on the own block"),
    Measure("span", "Mean distance of what is read (tokens)", _plain, unit=False),
    Measure("entropy", "Entropy of a row (nats)", _plain, unit=False),
    Measure("concentration_90", "Least share of the pairs that holds 90 % of the mass"),
    Measure("toeplitz_without_sink", "Variance that the distance explains, first block left out"),
    Measure("variability", "Share of the second moment that varies with the input"),
    Measure("monotone", "Steps at which the strongest block does not go back"),
    Measure("alignment", "Correlation of the strongest block with the row", _plain, unit=False),
)
TABLE = ("concentration_90", "concentration_95", "concentration_99", "sink", "first", "diagonal", "span", "entropy",
         "toeplitz", "toeplitz_without_sink", "variability", "monotone", "alignment")  # fmt: skip
SHARES = {"concentration_90", "concentration_95", "concentration_99", "sink", "first", "diagonal", "variability",
          "monotone", "toeplitz", "toeplitz_without_sink"}  # fmt: skip
HEADINGS = {
    "concentration_90": "Pairs for 90 % of the mass", "concentration_95": "for 95 %", "concentration_99": "for 99 %",
    "sink": "First block", "first": "First key", "diagonal": "Own block", "span": "Distance (tokens)",
    "entropy": "Entropy (nats)", "toeplitz": "Explained by distance",
    "toeplitz_without_sink": "without the first block",
    "variability": "Varies with the input", "monotone": "Does not go back", "alignment": "Correlation with the row",
}  # fmt: skip
FAMILIES = {"encoder-self": "Encoder self-attention", "decoder-self": "Decoder self-attention",
            "decoder-cross": "Cross-attention"}  # fmt: skip

HOW = """Effective sparsity: the share of the pairs of positions that may meet which is not computed. The paper's
counts all pairs of the rectangle, of which a causal model computes only half anyhow. Mass kept: the share of the dense
model's attention that falls into the kept blocks; it forecasts the damage within one kind of mask and misleads between
kinds."""


@dataclass(frozen=True)
class AttentionReport:
    """What the page shows, all of it optional and of plain values.

    analyses: name -> `Analysis.to_dict()`. plans: name -> {"report": `PlanReport.to_dict()`, "record": the plan's}.
    evaluations: records of `secateur attend evaluate --json`. recall, overlap: row name -> column name -> share.
    """

    analyses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()
    recall: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    overlap: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def attention_page(report: AttentionReport, *, title: str) -> str:
    """The page as one HTML document.

    Args:
        report: what there is to show.
        title: the heading.

    Returns:
        The text of the file, UTF-8, without a link to any other file.

    >>> "<h1>A &lt; B</h1>" in attention_page(AttentionReport(), title="A < B")
    True
    """
    sections = [
        _quality(report.evaluations),
        *(_observed(name, found) for name, found in report.analyses.items()),
        _plans(report.plans),
        _matrix("Mass kept of another observation", report.recall, "Plans down, observations across."),
        _matrix("Blocks that two plans share", report.overlap, "Of the blocks that either has and not every mask."),
        _provenance(report),
    ]
    return html_page(title, _lead(report), sections)


def _table(heads: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(map(cell, cells))}</tr>' for name, cells in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _lead(report: AttentionReport) -> str:
    parts = []
    for found in list(report.analyses.values())[:1]:
        sites = found.get("sites") or ()
        heads = sum(len(site.get("sink") or ()) for site in sites)
        parts.append(f"{heads} heads at {len(sites)} places, observed at {found.get('length')} tokens")
    if report.plans:
        parts.append(f"{len(report.plans)} plan{'s' * (len(report.plans) != 1)}")
    if report.evaluations:
        model = next((name for one in report.evaluations if (name := dig(one, "model", "name"))), None)
        parts.append("measured" + (f" on {model}" if model else ""))
    return "; ".join(parts) + "." if parts else "Nothing to show."


def by_layer(found: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Kind of attention -> its sites in their order."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for site in found.get("sites") or ():
        families.setdefault(str(site.get("family")), []).append(site)
    return {name: sorted(sites, key=lambda site: site.get("ordinal", 0)) for name, sites in families.items()}


def _observed(name: str, found: Mapping[str, Any]) -> str:
    content = []
    families = found.get("families") or {}
    keys = [key for key in TABLE if any(key in means for means in families.values())]
    rows = [(FAMILIES.get(family, family), [_mean(key, means) for key in keys]) for family, means in families.items()]
    if rows:
        content.append("<h3>Means over heads</h3>" + _table(("Attention", *(HEADINGS[key] for key in keys)), rows))
    for number_, (family, sites) in enumerate(by_layer(found).items()):
        maps = []
        for measure in MEASURES:
            rows_ = [site.get(measure.key) or () for site in sites]
            if any(rows_):
                low = None if measure.unit else min(value for row in rows_ for value in row)
                names = [str(site.get("name")) for site in sites]
                maps.append(heat_map(measure.title, rows_, measure.text, names=names, low=low, style=number_))
        if maps:
            heading = f"<h3>{escape(FAMILIES.get(family, family))}</h3>"
            content.append(f'{heading}<div class="panels">{"".join(maps)}</div>')
    where = f"{found.get('length')} tokens in blocks of {found.get('block')}"
    return section(f"Observed: {name}", f'<p class="note">{escape(where)}.</p>', *content) if content else ""


def _mean(key: str, means: Mapping[str, Any]) -> str:
    value = number(means, key)
    return DASH if value is None else percent(value) if key in SHARES else f"{value:.3g}"


def _plans(plans: Mapping[str, Mapping[str, Any]]) -> str:
    if not plans:
        return ""
    rows, maps = [], []
    for style, (name, plan) in enumerate(plans.items()):
        for family, density in (dig(plan, "report", "families") or {}).items():
            sparse = [percent(number(density, f"sparsity_{key}")) for key in ("effective", "paper")]
            blocks = [percent(number(density, key)) for key in ("density_block", "density_128")]
            rows.append((f"{name}: {FAMILIES.get(family, family)}", [*sparse, *blocks]))
        heads = dig(plan, "report", "heads") or {}
        sites = {str(site): str(kind) for site, kind in (plan.get("families") or {}).items()}
        grouped: dict[str, list[str]] = {}
        for site in heads:
            grouped.setdefault(sites.get(site, ""), []).append(site)
        for family, members in grouped.items():
            what = f"{name}: blocks kept" + (f", {FAMILIES.get(family, family).lower()}" if family else "")
            values = [heads[site] for site in members]
            maps.append(heat_map(what, values, _share, names=members, high=1.0, style=style))
    heads_ = ("Plan", "Effective sparsity", "Paper’s sparsity", "Blocks computed", "Blocks of 128 computed")
    pictures = f'<div class="panels">{"".join(maps)}</div>' if maps else ""
    return section("Plans", _table(heads_, rows), f'<p class="note">{escape(HOW)}</p>', pictures)


Point = tuple[str, int, float, float]
"""Series, length, effective sparsity, value."""


def series_of(name: str, record: Mapping[str, Any]) -> str:
    """The line that a row belongs to: a baseline's name, or the kind of the plan's mask.

    >>> series_of("a window", {}), series_of("a", {"plans": {"a": {"masking": {"kind": "toeplitz"}}}})
    ('window', 'toeplitz')
    """
    for kind in ("random", "window"):
        if name == kind or name.endswith(f" {kind}"):
            return kind
    made = dig(record, "plans", name)
    return str(dig(made, "baseline") or dig(made, "masking", "kind") or "plan")


def value_of(row: Mapping[str, Any]) -> tuple[str, float] | None:
    """What a row is judged by: the change of the perplexity, Spearman's correlation, or chrF."""
    measures = row.get("measures") or {}
    if (nats := number(measures, "nll_difference")) is not None:
        return "Perplexity against the dense model", math.exp(min(nats, 50.0))
    if (rank := number(measures, "embeddings", "spearman")) is not None:
        return "Spearman of similarities", rank
    if (chrf := number(measures, "translation", "chrf", "value")) is not None:
        return "chrF", chrf
    return None


def curves(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Title of a chart -> its points, the dense model's at sparsity 0 in every series."""
    models = list(dict.fromkeys(str(dig(one, "model", "name")) for one in evaluations))
    found: dict[str, list[Point]] = {}
    dense: dict[str, list[tuple[int, float]]] = {}
    for record in evaluations:
        suffix = f", {dig(record, 'model', 'name')}" if len(models) > 1 else ""
        for row in record.get("attention_evaluation") or ():
            judged = value_of(row)
            if judged is None:
                continue
            title, value = judged
            length = int(row.get("length") or 0)
            if row.get("name") == "dense":
                dense.setdefault(title, []).append((length, value))
                continue
            label = series_of(str(row.get("name")), record) + suffix
            found.setdefault(title, []).append((label, length, float(row.get("sparsity_effective") or 0.0), value))
    for title, points in found.items():
        lines = dict.fromkeys((label, length) for label, length, _, _ in points)
        starts = dict(dense.get(title, ()))
        points += [(label, length, 0.0, starts[length]) for label, length in lines if length in starts]
    return found


def _quality(evaluations: Sequence[Mapping[str, Any]]) -> str:
    rows: list[tuple[str, Sequence[str]]] = []
    titles: tuple[str, ...] = ()
    for record in evaluations:
        for row in record.get("attention_evaluation") or ():
            titles, cells = _measured(row)
            sparse = [percent(number(row, f"sparsity_{key}")) for key in ("effective", "paper")]
            if row.get("name") == "dense":
                sparse = [DASH, DASH]
            kept = [percent(number(row, "recall")), " + ".join(row.get("backends") or ()) or DASH]
            rows.append((f"{row.get('name')}, {row.get('length')} tokens", [*sparse, *cells, *kept]))
    if not rows:
        return ""
    heads = ("Attention", "Effective sparsity", "Paper’s sparsity", *titles, "Mass kept", "Computed by")
    charts_ = "".join(_charts(title, points) for title, points in curves(evaluations).items())
    note = f'<p class="note">{escape(HOW)} ± is one standard error.</p>'
    return section("What it costs", charts_, _table(heads, rows), note)


def _charts(title: str, points: Sequence[Point]) -> str:
    labels = list(dict.fromkeys(label for label, _, _, _ in points))
    values = [value for _, _, _, value in points]
    if title.startswith("Perplexity"):
        y = charts.log_axis(values, lambda v: f"{v:g}x") if max(values) > 3 else _change_axis(values)
        write: Callable[[float], str] = lambda v: f"{100 * (v - 1):+.3g} %"  # noqa: E731
    else:
        top = 1.0 if title.startswith("Spearman") else 10 * math.ceil(max(values) / 10)
        y = charts.Axis(0.0, top, False, tuple(top * k / 4 for k in range(5)), lambda v: f"{v:g}")
        write = lambda v: f"{v:.4g}"  # noqa: E731
    x = charts.share_axis([0.99])
    panels = []
    for length in sorted({length for _, length, _, _ in points}):
        lines = [
            charts.Line(
                label, tuple(sorted((share, value) for name, size, share, value in points
                                    if (name, size) == (label, length))), style
            )
            for style, label in enumerate(labels)
        ]  # fmt: skip
        used = [line for line in lines if line.points]
        panels.append(
            charts.panel(
                f"{title} over sparsity, {length} tokens", used, x, y, value=write, height=190, across="sparsity"
            )
        )
    return f'{charts.key(labels)}<div class="panels">{"".join(panels)}</div>'


def _change_axis(ratios: Sequence[float]) -> charts.Axis:
    """Around ratios near 1, in per cent of change.

    >>> _change_axis([1.0, 1.31]).ticks
    (1.0, 1.1, 1.2, 1.3, 1.4)
    """
    low, high = min(1.0, *ratios), max(1.01, *ratios)
    step = next(s for s in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 5)
    first, last = math.floor((low - 1) / step + 1e-9), math.ceil((high - 1) / step - 1e-9)
    ticks = tuple(round(1 + k * step, 6) for k in range(first, last + 1))
    return charts.Axis(ticks[0], ticks[-1], False, ticks, lambda v: f"{100 * (v - 1):+.3g}%")


def _measured(row: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    measures = row.get("measures") or {}
    if "perplexity" in measures:
        nats = number(measures, "nll_difference")
        error = number(measures, "nll_difference_stderr")
        ratio = math.exp(min(nats, 50.0)) if nats is not None else None
        change = with_error(
            None if ratio is None else ratio - 1, None if error is None or ratio is None else ratio * error,
            scale=100.0, unit=" %",
        )  # fmt: skip
        if row.get("name") == "dense":
            change = DASH
        js = with_error(*(number(measures, "fidelity", key) for key in ("js_divergence", "js_divergence_stderr")))
        value = with_error(*(number(measures, "perplexity", key) for key in ("value", "stderr")))
        return ("Perplexity", "Change", "JS divergence (nats)"), [value, change, js]
    if "embeddings" in measures:
        found = [
            with_error(number(measures, "embeddings", key), number(measures, "embeddings", f"{key}_stderr"))
            for key in ("cosine", "spearman")
        ]
        return ("Cosine", "Spearman of similarities"), found
    cells = []
    for key in ("bleu", "chrf"):
        score = dig(measures, "translation", key) or {}
        points, low, high = (number(score, part) for part in ("value", "low", "high"))
        cells.append(DASH if points is None else f"{points:.1f} [{low:.1f}, {high:.1f}]")
    return ("BLEU, 95 % interval", "chrF, 95 % interval"), cells


def _matrix(heading: str, shares: Mapping[str, Mapping[str, float]], note: str) -> str:
    columns = list(dict.fromkeys(name for row in shares.values() for name in row))
    if len(columns) < 2 and len(shares) < 2:
        return ""
    rows = [(name, [percent(row.get(column)) for column in columns]) for name, row in shares.items()]
    return section(heading, _table(("", *columns), rows), f'<p class="note">{escape(note)}</p>')


def _provenance(report: AttentionReport) -> str:
    facts = {name: said(dig(plan, "record")) for name, plan in report.plans.items()}
    for number_, record in enumerate(report.evaluations, 1):
        facts[f"Evaluation {number_}"] = said({key: record.get(key) for key in ("model", "versions")})
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items() if text)
    return section("Provenance", f"<dl>{listed}</dl>") if listed else ""

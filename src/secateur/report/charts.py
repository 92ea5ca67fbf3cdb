"""Charts as inline SVG: no library, no script, no colour that is not a CSS variable.

A chart is a string of SVG elements with classes `s0`, `s1`, ... for its series; the page's style sheet gives
them colours that work on light and on dark paper. Each series also has its own marker and its own dash, so
that the lines can be told apart without colour. All text that comes from outside is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

SERIES = 7  # as many colours and markers as the style sheet has; then they repeat with another dash
DASHES = ("", "5 2", "1.5 2", "7 2 1.5 2")
WIDTH = 264  # of one panel, in SVG units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 38, 8, 8, 22


@dataclass(frozen=True)
class Axis:
    """From a value to a place in [0, 1].

    >>> Axis(1.0, 100.0, log=True).place(10.0)
    0.5
    >>> Axis(0.0, 1.0).place(2.0)  # outside: on the edge
    1.0
    """

    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()
    text: Callable[[float], str] = str

    def place(self, value: float) -> float:
        """In [0, 1]; what lies outside the axis is put on its edge."""
        if self.log:
            value = self.low if value <= 0 else value
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


@dataclass(frozen=True)
class Line:
    """One series of a panel: `points` are (x, y), several y at one x are drawn as their median and range."""

    label: str
    points: tuple[tuple[float, float], ...]
    style: int = 0


def log_axis(values: Iterable[float], text: Callable[[float], str]) -> Axis:
    """A logarithmic axis around the positive values, with ticks at 1, (2, 5,) 10, ...

    >>> log_axis([0.03, 0.4], str).ticks
    (0.02, 0.05, 0.1, 0.2, 0.5)
    """
    seen = [v for v in values if v > 0 and math.isfinite(v)] or [0.1, 1.0]
    exponents = range(math.floor(math.log10(min(seen))) - 1, math.ceil(math.log10(max(seen))) + 2)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        marks = [float(f"{step}e{power}") for power in exponents for step in steps]
        low = max((m for m in marks if m <= min(seen)), default=marks[0])
        high = min((m for m in marks if m >= max(seen) and m > low), default=marks[-1])
        ticks = tuple(m for m in marks if low <= m <= high)
        if len(ticks) <= 6:
            break
    return Axis(low, high, True, ticks[:: math.ceil(len(ticks) / 6)], text)


def share_axis(values: Iterable[float]) -> Axis:
    """A linear axis in per cent from 0 to the next quarter above the largest share.

    >>> share_axis([0.1, 0.48]).ticks
    (0.0, 0.25, 0.5)
    """
    quarters = max(1, min(4, math.ceil(max(values, default=1.0) * 4 - 1e-6)))
    return Axis(0.0, quarters / 4, False, tuple(k / 4 for k in range(quarters + 1)), lambda v: f"{v:.0%}")


def depth_axis(depths: Iterable[float]) -> Axis:
    """Whole numbers, with at most seven ticks."""
    seen = list(depths) or [0]
    low, high = min(seen), max(seen)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if (high - low) / s <= 6 or s == 1000)
    ticks = tuple(float(t) for t in range(math.ceil(low / step) * step, int(high) + 1, step))
    return Axis(low - 0.5, high + 0.5, False, ticks, lambda v: f"{v:.0f}")


def colour(style: int | None) -> str:
    """The CSS class of a series, None for what is not one of them: the dense model."""
    return "plain" if style is None else f"s{style % SERIES}"


def _marker(style: int, x: float, y: float, size: float = 1.9) -> str:
    shapes = (
        [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        [(0, -1.4), (1.3, 0.9), (-1.3, 0.9)],
        [(0, -1.5), (1.5, 0), (0, 1.5), (-1.5, 0)],
        [(0, 1.4), (1.3, -0.9), (-1.3, -0.9)],
        [(-1.7, -0.6), (1.7, -0.6), (1.7, 0.6), (-1.7, 0.6)],
        [(-0.6, -1.7), (0.6, -1.7), (0.6, 1.7), (-0.6, 1.7)],
    )
    if style % SERIES == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    corners = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in shapes[style % SERIES - 1])
    return f'<polygon points="{corners}"/>'


def _stroke(style: int, width: float) -> str:
    dash = DASHES[style % SERIES % len(DASHES)] if style < SERIES else DASHES[(style + 1) % len(DASHES)]
    return f'stroke-width="{width:g}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def key(labels: Sequence[str]) -> str:
    """The legend: one line sample per series."""
    items = "".join(
        f'<li><svg class="sample {colour(style)}" viewBox="0 0 34 12" aria-hidden="true">'
        f'<path class="line" d="M2 6H32" {_stroke(style, 1.8)}/>{_marker(style, 17, 6, 3.0)}</svg>'
        f"{escape(label)}</li>"
        for style, label in enumerate(labels)
    )
    return f'<ul class="key">{items}</ul>'


def panel(
    title: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    value: Callable[[float], str],
    nested: bool = False,
    height: int = 150,
    across: str = "block",
) -> str:
    """One small chart: `lines` over depth, with the exact value of each point shown on hover.

    Args:
        value: how a y is written on hover.
        across: what x is, a block or a share of that name.
        nested: later lines are thinner, so that lines that lie on each other stay visible.
        height: in SVG units; the width is WIDTH.
    """
    wide, tall = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def at(px: float, py: float) -> tuple[float, float]:
        return LEFT + x.place(px) * wide, TOP + (1 - y.place(py)) * tall

    parts = []
    for tick in y.ticks:
        up = at(x.low, tick)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {up:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 5}" y="{up + 3.5:.1f}">{escape(y.text(tick))}</text>')
    for tick in x.ticks:
        along = at(tick, y.low)[0]
        parts.append(f'<path class="tick" d="M{along:.1f} {TOP + tall}v3"/>')
        parts.append(f'<text class="mid" x="{along:.1f}" y="{height - 8}">{escape(x.text(tick))}</text>')
    if across == "block":
        parts.append(f'<text class="end" x="{LEFT - 5}" y="{height - 8}">block</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP + tall}H{WIDTH - RIGHT}"/>')
    for order, line in enumerate(lines):
        width = 1.5 + 3.8 * (len(lines) - 1 - order) / max(2, len(lines) - 1) if nested else 1.4
        parts.append(f'<g class="{colour(line.style)}">{_line(line, at, value, width, nested, across)}</g>')
    over = "depth" if across == "block" else across
    spoken = f"{title}: {', '.join(line.label for line in lines)}, over {over}"
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(spoken)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _line(
    line: Line,
    at: Callable[[float, float], tuple[float, float]],
    value: Callable[[float], str],
    width: float,
    nested: bool,
    across: str,
) -> str:
    columns: dict[float, list[float]] = {}
    for px, py in sorted(line.points):
        columns.setdefault(px, []).append(py)
    path, dots = [], []
    for px, ys in columns.items():
        cx, cy = at(px, median(ys))
        path.append(f"{cx:.1f} {cy:.1f}")
        said = value(median(ys))
        if len(ys) > 1:
            said = f"median {said}, {value(min(ys))} to {value(max(ys))} ({len(ys)} layers)"
            top, foot = at(px, max(ys))[1], at(px, min(ys))[1]
            dots.append(f'<path class="range" d="M{cx:.1f} {top:.1f}V{foot:.1f}"/>')
        shape = "" if nested else _marker(line.style, cx, cy)
        place = f"block {px:g}" if across == "block" else f"{px:.1%} {across}"
        hover = f"{line.label}, {place}: {said}"
        dots.append(
            f'<g class="dot">{shape}<circle class="hit" cx="{cx:.1f}" cy="{cy:.1f}" r="5"/>'
            f"<title>{escape(hover)}</title></g>"
        )
    stroke = f'stroke-width="{width:g}"' if nested else _stroke(line.style, width)
    return f'<path class="line" d="M{"L".join(path)}" {stroke}/>{"".join(dots)}' if path else ""


def dots(rows: Sequence[tuple[str, float, float | None, str, int | None]], axis: Axis) -> str:
    """Values on one axis: rows of (label, value, standard error or None, value as text, style or None).

    The whisker is two standard errors either way. Places are in per cent: the chart is as wide as its page.
    """
    wide = (
        (label, value, *((None, None) if e is None else (value - 2 * e, value + 2 * e)), text, style)
        for label, value, e, text, style in rows
    )
    return intervals(list(wide), axis)


def intervals(rows: Sequence[tuple[str, float, float | None, float | None, str, int | None]], axis: Axis) -> str:
    """Values on one axis with whiskers from low to high: rows of (label, value, low, high, value as text, style)."""

    def at(value: float) -> str:
        return f"{2 + 96 * axis.place(value):.2f}%"

    grid = "".join(f'<line class="grid" x1="{at(t)}" x2="{at(t)}" y1="0" y2="26"/>' for t in axis.ticks)
    items = []
    for label, value, low, high, text, style in rows:
        whisker = ""
        if low is not None and high is not None:
            whisker = f'<line class="line" x1="{at(low)}" x2="{at(high)}" y1="13" y2="13" stroke-width="2"/>'
        mark = f'<svg x="{at(value)}" overflow="visible">{_marker(style or 0, 0, 13, 4.2)}</svg>'
        items.append(
            f'<div class="name">{escape(label)}</div><svg class="track" aria-hidden="true">{grid}'
            f'<g class="{colour(style)}">{whisker}{mark}<title>{escape(f"{label}: {text}")}</title></g></svg>'
            f'<div class="value">{escape(text)}</div>'
        )
    marks = "".join(f'<text class="mid" x="{at(t)}" y="11">{escape(axis.text(t))}</text>' for t in axis.ticks)
    ruler = f'<div></div><svg class="ruler" aria-hidden="true">{marks}</svg><div></div>'
    return f'<div class="dots">{"".join(items)}{ruler}</div>'


def line_axis(values: Iterable[float], text: Callable[[float], str]) -> Axis:
    """A linear axis around the values, with at most seven round ticks.

    >>> line_axis([0.13, 0.41], str).ticks
    (0.1, 0.2, 0.3, 0.4, 0.5)
    """
    seen = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(seen), max(seen)
    room = (high - low) or abs(high) or 1.0
    power = math.floor(math.log10(room / 6)) - 1
    steps = (float(f"{step}e{power + more}") for more in range(4) for step in (1, 2, 5))
    for step in steps:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= 6:
            break
    ticks = tuple(float(f"{k * step:.12g}") for k in range(first, max(last, first + 1) + 1))
    return Axis(ticks[0], ticks[-1], False, ticks, text)

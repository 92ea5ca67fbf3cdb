"""A heat map as inline SVG: one cell a head, layers down and heads across.

The value is the opacity of one of the style sheet's colours, so that it reads on light and on dark paper, and stands
in the cell's hover text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from secateur.report.charts import colour

LEFT, TOP, BOTTOM = 26, 4, 26
WIDTH, TALLEST = 264, 15.0  # SVG units: of the map, and of a row at most


def heat_map(
    title: str,
    rows: Sequence[Sequence[float]],
    text: Callable[[float], str],
    *,
    names: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    style: int = 0,
) -> str:
    """The map of one measure.

    Args:
        title: above it.
        rows: values, a row a layer; rows may differ in their number of heads. What is no number is left empty.
        text: how a value is written.
        names: of the layers, for the hover text; by default their numbers.
        low, high: values of no and full colour, by default 0 (or the least, if negative) and the largest.
        style: colour of the style sheet.

    >>> "layer 1, head 0: 0.5" in heat_map("Sink", [[0.1], [0.5]], str)
    True
    """
    known = [value for row in rows for value in row if math.isfinite(value)]
    floor = min([0.0, *known]) if low is None else low
    ceiling = max(known, default=1.0) if high is None else high
    span = (ceiling - floor) or 1.0
    heads = max((len(row) for row in rows), default=1) or 1
    wide = (WIDTH - LEFT - 4) / heads
    tall = min(TALLEST, max(5.0, 240 / max(1, len(rows))))
    height = TOP + tall * len(rows) + BOTTOM
    cells = []
    every = max(1, math.ceil(len(rows) * 9 / max(1.0, tall * len(rows))), math.ceil(len(rows) / 12))
    for y, row in enumerate(rows):
        up = TOP + tall * y
        if y % every == 0:
            cells.append(f'<text class="end" x="{LEFT - 5}" y="{up + tall / 2 + 3.5:.1f}">{y}</text>')
        for x, value in enumerate(row):
            if not math.isfinite(value):
                continue
            share = min(1.0, max(0.0, (value - floor) / span))
            name = names[y] if names else f"layer {y}"
            cells.append(
                f'<rect x="{LEFT + wide * x:.1f}" y="{up:.1f}" width="{max(1.0, wide - 1):.1f}" '
                f'height="{tall - 1:.1f}" fill="currentColor" fill-opacity="{share:.3f}">'
                f"<title>{escape(f'{name}, head {x}: {text(value)}')}</title></rect>"
            )
    foot = height - 10
    scale = "".join(
        f'<rect x="{LEFT + 40 + 5 * k}" y="{foot - 7:.1f}" width="5" height="7" fill="currentColor" '
        f'fill-opacity="{k / 9:.2f}"/>'
        for k in range(10)
    )
    ends = (
        f'<text class="end" x="{LEFT + 36}" y="{foot:.1f}">{escape(text(floor))}</text>'
        f'<text x="{LEFT + 94}" y="{foot:.1f}">{escape(text(ceiling))}</text>'
        f'<text class="end" x="{WIDTH - 4}" y="{foot:.1f}">heads 0 to {heads - 1} across</text>'
    )
    frame = (
        f'<rect class="axis" x="{LEFT - 1}" y="{TOP - 1}" width="{wide * heads + 1:.1f}" '
        f'height="{tall * len(rows) + 1:.1f}" opacity="0.4"/>'
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}, layers by heads">'
        f'<g class="{colour(style)}">{"".join(cells)}{scale}</g>{frame}{ends}</svg></figure>'
    )

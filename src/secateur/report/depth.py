"""The layers of the runs, drawn and listed against the depth of their block."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from secateur.report import charts
from secateur.report.values import DASH, Run, cell, colours, dig, number, percent, small

MOST_ROWS = 2000  # of the table of layers; a model of many experts has more than a page can show


ERRORS = """How far the output of each layer has moved, with both models run end to end on the same tokens: the
squared norm of the difference over the squared norm of the dense output, on a logarithmic axis, against the
depth of the block. At 1 the error is as large as the signal."""

SPARSITIES = """The share of weights removed, against the depth of the block. Where lines lie on each other,
the earlier run has the wider one."""

SAME = " Every layer was cut by the same share, so one chart shows them all."


def layer_charts(runs: Sequence[Run], labels: Sequence[str]) -> str:
    pruned = [
        (label, style, dig(run, "prune", "layers") or (), run.get("errors") or ())
        for run, label, style in zip(runs, labels, colours(runs), strict=True)
        if style is not None
    ]
    cuts = [cut for _, _, layers, _ in pruned for e in layers if (cut := number(e, "sparsity")) is not None]
    same = bool(cuts) and max(cuts) - min(cuts) < 0.002
    blocks = {e["name"]: e.get("block") for _, _, layers, _ in pruned for e in layers}
    errors, sparsities = _Panels(blocks), _Panels(blocks, merged=same)
    for label, style, layers, wrong in pruned:
        errors.add(label, style, wrong, "relative_error")
        sparsities.add(label, style, layers, "sparsity")
    legend = charts.key([label for label, *_ in pruned])
    parts = []
    if errors.lines:
        drawn = errors.draw(
            charts.log_axis(errors.values, lambda v: f"{v:g}"), small, height=150 + 14 * max(0, len(pruned) - 4)
        )
        parts.append(f"<section><h2>Error of each layer</h2><p>{ERRORS}</p>{legend}{drawn}</section>")
    if sparsities.lines:
        axis = charts.share_axis(sparsities.values)
        drawn = sparsities.draw(axis, lambda v: f"{v:.2%}", nested=True, height=105)
        text = SPARSITIES + (SAME if same else "")
        parts.append(f"<section><h2>Sparsity of each layer</h2><p>{text}</p>{legend}{drawn}</section>")
    return "\n".join(parts)


class _Panels:
    """Gathers (depth, value) by role and run: role is the layer's name inside its block, without numbers."""

    def __init__(self, blocks: Mapping[str, str | None], *, merged: bool = False) -> None:
        self.blocks = blocks
        self.merged = merged  # all roles in one panel
        self.lines: dict[tuple[str, ...], list[charts.Line]] = {}
        self.values: list[float] = []
        self.depths: list[int] = []

    def add(self, label: str, style: int, entries: Iterable[Mapping[str, Any]], key: str) -> None:
        points: dict[tuple[str, ...], list[tuple[float, float]]] = {}
        for entry in entries:
            value, place = number(entry, key), _place(str(entry["name"]), self.blocks.get(entry["name"]))
            if value is None or math.isinf(value) or place is None:
                continue
            role, depth = (("all layers",), place[1]) if self.merged else place
            points.setdefault(role, []).append((depth, value))
            self.values.append(value)
            self.depths.append(depth)
        for role, found in points.items():
            self.lines.setdefault(role, []).append(charts.Line(label, tuple(found), style))

    def draw(self, y: charts.Axis, value: Callable[[float], str], **look: Any) -> str:
        x = charts.depth_axis(self.depths)
        drawn = (
            charts.panel(_title(role, self.lines), lines, x, y, value=value, **look)
            for role, lines in self.lines.items()
        )
        return f'<div class="panels">{"".join(drawn)}</div>'


def _place(name: str, block: str | None) -> tuple[tuple[str, ...], int] | None:
    """The role of a layer and the depth of its block, None for a layer outside every block.

    >>> _place("model.layers.3.self_attn.q_proj", None)
    (('model', 'layers', '', 'self_attn', 'q_proj'), 3)
    """
    found = re.match(r"(.*?)\.?(\d+)$", block) if block else re.match(r"(.*?)\.?(\d+)(?=\.)", name)
    if not found or not name.startswith(found[0]):
        return None
    inside = [part for part in name[len(found[0]) :].split(".") if part and not part.isdigit()]
    return (*found[1].split("."), "", *inside), int(found[2])


def _title(role: tuple[str, ...], others: Iterable[tuple[str, ...]]) -> str:
    """The shortest end of the role that no other role shares.

    >>> _title(("layers", "", "attn", "q"), [("layers", "", "attn", "q"), ("layers", "", "cross", "q")])
    'attn.q'
    """
    rest = [other for other in others if other != role]
    for size in range(1, len(role)):
        if all(other[-size:] != role[-size:] for other in rest):
            return ".".join(part for part in role[-size:] if part)
    return ".".join(part for part in role if part)


def layer_table(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """Every layer's shape, sparsity and error as a folded table: the numbers of the charts, for copying."""
    rows: dict[str, dict[str, str]] = {}
    pruned = [(run, label) for run, label in zip(runs, labels, strict=True) if run.get("prune") is not None]
    for run, label in pruned:
        for entry in dig(run, "prune", "layers") or ():
            row = rows.setdefault(str(entry["name"]), {})
            row["shape"] = " × ".join(map(str, entry.get("shape") or ())) or DASH
            row[f"{label} sparsity"] = percent(number(entry, "sparsity"))
        for entry in run.get("errors") or ():
            error = number(entry, "relative_error")
            row = rows.setdefault(str(entry["name"]), {})
            row[f"{label} error"] = DASH if error is None else small(error)
    if not rows:
        return ""
    if len(rows) > MOST_ROWS:
        return f'<p class="note">{len(rows):,} layers are too many to list here; see the JSON record.</p>'
    columns = ["shape", *(f"{label} {what}" for _, label in pruned for what in ("sparsity", "error"))]
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in ("layer", *columns))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(cell(row.get(c, DASH)) for c in columns)}</tr>'
        for name, row in rows.items()
    )
    return (
        f'<details><summary>All {len(rows):,} layers as a table</summary><div class="wide">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )

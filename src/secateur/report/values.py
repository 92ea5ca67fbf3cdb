"""Reading a run, in which anything may be missing, and writing its numbers for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Run = Mapping[str, Any]
DASH = "–"


def dig(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def number(data: Any, *keys: str) -> float | None:
    found = dig(data, *keys)
    if isinstance(found, bool) or not isinstance(found, int | float) or math.isnan(found):
        return None
    return float(found)


def name_runs(runs: Sequence[Run]) -> list[str]:
    """The method's name, with whatever sets it apart from other runs of the same method.

    >>> wanda = [{"prune": {"method": {"name": "wanda"}, "pattern": pattern}} for pattern in ("2:4", "4:8")]
    >>> name_runs([{"prune": None}, *wanda])
    ['dense', 'wanda 2:4', 'wanda 4:8']
    """
    found = []
    for run in runs:
        label = _name(run)
        rivals = [(other, _traits(other)) for other in runs if other is not run and _name(other) == label]
        for k, trait in enumerate(_traits(run)):
            if any(trait != theirs[k] for _, theirs in rivals):
                label = f"{label} {trait}".rstrip()
                rivals = [(other, theirs) for other, theirs in rivals if theirs[k] == trait]
        found.append(label)
    return [f"{n} ({k + 1})" if found.count(n) > 1 else n for k, n in enumerate(found)]


def _name(run: Run) -> str:
    named = [dig(run, "prune", "method"), *(dig(run, "prune", "refine") or ())]
    usual = "dense" if run.get("prune") is None else " + ".join(str(n) for one in named if (n := dig(one, "name")))
    return str(run.get("name") or usual or "pruned")


def _traits(run: Run) -> tuple[str, ...]:
    """What can set two runs of one method apart, the most telling first."""
    target, allocation = number(run, "prune", "target"), dig(run, "prune", "allocation")
    return (
        "" if run.get("prune") is None else pattern(run).removeprefix("unstructured "),
        "" if target is None else percent(target),
        str(dig(run, "prune", "schedule") or ""),
        str(dig(allocation, "name") or ""),
        _options(allocation),
        _options(dig(run, "prune", "method")),
        " ".join(filter(None, map(_options, dig(run, "prune", "refine") or ()))),
    )


def _options(record: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in record.items() if k != "name") if isinstance(record, Mapping) else ""


def colours(runs: Sequence[Run]) -> list[int | None]:
    """The number of each pruned run's colour; the dense model has none."""
    pruned = [k for k, run in enumerate(runs) if run.get("prune") is not None]
    return [pruned.index(k) if k in pruned else None for k in range(len(runs))]


def pattern(run: Run) -> str:
    return str(dig(run, "prune", "pattern") or DASH)


def with_error(value: float | None, stderr: float | None, *, scale: float = 1.0, unit: str = "") -> str:
    """Two significant digits of the standard error decide how many digits the value shows."""
    if value is None:
        return DASH
    if math.isinf(value):
        return "∞"
    value, digits = value * scale, 4
    if stderr and math.isfinite(stderr):
        stderr *= scale
        digits = max(0, min(6, 1 - math.floor(math.log10(stderr))))
        return f"{value:,.{digits}f} ± {stderr:,.{digits}f}{unit}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(6, digits)}f}{unit}"


def percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}".replace(".0%", "%").replace("%", " %")


def duration(value: float | None) -> str:
    if value is None:
        return DASH
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02} s"


def gibibytes(value: float | None) -> str:
    return DASH if value is None else f"{value / 2**30:.2f} GiB"


def small(value: float) -> str:
    return f"{value:.2e}" if 0 < value < 1e-3 else f"{value:.3g}"


def said(value: Any) -> str | None:
    """Any part of a record in one line, None if there is nothing to say.

    >>> said({"name": "wanda", "variant": False, "seed": None})
    'name: wanda · variant: False'
    """
    if value is None or value == {} or value == [] or value != value:  # the last is nan
        return None
    if isinstance(value, Mapping):
        return " · ".join(f"{k}: {told}" for k, v in value.items() if (told := said(v)) is not None)
    if isinstance(value, list | tuple):
        return ", ".join(str(said(v)) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def listing(names: Any, most: int = 8) -> str:
    """Names, or names with their number of weights, as far as they fit into a sentence.

    >>> listing({"bias": 1200}), listing(["a", "b", "c"], most=2)
    ('bias (1,200 weights)', 'a, b and 1 more')
    """
    if isinstance(names, Mapping):
        names = [f"{name} ({count:,} weights)" for name, count in names.items()]
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def cell(text: str) -> str:
    if text == DASH:
        return f'<td class="none">{DASH}</td>'
    value, plus_minus, stderr = escape(text).partition(" ± ")
    return f"<td>{value} <small>± {stderr}</small></td>" if plus_minus else f"<td>{value}</td>"

"""Tables of the safety page, and how its numbers are written: shares, differences, intervals, p values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from secateur.report.frame import section
from secateur.report.values import DASH, cell, dig, number

MOST = 200  # prompts that are listed

CHANGED = """Prompts on which the first judge says something else of a pruned model than of the dense one; compliance
on a harmful prompt is an attack that succeeded."""


@dataclass(frozen=True)
class SafetyTexts:
    """What may be shown to people who asked for it: prompt id -> text, and arm -> prompt id -> answer."""

    prompts: Mapping[str, str]
    answers: Mapping[str, Mapping[str, str]]


@dataclass
class Table:
    """Rows of cells, all escaped; the first column is the row's heading, the first `left` are set to the left."""

    heads: Sequence[str]
    left: int = 1
    rows: list[str] = field(default_factory=list)

    def add(self, first: str, *cells: str, kind: str = "") -> None:
        """One row; `kind` is its class."""
        body = [
            f'<td class="left">{escape(text)}</td>' if k < self.left else _ranged(text)
            for k, text in enumerate(cells, 1)
        ]
        self.rows.append(f'<tr class="{kind}"><th scope="row">{escape(first)}</th>{"".join(body)}</tr>')

    def html(self) -> str:
        """The table in a box that scrolls."""
        head = "".join(
            f'<th scope="col"{" class=left" if k < self.left else ""}>{escape(name)}</th>'
            for k, name in enumerate(self.heads)
        )
        body = "".join(self.rows)
        tight = " tight" if len(self.heads) < 6 else ""
        return (
            f'<div class="wide"><table class="safety{tight}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )


def rows_of(items: str) -> str:
    """A list, if there is anything to list."""
    return f"<ul>{items}</ul>" if items else ""


def of_arms(labels: Mapping[str, str]) -> dict[str, int | None]:
    """The colour of each arm; the dense model has none."""
    return {arm: None if k == 0 else k - 1 for k, arm in enumerate(labels)}


def rate(found: Any, short: bool = False) -> str:
    """A share with its interval.

    >>> rate({"value": 0.25, "low": 0.1, "high": 0.5, "count": 5, "n": 20})
    '25.0 % [10, 50] (5/20)'
    >>> rate(None)
    '–'
    """
    value, low, high = (number(found, key) for key in ("value", "low", "high"))
    if value is None:
        return DASH
    span = "" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
    counts = "" if short else f" ({dig(found, 'count')}/{dig(found, 'n')})"
    return f"{100 * value:.1f} %{span}{counts}"


def points(value: float | None, sign: bool = True) -> str:
    """A difference of shares, in percentage points.

    >>> points(-0.1234), points(0.05, sign=False)
    ('-12.3', '5.0')
    """
    if value is None:
        return DASH
    return (f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}").replace("-0.0", "0.0").replace("+0.0", "0.0")


def plain(value: float | None, sign: bool = True) -> str:
    """A number with three decimals.

    >>> plain(0.1234), plain(None)
    ('+0.123', '–')
    """
    if value is None:
        return DASH
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def between(
    found: Any, written: Callable[..., str] = plain, *, key: str = "value", value: bool = True, sign: bool = True
) -> str:
    """An estimate with its interval.

    >>> between({"value": 0.1, "low": -0.05, "high": 0.25}, points)
    '+10.0 [-5.0, +25.0]'
    """
    if not isinstance(found, Mapping):
        return DASH
    middle, low, high = (number(found, name) for name in (key, "low", "high"))
    if middle is None and (value or low is None):
        return DASH
    span = "" if low is None or high is None else f"[{written(low, sign=sign)}, {written(high, sign=sign)}]"
    return " ".join(filter(None, (written(middle, sign=sign) if value else "", span))) or DASH


def p_value(value: float | None) -> str:
    """
    >>> p_value(0.2), p_value(0.00001), p_value(None)
    ('0.20', '< 0.0001', '–')
    """
    if value is None:
        return DASH
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"


def changed_section(summary: Mapping[str, Any], labels: Mapping[str, str], texts: SafetyTexts | None) -> str:
    """The prompts whose verdict changed; their texts only if they are given."""
    found = summary.get("changed") or ()
    if not found:
        return ""
    arms = list(dict.fromkeys(arm for each in found for arm in each["kinds"]))
    table = Table(["Prompt", "Label", "Category", "Template", *(labels.get(arm, arm) for arm in arms)], left=4)
    for each in found[:MOST]:
        table.add(
            str(each["prompt"]),
            str(each["label"]),
            str(each.get("category") or DASH),
            str(each.get("template") or "bare"),
            *(str(each["kinds"].get(arm, DASH)) for arm in arms),
        )
    more = f"<p>And {len(found) - MOST} more.</p>" if len(found) > MOST else ""
    hidden = (
        ""
        if texts
        else (
            " The texts are left out of this page; <code>secateur probe report DIR --show-text</code> puts them in, "
            "for people who may see them."
        )
    )
    shown = _texts(found[:MOST], arms, labels, texts) if texts else ""
    return section(
        "Prompts that are answered otherwise", f'<p class="note">{CHANGED}{hidden}</p>', table.html(), more, shown
    )


def _texts(found: Sequence[Any], arms: Sequence[str], labels: Mapping[str, str], texts: SafetyTexts) -> str:
    parts = []
    for each in found:
        name = str(each["prompt"])
        rows = "".join(
            f"<dt>{escape(labels.get(arm, arm))}</dt>"
            f'<dd class="said">{escape(texts.answers.get(arm, {}).get(name, DASH))}</dd>'
            for arm in arms
        )
        asked = escape(texts.prompts.get(name, DASH))
        parts.append(f'<div class="probe"><h3>{escape(name)}</h3><p class="said">{asked}</p><dl>{rows}</dl></div>')
    return f"<details><summary>Texts (sensitive)</summary>{''.join(parts)}</details>"


def _ranged(text: str) -> str:
    """The interval smaller than the value."""
    head, bracket, tail = text.partition(" [")
    if not bracket or " ± " in text:
        return cell(text)
    return f'<td class="estimate">{escape(head)} <small>[{escape(tail)}</small></td>'

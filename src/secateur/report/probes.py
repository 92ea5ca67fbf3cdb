"""What the models write after the same prompts, side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from secateur.report import charts
from secateur.report.values import Run, colours, dig

MOST = 1200  # characters of a continuation that a page shows

INTRO = """Each model goes on with the same prompt and always takes its likeliest token. Grey is what the pruned
model writes like the dense one; from the first difference on the two read different texts, so what follows shows
how a model writes, and measures nothing."""


def probe_section(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """The prompts that any run has probes of, each with the dense text and those of the pruned models."""
    found: dict[tuple[str, bool, str], list[tuple[str, int | None, Mapping[str, Any]]]] = {}
    for run, label, style in zip(runs, labels, colours(runs), strict=True):
        for probe in dig(run, "evaluate", "generation", "probes") or ():
            key = str(probe.get("prompt", "")), bool(probe.get("chat")), _tidy(probe.get("dense"))
            found.setdefault(key, []).append((label, style, probe))
    if not found:
        return ""
    most = max((dig(run, "evaluate", "generation", "tokens") or 0 for run in runs), default=0)
    parts = [f"<h2>What the models write</h2><p>{INTRO} At most {int(most)} tokens each.</p>"]
    for (prompt, chat, dense), theirs in found.items():
        kind = ' <span class="kind">through the chat template</span>' if chat else ""
        rows = [_row("dense", None, dense, 0)]
        for label, style, probe in theirs:
            text = _tidy(probe.get("pruned"))
            same = len(text) if probe.get("first_difference") is None else _shared(dense, text)
            rows.append(_row(label, style, text, same, _note(probe)))
        parts.append(f'<div class="probe"><h3>{escape(prompt)}{kind}</h3><dl>{"".join(rows)}</dl></div>')
    return f"<section>{''.join(parts)}</section>"


def _row(label: str, style: int | None, text: str, same: int, note: str = "") -> str:
    swatch = f'<i class="swatch {charts.colour(style)}"></i>'
    before = f'<span class="same">{escape(text[:same])}</span>' if same else ""
    written = before + escape(text[same:]) or "<i>nothing</i>"
    more = f' <span class="kind">{escape(note)}</span>' if note else ""
    return f"<dt>{swatch}{escape(label)}</dt><dd>{written}{more}</dd>"


def _note(probe: Mapping[str, Any]) -> str:
    first = probe.get("first_difference")
    if first is None:
        return "the same as the dense model"
    return f"differs after {first} token{'' if first == 1 else 's'}" if first else "differs at once"


def _shared(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _tidy(text: Any) -> str:
    """Without the empty lines that only make a page longer."""
    tidy = re.sub(r"\n\s*\n\s*\n", "\n\n", str(text or "")).strip("\n").rstrip()
    return tidy if len(tidy) <= MOST else tidy[:MOST] + " …"

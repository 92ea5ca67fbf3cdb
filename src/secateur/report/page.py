"""One self-contained HTML page about some pruning runs: what was cut, what it did, and how it was measured.

The page loads nothing: style and charts are inside, there is no script. All that comes from data is escaped.
A measure that is missing is a dash, never a zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from secateur.report import charts
from secateur.report.depth import layer_charts, layer_table
from secateur.report.frame import html_page, section
from secateur.report.probes import probe_section
from secateur.report.values import (
    Run,
    cell,
    colours,
    dig,
    duration,
    gibibytes,
    listing,
    name_runs,
    number,
    pattern,
    percent,
    said,
    small,
    with_error,
)

HEADS = (
    "Model",
    "Pattern",
    "Layers’ sparsity",
    "Model’s sparsity",
    "Perplexity",
    "JS divergence",
    "JS, 99 % of tokens below",
    "KL divergence",
    "Top-1 agreement",
    "Pruning time",
    "Peak memory",
)

MEASURES = """± is one standard error, over windows. JS and KL: how far the next-token predictions lie from the dense
model’s, per token, in nats (JS is at most 0.693; under “99 %” stands the value that one token in a hundred exceeds).
Top-1: how often both models put the same token first."""

NOT_COMPARABLE = """These perplexities were not measured on the same tokens (the text, its hash, the window
length or the number of tokens differ): do not compare them with each other."""

UNSTRUCTURED = """A model pruned without structure has the same file size as before and runs as fast as
before on ordinary kernels, which multiply by a stored zero as by any other number. A smaller file needs a
sparse format: with one bit per weight that says which weights stay, 50 % sparsity in bfloat16 takes 9 bits
per weight instead of 16. More speed needs kernels or an inference engine made for sparse weights, and they
usually pay off only well above 50 %."""

TWO_OF_FOUR = """A 2:4 model is saved as an ordinary one, so its file and its speed are unchanged too. GPUs
with sparse tensor cores (NVIDIA, Ampere or newer) can run it faster after its weights are converted to
their compressed format, for example with torch.sparse.to_sparse_semi_structured; nothing on this page was
measured that way."""

OTHER_NM = """n:m patterns other than 2:4 have no common hardware support: the model stays as large and as
slow as it was unless an inference engine has kernels of its own for them."""


def page(runs: Sequence[Run], *, title: str) -> str:
    """The report as one HTML document.

    Args:
        runs: one mapping per model, in the order of the table. Every key may be missing or None:
            `prune`: `PruneResult.to_dict()`, None for the dense model;
            `evaluate`: {"perplexity": {...}, "fidelity": {...}, "sparsity": {...}, "generation": {...}};
            `errors`: [{"name", "relative_error"}, ...], one per layer;
            `name`: shown instead of the method's name;
            `model`, `machine`: mappings that say where the model came from and what it ran on.
        title: the heading.

    Returns:
        the text of the file, UTF-8, without a link to any other file.

    >>> dense = {"prune": None, "evaluate": {"perplexity": {"value": 19.4, "stderr": 0.21}}}
    >>> html = page([dense], title="A & B")
    >>> "<h1>A &amp; B</h1>" in html, "19.40 <small>± 0.21<" in html
    (True, True)
    """
    labels = name_runs(runs)
    sections = (
        _results(runs, labels),
        layer_charts(runs, labels),
        probe_section(runs, labels),
        _left_dense(runs, labels),
        _size_and_speed(runs),
        _warnings(runs, labels),
        _provenance(runs, labels),
        layer_table(runs, labels),
    )
    return html_page(title, _lead(runs, labels), sections)


def _bullets(items: Sequence[tuple[str, str]]) -> str:
    return f"<ul>{''.join(f'<li><b>{escape(k)}</b>: {escape(v)}</li>' for k, v in items)}</ul>"


def _lead(runs: Sequence[Run], labels: Sequence[str]) -> str:
    model = next((name for run in runs if (name := dig(run, "model", "name"))), None)
    count = sum(run.get("prune") is not None for run in runs)
    lead = f"{count} pruned model{'' if count == 1 else 's'}" + (f" of {model}" if model else "")
    values = [(number(run, "evaluate", "perplexity", "value"), k) for k, run in enumerate(runs)]
    found = [(v, k) for v, k in values if v is not None]
    pruned = [(v, k) for v, k in found if runs[k].get("prune") is not None]
    dense = [k for _, k in found if runs[k].get("prune") is None]
    if len(pruned) > 1 and dense and len(_measured_on(runs)) == 1:
        best = min(pruned)[1]
        lead += f". Lowest perplexity: {labels[best]}, {_perplexity(runs[best])}"
        lead += f"; the dense model has {_perplexity(runs[dense[0]])}"
    return lead + "."


def _measured_on(runs: Iterable[Run]) -> list[tuple[Any, ...]]:
    """The different texts that perplexity was measured on: one, if the numbers can be compared."""
    found = (dig(run, "evaluate", "perplexity") for run in runs)
    keys = ("text", "split", "seqlen", "tokens", "sha256", "ids_sha256")
    return list(dict.fromkeys(tuple(p.get(k) for k in keys) for p in found if p))


def _results(runs: Sequence[Run], labels: Sequence[str]) -> str:
    rows, marks = [], []
    for run, label, style in zip(runs, labels, colours(runs), strict=True):
        value, stderr = (number(run, "evaluate", "perplexity", k) for k in ("value", "stderr"))
        perplexity = _perplexity(run)
        if value is not None and 0 < value < math.inf:
            marks.append((label, value, stderr, perplexity, style))
        cells = (
            pattern(run),
            *(percent(_sparsity(run, of)) for of in ("layers", "model")),
            perplexity,
            _fidelity(run, "js_divergence"),
            with_error(number(run, "evaluate", "fidelity", "js_quantiles", "0.99"), None),
            *(_fidelity(run, measure) for measure in ("kl_divergence", "top1_agreement")),
            duration(number(run, "prune", "seconds", "total")),
            gibibytes(number(run, "prune", "peak_memory_bytes")),
        )
        swatch = f'<i class="swatch {charts.colour(style)}"></i>'
        rows.append(f'<tr><th scope="row">{swatch}{escape(label)}</th>{"".join(map(cell, cells))}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in HEADS)
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    chart = ""
    if len(marks) > 1:
        ends = [v + k * (e or 0) for _, v, e, _, _ in marks for k in (-2, 2)]
        chart = "<h3>Perplexity</h3>" + charts.dots(marks, charts.log_axis(ends, lambda v: f"{v:,.10g}"))
    return section(
        "Results",
        f'<div class="wide"><table class="results">{table}</table></div>',
        _how_measured(runs),
        chart,
    )


def _perplexity(run: Run) -> str:
    return with_error(*(number(run, "evaluate", "perplexity", key) for key in ("value", "stderr")))


def _sparsity(run: Run, of: str) -> float | None:
    measured = number(run, "evaluate", "sparsity", of)
    return number(run, "prune", "sparsity", of) if measured is None else measured


def _fidelity(run: Run, measure: str) -> str:
    found = dig(run, "evaluate", "fidelity")
    value, stderr = number(found, measure), number(found, f"{measure}_stderr")
    if measure == "top1_agreement":
        return with_error(value, stderr, scale=100.0, unit=" %")
    return with_error(value, stderr)


def _how_measured(runs: Sequence[Run]) -> str:
    texts, how = _measured_on(runs), MEASURES
    if len(texts) == 1:
        text, split, seqlen, tokens, *_ = texts[0]
        part = f" ({split})" if split else ""
        counted = (
            " of responses" if "response" in {dig(run, "evaluate", "perplexity", "counted") for run in runs} else ""
        )
        count = f", {tokens:,} tokens{counted}" if isinstance(tokens, int) else ""
        windows = f" in windows of {seqlen}" if seqlen else ""
        how = f"Perplexity: per token, on {text or 'an unnamed text'}{part}{count}{windows}. {how}"
    warning = f'<p class="warn">{NOT_COMPARABLE}</p>' if len(texts) > 1 else ""
    return f'<p class="note">{escape(how)}</p>{warning}'


def _left_dense(runs: Sequence[Run], labels: Sequence[str]) -> str:
    found: dict[str, list[str]] = {}
    for run, label in zip(runs, labels, strict=True):
        facts = _dense_facts(run)
        if facts:
            found.setdefault("; ".join(facts) + ".", []).append(label)
    if not found:
        return ""
    intro = "Embeddings, the output head, norms and biases stay dense, and so does every layer that was excluded."
    return section("What was not pruned", f"<p>{intro}</p>", _bullets([(", ".join(k), v) for v, k in found.items()]))


def _dense_facts(run: Run) -> list[str]:
    prune, facts = run.get("prune"), []
    if prune is None:
        return []
    layers, model = (number(prune, "sparsity", of) for of in ("layers", "model"))
    if layers and model is not None:
        facts.append(f"{percent(1 - min(1.0, model / layers))} of all parameters lie outside the pruned layers")
    share = number(prune, "coverage", "share")
    if share is not None:
        facts.append(f"the engine saw {percent(share)} of the parameters of the blocks")
    whole = [entry["name"] for entry in prune.get("layers") or () if entry.get("sparsity") == 0]
    for key, what in (("unseen", "not seen"), ("uncalled", "used without being called")):
        if missed := dig(prune, "coverage", key):
            facts.append(f"{what}: {listing(missed)}")
    return [*facts, f"given no sparsity: {listing(whole)}"] if whole else facts


def _size_and_speed(runs: Sequence[Run]) -> str:
    patterns = {pattern(run) for run in runs if run.get("prune") is not None}
    grouped = {p for p in patterns if re.fullmatch(r"\d+:\d+", p)}
    texts = (
        UNSTRUCTURED if patterns - grouped else "",
        TWO_OF_FOUR if "2:4" in grouped else "",
        OTHER_NM if grouped - {"2:4"} else "",
    )
    return section("Size and speed", *(f"<p>{text}</p>" for text in texts if text)) if patterns else ""


def _warnings(runs: Sequence[Run], labels: Sequence[str]) -> str:
    every = [(k, str(w)) for r, k in zip(runs, labels, strict=True) for w in dig(r, "prune", "warnings") or ()]
    return section("Warnings", _bullets(every) if every else "<p>None.</p>")


def _provenance(runs: Sequence[Run], labels: Sequence[str]) -> str:
    rows = {"Model": [said(run.get("model")) for run in runs]}
    for measure in ("perplexity", "fidelity"):
        rows[f"{measure.capitalize()} on"] = [_text_of(dig(run, "evaluate", measure)) for run in runs]
    for key in ("method", "refine", "schedule", "allocation", "calibration", "dtype", "device", "seconds", "versions"):
        rows[key.capitalize()] = [said(dig(run, "prune", key)) for run in runs]
    for k, run in enumerate(runs):
        if run.get("prune") is not None and rows["Calibration"][k] is None:
            rows["Calibration"][k] = "none"
    rows["Output error of layers"] = [_output_error(run) for run in runs]
    rows["Machine"] = [said(run.get("machine")) for run in runs]
    listed = []
    for name, values in rows.items():
        groups: dict[str, list[str]] = {}
        for label, value in zip(labels, values, strict=True):
            if value:
                groups.setdefault(value, []).append(label)
        if groups:
            same = escape(next(iter(groups)))
            each = _bullets([(", ".join(owners), value) for value, owners in groups.items()])
            listed.append(f"<dt>{name}</dt><dd>{same if len(groups) == 1 else each}</dd>")
    return section("Provenance", f"<dl>{''.join(listed)}</dl>") if listed else ""


def _output_error(run: Run) -> str | None:
    """What the refinements won, over the layers that have been refined."""
    found = [layer.get("output_error") for layer in dig(run, "prune", "layers") or ()]
    pairs = [(number(error, "before"), number(error, "after")) for error in found if error]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not known:
        return None
    before, after = (sum(values) / len(known) for values in zip(*known, strict=True))
    return (
        f"E|(W - W0) x|² / E|W0 x|² on the calibration inputs, mean over {len(known)} refined layers: "
        f"{small(before)} before the refinements, {small(after)} after"
    )


def _text_of(measured: Any) -> str | None:
    numbers = ("value", "nll", "js_divergence", "js_quantiles", "kl_divergence", "top1_agreement")
    if not isinstance(measured, Mapping):
        return None
    return said({k: v for k, v in measured.items() if k not in numbers and not k.endswith("stderr")})

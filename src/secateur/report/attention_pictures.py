"""The pictures of `attention_page` as PNG files, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.cache import scratch_beside, sync
from secateur.errors import SaveFailure, UsageError
from secateur.report.attention_page import FAMILIES, MEASURES, AttentionReport, Measure, by_layer, curves

DOTS = 150  # an inch


def write_pictures(report: AttentionReport, folder: str | Path) -> tuple[Path, ...]:
    """Heat maps of every kind of attention and plan, and the curves of quality, into a folder; it is made if needed.

    Files of the same names are replaced, each in one step.

    Raises:
        UsageError: matplotlib is not installed, or there is nothing to draw.
        SaveFailure: the folder cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("Pictures need matplotlib: pip install 'secateur[attention]'.") from error
    figures: dict[str, Any] = {}
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 8}):
        for name, found in report.analyses.items():
            for family, sites in by_layer(found).items():
                figures[f"observed_{name}_{family}"] = _maps(Figure, f"{FAMILIES.get(family, family)}: {name}", sites)
        for name, plan in report.plans.items():
            heads = dict((plan.get("report") or {}).get("heads") or {})
            if heads:
                kept = Measure("kept", "Blocks kept")
                rows = [{"kept": values} for values in heads.values()]
                figures[f"kept_{name}"] = _maps(Figure, f"Blocks kept by {name}", rows, (kept,))
        for title, points in curves(report.evaluations).items():
            figures[f"quality_{title}"] = _curves(Figure, title, points)
        if not figures:
            raise UsageError("There is nothing to draw: name observations, plans or evaluations.")
        target = Path(folder).expanduser().resolve()
        written = []
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name, figure in figures.items():
                file = target / f"{_slug(name)}.png"
                with scratch_beside(file) as scratch:
                    FigureCanvasAgg(figure)
                    figure.savefig(scratch / file.name, dpi=DOTS)
                    sync(scratch / file.name)
                    (scratch / file.name).replace(file)
                written.append(file)
        except OSError as error:
            raise SaveFailure(f"The pictures could not be written to {target}: {error}.") from error
    return tuple(written)


def _slug(name: str) -> str:
    """
    >>> _slug("quality_BLEU, 24 tokens/x")
    'quality_bleu_24_tokens_x'
    """
    return "_".join("".join(c if c.isalnum() or c == "-" else " " for c in name.lower()).split())


def _maps(
    figure_class: Any, title: str, sites: Sequence[Mapping[str, Any]], measures: Sequence[Measure] = MEASURES
) -> Any:
    from matplotlib.ticker import MaxNLocator

    shown = [measure for measure in measures if any(site.get(measure.key) for site in sites)]
    columns = min(3, len(shown)) or 1
    rows = math.ceil(len(shown) / columns) or 1
    tall = min(4.5, 1.3 + 0.14 * len(sites))
    figure = figure_class(figsize=(3.4 * columns, tall * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for place, measure in enumerate(shown, 1):
        values = [site.get(measure.key) or () for site in sites]
        wide = max(map(len, values))
        grid = [[*row, *[math.nan] * (wide - len(row))] for row in values]
        axes = figure.add_subplot(rows, columns, place)
        image = axes.imshow(
            grid, aspect="auto", cmap="viridis", vmin=0.0 if measure.unit else None, interpolation="nearest"
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(measure.title, wrap=True)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes)
    return figure


def _curves(figure_class: Any, title: str, points: Sequence[tuple[str, int, float, float]]) -> Any:
    lengths = sorted({length for _, length, _, _ in points})
    figure = figure_class(figsize=(3.8 * len(lengths), 3.2), layout="constrained")
    for place, length in enumerate(lengths, 1):
        axes = figure.add_subplot(1, len(lengths), place)
        for number, label in enumerate(dict.fromkeys(label for label, _, _, _ in points)):
            line = sorted((share, value) for name, size, share, value in points if (name, size) == (label, length))
            if line:
                axes.plot(*zip(*line, strict=True), marker="osD^v*X"[number % 7], label=label, markersize=4)
        if title.startswith("Perplexity"):
            axes.set_yscale("log")
        axes.set_title(f"{title}, {length} tokens")
        axes.set_xlabel("effective sparsity")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure

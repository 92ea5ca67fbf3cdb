"""Perplexity of pruned models, methods and schedules side by side, from one calibration set.

    python benchmarks/quality.py [--samples 128] [--seqlen 2048] [--windows 48] [--wikitext PATH]

Texts: the test books of `gutenberg`, and wikitext2's raw test split when a file is given (the hub's by name
otherwise, where it answers). Writes results/NAME.json after every model; the same request goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from machine import RESULTS, store
from rich.console import Console
from rich.table import Table

from secateur.data.calibration import calibration
from secateur.errors import SecateurError
from secateur.evaluate import fidelity, perplexity
from secateur.masks import parse_pattern
from secateur.methods import make_method
from secateur.models.load import load, resolve
from secateur.pruning import prune

CASES = (  # method, pattern (None: the method's own), schedule
    ("magnitude", None, None),
    ("wanda", None, "sequential"),
    ("sparsegpt", None, "sequential"),
    ("wanda", None, "block"),
    ("sparsegpt", None, "block"),
    ("ria", None, "sequential"),
    ("wanda", "2:4", "sequential"),
    ("sparsegpt", "2:4", "sequential"),
)


def measures(model: Any, dense: Any, tokenizer: Any, texts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on every text, and fidelity on the first."""
    asked: dict[str, Any] = {"seqlen": options.seqlen, "windows": options.windows}
    found: dict[str, Any] = {text: perplexity(model, tokenizer, text, **asked).to_dict() for text in texts}
    if model is not dense:
        few = asked | {"windows": min(8, options.windows or 8)}
        found["fidelity"] = fidelity(model, dense, tokenizer, texts[0], **few).to_dict()
    return found


def row(table: Table, name: tuple[str, ...], found: dict[str, Any], texts: list[str], seconds: str) -> None:
    close = found.get("fidelity")
    table.add_row(
        *name,
        *(f"{found[text]['value']:.2f} ± {found[text]['stderr']:.2f}" for text in texts),
        *((f"{close['js_divergence']:.4f}", f"{close['top1_agreement']:.3f}") if close else ("0", "1")),
        seconds,
    )


def earlier(name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run with these settings that was stopped."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record["rows"] if all(record.get(key) == value for key, value in settings.items()) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--wikitext", default="../shared/data/text/wikitext2_raw_test.txt")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    parser.add_argument("--name", default="quality", help="of the file in results/")
    options = parser.parse_args()
    console = Console()
    texts = ["gutenberg", options.wikitext if Path(options.wikitext).exists() else "wikitext2"]
    source = resolve(options.model)
    dense, tokenizer = load(source, dtype=options.dtype)
    ids = calibration(tokenizer, "gutenberg", n=options.samples, seqlen=options.seqlen, model=dense)
    table = Table(
        "method", "pattern", "schedule", *(Path(t).stem for t in texts), "JS (nats)", "top-1", "seconds to prune"
    )
    settings = {
        "model": source.description, "dtype": options.dtype, "calibration": ids.record, "sparsity": options.sparsity,
        "windows": options.windows, "texts": texts,
    }  # fmt: skip
    rows = earlier(options.name, settings)
    for case in (("dense", None, None), *CASES[: options.cases]):
        method, pattern, schedule = case
        done = next((r for r in rows if r["case"] == list(case)), None)
        if done is None:
            model, about = dense, {"pattern": "-", "schedule": "-", "seconds": None}
            if method != "dense":
                model = copy.deepcopy(dense)
                share = {"pattern": parse_pattern(pattern)} if pattern else {"sparsity": options.sparsity}
                result = prune(model, make_method(method), ids, schedule=schedule, **share)
                about = {"pattern": result.pattern, "schedule": result.schedule, "seconds": result.seconds}
            try:
                found = measures(model, dense, tokenizer, texts, options)
            except SecateurError as error:
                raise SystemExit(f"quality: {error}") from error
            done = {"case": list(case), "method": method} | about | found
            rows.append(done)
            store(options.name, settings | {"rows": rows})
        seconds = f"{done['seconds']['total']:.0f}" if done["seconds"] else "-"
        row(table, (method, done["pattern"], done["schedule"]), done, texts, seconds)
        console.print(f"{method} {done['pattern']} {done['schedule']}: {done[texts[0]]['value']:.2f}")
    console.print(table)
    console.print(f"{source.description}; calibration {options.samples} x {options.seqlen} gutenberg; {options.dtype}")


if __name__ == "__main__":
    main()

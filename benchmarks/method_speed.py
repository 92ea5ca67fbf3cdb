"""What the dearer methods cost, as multiples of one plain forward pass, each measured in turns with it.

    python benchmarks/method_speed.py [--samples 16] [--seqlen 1024] [--repeats 1] [--dtype float32]

Two bounds: gblm takes at most 3.5 forward passes more than wanda, and wanda with refit at most 1.5 times what sparsegpt
takes. The pass of gblm's loss goes through the head as well: `with head` says what that is in the same unit.
Writes results/method_speed.json.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from machine import store
from prune_speed import forward_seconds, measure
from rich.console import Console
from rich.table import Table

from secateur.data.calibration import calibration
from secateur.methods import make_method
from secateur.models.load import load
from secateur.refinements.refit import Refit
from secateur.refinements.swap import Swap

CASES: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (  # label, method, its options, arguments of prune
    ("wanda", "wanda", {}, {}),
    ("sparsegpt", "sparsegpt", {}, {}),
    ("wanda + refit", "wanda", {}, {"refine": (Refit(),)}),
    ("gblm", "gblm", {"checkpointing": "never"}, {}),
    ("gblm, checkpointed", "gblm", {"checkpointing": "always"}, {}),
    ("wanda + swap + refit", "wanda", {}, {"refine": (Swap(), Refit())}),
    ("besa", "besa", {}, {}),
)


def with_head(model: Any, ids: torch.Tensor) -> float:
    """Seconds of one plain pass that ends in logits."""
    started = time.perf_counter()
    with torch.no_grad():
        for row in ids.split(1):
            model(input_ids=row, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32", help="bfloat16 only where the processor multiplies it")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    options = parser.parse_args()
    console = Console()
    dense, tokenizer = load(options.model, dtype=options.dtype)
    ids = calibration(tokenizer, "gutenberg", n=options.samples, seqlen=options.seqlen, model=dense).ids
    forward_seconds(dense, ids[:1])  # warm
    head = with_head(dense, ids) / forward_seconds(dense, ids)
    rows: dict[str, dict[str, Any]] = {}
    table = Table("method", "forward passes", "forward pass", "gradients", "select", "refine", "peak")
    for label, name, own, asked in CASES[: options.cases]:
        found = rows[label] = measure(dense, ids, make_method(name, **own), options.repeats, **asked)
        seconds = found["seconds"]
        parts = (f"{seconds.get(key, 0.0):.1f} s" for key in ("forward_pass", "gradients", "select", "refine"))
        table.add_row(label, f"{found['ratio']:.2f}", *parts, f"{found['peak_bytes'] / 1e9:.2f} GB")
        console.print(f"{label}: {found['ratio']:.2f} forward passes", highlight=False)
        record = {"asked": vars(options), "with_head": head, "rows": rows}
        store("method_speed", record)
    console.print(table)
    beyond = {label: found["ratio"] - rows["wanda"]["ratio"] for label, found in rows.items() if "gblm" in label}
    refit = rows["wanda + refit"]["seconds"]["total"] / rows["sparsegpt"]["seconds"]["total"]
    console.print(f"with head: {head:.2f} passes through the blocks", highlight=False)
    for label, passes in beyond.items():
        console.print(f"{label} beyond wanda: {passes:.2f} passes, {passes / head:.2f} with head; bound 3.5")
    console.print(f"wanda + refit / sparsegpt: {refit:.2f}, bound 1.5", highlight=False)


if __name__ == "__main__":
    main()

"""What pruning costs, as a multiple of one plain forward pass of the same tokens through the blocks.

    python benchmarks/prune_speed.py [--model smollm2] [--repeats 3] [--tokens 16 64] [--seqlen 1024]

Every ratio comes from one run: forward pass, pruning, forward pass, in turns; the median of the pairs is printed.
Peak memory is measured in a process of its own. Writes results/prune_speed.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from machine import store
from rich.console import Console
from rich.table import Table

from secateur.data.calibration import calibration
from secateur.inputs import batches_of
from secateur.memory import peak_memory
from secateur.methods import Method, make_method
from secateur.models.load import load
from secateur.pruning import prune
from secateur.scout import run

BOUNDS = {  # (method, schedule, dtype, samples) -> the ratio issue 2 asks for
    ("wanda", "sequential", "bfloat16", 16): 1.15,
    ("wanda", "sequential", "float32", 16): 1.15,
    ("wanda", "block", "bfloat16", 16): 2.2,
    ("wanda", "block", "float32", 16): 2.2,
    ("sparsegpt", "sequential", "float32", 16): 2.0,
}


def forward_seconds(model: Any, ids: torch.Tensor) -> float:
    """One plain pass of all sequences, one at a time, through the blocks and no head."""
    started = time.perf_counter()
    with torch.no_grad():
        for batch in batches_of(model, ids):
            run(model, batch)
    return time.perf_counter() - started


def measure(dense: Any, ids: torch.Tensor, method: Method, repeats: int, **asked: Any) -> dict[str, Any]:
    """Pruning, asked for by the arguments of `prune`, against the mean of the forward passes before and after it."""
    ratios, runs, peaks = [], [], []
    before = forward_seconds(dense, ids)
    for _ in range(repeats):
        model = copy.deepcopy(dense)
        result = prune(model, method, ids, sparsity=0.5, **asked)
        after = forward_seconds(dense, ids)
        ratios.append(result.seconds["total"] / ((before + after) / 2))
        runs.append({"forward_pass": (before + after) / 2} | result.seconds)
        peaks.append(result.peak_memory_bytes)
        before = after
    middle = sorted(range(repeats), key=ratios.__getitem__)[repeats // 2]
    return {"ratio": statistics.median(ratios), "ratios": ratios, "seconds": runs[middle], "peak_bytes": max(peaks)}


def memory(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Peak of a Wanda run in a fresh process, against the model, four times the boundary activations and 300 MB."""
    words = [sys.executable, __file__, "--peak", dtype, "--model", options.model, "--seqlen", str(options.seqlen)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak(options: argparse.Namespace) -> None:
    """The child of `memory`: imports, loads, prunes, prints one JSON line."""
    with peak_memory(torch.device("cpu")) as libraries:
        import transformers.models.llama.modeling_llama  # noqa: F401
    model, tokenizer = load(options.model, dtype=options.peak)
    ids = calibration(tokenizer, "gutenberg", n=16, seqlen=options.seqlen).ids
    result = prune(model, make_method("wanda"), ids, sparsity=0.5)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    boundary = ids.numel() * model.config.hidden_size * next(model.parameters()).element_size()
    bound = weights + 4 * boundary + 300_000_000
    print(
        json.dumps(
            {
                "peak": result.peak_memory_bytes,
                "model": weights,
                "boundary": boundary,
                "libraries": libraries.host,
                "bound": bound,
                "beyond_model_and_libraries_in_boundaries": (result.peak_memory_bytes - weights - libraries.host)
                / boundary,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return peak(options)
    console = Console()
    table = Table("dtype", "tokens", "method", "schedule", "ratio", "bound", "forward pass", "of it: collect", "select")
    rows = []
    for dtype in options.dtypes:
        dense, tokenizer = load(options.model, dtype=dtype)
        for samples in options.samples:
            ids = calibration(tokenizer, "gutenberg", n=samples, seqlen=options.seqlen).ids
            forward_seconds(dense, ids[:1])  # warm
            cases = [("wanda", "sequential"), ("wanda", "block"), ("sparsegpt", "sequential"), ("sparsegpt", "block")]
            for method, schedule in cases if samples == options.samples[0] else [("wanda", "sequential")]:
                found = measure(dense, ids, make_method(method), options.repeats, schedule=schedule)
                bound = BOUNDS.get((method, schedule, dtype, samples))
                rows.append({"dtype": dtype, "tokens": ids.numel(), "method": method, "schedule": schedule} | found)
                seconds = found["seconds"]
                table.add_row(
                    dtype, f"{samples} x {options.seqlen}", method, schedule, f"{found['ratio']:.2f}",
                    f"{bound:.2f}" if bound else "-",
                    *(f"{seconds[k]:.2f} s" for k in ("forward_pass", "collect", "select")),
                )  # fmt: skip
                console.print(f"{dtype} {samples} {method} {schedule}: {found['ratio']:.2f}")
    memories = {dtype: memory(options, dtype) for dtype in options.dtypes}
    console.print(table)
    for dtype, m in memories.items():
        mega = {
            name: f"{value / 1e6:.0f}" for name, value in m.items() if name in ("peak", "bound", "model", "boundary")
        }
        console.print(
            f"peak memory, Wanda, 16 x {options.seqlen}, {dtype}: {mega['peak']} MB; bound {mega['bound']} = "
            f"model {mega['model']} + 4 x {mega['boundary']} + 300 (libraries alone: {m['libraries'] / 1e6:.0f})"
        )
    console.print(f"written to {store('prune_speed', {'rows': rows, 'memory': memories})}")


if __name__ == "__main__":
    main()

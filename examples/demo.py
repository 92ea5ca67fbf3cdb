"""Prune one model in three ways, measure each against the dense model, and write one page.

    python examples/demo.py                      # SmolLM2-135M-Instruct, 50 %, some minutes on two cores
    python examples/demo.py --model FOLDER --sparsity 0.6 --out demo

Writes OUT/index.html, the page, and OUT/results.json, all the numbers in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from secateur import DensePredictions, calibration, generation, layer_errors, load, measure, prune, read_text, sparsity
from secateur.data.calibration import windows
from secateur.errors import SecateurError
from secateur.evaluate import continuations
from secateur.methods import Method, make_method
from secateur.models.load import resolve
from secateur.report import page

T = TypeVar("T")


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prune one model in several ways, measure each against the dense model, write one page.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="a built-in name, folder, .gguf file or hub id")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt"], metavar="METHOD")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of the layers' weights to remove")
    parser.add_argument("--text", default="gutenberg", help="for calibration and, another part of it, for measuring")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens in a sequence or window")
    parser.add_argument("--windows", type=int, default=12, help="windows that are measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="fastest", help="fastest: the faster of bfloat16 and float32, tried here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the page and the numbers")
    return parser.parse_args(arguments)


class Steps:
    """The steps of the demo, each with a bar and an estimate on a terminal, else a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.begun = self.said = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, total=total)
        elif 0 < done < total and now - self.said > 10:
            self.said, left = now, (now - self.begun) * (total - done) / done
            self.console.print(f"    {done / total:.0%}, about {left:.0f} s left", highlight=False)

    def run(self, name: str, work: Callable[[], T]) -> T:
        """Do one step and say how long it took."""
        self.begun = self.said = time.perf_counter()
        if self.console.is_terminal:
            columns = (TextColumn("  {task.description}", markup=False), BarColumn(), TaskProgressColumn())
            left = (TimeRemainingColumn(compact=True), TextColumn("left"))
            with Progress(*columns, *left, console=self.console, transient=True) as self.bar:
                self.bar.add_task(name, total=None)
                found = work()
            self.bar = None
        else:
            self.console.print(f"  {name} ...", highlight=False, markup=False)
            found = work()
        spent = time.perf_counter() - self.begun
        self.console.print(f"  {name}: {spent:.1f} s", highlight=False, markup=False)
        return found


def faster_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it quickly, float32 where it would only emulate it."""

    def seconds(dtype: torch.dtype) -> float:
        x, w = torch.ones(512, 1024, dtype=dtype, device=device), torch.ones(1024, 1024, dtype=dtype, device=device)
        spent = []
        for _ in range(4):
            begun = time.perf_counter()
            torch.nn.functional.linear(x, w)[0, 0].item()
            spent.append(time.perf_counter() - begun)
        return min(spent)

    return min((torch.bfloat16, torch.float32), key=seconds)


def machine() -> dict[str, object]:
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    }


def demo(asked: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """All runs, the dense model first, as `secateur.report.page` reads them."""
    steps = Steps(console)
    methods = [make_method(name) for name in asked.methods]
    dtype = faster_dtype(asked.device) if asked.dtype == "fastest" else asked.dtype
    source = steps.run(f"finding {asked.model}", lambda: resolve(asked.model, progress=steps))
    console.print(f"  {source.description}", highlight=False)
    dense, tokenizer = steps.run("loading", lambda: load(source, dtype=dtype, device=asked.device))
    about = asdict(source) | {"dtype": str(dense.dtype).removeprefix("torch."), "device": asked.device}
    ids = steps.run(
        f"calibration: {asked.samples} x {asked.seqlen} tokens of {asked.text}",
        lambda: calibration(tokenizer, asked.text, asked.samples, asked.seqlen, asked.seed, model=dense),
    )
    test = steps.run(f"reading the test part of {asked.text}", lambda: read_text(asked.text, "test"))
    few = windows(tokenizer, test, min(256, asked.seqlen), 1).ids
    measured: dict[str, Any] = {"seqlen": asked.seqlen, "windows": asked.windows, "progress": steps}

    kept = steps.run("dense: predictions", lambda: DensePredictions(dense, tokenizer, test, **measured))
    written = steps.run("dense: going on with some prompts", lambda: continuations(dense, tokenizer, progress=steps))

    def result(model: Any, name: str) -> dict[str, Any]:
        value, close = steps.run(
            f"{name}: perplexity and fidelity", lambda: measure(model, kept, tokenizer, progress=steps)
        )
        zeros = {k: v for k, v in sparsity(model).to_dict().items() if k != "per_layer"}
        found = {"perplexity": value.to_dict(), "fidelity": None, "sparsity": zeros, "generation": None}
        run = {"prune": None, "evaluate": found, "errors": None, "model": about, "machine": machine()}
        if model is not dense:
            probes = steps.run(f"{name}: going on with the prompts", lambda: generation(model, written, tokenizer))
            found["fidelity"], found["generation"] = close.to_dict(), probes.to_dict()
        return run

    def pruned(method: Method) -> dict[str, Any]:
        name, model = method.name(), copy.deepcopy(dense)
        share = {"sparsity": asked.sparsity, "progress": steps}
        cut = steps.run(f"{name}: pruning", lambda: prune(model, method, ids, **share))
        run = result(model, name)
        moved = steps.run(f"{name}: errors per layer", lambda: layer_errors(model, dense, few))
        run["prune"] = cut.to_dict()
        run["errors"] = [{"name": layer.name, "relative_error": layer.error} for layer in moved]
        return run

    return [result(dense, "dense"), *map(pruned, methods)]


def table(runs: list[dict[str, Any]], title: str) -> Table:
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("model")
    for head in ("sparsity", "perplexity", "JS (nats)", "KL (nats)", "top-1", "pruning", "peak"):
        drawn.add_column(head, justify="right")
    for run in runs:
        cut, measures = run["prune"], run["evaluate"]
        value, close = measures["perplexity"], measures["fidelity"] or {}
        error = "" if value["stderr"] is None else f" ± {value['stderr']:.2f}"
        drawn.add_row(
            cut["method"]["name"] if cut else "dense",
            f"{measures['sparsity']['layers']:.1%}",
            f"{value['value']:.2f}{error}",
            *(f"{close[k]:.4f}" if close else "–" for k in ("js_divergence", "kl_divergence")),
            f"{close['top1_agreement']:.1%}" if close else "–",
            f"{cut['seconds']['total']:.1f} s" if cut else "–",
            f"{cut['peak_memory_bytes'] / 2**30:.2f} GiB" if cut else "–",
        )
    return drawn


def main(arguments: list[str] | None = None) -> int:
    asked = options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 100)
    begun = time.perf_counter()
    title = f"{asked.model} pruned to {asked.sparsity:.0%}".replace("%", " %")
    try:
        runs = demo(asked, console)
    except SecateurError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    console.print(table(runs, title))
    asked.out.mkdir(parents=True, exist_ok=True)
    results, html = asked.out / "results.json", asked.out / "index.html"
    results.write_text(json.dumps({"title": title, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    html.write_text(page(runs, title=title), encoding="utf-8")
    console.print(
        f"{time.perf_counter() - begun:.0f} s in all. The page: {html}   The numbers: {results}", soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

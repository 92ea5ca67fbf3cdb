"""How much of the perplexity that a cut costs comes back, with which share of the parameters, and how fast.

    python benchmarks/recovery.py [--steps 50] [--lr 2e-3] [--train adapters norms biases] [--adapter masked]

Magnitude-pruned model, trained on the calibration books of `gutenberg`, measured on its test books. The zeros are
counted layer by layer before and after, by their places. Writes results/NAME.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from machine import store
from rich.console import Console
from rich.table import Table

from secateur.cli.progress_bar import ProgressBar
from secateur.evaluate import perplexity
from secateur.methods import make_method
from secateur.models.layers import find_layers
from secateur.models.load import load, resolve
from secateur.models.save import save
from secateur.pruning import prune
from secateur.recovering import recover
from secateur.recovery.options import Recovery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seqlen", type=int, default=512, help="of measuring")
    parser.add_argument("--train-seqlen", type=int, default=256)
    parser.add_argument("--train", nargs="+", default=["adapters", "norms", "biases"])
    parser.add_argument("--adapter", default="masked")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--name", default="recovery", help="of the file in results/")
    asked = parser.parse_args()
    source = resolve(asked.model)
    model, tokenizer = load(source, dtype=asked.dtype)
    options = Recovery(
        train=tuple(asked.train), adapter=asked.adapter, rank=asked.rank, steps=asked.steps, lr=asked.lr,
        batch_size=asked.batch_size,
    )  # fmt: skip
    measure = {"seqlen": asked.seqlen, "windows": asked.windows}
    console = Console()

    dense = perplexity(model, tokenizer, "gutenberg", **measure)
    console.print(f"dense      {dense}")
    pruning = prune(model, make_method(asked.method), sparsity=asked.sparsity)
    pruned = perplexity(model, tokenizer, "gutenberg", **measure)
    console.print(f"pruned     {pruned}")
    dropped = {layer.name: layer.weight == 0 for layer in find_layers(model)}
    spent = time.process_time()
    with ProgressBar() as progress:
        result = recover(
            model, tokenizer, "gutenberg", pruning, options, seqlen=asked.train_seqlen, held_out=0, progress=progress
        )
    spent = time.process_time() - spent
    with TemporaryDirectory() as folder:  # what is measured is what a user loads
        save(model, tokenizer, Path(folder) / "recovered", record=pruning.to_dict())
        model, tokenizer = load(Path(folder) / "recovered")
    lost = sum(int((dropped[layer.name] & (layer.weight != 0)).sum()) for layer in find_layers(model))
    recovered = perplexity(model, tokenizer, "gutenberg", **measure)
    console.print(f"recovered  {recovered}")
    share = (pruned.value - recovered.value) / (pruned.value - dense.value)
    zeros = sum(int(where.sum()) for where in dropped.values())
    speed = result.tokens / result.seconds["training"]

    table = Table(
        "", "perplexity", "of the loss recovered", "parameters trained", "minutes (CPU)", "tokens/s", "zeros lost"
    )
    table.add_row("dense", f"{dense.value:.2f} ± {dense.stderr:.2f}")
    table.add_row("pruned", f"{pruned.value:.2f} ± {pruned.stderr:.2f}", "0 %")
    table.add_row(
        "recovered", f"{recovered.value:.2f} ± {recovered.stderr:.2f}", f"{share:.1%}", f"{result.share:.3%}",
        f"{result.seconds['total'] / 60:.1f} ({spent / 60:.1f})", f"{speed:.0f}", f"{lost} of {zeros}",
    )  # fmt: skip
    console.print(table)
    store(
        asked.name,
        {
            "model": source.description, "dtype": asked.dtype, "asked": vars(asked), "dense": dense.to_dict(),
            "pruned": pruned.to_dict(), "recovered": recovered.to_dict(), "recovered_share": share,
            "tokens_per_second": speed, "cpu_minutes": spent / 60, "zeros_lost": lost, "recovery": result.to_dict(),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()

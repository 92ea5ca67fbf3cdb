"""Whether an allocation pays: divergence from the dense model and perplexity at one sparsity, paired with uniform.

    python benchmarks/allocations.py [--sparsities 0.7 0.6] [--samples 8] [--windows 8] [--seqlen 256]

Small and quick on purpose: Wanda's scores from one dense pass choose the masks, so that a line costs one pass over
the test windows. Calibrated on the training books of `gutenberg`, measured on windows spread over its test books.
Writes results/allocations.json.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from machine import store
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.allocation import Allocation, Evidence, Owl, Uniform
from secateur.allocation.alpha import Alpha
from secateur.allocation.atp import Atp
from secateur.allocation.descent import Descent
from secateur.allocation.owl import wanda_score
from secateur.data.calibration import calibration, windows
from secateur.divergence import kl_divergence
from secateur.inputs import batches_of
from secateur.masks import Unstructured
from secateur.models.layers import Layer, find, select
from secateur.models.load import load
from secateur.statistics import Bundle, SecondMoment
from secateur.walk import walk

CASES: tuple[Allocation, ...] = (
    Uniform(), Owl(), Alpha(), Alpha(epsilon=0.1), Descent(steps=4, tokens=512), Atp(), Owl(bound=0.04),
)  # fmt: skip


class Bench:
    """The dense model, its statistics and its predictions."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.model, tokenizer = load(asked.model, dtype=asked.dtype)
        self.layers = select(find(self.model), ("all",), ())[0]
        ids = calibration(tokenizer, "gutenberg", n=asked.samples, seqlen=asked.seqlen, model=self.model)
        self.batches = batches_of(self.model, ids)
        every = windows(tokenizer, "gutenberg", asked.seqlen).ids
        self.test = every[:: len(every) // asked.windows][: asked.windows]
        self.seen: dict[Layer, SecondMoment] = {}
        walk(
            self.model, self.batches, self.layers, blocks=find(self.model).blocks,
            collector=lambda: Bundle((SecondMoment,)), visit=self._remember, schedule="oneshot",
        )  # fmt: skip
        self.dense = {layer: layer.weight.clone() for layer in self.layers}
        self.predictions = [self._logits(row) for row in self.test]

    def _remember(self, arrivals: list[Any]) -> None:
        self.seen.update({arrival.layer: arrival.seen[SecondMoment] for arrival in arrivals})

    def _logits(self, row: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=row[None], use_cache=False).logits[0]

    def measure(self, given: dict[Layer, float]) -> Tensor:
        """(windows, 2): KL to the dense model and log-loss, means over the tokens of each window."""
        for layer, weight in self.dense.items():
            score = wanda_score(weight, self.seen.get(layer))
            layer.weight.copy_(weight * Unstructured("row").keep(score, given[layer]))
        found = []
        for row, p in zip(self.test, self.predictions, strict=True):
            q = self._logits(row)
            found.append(torch.stack([kl_divergence(p, q).mean(), cross_entropy(q[:-1], row[1:])]))
        for layer, weight in self.dense.items():
            layer.weight.copy_(weight)
        return torch.stack(found).double()

    def shares(self, given: dict[Layer, float]) -> list[float]:
        """The sparsity of every block."""
        sums: dict[str, list[float]] = {}
        for layer, sparsity in given.items():
            sums.setdefault(layer.block, []).append(sparsity)
        return [round(sum(each) / len(each), 4) for each in sums.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.7, 0.6])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    asked = parser.parse_args()
    console, bench, rows = Console(width=160), Bench(asked), []
    for sparsity in asked.sparsities:
        uniform: Tensor | None = None
        for allocation in CASES:
            started = time.perf_counter()
            given = allocation.allocate(bench.layers, sparsity, Evidence(bench.seen, bench.model, bench.batches))
            seconds = time.perf_counter() - started
            found = bench.measure(given)
            uniform = found if uniform is None else uniform
            mean, difference = found.mean(0), found - uniform
            error = difference.std(0) / len(difference) ** 0.5
            rows.append(
                {"sparsity": sparsity, "allocation": repr(allocation), "seconds": seconds}
                | {"kl": float(mean[0]), "perplexity": math.exp(float(mean[1])), "blocks": bench.shares(given)}
                | {"kl_difference": float(difference.mean(0)[0]), "kl_difference_stderr": float(error[0])}
                | {"nll_difference": float(difference.mean(0)[1]), "nll_difference_stderr": float(error[1])}
            )
            row = rows[-1]
            console.print(
                f"{sparsity:.0%} {allocation!r}: KL {row['kl']:.3f} ({row['kl_difference']:+.3f} ± "
                f"{row['kl_difference_stderr']:.3f}), perplexity {row['perplexity']:.1f} (log "
                f"{row['nll_difference']:+.3f} ± {row['nll_difference_stderr']:.3f}), {seconds:.1f} s",
                highlight=False,
            )
            store("allocations", {"asked": vars(asked), "rows": rows})


if __name__ == "__main__":
    main()

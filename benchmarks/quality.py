"""What every method costs at several sparsities: perplexity, divergence from the dense model, zero-shot accuracy, time.

    python benchmarks/quality.py [--samples 32] [--seqlen 512] [--windows 16] [--limit 25] [--only TEXT]

Calibration on the training books of `gutenberg`; measured on its test books and on wikitext2's raw test split when a
file is given (the hub's by name otherwise, where it answers), from one pass of the pruned model a text; zero-shot
tasks through lm-evaluation-harness, the same items for every model. Writes results/NAME.json after every model; the
same request goes on from there. `--only` runs the cases whose label holds a text; `--limit 0` leaves the tasks out.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, store
from rich.console import Console
from rich.table import Table

from secateur.allocation import ALLOCATIONS
from secateur.data.calibration import calibration
from secateur.errors import SecateurError
from secateur.evaluate import DensePredictions, TaskResult, TaskResults, compare_tasks, measure, tasks
from secateur.masks import parse_pattern
from secateur.methods import make_method
from secateur.models.load import load, resolve
from secateur.pruning import prune
from secateur.refinements import find_refinements

EVERYWHERE = (  # method, refinements
    "wanda",
    "sparsegpt",
    "wanda+refit",
    "gblm",
    "magnitude",
    "ria",
    "sparsegpt+refit",
    "wanda+swap+refit",
)
CASES = (  # amount, method with its refinements and allocation; the first ones answer the most
    *(("50%", name) for name in ("wanda", "sparsegpt", "wanda+refit", "besa", "gblm", "magnitude")),
    *(("2:4", name) for name in ("wanda", "sparsegpt", "wanda+refit", "alps")),
    *(
        ("70%", name)
        for name in ("wanda", "wanda owl", "wanda alpha", "wanda+refit", "sparsegpt", "alps", "wanda descent")
    ),
    ("50%", "alps"),
    *(("60%", name) for name in ("wanda", "sparsegpt", "wanda+refit")),
    *(("50%", name) for name in ("sparsegpt+refit", "wanda+swap+refit", "ria")),
    *(("4:8", name) for name in ("wanda", "sparsegpt", "wanda+refit")),
    *(("70%", name) for name in ("besa", "sparsegpt+refit", "sparsegpt descent")),
    *((amount, name) for amount in ("50%", "2:4", "70%", "60%", "4:8") for name in EVERYWHERE),
    ("50%", "besa per row"),
)


def cases(only: str | None) -> list[tuple[str, str]]:
    """Each once, in order of what they answer."""
    return [case for case in dict.fromkeys(CASES) if only is None or only in " ".join(case)]


def request(amount: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The method, and the rest of the arguments of `prune`, that a case's words mean."""
    words, *refine = name.split("+")
    method, *rest = words.split()
    asked: dict[str, Any] = {"refine": tuple(find_refinements()[one]() for one in refine)}
    if amount.endswith("%"):
        asked["sparsity"] = int(amount[:-1]) / 100
    else:
        asked["pattern"] = parse_pattern(amount)
    if rest[:1] == ["per"]:
        asked["pattern"] = parse_pattern(rest[1])
    elif rest:
        asked["allocation"] = ALLOCATIONS[rest[0]]()
    return make_method(method), asked


def earlier(name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run with these settings that was stopped."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record["rows"] if all(record.get(key) == value for key, value in settings.items()) else []


def answered(record: dict[str, Any]) -> TaskResults:
    """The answers that a row holds."""
    each = [one | {"correct": tuple(mark == "1" for mark in one["correct"])} for one in record["tasks"]]
    return TaskResults(**record | {"tasks": tuple(TaskResult(**one) for one in each)})


class Bench:
    """The dense model, and everything that is measured against it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.console = options, Console(width=150)
        self.texts = ["gutenberg", options.wikitext if Path(options.wikitext).exists() else "wikitext2"]
        source = resolve(options.model)
        self.dense, self.tokenizer = load(source, dtype=options.dtype)
        self.ids = calibration(
            self.tokenizer, "gutenberg", n=options.samples, seqlen=options.seqlen, model=self.dense
        )  # fmt: skip
        self.settings = {
            "model": source.description, "dtype": options.dtype, "calibration": self.ids.record, "texts": self.texts,
            "seqlen": options.seqlen, "windows": options.windows, "limit": options.limit,
        }  # fmt: skip
        self.rows = earlier(options.name, self.settings)
        how: dict[str, Any] = {"seqlen": options.seqlen, "windows": options.windows}
        self.predictions = {text: DensePredictions(self.dense, self.tokenizer, text, **how) for text in self.texts}

    @cached_property
    def answers(self) -> TaskResults:
        """The dense model's, from its row where a run goes on."""
        row = next((row for row in self.rows if row["case"] == ["dense", "dense"]), None)
        return answered(row["tasks"]) if row else self.ask(self.dense)

    def ask(self, model: Any) -> TaskResults:
        return tasks(model, self.tokenizer, limit=self.options.limit)

    def measures(self, model: Any, case: tuple[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for text, dense in self.predictions.items():
            surprise, close = measure(model, dense, self.tokenizer)
            found[Path(text).stem] = {"perplexity": surprise.to_dict(), "fidelity": close.to_dict()}
        if self.options.limit and case[0] in ("dense", *self.options.asked):
            answers = self.answers if model is self.dense else self.ask(model)
            found["tasks"] = answers.to_dict()
            found["tasks_against_dense"] = compare_tasks(answers, self.answers).to_dict()
        return found

    def row(self, case: tuple[str, str]) -> dict[str, Any]:
        done = next((row for row in self.rows if row["case"] == list(case)), None)
        wanted = self.options.limit and case[0] in self.options.asked
        if done is not None and ("tasks" in done or not wanted):
            return done
        model, about = self.dense, {}
        if case != ("dense", "dense"):
            method, asked = request(*case)
            model = copy.deepcopy(self.dense)
            result = prune(model, method, self.ids, **asked).to_dict()
            keys = ("method", "pattern", "schedule", "allocation", "refine", "passes", "seconds", "peak_memory_bytes")
            about = {key: result[key] for key in keys} | {
                "sparsity": result["sparsity"],
                "warnings": result["warnings"],
            }
        started = time.perf_counter()
        done = {"case": list(case)} | about | self.measures(model, case) | {"measuring": time.perf_counter() - started}
        self.rows = [row for row in self.rows if row["case"] != list(case)] + [done]
        store(self.options.name, self.settings | {"rows": self.rows})
        return done

    def table(self) -> Table:
        drawn = Table("amount", "method", *(f"{Path(t).stem}" for t in self.texts), "JS (nats)", "tasks", "seconds")
        order = ["dense", "50%", "60%", "70%", "2:4", "4:8"]
        for row in sorted(self.rows, key=lambda row: order.index(row["case"][0])):
            perplexities = [row[Path(text).stem]["perplexity"] for text in self.texts]
            close, answers = row[Path(self.texts[0]).stem]["fidelity"], row.get("tasks")
            drawn.add_row(
                *row["case"],
                *(f"{value['value']:.2f} ± {value['stderr']:.2f}" for value in perplexities),
                f"{close['js_divergence']:.4f} ± {close['js_divergence_stderr']:.4f}",
                f"{answers['mean']:.3f} ± {answers['stderr']:.3f}" if answers else "-",
                f"{row['seconds']['total']:.0f}" if "seconds" in row else "-",
            )
        return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32", help="bfloat16 only where the processor multiplies it")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="of each text")
    parser.add_argument("--limit", type=int, default=25, help="items of each of the eight usual tasks; 0: no tasks")
    parser.add_argument(
        "--asked", nargs="*", default=["50%"], help="amounts whose models answer the tasks: the dear part"
    )
    parser.add_argument("--wikitext", default="../shared/data/text/wikitext2_raw_test.txt")
    parser.add_argument("--only", help="cases whose label, as '50% wanda+refit', holds this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further case after so long")
    parser.add_argument("--name", default="quality", help="of the file in results/")
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(0)
    try:
        bench = Bench(options)
        for case in (("dense", "dense"), *cases(options.only)):
            if time.perf_counter() - started > 60 * options.minutes:
                bench.console.print("time is up; the same command goes on from here")
                break
            row = bench.row(case)
            value = row[Path(bench.texts[0]).stem]["perplexity"]["value"]
            bench.console.print(
                f"{' '.join(case)}: {value:.2f} ({time.perf_counter() - started:.0f} s)", highlight=False
            )
    except SecateurError as error:
        raise SystemExit(f"quality: {error}") from error
    bench.console.print(bench.table())


if __name__ == "__main__":
    main()

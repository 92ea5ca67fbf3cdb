"""What attention plans cost on real models, beside random masks and windows of their density, and after training.

    python benchmarks/attention_quality.py [--only smollm2] [--minutes 60] [--quick]

    smollm2         perplexity of 1024, 2048 and 4096 tokens on the test books of `gutenberg`
    minilm          embeddings of passages: cosine and Spearman against the dense model
    opus-mt-zh-en   BLEU and chrF of Tatoeba sentences; encoder, decoder, cross-attention masked alone, and all of it

Every kind of mask is brought to the same effective sparsity on the measured data (`at_sparsity`), so that a row of the
table compares equals; where a kind cannot be so sparse (its diagonal, sinks and band stay) the nearest is taken and its
own sparsity is in the record. Blocks are a 64th of the length, of sentences single entries. Cases with `trained` are
measured after training under the mask; `dense trained` is what the same training does to the model without one.
Writes results/NAME.json after every case; the same request goes on from there.
`--quick` is a small run to see that all works.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import RESULTS, store
from rich.console import Console
from rich.table import Table

from secateur.attending import train_with_plan
from secateur.attention.baselines import random_plan, window_plan
from secateur.attention.masking import make_plan
from secateur.attention.observation import Observation
from secateur.attention.observe import observe
from secateur.attention.plan import Plan
from secateur.cli.progress_bar import ProgressBar
from secateur.data.calibration import calibration
from secateur.data.pairs import Pairs, pair_batches, read_pairs
from secateur.data.passages import CHARACTERS, passage_batches, passage_ids, passages
from secateur.data.text import read_text
from secateur.errors import SecateurError
from secateur.models.load import load, resolve
from secateur.plan_quality import HeldOut, at_sparsity, observe_pairs, sparsity_on
from secateur.recovery.options import Recovery

KINDS = ("toeplitz:stack:loss", "absolute:stack:loss", "toeplitz", "absolute", "window", "random")
SITES = {
    "all": ("encoder-self", "decoder-self", "cross"), "encoder-self": ("encoder-self",),
    "decoder-self": ("decoder-self",), "cross": ("cross",),
}  # fmt: skip
SHORT, LONG = 8, 24  # tokens of the sentences that are translated


class Case(NamedTuple):
    """`what`: a length in tokens, or which attention is masked. `trained`: measured after training under the mask."""

    model: str
    what: str
    sparsity: float
    kind: str
    trained: bool = False

    def __str__(self) -> str:
        trained = " trained" if self.trained else ""
        return f"{self.model} {self.what} {100 * self.sparsity:g}% {self.kind}{trained}"


def cases(options: argparse.Namespace) -> list[Case]:
    """In order of what they answer; the dense model is each group's first."""
    found: list[Case] = []
    groups = [("smollm2", str(length)) for length in options.lengths]
    groups += [("minilm", str(options.encoder_length)), *(("opus-mt-zh-en", what) for what in SITES)]
    for model, what in groups:
        found.append(Case(model, what, 0.0, "dense"))
        found += [Case(model, what, share, kind) for share in options.sparsities for kind in options.kinds]
    for model, what in (groups[0], ("minilm", str(options.encoder_length)), ("opus-mt-zh-en", "all")):
        found += [Case(model, what, share, kind, True) for share in options.train_at for kind in options.train_kinds]
        found += [Case(model, what, 0.0, "dense", True)] * bool(options.train_at)
    return [case for case in found if options.only is None or options.only in str(case)]


class Group:
    """A model at one length, or with one kind of attention masked: the observation, the held-out data, the plans."""

    def __init__(self, model: Any, tokenizer: Any, what: str, options: argparse.Namespace, progress: Any) -> None:
        self.model, self.tokenizer, self.options, self.progress = model, tokenizer, options, progress
        self.pairs = bool(model.config.is_encoder_decoder)
        self.encoder = not self.pairs and options.model == "minilm"
        self.sites = SITES[what] if self.pairs else tuple(SITES["all"])
        self.length = LONG if self.pairs else int(what)
        self.block = 1 if self.pairs else max(1, self.length // options.blocks)
        self.size = options.batch_size if self.pairs or self.encoder else 1

    @cached_property
    def held(self) -> HeldOut:
        data: Any = self.sentences[1] if self.pairs else "gutenberg"
        windows = self.options.passages if self.encoder else max(1, self.options.tokens // self.length)
        return HeldOut(
            self.model, self.tokenizer, data, length=self.length, windows=windows, block=self.block,
            batch_size=self.size, progress=self.progress,
        )  # fmt: skip

    @cached_property
    def sentences(self) -> tuple[Pairs, Pairs]:
        """To observe and learn from, and to measure on."""
        pairs = read_pairs(self.options.pairs, limit=self.options.pool, seed=0)
        read = self.tokenizer(list(pairs.sources))["input_ids"]
        fit = [i for i, ids in enumerate(read) if SHORT <= len(ids) <= LONG]
        kept = Pairs(
            tuple(pairs.sources[i] for i in fit), tuple(pairs.references[i] for i in fit), pairs.name, pairs.sha256
        )
        measured = self.options.sentences
        return kept[measured : measured + self.options.observed], kept[:measured]

    @cached_property
    def observation(self) -> Observation:
        """Of text that is not measured."""
        progress, samples = self.progress, self.options.samples
        kinds = (*self.options.kinds, *(self.options.train_kinds if self.options.train_at else ()))
        by_loss = any(kind.endswith(":loss") for kind in kinds)
        how: dict[str, Any] = {"block": self.block, "gradients": by_loss, "progress": progress}
        if self.pairs:
            return observe_pairs(self.model, self.tokenizer, self.sentences[0], batch_size=self.size, **how)
        if self.encoder:
            text = read_text("gutenberg", "calibration")
            words = passages(text, CHARACTERS * self.length, 4 * samples)
            batches = passage_batches(self.tokenizer, words, self.length, self.size)
            return observe(self.model, batches, entries=self.block == 1, **how)
        drawn = calibration(self.tokenizer, "gutenberg", n=samples, seqlen=self.length, model=self.model)
        return observe(self.model, drawn, **how)

    def plan(self, kind: str, sparsity: float) -> Plan:
        """Of this effective sparsity on the measured data."""
        seen = self.held.observation
        assert seen is not None
        made = partial(make_plan, self.observation, sites=self.sites, extend="diagonal")
        if kind == "dense":
            return made(0.0, kind="toeplitz")
        last = any(mask.last for mask in made(sparsity, kind="toeplitz").sites.values())
        made = partial(made, last="always" if last else "never")  # the same for every kind, whatever is tried for it
        base, pool, score = (*kind.split(":"), "", "")[:3]
        if base in ("window", "random"):
            like = made(sparsity, kind="toeplitz")
            make: Callable[[float], Plan] = lambda share: (  # noqa: E731
                window_plan(like, sparsity=share) if base == "window" else random_plan(like, sparsity=share)
            )
        else:
            make = partial(made, kind=base, pool=pool or "layer")
            make = partial(make, score=score or "mean")
        return at_sparsity(make, sparsity, seen)

    def row(self, case: Case) -> dict[str, Any]:
        if case.kind == "dense" and not case.trained:
            return self.held.measure("dense", self.model).to_dict()
        plan = self.plan(case.kind, case.sparsity)
        found: dict[str, Any] = {"sparsity_calibration": sparsity_on(plan, self.observation)[0]}
        model = self.model
        if case.trained:
            model = copy.deepcopy(self.model)
            found["training"] = self.train(model, plan)
        return found | self.held.measure(str(case), model, plan).to_dict()

    def train(self, model: Any, plan: Plan) -> dict[str, Any]:
        """Adapters and norms, on text that is not measured."""
        asked = self.options
        how: dict[str, Any] = {"steps": asked.steps, "lr": asked.lr, "rank": asked.rank, "batch_size": self.size}
        if self.pairs:
            pool = self.sentences[0]
            (batch,) = pair_batches(self.tokenizer, model, pool, batch_size=len(pool))
            data: Any = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        elif self.encoder:
            how["objective"] = "reconstruct"
            words = passages(
                read_text("gutenberg", "calibration"), CHARACTERS * self.length, min(512, asked.steps * self.size)
            )
            data = passage_ids(self.tokenizer, words, self.length)
        else:
            how["objective"] = asked.objective
            data = "gutenberg"
        done = train_with_plan(
            model, self.tokenizer, data, plan, Recovery(**how), seqlen=self.length, held_out=0, progress=self.progress
        ).to_dict()
        recovery = done["recovery"]
        return {key: recovery[key] for key in ("options", "share", "tokens", "seconds")} | {
            "losses": {key: recovery["losses"][key] for key in ("first", "last")}, "backends": done["backends"],
        }  # fmt: skip


class Bench:
    """The results so far, and one group in memory at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.console = options, Console(width=150)
        keys = ("tokens", "samples", "blocks", "passages", "sentences", "observed", "steps", "lr", "rank", "objective")
        self.settings = {"dtype": options.dtype, **{key: getattr(options, key) for key in keys}}
        path = RESULTS / f"{options.name}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = all(record.get(key) == value for key, value in self.settings.items())
        self.rows: list[dict[str, Any]] = record["rows"] if same and record else []
        self.loaded: tuple[str, Any, Any] | None = None
        self.group: tuple[tuple[str, str], Group] | None = None
        self.seen: dict[str, dict[str, Any]] = {}
        self.progress: Any = None

    def find(self, case: Case) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["case"] == list(case)), None)

    def run(self, case: Case) -> dict[str, Any]:
        if (done := self.find(case)) is not None:
            return done
        begun = time.perf_counter()
        row = {"case": list(case), **self._group(case).row(case), "total_seconds": time.perf_counter() - begun}
        self.rows.append(row)
        store(self.options.name, self.settings | {"rows": self.rows})
        return row

    def _group(self, case: Case) -> Group:
        if self.group is None or self.group[0] != (case.model, case.what):
            self.group = None
            if self.loaded is None or self.loaded[0] != case.model:
                self.loaded = None
                self.loaded = (case.model, *load(resolve(case.model), dtype=self.options.dtype))
            self.options.model = case.model
            made = Group(self.loaded[1], self.loaded[2], case.what, self.options, self.progress)
            if made.pairs:  # all of its groups are of the same sentences
                if case.model not in self.seen:
                    self.seen[case.model] = {"held": made.held, "observation": made.observation}
                made.__dict__.update(self.seen[case.model])
            self.group = ((case.model, case.what), made)
        return self.group[1]

    def table(self) -> Table:
        drawn = Table("model", "what", "sparsity", "kind", "effective", "mass kept", "quality", "against dense", "s")
        for row in sorted(self.rows, key=lambda row: (row["case"][:3], row["case"][4], row["case"][3])):
            model, what, sparsity, kind, trained = row["case"]
            recall = "-" if row["recall"] is None else f"{row['recall']:.3f}"
            drawn.add_row(
                model, what, f"{sparsity:.0%}", kind + (" trained" if trained else ""),
                f"{row['sparsity_effective']:.1%}", recall, *quality(row["measures"]), f"{row['total_seconds']:.0f}",
            )  # fmt: skip
        return drawn


def quality(measures: dict[str, Any]) -> tuple[str, str]:
    """A row's measures in two words."""
    if "perplexity" in measures:
        value, nats = measures["perplexity"]["value"], measures["nll_difference"]
        error = measures["nll_difference_stderr"]
        said = "" if error is None else f" ± {error:.4f}"
        return f"perplexity {value:.2f}", f"{nats:+.4f}{said} nats"
    if "embeddings" in measures:
        found = measures["embeddings"]
        return f"cosine {found['cosine']:.4f}", f"Spearman {found['spearman']:.4f} ± {found['spearman_stderr']:.4f}"
    bleu, chrf = measures["translation"]["bleu"], measures["translation"]["chrf"]
    nats = measures["references"]["nll_difference"]
    against = f"chrF {chrf['difference']:+.1f} [{chrf['difference_low']:+.1f}, {chrf['difference_high']:+.1f}]"
    return f"BLEU {bleu['value']:.1f}, chrF {chrf['value']:.1f}", f"{against}, {nats:+.3f} nats"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="cases whose words, as 'smollm2 1024 90%% toeplitz trained', hold this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further case after so long")
    parser.add_argument("--dtype", default="float32", help="bfloat16 only where the processor multiplies it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="of smollm2")
    parser.add_argument("--encoder-length", type=int, default=256, help="of minilm")
    parser.add_argument("--tokens", type=int, default=16384, help="of text that smollm2 is measured on, at each length")
    parser.add_argument("--samples", type=int, default=8, help="windows to observe; passages four times as many")
    parser.add_argument("--blocks", type=int, default=64, help="blocks on a side of the attention of a window")
    parser.add_argument("--passages", type=int, default=64, help="that minilm is measured on")
    parser.add_argument("--sentences", type=int, default=100, help="that are translated")
    parser.add_argument("--observed", type=int, default=400, help="other sentences, to observe and to learn from")
    parser.add_argument("--pairs", default="../shared/data/mt/tatoeba_en_zh.jsonl")
    parser.add_argument("--pool", type=int, default=4000, help="pairs to take sentences of fitting length from")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.25, 0.95])
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=list(KINDS),
        help="of masks, as toeplitz, toeplitz:POOL or toeplitz:POOL:loss",
    )
    parser.add_argument("--train-at", type=float, nargs="*", default=[0.9, 0.75, 0.5])
    parser.add_argument("--train-kinds", nargs="+", default=["auto:stack:loss", "window", "random"])
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--objective", default="text", help="of smollm2's training: text or distil")
    parser.add_argument("--batch-size", type=int, default=16, help="passages or sentences together")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all works")
    parser.add_argument("--name", default="attention_quality", help="of the file in results/")
    options = parser.parse_args()
    if options.quick:
        small = {"lengths": [256], "tokens": 512, "samples": 2, "blocks": 16, "passages": 8, "sentences": 8,
                 "observed": 24, "pool": 200, "sparsities": [0.5], "train_at": [0.5], "train_kinds": ["toeplitz"],
                 "steps": 2, "encoder_length": 64}  # fmt: skip
        vars(options).update(small)
        options.name += "_quick"
    started = time.perf_counter()
    torch.manual_seed(0)
    bench = Bench(options)
    try:
        with ProgressBar() as bench.progress:
            for case in cases(options):
                if time.perf_counter() - started > 60 * options.minutes:
                    bench.console.print("time is up; the same command goes on from here")
                    break
                if case.model == "opus-mt-zh-en" and not Path(options.pairs).exists():
                    bench.console.print(f"{case}: left out, there is no {options.pairs}", highlight=False)
                    continue
                row = bench.run(case)
                said = ", ".join(quality(row["measures"]))
                bench.console.print(f"{case}: {said} ({time.perf_counter() - started:.0f} s)", highlight=False)
    except SecateurError as error:
        raise SystemExit(f"attention_quality: {error}") from error
    bench.console.print(bench.table())


if __name__ == "__main__":
    main()

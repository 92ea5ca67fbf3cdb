"""What a model loses under an attention plan: on held-out text, beside baselines of the same density.

    a causal model        perplexity, divergence from the dense model, and their difference token by token
    an encoder            cosine and Spearman of passages' embeddings against the dense model's
    an encoder-decoder    BLEU and chrF of translations against people's, and against the dense model's

Sparsity is that of the attention which is masked, on the data that is measured: short sentences in a batch reach
the first rows of a mask only, where there is less to drop than in the mask as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.attention.apply import attached
from secateur.attention.baselines import random_plan, window_plan
from secateur.attention.density import plan_report
from secateur.attention.observation import Observation
from secateur.attention.observe import observe
from secateur.attention.plan import Plan
from secateur.attention.sites import find_sites
from secateur.attention.transfer import kept_of, mass_recall
from secateur.data.pairs import Pairs, pair_batches
from secateur.data.passages import CHARACTERS, passage_batches, passages
from secateur.data.text import Text, read_text
from secateur.errors import UsageError, check_whole
from secateur.evaluate.embeddings import compare_embeddings, embed
from secateur.evaluate.fidelity import of_tokens
from secateur.evaluate.perplexity import of_nlls
from secateur.evaluate.sample import mean_and_stderr, paired
from secateur.evaluate.tokens import DensePredictions, read_tokens
from secateur.evaluate.translation import score_translations, translate
from secateur.progress import Progress, silent
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Run = Callable[[Any], dict[str, Any]]
"""Measure a model as it is now."""


@dataclass(frozen=True)
class PlanQuality:
    """One plan, or the dense model, at one length.

    sparsity_effective, sparsity_paper: of the masked attention on the data, of the pairs that may meet and of all
        pairs (0 for the dense model). density_block, density_128: blocks computed at the plan's length.
    recall: share of the dense model's attention mass in the kept blocks; None where nothing was observed.
    measures: `perplexity`, `fidelity` and `nll_difference` (with `_stderr`, in nats per token against the dense
        model); or `embeddings`; or `translation` and `references` (nats per token of people's translations).
    backends: calls that each kernel computed. seconds: of the pass under the plan.
    """

    name: str
    length: int
    sparsity_effective: float
    sparsity_paper: float
    density_block: float | None
    density_128: float | None
    recall: float | None
    measures: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def plan_quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, Plan],
    data: str | Path | Text | Pairs = "gutenberg",
    *,
    length: int | None = None,
    windows: int = 8,
    observed: int = 1,
    batch_size: int = 1,
    backend: str = "auto",
    progress: Progress = silent,
) -> tuple[PlanQuality, ...]:
    """Measure the dense model, and then the model under each plan, on the same data.

    Args:
        model: the plans' model, dense.
        tokenizer: its own.
        plans: by name.
        data: a text, of which the test part is read; for an encoder-decoder `Pairs`.
        length: tokens of a window or passage, by default that of the first plan.
        windows: of the text, or passages; pairs are all taken.
        observed: how many of them tell the mass that plans keep; 0 for none. Pairs are all observed.
        batch_size: windows, passages or pairs together.
        backend: as of `attached`.
        progress: told how far it is.

    Returns:
        The dense model first, then the plans in their order.

    Raises:
        UsageError: a plan of another model, or data of another kind than the model reads.
        InvalidParameter, TextTooShort, UnknownName, LoadFailure: sizes out of range, a text that cannot be read.
        NumericalFailure: a value is not finite.
    """
    for plan in plans.values():
        plan.masks_for(model)
    first = next(iter(plans.values()), None)
    if length is None:
        if first is None:
            raise UsageError("Without a plan, say at which length the model is to be measured.")
        length = plan_report(first).length
    held = HeldOut(
        model, tokenizer, data, length=length, windows=windows, observed=observed if first else 0,
        block=_block(first) if first else 64, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    rows = [held.measure("dense", model)]
    rows += [held.measure(name, model, plan, backend=backend) for name, plan in plans.items()]
    return tuple(rows)


class HeldOut:
    """Data that a model is measured on, and the dense model's answers to it, with which all plans are compared.

    Args:
        model: dense; it is not kept, unless its body and head cannot be run apart.
        tokenizer, data, windows, observed, batch_size, progress: as of `plan_quality`.
        length: tokens of a window or passage; of pairs it only names the result.
        block: of the plans, or one that divides it, for the observation of the data.

    Attributes:
        observation: the dense model's attention on the data; None if nothing was to be observed.

    Raises:
        As `plan_quality`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: str | Path | Text | Pairs = "gutenberg",
        *,
        length: int,
        windows: int = 8,
        observed: int = 1,
        block: int = 64,
        batch_size: int = 1,
        progress: Progress = silent,
    ) -> None:
        for name, value, least in (("windows", windows, 1), ("observed", observed, 0), ("batch_size", batch_size, 1)):
            check_whole(name, "plan_quality", value, least)
        self.tokenizer, self.length, self.size, self.progress = tokenizer, length, batch_size, progress
        self.on_pairs = isinstance(data, Pairs)
        if bool(model.config.is_encoder_decoder) != self.on_pairs:
            wanted = "a text" if self.on_pairs else "pairs of sentences"
            raise UsageError(f"{type(model).__name__} under an attention plan is measured on {wanted}.")
        self.observation: Observation | None = None
        if isinstance(data, Pairs):
            self._run = self._translation(model, data, observed, block)
        elif any(site.causal for site in find_sites(model)):
            self._run = self._causal(model, data, windows, observed, block)
        else:
            self._run = self._encoder(model, data, windows, observed, block)

    def measure(
        self, name: str, model: PreTrainedModel, plan: Plan | None = None, *, backend: str = "auto"
    ) -> PlanQuality:
        """One row: a model, dense or trained, under a plan or under none."""
        begun = time.perf_counter()
        with nullcontext(None) if plan is None else attached(model, plan, backend) as said:
            measures = self._run(model)
        seconds = time.perf_counter() - begun
        if plan is None:
            return PlanQuality(name, self.length, 0.0, 0.0, 1.0, 1.0, None, measures, {}, seconds)
        report = plan_report(plan, None if self.on_pairs else self.length)
        if self.on_pairs and self.observation is not None:
            effective, paper = sparsity_on(plan, self.observation)
        else:
            masked = [report.sites[site] for site in plan.sites]
            kept = sum(site.kept_pairs for site in masked)
            effective = 1 - kept / sum(site.possible_pairs for site in masked)
            paper = 1 - kept / sum(site.all_pairs for site in masked)
        recall = None if self.observation is None else mass_recall(plan, self.observation).total
        total, backends = report.total, {} if said is None else dict(said.backends)
        return PlanQuality(
            name,
            self.length,
            effective,
            paper,
            total.density_block,
            total.density_128,
            recall,
            measures,
            backends,
            seconds,
        )

    def _causal(self, model: Any, data: Any, windows: int, observed: int, block: int) -> Run:
        how: dict[str, Any] = {"seqlen": self.length, "windows": windows, "batch_size": self.size}
        dense = DensePredictions(model, self.tokenizer, data, progress=self.progress, **how)
        if observed:
            self.observation = observe(model, dense.sample.ids[:observed], block=block, progress=self.progress)

        def run(model: Any) -> dict[str, Any]:
            found = read_tokens(
                model, dense.sample, self.size, dense, likelihood=True, what="perplexity", progress=self.progress
            )  # fmt: skip
            difference, error = paired(found.nll, found.dense_nll)
            return {
                "perplexity": of_nlls(found.nll, model, dense.sample).to_dict(),
                "fidelity": of_tokens(found, model, dense, dense.sample).to_dict(),
                "nll_difference": difference,
                "nll_difference_stderr": error,
            }

        return run

    def _encoder(self, model: Any, data: Any, windows: int, observed: int, block: int) -> Run:
        text = data if isinstance(data, Text) else read_text(data, "test", progress=self.progress)
        texts = passages(text, CHARACTERS * self.length, windows)
        how: dict[str, Any] = {"length": self.length, "batch_size": self.size, "progress": self.progress}
        dense = embed(model, self.tokenizer, texts, **how)
        about = {"text": text.name, "split": text.split, "sha256": text.sha256, "seqlen": self.length}
        if observed:
            batches = passage_batches(self.tokenizer, texts[:observed], self.length, self.size)
            self.observation = observe(model, batches, block=block, entries=block == 1, progress=self.progress)

        def run(model: Any) -> dict[str, Any]:
            vectors = embed(model, self.tokenizer, texts, **how)
            return {"embeddings": compare_embeddings(vectors, dense).to_dict() | about}

        return run

    def _translation(self, model: Any, pairs: Pairs, observed: int, block: int) -> Run:
        how: dict[str, Any] = {"batch_size": self.size, "progress": self.progress}
        batches = pair_batches(self.tokenizer, model, pairs, batch_size=self.size)
        dense, before = translate(model, self.tokenizer, pairs.sources, **how), _reference_nlls(model, batches)
        if observed:
            self.observation = observe_pairs(model, self.tokenizer, pairs, block=block, **how)

        def run(model: Any) -> dict[str, Any]:
            written, nlls = translate(model, self.tokenizer, pairs.sources, **how), _reference_nlls(model, batches)
            nll, error = mean_and_stderr(nlls)
            difference, difference_error = paired(nlls, before)
            return {
                "translation": score_translations(written, pairs, dense).to_dict(),
                "references": {
                    "nll": nll, "nll_stderr": error,
                    "nll_difference": difference, "nll_difference_stderr": difference_error,
                },
            }  # fmt: skip

        return run


def sparsity_on(plan: Plan, observation: Observation, length: int | None = None) -> tuple[float, float]:
    """The sparsities of the masked attention over what was observed, pair by pair: effective, and the paper's.

    Args:
        plan: with blocks that the observation's divide.
        observation: of the same model.
        length: one that was observed, by default the longest.

    Raises:
        UsageError: blocks that do not divide, or nothing in common.
    """
    kept = possible = every = 0.0
    for name, site in observation.at(length).items():
        if (mask := plan.sites.get(name)) is not None:
            kept += float(kept_of("count", mask, site, observation.block).sum())
            possible += float(site.count.sum()) * site.heads
            every += float(site.area.sum()) * site.heads
    if not possible:
        raise UsageError("The plan masks no attention of this observation: it is of another model.")
    return 1 - kept / possible, 1 - kept / every


def at_sparsity(make: Callable[[float], Plan], sparsity: float, observation: Observation, *, steps: int = 12) -> Plan:
    """The plan whose effective sparsity on some data comes nearest, by bisection of the sparsity that is asked for.

    Args:
        make: from a sparsity in [0, 1) to a plan, sparser when it is larger; as `make_plan`, `random_plan` or
            `window_plan` with everything else given.
        sparsity: wanted on the data.
        observation: what the data are; only the counts of pairs matter.
        steps: plans to try.
    """
    low, high = 0.0, 1.0
    best: tuple[float, Plan] | None = None
    for _ in range(steps):
        middle = (low + high) / 2
        plan = make(middle)
        found = sparsity_on(plan, observation)[0]
        if best is None or abs(found - sparsity) < best[0]:
            best = abs(found - sparsity), plan
        low, high = (middle, high) if found < sparsity else (low, middle)
    assert best is not None
    return best[1]


def with_baselines(
    plans: Mapping[str, Plan], observation: Observation | None = None, *, length: int | None = None, seed: int = 0
) -> dict[str, Plan]:
    """Each plan, and behind it random and window masks of its density: `NAME random`, `NAME window`.

    Args:
        plans: by name.
        observation: of short texts, on which the densities are to agree; else they agree at `length`, block by block.
        length: tokens, by default each plan's own.
        seed: of the random masks.
    """
    found: dict[str, Plan] = {}
    for name, plan in plans.items():
        found[name] = plan
        if observation is None:
            found[f"{name} random"] = random_plan(plan, seed=seed, length=length)
            found[f"{name} window"] = window_plan(plan, length=length)
            continue
        wanted = sparsity_on(plan, observation)[0]
        same: dict[str, Callable[[float], Plan]] = {
            "random": lambda share, plan=plan: random_plan(plan, seed=seed, sparsity=share),  # type: ignore[misc]
            "window": lambda share, plan=plan: window_plan(plan, sparsity=share),  # type: ignore[misc]
        }
        for kind, make in same.items():
            found[f"{name} {kind}"] = at_sparsity(make, wanted, observation)
    return found


@torch.no_grad()
def _reference_nlls(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Nats of every token of people's translations, sentence by sentence, when the model reads them so far."""
    found = []
    device = model.get_input_embeddings().weight.device
    with evaluating(model):
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            losses = -model(**inputs).logits.float().log_softmax(-1)
            labels = batch["labels"]
            own = losses.gather(-1, labels.clamp(min=0)[..., None].to(device))[..., 0].double().cpu()
            found += [row[real] for row, real in zip(own, labels >= 0, strict=True)]
    return found


def observe_pairs(
    model: Any,
    tokenizer: Any,
    pairs: Pairs,
    *,
    block: int = 1,
    gradients: bool = False,
    batch_size: int = 16,
    progress: Progress = silent,
) -> Observation:
    """The attention of an encoder-decoder that reads sentences and their translations by people."""
    batches = pair_batches(tokenizer, model, pairs, batch_size=batch_size)
    if not gradients:
        batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    return observe(model, batches, block=block, entries=block == 1, gradients=gradients, progress=progress)


def _block(plan: Plan) -> int:
    return next(iter(plan.sites.values())).block

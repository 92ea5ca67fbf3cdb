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
from secateur.attention.observation import Observation, SiteObservation
from secateur.attention.observe import observe
from secateur.attention.plan import Plan
from secateur.attention.site_mask import SiteMask
from secateur.attention.transfer import mass_recall
from secateur.data.pairs import Pairs, pair_batches
from secateur.data.passages import CHARACTERS, passage_batches, passages
from secateur.data.text import Text, read_text
from secateur.errors import InvalidParameter, UsageError
from secateur.evaluate.embeddings import compare_embeddings, embed
from secateur.evaluate.fidelity import of_tokens
from secateur.evaluate.perplexity import of_nlls
from secateur.evaluate.sample import paired
from secateur.evaluate.tokens import DensePredictions, read_tokens
from secateur.evaluate.translation import score_translations, translate
from secateur.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PlanQuality:
    """One plan, or the dense model, at one length.

    sparsity_effective, sparsity_paper: of the masked attention on the data, of the pairs that may meet and of all
        pairs (0 for the dense model). density_block, density_128: blocks computed at the plan's length.
    recall: share of the dense model's attention mass in the kept blocks; None where nothing was observed.
    measures: `perplexity`, `fidelity` and `nll_difference` (with `_stderr`, in nats per token against the dense
        model); or `embeddings`; or `translation`.
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
    for name, value, least in (("windows", windows, 1), ("observed", observed, 0), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidParameter(name, "plan_quality", f"a whole number of at least {least}", value)
    for plan in plans.values():
        plan.masks_for(model)
    pairs = bool(model.config.is_encoder_decoder)
    if pairs != isinstance(data, Pairs):
        wanted = "pairs of sentences" if pairs else "a text"
        raise UsageError(f"{type(model).__name__} under an attention plan is measured on {wanted}.")
    first = next(iter(plans.values()), None)
    if length is None:
        if first is None:
            raise UsageError("Without a plan, say at which length the model is to be measured.")
        length = plan_report(first).length
    if isinstance(data, Pairs):
        run, seen = _translation(model, tokenizer, data, batch_size, first, progress)
    elif _is_causal(model):
        run, seen = _causal(model, tokenizer, data, length, windows, observed, batch_size, first, progress)
    else:
        run, seen = _encoder(model, tokenizer, data, length, windows, observed, batch_size, first, progress)
    rows = [_row("dense", None, model, run, seen, length, backend)]
    rows += [_row(name, plan, model, run, seen, length, backend) for name, plan in plans.items()]
    return tuple(rows)


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
            kept += float((_kept(mask, site, observation.block) * site.count).sum())
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


Run = Callable[[bool], dict[str, Any]]
"""Measure the model as it is now; told whether it is dense."""


def _row(
    name: str, plan: Plan | None, model: Any, run: Run, seen: Observation | None, length: int, backend: str
) -> PlanQuality:
    begun = time.perf_counter()
    with nullcontext(None) if plan is None else attached(model, plan, backend) as said:
        measures = run(plan is None)
    seconds = time.perf_counter() - begun
    if plan is None:
        return PlanQuality(name, length, 0.0, 0.0, 1.0, 1.0, None, measures, {}, seconds)
    on_pairs = bool(model.config.is_encoder_decoder)
    report = plan_report(plan, None if on_pairs else length)
    if on_pairs and seen is not None:
        effective, paper = sparsity_on(plan, seen)
    else:
        masked = [report.sites[site] for site in plan.sites]
        kept = sum(site.kept_pairs for site in masked)
        effective = 1 - kept / sum(site.possible_pairs for site in masked)
        paper = 1 - kept / sum(site.all_pairs for site in masked)
    recall = None if seen is None else mass_recall(plan, seen).total
    backends = {} if said is None else dict(said.backends)
    total = report.total
    return PlanQuality(
        name, length, effective, paper, total.density_block, total.density_128, recall, measures, backends, seconds
    )


def _causal(
    model: Any, tokenizer: Any, data: Any, length: int, windows: int, observed: int, size: int, plan: Plan | None,
    progress: Progress,
) -> tuple[Run, Observation | None]:  # fmt: skip
    dense = DensePredictions(
        model, tokenizer, data, seqlen=length, windows=windows, batch_size=size, progress=progress
    )  # fmt: skip
    seen = None
    if observed and plan is not None:
        seen = observe(model, dense.sample.ids[:observed], block=_block(plan), progress=progress)

    def run(is_dense: bool) -> dict[str, Any]:
        what = "the dense model" if is_dense else "the model under its plan"
        found = read_tokens(model, dense.sample, size, dense, likelihood=True, what=what, progress=progress)
        difference, error = paired(found.nll, found.dense_nll)
        return {
            "perplexity": of_nlls(found.nll, model, dense.sample).to_dict(),
            "fidelity": of_tokens(found, model, dense, dense.sample).to_dict(),
            "nll_difference": difference,
            "nll_difference_stderr": error,
        }

    return run, seen


def _encoder(
    model: Any, tokenizer: Any, data: Any, length: int, windows: int, observed: int, size: int, plan: Plan | None,
    progress: Progress,
) -> tuple[Run, Observation | None]:  # fmt: skip
    text = data if isinstance(data, Text) else read_text(data, "test", progress=progress)
    texts = passages(text, CHARACTERS * length, windows)
    how: dict[str, Any] = {"length": length, "batch_size": size, "progress": progress}
    dense = embed(model, tokenizer, texts, **how)
    seen = None
    if observed and plan is not None:
        seen = observe(model, passage_batches(tokenizer, texts[:observed], length, size), block=_block(plan))

    def run(is_dense: bool) -> dict[str, Any]:
        vectors = dense if is_dense else embed(model, tokenizer, texts, **how)
        about = {"text": text.name, "split": text.split, "sha256": text.sha256, "seqlen": length}
        return {"embeddings": compare_embeddings(vectors, dense).to_dict() | about}

    return run, seen


def _translation(
    model: Any, tokenizer: Any, pairs: Pairs, size: int, plan: Plan | None, progress: Progress
) -> tuple[Run, Observation | None]:
    dense = translate(model, tokenizer, pairs.sources, batch_size=size, progress=progress)
    seen = None if plan is None else observe_pairs(model, tokenizer, pairs, block=_block(plan), batch_size=size)

    def run(is_dense: bool) -> dict[str, Any]:
        how: dict[str, Any] = {"batch_size": size, "progress": progress}
        written = dense if is_dense else translate(model, tokenizer, pairs.sources, **how)
        return {"translation": score_translations(written, pairs, dense).to_dict()}

    return run, seen


def observe_pairs(
    model: Any, tokenizer: Any, pairs: Pairs, *, block: int = 1, batch_size: int = 16, progress: Progress = silent
) -> Observation:
    """The attention of an encoder-decoder that reads sentences and their translations by people."""
    batches = pair_batches(tokenizer, model, pairs, batch_size=batch_size)
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    return observe(model, inputs, block=block, entries=block == 1, progress=progress)


def _block(plan: Plan) -> int:
    return next(iter(plan.sites.values())).block


def _kept(mask: SiteMask, site: SiteObservation, observed: int) -> torch.Tensor:
    """Bool (heads, rows, columns) over the observation's tiles."""
    if mask.block % observed:
        raise UsageError(f"The plan has blocks of {mask.block}, which blocks of {observed} do not divide.")
    rows, columns = site.count.shape
    factor = mask.block // observed
    keep = mask.layout(rows * observed, columns * observed).keep.cpu().expand(site.heads, -1, -1)
    return keep.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, :rows, :columns]


def _is_causal(model: Any) -> bool:
    from secateur.attention.sites import find_sites

    return any(site.causal for site in find_sites(model))

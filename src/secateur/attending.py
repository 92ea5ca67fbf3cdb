"""train_with_plan(model, ...): a model trained with its attention mask on, by the loop that all recovery uses.

The protocol of attention pruning: a mask that is the same for every input is fixed, and the model learns under it
(Rugina et al. 2020, arXiv:2012.02030, whose released code trains whole models so, anew or from a checkpoint). Here
what is trained is chosen as in recovery (PERP, arXiv:2312.15230): adapters, norms, biases or everything. The objective
is that of the text, of agreement with the dense model, or of its hidden states, block by block, which needs neither a
head nor labels and so suits encoders too.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.attention.apply import attached
from secateur.attention.density import PlanReport, plan_report
from secateur.attention.plan import Plan
from secateur.data.calibration import Calibration, ids_sha256
from secateur.data.text import Text
from secateur.errors import UsageError
from secateur.models.layers import find
from secateur.progress import Progress, silent
from secateur.recovering import RecoverResult, TrainingJob
from secateur.recovery.objectives import IGNORED
from secateur.recovery.options import Recovery
from secateur.scout import Batch
from secateur.training_text import held_out_ids, training_ids
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pairs = Mapping[str, Tensor]
"""What an encoder-decoder learns from: input_ids and attention_mask (n, read), labels (n, written), -100 = none."""


@dataclass(frozen=True)
class PlanTraining:
    """The record of a training under a plan.

    `recovery` has what was trained and the losses; its held-out loss `before` is with the mask on and nothing trained.
    `dense` has the held-out loss (nats per token) and perplexity without the mask before training, None without
    held-out windows. `density` is that of the plan at the training length; `backends` counts the attention calls by
    how they were computed.
    """

    recovery: RecoverResult
    dense: dict[str, float] | None
    density: PlanReport
    plan: Mapping[str, Any]
    backends: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "recovery": self.recovery.to_dict(), "dense": self.dense, "density": self.density.to_dict(),
            "plan": dict(self.plan), "backends": self.backends,
        }  # fmt: skip

    def __str__(self) -> str:
        said = str(self.recovery)
        if self.dense and self.recovery.held_out:
            said += f"; without the mask it was {self.dense['perplexity']:.2f}"
        return f"{said}; {self.density}"


def train_with_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Path | Text | Calibration | Tensor | Pairs,
    plan: Plan,
    options: Recovery | None = None,
    *,
    seqlen: int | None = None,
    samples: int | None = None,
    held_out: int | Tensor | Pairs = 8,
    dense: PreTrainedModel | None = None,
    backend: str = "auto",
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> PlanTraining:
    """Train a model in place with a plan's mask on its attention.

    Args:
        model: the plan's model; it may be pruned: adapters and kept weights leave its zeros alone.
        tokenizer: of the model; None if text is given as ids (a masked language model needs it all the same).
        text: a name or file, of which the calibration split is read, a Text, or ids (n, seqlen); of an
            encoder-decoder also pairs: a mapping of input_ids, attention_mask, labels.
        plan: from `make_plan` or `load_plan`.
        options: what is trained, and how; adapters are laid on every matrix of the blocks. `objective="reconstruct"`
            learns the dense model's hidden states, and is the one for encoders without a head.
        seqlen: tokens in a window, by default that of the plan's record, or what the model takes.
        samples: windows of the text to learn from, by default as many as are used.
        held_out: windows of the text's test split to measure before and after, ids, or pairs; 0 for none.
        dense: the teacher of the objectives distil and reconstruct, by default a copy of the model as it comes.
        backend: of the attention; it must have gradients (`auto` takes one that has).
        checkpoint: a file to keep the state in; a killed run goes on from it with `resume`.
        resume: go on from `checkpoint`.
        progress: told how far the training is.

    Returns:
        What was trained, the losses, the densities, the backends that ran.

    Raises:
        UsageError: the plan is of another model or does not reach the length, or the request cannot be met; the
            model is what it was.
        NumericalFailure: a loss is not finite; the model is what it was.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from secateur.attention.masking import make_plan
    >>> from secateur.attention.observe import observe
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, vocab_size=20))
    >>> ids = torch.randint(20, (4, 16))
    >>> done = train_with_plan(model, None, ids, make_plan(observe(model, ids, block=2), 0.5), Recovery(steps=2))
    >>> len(done.recovery.losses["steps"]), done.density.length
    (2, 16)
    """
    options = options or Recovery()
    plan.masks_for(model)  # refuses another model
    found = find(model)
    pairs = _pairs(model, text)
    width = None if pairs is None else pairs[0]
    extra = {"attention plan": _fingerprint(plan)}
    if dense is None and options.objective != "text":
        dense = copy.deepcopy(model)
    batch = None if width is None else _two_texts(model, width)
    job = TrainingJob(model, tokenizer, found, found.layers, options, dense, batch=batch, extra=extra)
    if pairs is not None:
        ids, about = pairs[1], {"text": None, "samples": len(pairs[1]), "how": "pairs of the caller"}
        about["sha256"] = ids_sha256(ids)
        unseen = _unseen_pairs(model, held_out, width)
    else:
        if seqlen is None and not isinstance(text, Calibration | Tensor):
            seqlen = plan.record.get("length")
        ids, known = training_ids(model, tokenizer, text, seqlen, samples, options, progress)
        about = dict(known)
        if isinstance(held_out, Mapping):
            raise UsageError("Held-out pairs go with training on pairs: give windows of text, or ids.")
        unseen = held_out_ids(model, tokenizer, text, held_out, ids.shape[1], progress)
    density = _report(model, plan, ids, width)  # refuses what the plan does not reach
    without = _without_mask(job, ids, unseen)
    with attached(model, plan, backend) as ran:
        result = job.go(ids, about, unseen, checkpoint, resume, progress)
    return PlanTraining(result, without, density, plan.record, dict(ran.backends))


def _without_mask(job: TrainingJob, ids: Tensor, unseen: Tensor | None) -> dict[str, float] | None:
    if unseen is None:
        return None
    with evaluating(job.model):
        losses = job.loss(ids).held_out(unseen, 1)
    loss = math.fsum(losses) / len(losses)
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def _report(model: Any, plan: Plan, ids: Tensor, width: int | None) -> PlanReport:
    if width is not None:
        return plan_report(plan, ids.shape[1] - width, keys=width)
    two = getattr(model.config, "is_encoder_decoder", False)
    return plan_report(plan, ids.shape[1] // 2 if two else ids.shape[1])


def _pairs(model: Any, text: Any) -> tuple[int, Tensor] | None:
    """Pairs as one tensor (n, read + written), -100 where there is no token, and the width of what is read."""
    if not isinstance(text, Mapping):
        return None
    lacking = {"input_ids", "attention_mask", "labels"} - set(text)
    if lacking:
        raise UsageError(f"Pairs need input_ids, attention_mask and labels; {sorted(lacking)[0]} is missing.")
    if not getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(f"{type(model).__name__} reads one text, not pairs: give windows of text, or ids.")
    read, mask, labels = (text[name] for name in ("input_ids", "attention_mask", "labels"))
    if read.dim() != 2 or read.shape != mask.shape or labels.dim() != 2 or len(labels) != len(read) or not len(read):
        raise UsageError(
            f"Pairs are (n, read), (n, read) and (n, written); got {tuple(read.shape)}, {tuple(mask.shape)} and "
            f"{tuple(labels.shape)}."
        )
    return read.shape[1], torch.cat([read.masked_fill(mask == 0, IGNORED), labels], dim=1)


def _unseen_pairs(model: Any, held_out: Any, width: int | None) -> Tensor | None:
    if isinstance(held_out, Mapping):
        found = _pairs(model, held_out)
        assert found is not None
        if found[0] != width:
            raise UsageError(f"The held-out pairs read {found[0]} tokens, those to learn from {width}: pad them alike.")
        return found[1]
    if isinstance(held_out, Tensor):
        raise UsageError("Training on pairs is measured on pairs: give them as held_out.")
    return None  # windows of a text there are none


def _two_texts(model: Any, width: int) -> Any:
    """Rows of pairs -> what an encoder-decoder reads; the labels are the last columns of the rows."""
    config = model.config
    padding = config.pad_token_id if config.pad_token_id is not None else 0
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else padding

    def batch(rows: Tensor) -> Batch:
        read, written = rows[:, :width], rows[:, width:]
        before = torch.cat([torch.full_like(written[:, :1], start), written[:, :-1]], dim=1)
        return {
            "input_ids": read.masked_fill(read == IGNORED, padding),
            "attention_mask": (read != IGNORED).long(),
            "decoder_input_ids": before.masked_fill(before == IGNORED, padding),
        }

    return batch


def _fingerprint(plan: Plan) -> str:
    """Of the masks: which blocks are kept."""
    digest = hashlib.sha256()
    for name, mask in sorted(plan.sites.items()):
        facts = {key: value for key, value in vars(mask).items() if not torch.is_tensor(value)}
        digest.update(json.dumps([name, facts], sort_keys=True).encode())
        for part, tensor in sorted(mask.tensors().items()):
            digest.update(f"{part}{tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()

"""recover(model, ...): text, what is trained, and the loop, joined."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.data.calibration import Calibration, ids_sha256
from secateur.data.text import Text
from secateur.errors import UsageError
from secateur.inputs import batches_of
from secateur.memory import peak_memory
from secateur.models.layers import Found, Layer, find, find_blocks
from secateur.progress import Progress, silent
from secateur.recovery import checkpoint as checkpoints
from secateur.recovery.adapters import LORA
from secateur.recovery.keep import check_record, pruned_layers, read_record, zeros
from secateur.recovery.loop import order, train
from secateur.recovery.lora import attach, check_lora, detach
from secateur.recovery.objectives import TextLoss, checkpointed
from secateur.recovery.options import Recovery
from secateur.recovery.overlay import Overlay
from secateur.recovery.reconstruct import reconstruct, record_calls
from secateur.recovery.subsets import find_trainees
from secateur.result import PruneResult, versions
from secateur.scout import Batch, run
from secateur.training_text import held_out_ids, training_ids
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class RecoverResult:
    """The record of a recovery.

    `trained` counts numbers that were trained by subset, `share` is their share of all parameters. `losses` are
    per step, in nats per token (of the mean square error, relative to the target's, with reconstruct). `held_out`
    has the loss and perplexity before and after, with its text. `zeros` counts the pruned layers' before and
    after, and how many were lost.
    """

    options: dict[str, Any]
    trained: dict[str, int]
    share: float
    tokens: int
    text: Mapping[str, Any]
    losses: dict[str, Any]
    held_out: dict[str, Any] | None
    zeros: dict[str, int]
    seconds: dict[str, float]
    peak_memory_bytes: int
    device: str
    dtype: str
    warnings: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        said = f"trained {self.share:.2%} of the parameters in {self.seconds['total']:.1f} s"
        if self.held_out:
            said += f", held-out perplexity {self.held_out['before']:.2f} -> {self.held_out['after']:.2f}"
        return f"{said}, {self.zeros['lost']} of {self.zeros['before']} zeros lost".replace("%", " %")


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Path | Text | Calibration | Tensor,
    pruning: PruneResult | Mapping[str, Any] | str | Path,
    options: Recovery | None = None,
    *,
    seqlen: int | None = None,
    samples: int | None = None,
    held_out: int | Tensor = 8,
    dense: PreTrainedModel | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> RecoverResult:
    """Train a pruned model back, in place.

    Args:
        model: pruned; any transformers model that `secateur.prune` can prune.
        tokenizer: of the model; None if text is given as ids (a masked language model needs it all the same).
        text: a name or file, of which the calibration split is read, a Text, or ids (n, seqlen) ready made.
        pruning: what was pruned: the result of `secateur.prune`, its record, or the folder with `pruning.json`.
            The zeros of the model are counted and must be those.
        options: what is trained, and how; see `Recovery`.
        seqlen: tokens in a window, by default the least of 2048 and the model's limit. Ids have their own.
        samples: windows of the text to learn from; by default as many as the steps use and the text
            has; with reconstruct, whose inputs are held in memory, at most 128.
        held_out: windows of the text's test split to measure before and after, or ids (n, seqlen); 0 for none.
        dense: the model before pruning, for the objectives distil and reconstruct.
        checkpoint: a file to keep the state in; a killed run goes on from it with `resume`, to the bit.
        resume: go on from `checkpoint`.
        progress: told how far the training is.

    Returns:
        What was trained, the losses, the zeros.

    Raises:
        UsageError: the request cannot be met, the zeros are not those of the record, or the checkpoint is of
            another run; nothing was touched.
        NumericalFailure: a loss is not finite; the model is what it was.

    Source:
        PERP, Zimmer et al. 2023, arXiv:2312.15230.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from secateur.methods.magnitude import Magnitude
    >>> from secateur.pruning import prune
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, vocab_size=20))
    >>> pruned = prune(model, Magnitude(), sparsity=0.5)
    >>> ids = torch.randint(20, (4, 8))
    >>> recover(model, None, ids, pruned, Recovery(steps=2)).zeros
    {'before': 1152, 'after': 1152, 'lost': 0}
    """
    options = options or Recovery()
    record, found = _record(pruning), find(model)
    layers, warnings = pruned_layers(model, found, record)
    job = TrainingJob(model, tokenizer, found, layers, options, dense, warnings)
    ids, about = training_ids(model, tokenizer, text, seqlen, samples, options, progress)
    unseen = held_out_ids(model, tokenizer, text, held_out, ids.shape[1], progress)
    return job.go(ids, about, unseen, checkpoint, resume, progress)


class TrainingJob:
    """One training: checked in the beginning, then run.

    `layers` are those that carry adapters, and whose zeros stay. `batch` makes what the model reads out of ids
    (windows, seqlen). `extra` is what else must be the same for a run to go on.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        found: Found,
        layers: Sequence[Layer],
        options: Recovery,
        dense: Any,
        warnings: Sequence[str] = (),
        *,
        batch: Callable[[Tensor], Batch] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.options, self.dense = model, tokenizer, options, dense
        self.found, self.layers, self.warnings = found, layers, list(warnings)
        self.batch = batch or (lambda part: batches_of(model, part, len(part))[0])
        self.extra = dict(extra or {})
        self.sparse = any(zeros(layer.weight) for layer in layers)
        _check_dense(options, model, dense)
        self.lora = options.adapter == LORA and "adapters" in options.train
        words = [word for word in options.train if not (self.lora and word == "adapters")]
        if self.lora:
            check_lora(self.layers)
            why = ": that would lose the zeros" if self.sparse else ""
            self.warnings.append(f"the adapters are not merged{why}; they belong to the model")
        self.trainees, said = find_trainees(model, self.layers, self.found.blocks, words, needed=not self.lora)
        self.warnings += said
        if "all" in options.train and self.sparse:
            self.warnings.append("all parameters are trained, the pruned ones too: the zeros are lost")

    def go(
        self, ids: Tensor, about: Mapping[str, Any], unseen: Tensor | None, checkpoint: str | Path | None, resume: bool,
        progress: Progress,
    ) -> RecoverResult:  # fmt: skip
        """Train on ids (n, seqlen), and measure `unseen` before and after; the rest is as of `recover`."""
        file = None if checkpoint is None else Path(checkpoint).expanduser().resolve()
        if resume and file is None:
            raise UsageError("To resume, name the checkpoint file of the run that was stopped.")
        options, model = self.options, self.model
        started = time.perf_counter()
        kind = "masked" if options.adapter == LORA else options.adapter
        overlay = Overlay(self.trainees, adapter=kind, rank=options.rank, scale=options.scale, seed=options.seed)
        state = checkpoints.State(self._identity(ids, unseen))
        if resume and file is not None:
            state = checkpoints.read(file, state.identity)
        device = next(model.parameters()).device
        everything = sum(parameter.numel() for parameter in model.parameters())
        before = sum(zeros(layer.weight) for layer in self.layers)
        with evaluating(model), _frozen(model, self.dense), peak_memory(device) as peak:
            # reconstruction needs no logits, nor a model that has any
            loss = None if options.objective == "reconstruct" and unseen is None else self.loss(ids)
            measured = {"before": self._look(loss, unseen)}
            with self._laid(overlay) as extra:
                if options.objective == "reconstruct":
                    losses, training = self._reconstruct(overlay, ids, file, state, progress)
                else:
                    assert loss is not None
                    losses, training = self._train(overlay.parts | extra, loss, ids, unseen, file, state, progress)
            lost = overlay.merge_()
            measured["after"] = self._look(loss, unseen)
        counts = ({"adapters": sum(part.numel() for part in extra.values())} if extra else {}) | overlay.counts()
        after = sum(zeros(layer.weight) for layer in self.layers)
        return RecoverResult(
            options=options.to_dict(),
            trained=counts,
            share=sum(counts.values()) / everything,
            tokens=options.steps * options.accumulate * options.batch_size * ids.shape[1],
            text=about,
            losses=losses,
            held_out=None if unseen is None else _perplexities(measured, unseen),
            zeros={"before": before, "after": after, "lost": lost},
            seconds={"total": time.perf_counter() - started, "training": training},
            peak_memory_bytes=peak.bytes,
            device=str(device),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            warnings=tuple(self.warnings),
        )  # fmt: skip

    def loss(self, ids: Tensor) -> TextLoss:
        """The loss on these windows, as the options ask for it."""
        options = self.options
        return TextLoss(
            self.model, ids, self.batch,
            mask_token=getattr(self.tokenizer, "mask_token_id", None),
            dense=self.dense if options.objective == "distil" else None,
            weight=options.distil_weight, temperature=options.temperature, precision=options.precision,
            seed=options.seed,
        )  # fmt: skip

    def _train(
        self, parts: dict[str, nn.Parameter], loss: TextLoss, ids: Tensor, unseen: Tensor | None, file: Path | None,
        state: checkpoints.State, progress: Progress,
    ) -> tuple[dict[str, Any], float]:  # fmt: skip
        options = self.options
        size = options.batch_size
        chosen = order(len(ids), options.steps * options.accumulate * size, options.seed)

        def loss_of(call: int) -> Tensor:
            return loss(chosen[call * size : (call + 1) * size], call)

        def look() -> float:
            return _mean(self._look(loss, unseen))

        trained = train(
            parts, loss_of, options, look=look, checkpoint=file, state=state, progress=progress,
            what=f"recovering ({options.objective})",
        )  # fmt: skip
        losses = {"first": trained.losses[0], "last": trained.losses[-1], "steps": trained.losses}
        return losses | {"held_out": trained.held_out, "best": trained.best}, trained.seconds

    def _reconstruct(
        self, overlay: Overlay, ids: Tensor, file: Path | None, state: checkpoints.State, progress: Progress
    ) -> tuple[dict[str, Any], float]:
        dense, blocks = self.dense, find_blocks(self.dense)
        recorded = []
        batches = [self.batch(part) for part in ids.split(self.options.batch_size)]
        for i, batch in enumerate(batches):
            recorded.append(record_calls(dense, blocks, partial(run, dense, batch)))
            progress(i + 1, len(batches), "recording the dense model")
        windows = reconstruct(
            overlay, self.found.blocks, blocks, recorded, self.options, checkpoint=file, state=state, progress=progress
        )
        ends = [(window.losses[0], window.losses[-1]) for window in windows if window.losses]
        losses: dict[str, Any] = {"first": _mean([e[0] for e in ends]), "last": _mean([e[1] for e in ends])}
        return losses | {"windows": [window.losses for window in windows]}, sum(window.seconds for window in windows)

    @contextmanager
    def _laid(self, overlay: Overlay) -> Iterator[dict[str, nn.Parameter]]:
        """Everything that is trained stands in the model; yields what peft adds to the overlay."""
        options, extra = self.options, dict[str, nn.Parameter]()
        with overlay.open(), checkpointed(self.found.blocks if options.gradient_checkpointing else {}):
            try:
                if self.lora:
                    extra = attach(self.model, self.layers, options.rank, options.scale, options.seed)
                yield extra
            except BaseException:
                if self.lora:
                    detach(self.model)
                raise

    def _look(self, loss: TextLoss | None, unseen: Tensor | None) -> list[float]:
        return [] if unseen is None or loss is None else loss.held_out(unseen, 1)

    def _identity(self, ids: Tensor, unseen: Tensor | None) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            **self.options.to_dict(),
            **self.extra,
            "text": ids_sha256(ids),
            "seqlen": ids.shape[1],
            "held-out text": ids_sha256(unseen) if unseen is not None and self.options.keep == "best" else None,
            "model": weights_sha256(self.model),
            "dense model": None if self.dense is None else weights_sha256(self.dense),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def with_recovery(pruning: Mapping[str, Any], model: nn.Module, recovery: Mapping[str, Any]) -> dict[str, Any]:
    """`pruning.json` of a recovered model: the record of the pruning, with this recovery at the end of its list.

    Where zeros were lost, the sparsity of each layer and of the whole is counted again.
    """
    record = {**pruning, "recovery": [*pruning.get("recovery", ()), dict(recovery)]}
    if not recovery["zeros"]["lost"]:
        return record
    layers = {layer.name: layer.weight for layer in find(model).layers}
    counted = [dict(entry) for entry in pruning["layers"]]
    for entry in counted:
        entry["sparsity"] = zeros(layers[entry["name"]]) / layers[entry["name"]].numel()
    gone = sum(zeros(layers[entry["name"]]) for entry in counted)
    everything = sum(parameter.numel() for parameter in model.parameters())
    size = sum(layers[entry["name"]].numel() for entry in counted)
    return record | {"layers": counted, "sparsity": {"layers": gone / size, "model": gone / everything}}


def weights_sha256(model: nn.Module) -> str:
    """Of the names, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _frozen(*models: nn.Module | None) -> Iterator[None]:
    """No parameter of the models wants a gradient meanwhile."""
    wanted = [p for model in models if model is not None for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _record(pruning: Any) -> dict[str, Any]:
    if isinstance(pruning, PruneResult):
        return check_record(pruning.to_dict())
    if isinstance(pruning, str | Path):
        return read_record(pruning)
    return check_record(pruning)


def _check_dense(options: Recovery, model: Any, dense: Any) -> None:
    if options.objective == "text":
        if dense is not None:
            raise UsageError("The objective text uses no dense model: leave it out, or choose distil or reconstruct.")
        return
    if dense is None:
        raise UsageError(f"The objective {options.objective} compares with the model before pruning: give it as dense.")
    theirs, ours = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (dense, model))
    for name in ours:
        if theirs.get(name) != ours[name]:
            raise UsageError(
                f"The dense model has no {name} of shape {ours[name]}: it is not the one that was pruned."
                if name not in theirs
                else f"{name} is {theirs[name]} in the dense model and {ours[name]} in the pruned one."
            )


def _perplexities(measured: Mapping[str, Sequence[float]], ids: Tensor) -> dict[str, Any]:
    losses = {when: _mean(found) for when, found in measured.items()}
    about = {"windows": len(ids), "seqlen": ids.shape[1], "sha256": ids_sha256(ids)}
    values = {when: math.exp(loss) if loss < 700 else math.inf for when, loss in losses.items()}
    return {**values, "loss_before": losses["before"], "loss_after": losses["after"], **about}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

"""Reconstruction: a window of blocks learns to give what the dense model's window gives.

    minimise  |f(x; trained) - y|^2 / |y|^2     y = dense f(x')

over the tokens of a batch; x comes from the dense model or from the recovered blocks before, x' from the dense model,
or is x itself (`inputs`, `targets`). Each window is trained by the loop that all recovery uses.

The blocks are called with what the model's own forward pass gave them: it runs once, and every call of a block is
recorded with all its arguments; then only the hidden states are replaced. So nothing here knows an architecture.
Where a block does not read what the one before gave (the decoder of an encoder-decoder begins), it gets the input
that was recorded.

Sources: Zimmer et al. 2023, arXiv:2312.15230, section 4 (a block at a time, inputs and targets from the pruned
prefix: here inputs and targets pruned); arXiv:2510.14444 (windows of any size do, if they hold a non-linearity; inputs
and targets from the dense model, which is the default here). |y|^2 makes the loss a share: 1 is no better than zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ModelNotSupported, UsageError
from secateur.models.taps import replaced_forward
from secateur.progress import Progress, silent
from secateur.recovery.checkpoint import State, write
from secateur.recovery.loop import Trained, order, train
from secateur.recovery.objectives import autocast
from secateur.recovery.options import Recovery
from secateur.recovery.overlay import Overlay

AFFINE = 1e-3  # relative departure from a straight line under which a window counts as one matrix


@dataclass
class Call:
    """One call of a block, on one batch. `x` is the hidden state it read: None where the call before gave it."""

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor | None

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """The block on another hidden state; its hidden output (batch, tokens, hidden)."""
        if self.args:
            return hidden(block(x, *self.args[1:], **self.kwargs))
        return hidden(block(**{**self.kwargs, "hidden_states": x}))


Stream = list[Tensor]
"""One hidden state a batch."""


def hidden(output: Any) -> Tensor:
    """The hidden state of what a block returns."""
    first = output if isinstance(output, Tensor) else output[0]
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise ModelNotSupported(f"a block returns {type(first).__name__} first, not a hidden state")
    return first


@torch.no_grad()
def record_calls(model: nn.Module, blocks: Mapping[str, nn.Module], batch: Callable[[], object]) -> list[Call]:
    """Every call of a block while `batch` runs the model, first to last, with its arguments.

    Raises:
        ModelNotSupported: a block that reads no hidden state first.
    """
    calls: list[Call] = []
    last: list[Tensor] = []

    def watching(name: str, plain: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise ModelNotSupported(f"{name} reads no hidden state, so it cannot be reconstructed by itself")
            follows = bool(last) and x is last[0]
            kept = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls.append(Call(name, (None, *args[1:]) if args else (), kept, None if follows else x))
            output = plain(*args, **kwargs)
            last[:] = [hidden(output)]
            return output

        return forward

    with ExitStack() as undo:
        for name, block in blocks.items():
            undo.enter_context(replaced_forward(block, watching(name, block.forward)))
        batch()
    if not calls:
        raise ModelNotSupported(f"{type(model).__name__} never calls its blocks")
    return calls


def reconstruct(
    overlay: Overlay,
    blocks: Mapping[str, nn.Module],
    dense_blocks: Mapping[str, nn.Module],
    recorded: Sequence[list[Call]],
    options: Recovery,
    *,
    checkpoint: Path | None = None,
    state: State | None = None,
    progress: Progress = silent,
) -> list[Trained]:
    """Train the parts of `overlay` window by window; it must be open.

    Args:
        overlay: what is trained, of all blocks.
        blocks: of the pruned model, by name.
        dense_blocks: of the dense model, by the same names.
        recorded: the calls of each batch, from the dense model's forward pass.
        options: `window`, `inputs`, `targets`, and those of the loop; `steps` are for each window.
        checkpoint: a file that keeps the windows that are done, and the state inside one.
        state: identity, and what `checkpoint.read` gave when the run is resumed.

    Raises:
        UsageError: a window without a non-linearity, or with nothing to train; nothing was trained.
    """
    state = state or State({})
    names = [call.block for call in recorded[0]]
    for calls in recorded:
        if [call.block for call in calls] != names:
            raise ModelNotSupported("the blocks are not called in one order for every batch")
    spans = [range(i, min(i + options.window, len(names))) for i in range(0, len(names), options.window)]
    owned = [_parts(overlay, {names[i] for i in span}) for span in spans]
    if not any(owned):
        raise UsageError(f"There is nothing of --train {' '.join(options.train)} inside the blocks.")
    _check_bent(recorded[0], spans, dense_blocks)
    dense_stream: Stream = [torch.empty(0)] * len(recorded)
    pruned_stream = list(dense_stream)
    finished: list[Trained] = []
    done = len(state.facts.get("windows", ()))
    if done:
        finished = [Trained(**facts) for facts in state.facts["windows"]]
        with torch.no_grad():
            for name, part in overlay.parts.items():
                part.copy_(state.tensors[f"all.{name}"])
    for number, (span, parts) in enumerate(zip(spans, owned, strict=True)):
        dense_stream = [_enter(calls[span.start], x) for calls, x in zip(recorded, dense_stream, strict=True)]
        pruned_stream = [_enter(calls[span.start], x) for calls, x in zip(recorded, pruned_stream, strict=True)]
        inputs = dense_stream if options.inputs == "dense" else pruned_stream
        leads = dense_stream if options.targets == "dense" else pruned_stream
        if number >= done and parts:
            targets = _through(recorded, span, dense_blocks, leads, options)
            inside = _with_all(state if number == done else State(state.identity), overlay, finished)
            trained = _train_window(
                parts, blocks, recorded, span, inputs, targets, options, checkpoint, inside, progress,
                f"reconstructing window {number + 1} of {len(spans)}",
            )  # fmt: skip
            finished.append(trained)
        elif number >= done:
            finished.append(Trained())
        if checkpoint is not None and number >= done:
            write(checkpoint, _with_all(State(state.identity), overlay, finished))
        dense_stream = _through(recorded, span, dense_blocks, dense_stream, options)
        if options.inputs == "pruned" or options.targets == "pruned":
            pruned_stream = _through(recorded, span, blocks, pruned_stream, options)
    return finished


def _train_window(
    parts: dict[str, nn.Parameter], blocks: Mapping[str, nn.Module], recorded: Sequence[list[Call]], span: range,
    inputs: Stream, targets: Stream, options: Recovery, checkpoint: Path | None, state: State, progress: Progress,
    what: str,
) -> Trained:  # fmt: skip
    chosen = order(len(recorded), options.steps * options.accumulate, options.seed)

    def loss_of(number: int) -> Tensor:
        i = int(chosen[number])
        wanted = targets[i].float()
        given = _run(recorded[i], span, blocks, inputs[i], options).float()
        return (given - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)

    return train(parts, loss_of, options, checkpoint=checkpoint, state=state, progress=progress, what=what)


def _with_all(state: State, overlay: Overlay, finished: Sequence[Trained]) -> State:
    """The state with the windows that are done, and everything trained so far."""
    every = {f"all.{name}": part.detach().clone() for name, part in overlay.parts.items()}
    facts = {**state.facts, "windows": [vars(trained) for trained in finished]}
    return replace(state, tensors={**state.tensors, **every}, facts=facts)


def _parts(overlay: Overlay, names: set[str]) -> dict[str, nn.Parameter]:
    return {name: part for name, part in overlay.parts.items() if any(name.startswith(f"{block}.") for block in names)}


def _enter(call: Call, x: Tensor) -> Tensor:
    return x if call.x is None else call.x


def _run(calls: list[Call], span: range, blocks: Mapping[str, nn.Module], x: Tensor, options: Recovery) -> Tensor:
    with autocast(x.device, options.precision):
        for i in span:
            x = calls[i].run(blocks[calls[i].block], _enter(calls[i], x) if i > span.start else x)
    return x


@torch.no_grad()
def _through(
    recorded: Sequence[list[Call]], span: range, blocks: Mapping[str, nn.Module], stream: Stream, options: Recovery
) -> Stream:
    return [_run(calls, span, blocks, x, options) for calls, x in zip(recorded, stream, strict=True)]


@torch.no_grad()
def _check_bent(calls: list[Call], spans: Sequence[range], blocks: Mapping[str, nn.Module]) -> None:
    """f(x + d) + f(x - d) is 2 f(x) for every d only if the window is one matrix (and a bias)."""
    plain, x = Recovery(), torch.empty(0)
    for span in spans:
        x = _enter(calls[span.start], x)
        step = x.roll(1, dims=1) - x
        ahead, here, back = (_run(calls, span, blocks, x + t * step, plain) for t in (1, 0, -1))
        bend = (ahead.double() + back.double() - 2 * here.double()).norm()
        if bend <= AFFINE * (ahead.double() - back.double()).norm():
            names = " ".join(dict.fromkeys(calls[i].block for i in span))
            raise UsageError(f"The window of {names} has no non-linearity, it is one matrix: take a larger --window.")
        x = here

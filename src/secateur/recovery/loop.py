"""The one training loop: AdamW on a handful of fp32 tensors, resumable to the bit.

What comes in which order is a function of the seed and the step, so the state of a run is its tensors, AdamW's
two moments, and the numbers so far. Nothing reads torch's global random state: dropout is off.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101. Cosine: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import NumericalFailure
from secateur.progress import Progress, silent
from secateur.recovery.checkpoint import State, write
from secateur.recovery.options import Recovery


@dataclass
class Trained:
    """What a loop leaves: the loss of every step, the norm of every gradient, held-out losses by step."""

    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    best: str | None = None


def learning_rate(options: Recovery, step: int) -> float:
    """Of step 0 ... steps - 1: rising to lr over the warm-up, then falling as the schedule says.

    >>> [round(learning_rate(Recovery(steps=4, warmup=0.25, lr=1.0), step), 2) for step in range(4)]
    [1.0, 1.0, 0.75, 0.25]
    """
    rising = round(options.warmup * options.steps)
    if step < rising:
        return options.lr * (step + 1) / rising
    done = (step - rising) / max(1, options.steps - rising)
    if options.schedule == "cosine":
        return options.lr * (1 + math.cos(math.pi * done)) / 2
    return options.lr * (1 - done if options.schedule == "linear" else 1.0)


def order(windows: int, need: int, seed: int) -> Tensor:
    """(need,) numbers of windows: every one once, in a seeded order, before any comes again.

    >>> sorted(order(3, 6, seed=0).tolist())
    [0, 0, 1, 1, 2, 2]
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(windows, generator=generator, device="cpu") for _ in range(-(-need // windows))]
    return torch.cat(rounds)[:need]


def train(
    parts: Mapping[str, nn.Parameter],
    loss_of: Callable[[int], Tensor],
    options: Recovery,
    *,
    look: Callable[[], float] | None = None,
    checkpoint: Path | None = None,
    state: State | None = None,
    progress: Progress = silent,
    what: str = "recovering",
) -> Trained:
    """Train `parts` in place for `options.steps` updates.

    Args:
        parts: fp32 leaves, by name.
        loss_of: number of a forward call, counted from 0 over the whole run -> its loss, a scalar with gradient.
        look: the held-out loss, for keep best.
        checkpoint: the file to write every `checkpoint_every` steps.
        state: identity, and what `checkpoint.read` gave when the run is resumed.
        progress: told the steps done, with the loss.

    Raises:
        NumericalFailure: a loss or gradient is not finite; the last checkpoint is as it was.
        SaveFailure: a checkpoint cannot be written.
    """
    # foreach: one fused update for many small tensors
    optimiser = torch.optim.AdamW(parts.values(), lr=options.lr, weight_decay=options.weight_decay, foreach=True)
    state = state or State({})
    run = Trained()
    first = _restore(parts, optimiser, state, run)
    best = {name: tensor for name, tensor in state.tensors.items() if name.startswith("best.")}
    begun = time.perf_counter() - run.seconds
    for step in range(first, options.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(options, step)
        total = 0.0
        for call in range(step * options.accumulate, (step + 1) * options.accumulate):
            loss = loss_of(call) / options.accumulate
            loss.backward()
            total += float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(parts.values(), options.clip or math.inf))
        if not math.isfinite(total) or not math.isfinite(norm):
            raise NumericalFailure(
                f"{what}: at step {step + 1} of {options.steps} the loss is {total:.4g} and its gradient {norm:.4g}; "
                f"try a lower learning rate than {options.lr:g}."
            )
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        run.losses.append(total)
        run.gradients.append(norm)
        done = step + 1
        if done % options.checkpoint_every == 0 or done == options.steps:
            if look is not None and options.keep == "best":
                run.held_out[str(done)] = look()
                if run.best is None or run.held_out[str(done)] < run.held_out[run.best]:
                    run.best = str(done)
                    best = {f"best.{name}": part.detach().clone() for name, part in parts.items()}
            run.seconds = time.perf_counter() - begun
            if checkpoint is not None:
                write(checkpoint, _snapshot(parts, optimiser, best, state, run))
        progress(done, options.steps, f"{what}, loss {total:.3f}")
    run.seconds = time.perf_counter() - begun
    if best:
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(best[f"best.{name}"])
    return run


def _snapshot(
    parts: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    state: State,
    run: Trained,
) -> State:
    others = {name: tensor for name, tensor in state.tensors.items() if name.startswith("all.")}
    tensors: dict[str, Tensor] = {**others, **best}
    for name, part in parts.items():
        tensors[f"part.{name}"] = part.detach()
        for key, value in optimiser.state[part].items():
            tensors[f"{key}.{name}"] = value
    return State(state.identity, tensors, {**state.facts, "run": vars(run)})


def _restore(parts: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, state: State, run: Trained) -> int:
    """Put a snapshot back; the number of steps that are done."""
    if "run" not in state.facts:
        return 0
    vars(run).update(state.facts["run"])
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(state.tensors[f"part.{name}"])
            optimiser.state[part] = {
                key: state.tensors[f"{key}.{name}"].to(part.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in state.tensors
            }
    return len(run.losses)

"""Losses on text: predicting it, and agreeing with the dense model about it.

    text       CE = mean over tokens of -ln p(token)
    distil     (1 - a) CE + a T^2 KL(P_T, Q_T), P and Q the dense and the pruned prediction at temperature T

A causal model predicts each next token, an encoder-decoder the second half of a window from the first, and a masked
language model the 15 % of the tokens that are hidden from it.

Source of distil: Hinton et al. 2015, arXiv:1503.02531, section 2.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from secateur.divergence import kl_divergence
from secateur.errors import UsageError
from secateur.models.taps import replaced_forward
from secateur.walk import evaluating

HIDDEN_SHARE = 0.15
IGNORED = -100


@dataclass(frozen=True)
class Reading:
    """What a model reads, and the tokens that its logits are to predict: (batch, positions), -100 for none."""

    inputs: Mapping[str, Tensor]
    targets: Tensor


class TextLoss:
    """The loss of a model on windows of text, in nats per token.

    `batch` makes keyword arguments out of ids (batch, seqlen); `mask_token` hides tokens from a masked model.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        batch: Callable[[Tensor], Mapping[str, Tensor]],
        *,
        mask_token: int | None = None,
        dense: nn.Module | None = None,
        weight: float = 0.5,
        temperature: float = 1.0,
        precision: str = "model",
        seed: int = 0,
    ) -> None:
        self.model, self.ids, self.batch, self.mask_token = model, ids, batch, mask_token
        self.dense, self.share, self.temperature = dense, weight, temperature
        self.precision, self.seed = precision, seed
        self.device = next(model.parameters()).device
        self.masked = not getattr(getattr(model, "config", None), "is_encoder_decoder", False) and self._looks_ahead()
        if self.masked and mask_token is None:
            raise UsageError(
                f"{type(model).__name__} predicts hidden tokens, but its tokenizer has no mask token to hide them."
            )

    def __call__(self, windows: Tensor, seed: int) -> Tensor:
        """The loss on ids[windows]; `seed` chooses the tokens hidden from a masked model."""
        reading = self._reading(self.ids[windows], seed)
        loss, logits = self._predict(self.model, reading)
        if self.dense is None:
            return loss
        with torch.no_grad():
            _, wanted = self._predict(self.dense, reading)
        chosen = reading.targets != IGNORED
        t = self.temperature
        apart = kl_divergence(wanted[chosen] / t, logits[chosen] / t).mean() * t * t
        return (1 - self.share) * loss + self.share * apart

    @torch.no_grad()
    def held_out(self, ids: Tensor, batch_size: int) -> list[float]:
        """The language-model loss of each batch of ids (windows, seqlen), tokens weighted alike."""
        found = []
        for first in range(0, len(ids), batch_size):
            reading = self._reading(ids[first : first + batch_size], first)
            found.append(float(self._predict(self.model, reading)[0]))
        return found

    def _reading(self, ids: Tensor, seed: int) -> Reading:
        ids = ids.to(self.device)
        if self.masked:
            assert self.mask_token is not None
            chance = torch.Generator().manual_seed(self.seed * 1_000_003 + seed)
            hidden = torch.rand(ids.shape, generator=chance, device="cpu") < HIDDEN_SHARE
            hidden[:, 0] |= ~hidden.any(1)  # never nothing to predict
            hidden = hidden.to(self.device)
            inputs = dict(self.batch(ids.masked_fill(hidden, self.mask_token)))
            return Reading(inputs, ids.masked_fill(~hidden, IGNORED))
        inputs = dict(self.batch(ids))
        if "decoder_input_ids" in inputs:
            return Reading(inputs, ids[:, -inputs["decoder_input_ids"].shape[1] :])
        nothing = torch.full_like(ids[:, :1], IGNORED)
        return Reading(inputs, torch.cat([ids[:, 1:], nothing], dim=1))

    def _predict(self, model: nn.Module, reading: Reading) -> tuple[Tensor, Tensor]:
        with autocast(self.device, self.precision):
            logits: Tensor = model(**reading.inputs, **_uncached(model)).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), reading.targets.flatten(), ignore_index=IGNORED)
        return loss, logits

    def _looks_ahead(self) -> bool:
        """Whether an early prediction changes with a later token, tried on a few tokens."""
        few = self.ids[:1, :8].to(self.device).repeat(2, 1)
        few[1, -1] = (
            self.ids[self.ids != few[0, -1].cpu()][:1].to(self.device)[0] if self.ids.unique().numel() > 1 else 0
        )
        with torch.no_grad(), evaluating(self.model):
            logits = self.model(**self.batch(few), **_uncached(self.model)).logits.float()
        return not torch.allclose(logits[0, :-1], logits[1, :-1], rtol=0.02, atol=0.02 * float(logits.std()))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 where it is asked for; otherwise the model's own dtype."""
    if precision == "model":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def checkpointed(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, each block keeps its inputs only and runs once more in the backward pass."""
    with ExitStack() as undo:
        for block in blocks.values():
            plain = block.forward

            def forward(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
                return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

            undo.enter_context(replaced_forward(block, forward))
        yield


def _uncached(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

"""How much what a model says depends on each tile of its attention: a score that mean attention cannot give.

    m[i, c] = sum over j in block c of P[i, j]                            P = softmax(s), o = P v, g_i = dL / do_i
    E[i, c] = sum over j in block c of P[i, j] (g_i . v_j - g_i . o_i) / (1 - m[i, c])
    F[r, c] = sum over i in block r of E[i, c]^2

Closing a tile takes its mass from a query and gives it to the others, which moves o_i by (m o_i - sum P v) / (1 - m):
that is exact, and to first order in o the loss falls by E. The squares, summed over queries and texts, are the diagonal
of the Fisher information of closing it, as in Optimal Brain Damage and what followed it. Unlike a mass it has one unit
in all layers, so that all heads of a model can share one budget.

L is the language-model loss of one sequence; for a model without a head, what it says is its hidden states, and L their
product with fixed noise, whose squared gradient is on average the squared change of the states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attention.tiles import LOW, blocks, chunks, scores_of, sum_columns, sum_rows
from secateur.errors import NumericalFailure, UsageError
from secateur.gradients import language_loss

LEAST = 1e-4  # of the mass beside a tile: with less, what it is divided by and what is divided are rounding


def sensitivity_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    scaling: float,
    block: int,
    *,
    allowed: Callable[[slice], Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """F of one sequence at one site, in fp32: (heads, rows, columns).

    Args:
        query: (heads, queries, width); key: (kv heads, keys, width); value: (kv heads, keys, width of values).
        gradient: (heads, queries, width of values), dL / do.
        scaling, block, allowed, bias: as of `attention_tiles`.

    >>> q = torch.zeros(1, 2, 1)
    >>> v = torch.tensor([[[0.0], [2.0]]])
    >>> sensitivity_tiles(q, q, v, torch.ones(1, 2, 1), 1.0, 1, allowed=lambda rows: torch.ones(2, 2).tril()[rows] > 0)
    tensor([[[0., 0.],
             [1., 1.]]])
    """
    found = query.new_zeros(
        query.shape[0], blocks(query.shape[1], block), blocks(key.shape[1], block), dtype=torch.float32
    )
    for part, at, mask in chunks(query, key, block, allowed):
        end = mask.shape[1]
        alone = sum_columns(mask.int(), block) == mask.sum(-1, keepdim=True)  # no other tile could take its mass
        for heads, own, scores in scores_of(query, key, scaling, bias, part, end):
            weights = scores.masked_fill_(~mask, LOW).softmax(-1).mul_(mask)  # a query without a key has no weights
            along = gradient[heads, part].float() @ value[own, :end].float().mT
            change = weights * (along - (weights * along).sum(-1, keepdim=True))
            rest = (1 - sum_columns(weights, block)).clamp(min=LEAST)
            moved = (sum_columns(change, block) / rest).masked_fill(alone, 0.0)
            found[heads, at, : blocks(end, block)] = sum_rows(moved.square(), block)
    return found


def objective(model: Any, batch: Mapping[str, Tensor], seed: int) -> Tensor:
    """L of one sequence: the summed language-model loss, or the hidden states times noise.

    Raises:
        NumericalFailure: it is not finite.
        UsageError: the model gives neither a loss nor hidden states.
    """
    if "labels" in inspect.signature(model.forward).parameters:
        read = "decoder_" if "decoder_input_ids" in batch else ""
        real = batch["labels"] != -100 if "labels" in batch else batch.get(f"{read}attention_mask")
        count = batch[f"{read}input_ids"].numel() if real is None else int(real.sum())
        loss = language_loss(model, batch) * count
    else:
        device = next(model.parameters()).device
        states = getattr(model(**{key: value.to(device) for key, value in batch.items()}), "last_hidden_state", None)
        if states is None:
            raise UsageError(f"{type(model).__name__} gives neither a loss nor hidden states to take gradients of.")
        noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed)).to(states)
        mask = batch.get("attention_mask")
        loss = (states * noise * (1 if mask is None else mask.to(states)[..., None])).sum()
    if not bool(torch.isfinite(loss)):
        raise NumericalFailure(f"the loss of a sequence is {loss.item()}: try another dtype or text")
    return loss


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """While open, gradients flow from the output to the embeddings, and no parameter gets any."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def opened(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True).clone()  # a copy may be changed in place

    with ExitStack() as undo:
        try:
            for parameter, _ in before:
                parameter.requires_grad_(False)
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    undo.callback(module.register_forward_hook(opened).remove)
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.enable_grad())
            yield
        finally:
            for parameter, wanted in before:
                parameter.requires_grad_(wanted)

"""How far two sets of predictions over a vocabulary are apart, in nats (bits = nats / ln 2).

    P = softmax(p_logits), Q = softmax(q_logits)   over the last axis, the vocabulary
    H(P)     = - sum P ln P                                          0 <= H  <= ln vocab
    KL(P, Q) =   sum P (ln P - ln Q)                                 0 <= KL
    JS(P, Q) =   KL(P, M) / 2 + KL(Q, M) / 2,  M = (P + Q) / 2       0 <= JS <= ln 2

All with 0 ln 0 = 0, so logits of minus infinity (tokens ruled out) are welcome in either set or in both.
Everything is computed in fp32, or in fp64 where an input is fp64, and can be differentiated.

Sources: Kullback and Leibler 1951; Lin 1991, "Divergence measures based on the Shannon entropy", eq. 4.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from secateur.errors import UsageError

LN2 = math.log(2.0)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of each prediction.

    Args:
        logits: (..., vocab) unnormalised, any float dtype, minus infinity allowed.

    Returns:
        (...,) fp32 (fp64 for fp64), in nats: 0 for a certain prediction, ln vocab for a uniform one.

    Raises:
        UsageError: the logits are not floating point or have no vocabulary axis.

    >>> entropy(torch.zeros(4)).exp().item()
    4.0
    >>> entropy(torch.tensor([7.0, -torch.inf])).item()
    0.0
    """
    log_p = _log_softmax(logits, "logits")
    return (log_p.exp() * -log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of Q from P: what it costs to believe Q when P is true.

    Args:
        p_logits: (..., vocab) unnormalised, any float dtype, minus infinity allowed; the dense model's.
        q_logits: the same shape as p_logits; the pruned model's.

    Returns:
        (...,) fp32 (fp64 if one input is fp64), in nats: 0 when they agree, infinite where Q rules out a
        token that P does not.

    Raises:
        UsageError: the shapes differ (two vocabularies are the usual cause), or the dtype is not a float.

    >>> round(kl_divergence(torch.tensor([0.0, -torch.inf]), torch.zeros(2)).item(), 6)  # ln 2
    0.693147
    >>> kl_divergence(torch.zeros(2), torch.tensor([0.0, -torch.inf])).item()
    inf
    """
    log_p, log_q = _both(p_logits, q_logits)
    ratio = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    return (log_p.exp() * ratio).sum(-1).clamp(min=0.0)


def js_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two predictions: symmetric, always finite, at most ln 2.

    With d = ln Q - ln P the formula above becomes, term by term and with no cancellation of large logarithms,
    2 JS = sum P (ln 2 - softplus(d)) + Q (ln 2 - softplus(-d)); equal predictions give exactly 0.

    Args:
        p_logits: (..., vocab) unnormalised, any float dtype, minus infinity allowed.
        q_logits: the same shape as p_logits.

    Returns:
        (...,) fp32 (fp64 if one input is fp64), in nats: 0 when they agree, ln 2 when they never overlap.

    Raises:
        UsageError: the shapes differ (two vocabularies are the usual cause), or the dtype is not a float.

    Source:
        Lin 1991, eq. 4.1. Used on pruned models by Khanal and Capone 2024, arXiv:2409.11233, whose released
        code normalises over token positions instead of the vocabulary; this does not.

    >>> js_divergence(torch.zeros(2, 5), torch.zeros(2, 5)).tolist()
    [0.0, 0.0]
    >>> round(js_divergence(torch.tensor([9e3, 0.0]), torch.tensor([0.0, 9e3])).item(), 6)
    0.693147
    """
    log_p, log_q = _both(p_logits, q_logits)
    # nan where both are ruled out; infinities become huge and meet a factor of exactly 0
    d = (log_q - log_p).nan_to_num(nan=0.0)
    twice = log_p.exp() * (LN2 - softplus(d)) + log_q.exp() * (LN2 - softplus(-d))
    return (twice.sum(-1) / 2).clamp(0.0, LN2)


def divergences(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon divergence and KL(P, Q) at once, from log-probabilities that are there already.

    The same numbers as `js_divergence` and `kl_divergence` to rounding, at about a third of their cost, as
    softplus(-d) = softplus(d) - d.

    Args:
        log_p, log_q: (..., vocab) logarithms of probabilities, of one shape and dtype; minus infinity allowed.

    Returns:
        js, kl: (...,) each, in nats.

    >>> log_p = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    >>> js, kl = divergences(log_p, torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log())
    >>> [round(x, 4) for x in js.tolist()], [round(x, 4) for x in kl.tolist()]
    ([0.0, 0.2158], [0.0, 0.6931])
    """
    p, q = log_p.exp(), log_q.exp()
    d = (log_p - log_q).nan_to_num(nan=0.0)
    s = softplus(d)  # ln (2 M) - ln Q; where d is huge, d - s is 0 and takes ln 2 without loss
    js = (p * (d - s + LN2) + q * (LN2 - s)).sum(-1) / 2
    kl = (p * d).sum(-1)
    ruled_out = log_q == -torch.inf
    if bool(ruled_out.any()):
        kl = kl.masked_fill((ruled_out & (log_p > -torch.inf)).any(-1), torch.inf)
    return js.clamp(0.0, LN2), kl.clamp(min=0.0)


def _both(p_logits: Tensor, q_logits: Tensor) -> tuple[Tensor, Tensor]:
    if p_logits.shape != q_logits.shape:
        raise UsageError(
            f"Two sets of logits must have one shape (..., vocab); "
            f"got p_logits {tuple(p_logits.shape)} and q_logits {tuple(q_logits.shape)}."
        )
    log_p, log_q = _log_softmax(p_logits, "p_logits"), _log_softmax(q_logits, "q_logits")
    dtype = torch.promote_types(log_p.dtype, log_q.dtype)
    return log_p.to(dtype), log_q.to(dtype)


def _log_softmax(logits: Tensor, name: str) -> Tensor:
    if not logits.is_floating_point() or logits.dim() == 0 or logits.shape[-1] == 0:
        raise UsageError(f"{name} must be floating point, (..., vocab); got {logits.dtype} {tuple(logits.shape)}.")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=dtype)

"""swap: other kept weights: exchange one kept with one dropped weight of a row as long as the row's output error falls.

With d = w - w0 and c = H d for a row, dropping the kept i and taking back the dropped j at its dense value changes the
error d^T H d by exactly

    D_ij = (w_i^2 H_ii - 2 w_i c_i) + (w0_j^2 H_jj + 2 w0_j c_j) - 2 w_i w0_j H_ij        H = X^T X / tokens

W0: (out, in) dense weight.  X: (tokens, in) inputs.  w: the row as the method left it; kept weights may differ from w0.
One-swaps as in SparseSwaps, Zimmer et al. 2025. A round picks in every row the entries that promise most by the first
two terms (for n:m the groups with the best exchange), then makes the best exchange among them again and again, with
the exact D; c is renewed by one product of matrices a round.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import UsageError, check_whole
from secateur.masks import NM, Pattern, Unstructured
from secateur.refinements import Refined, Refinement
from secateur.statistics import Gram
from secateur.view import LayerView

_ROOM = 1 << 24  # entries of the largest array
_LEAST = 1e-6  # share of a row's error that an exchange must win: less may be rounding


@dataclass(frozen=True)
class Swap(Refinement):
    """Exact one-swaps of the mask.

    Attributes:
        rounds: at most this many; a row that finds nothing in a round is finished.
        candidates: kept and dropped entries of a row looked at in a round; as many exchanges at most.

    >>> from secateur.statistics import Bundle
    >>> inputs = Bundle((Gram,))
    >>> inputs.update(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    >>> layer = LayerView("q", torch.tensor([[2.0, 0.0]]), inputs)
    >>> dense, keep = torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False]])
    >>> Swap().refine(layer, dense, keep, Unstructured("row")).keep  # the second input is three times as large
    tensor([[False,  True]])
    """

    rounds: int = 4
    candidates: int = 16

    source = "Zimmer et al. 2025, SparseSwaps"

    def __post_init__(self) -> None:
        for name in ("rounds", "candidates"):
            check_whole(name, "swap", getattr(self, name))

    def check(self, pattern: Pattern) -> None:
        if pattern == Unstructured("column"):
            raise UsageError(
                "swap exchanges weights within a row, which would change the counts per column that the pattern "
                "fixes: leave swap out, or compare per row, per layer or n:m."
            )

    def refine(self, layer: LayerView, dense: Tensor, keep: Tensor, pattern: Pattern) -> Refined:
        self.check(pattern)
        h, keep = layer[Gram].mean, keep.clone()
        before = dense.new_empty(len(dense))
        after = torch.empty_like(before)
        widest = max(4 * min(self.candidates, dense.shape[1]) ** 2, dense.shape[1] * _group(pattern))
        for part in torch.arange(len(dense), device=dense.device).split(max(_ROOM // widest, 1)):
            rows, w, w0, k = part, layer.weight[part], dense[part], keep[part]
            c = (w - w0) @ h
            before[rows] = after[rows] = error = ((w - w0) * c).sum(1)
            for _ in range(self.rounds if not bool(k.all()) else 0):
                new_w, new_k = self._round(h, w, w0, c, k, error, pattern)
                new_c = (new_w - w0) @ h
                new_error = ((new_w - w0) * new_c).sum(1)
                on = new_error < error  # a row that stayed is finished
                rows, w, w0, k = rows[on], new_w[on], w0[on], new_k[on]
                c, error = new_c[on], new_error[on]
                layer.weight[rows], keep[rows], after[rows] = w, k, error
                if not len(rows):
                    break
        return Refined(keep, before.clamp_(min=0), after.clamp_(min=0))

    def _round(
        self, h: Tensor, w: Tensor, w0: Tensor, c: Tensor, keep: Tensor, error: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """(rows, in) weights and keep after the exchanges of one round."""
        diagonal = h.diagonal()
        loss = (w * (w * diagonal - 2 * c)).masked_fill(~keep, torch.inf)
        gain = (w0 * (w0 * diagonal + 2 * c)).masked_fill(keep, torch.inf)
        if isinstance(pattern, NM):
            out, into, together = self._in_groups(h, w, w0, loss, gain, keep, pattern)
        else:
            many = min(self.candidates, w.shape[1])
            out, into = (cost.topk(many, largest=False, sorted=False).indices for cost in (loss, gain))
            together = torch.ones(1, 1, dtype=torch.bool, device=w.device)
        moved = _exchange(
            h, torch.where(keep, -w, w0), loss.gather(1, out), gain.gather(1, into), out, into, together, _LEAST * error
        )
        keep = keep ^ moved
        return torch.where(moved, w0 * keep, w), keep

    def _in_groups(
        self, h: Tensor, w: Tensor, w0: Tensor, loss: Tensor, gain: Tensor, keep: Tensor, pattern: NM
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Kept and dropped entries of each row's most promising groups, and which of them share one."""
        n, m = pattern.n, pattern.m
        size = (len(w), -1, m)
        inside = h.view(-1, m, h.shape[1] // m, m).diagonal(dim1=0, dim2=2).movedim(2, 0)  # (groups, m, m)
        change = loss.view(size)[..., None] + gain.view(size)[..., None, :]
        change -= 2 * w.view(size)[..., None] * w0.view(size)[..., None, :] * inside
        best = change.flatten(2).amin(2)
        groups = best.topk(min(max(2 * self.candidates // m, 1), best.shape[1]), largest=False, sorted=False).indices
        order = keep.view(size).int().argsort(dim=2, descending=True, stable=True)
        order = order.gather(1, groups[..., None].expand(-1, -1, m)) + groups[..., None] * m
        mine = torch.arange(groups.shape[1], device=w.device)
        together = mine.repeat_interleave(n)[:, None] == mine.repeat_interleave(m - n)
        return order[..., :n].flatten(1), order[..., n:].flatten(1), together


def _group(pattern: Pattern) -> int:
    return pattern.m if isinstance(pattern, NM) else 1


def _exchange(
    h: Tensor, step: Tensor, loss: Tensor, gain: Tensor, out: Tensor, into: Tensor, allowed: Tensor, least: Tensor
) -> Tensor:
    """The best exchange of every row, again and again, each entry once; (rows, in) bool, the entries that moved.

    Args:
        step: (rows, in) by how much an entry changes when it moves.
        loss, gain: (rows, K) and (rows, J), the changes of the error if only an entry `out` or `into` moved; inf where
            it must not. They are kept up to date.
        out, into: columns of the candidates. allowed: (K, J) or (1, 1) bool, which may be exchanged for each other.
        least: (rows,) what an exchange must win.
    """
    lines = torch.arange(len(step), device=step.device)
    moved = torch.zeros_like(step, dtype=torch.bool)
    step_out, step_into = step.gather(1, out), step.gather(1, into)
    # twice the step of one times H times the step of the other: how one move changes what another is worth
    both = torch.cat([out, into], 1)
    steps = torch.cat([step_out, step_into], 1)
    effect = h[both[:, :, None], both[:, None, :]].mul_(2 * steps[:, :, None]).mul_(steps[:, None, :])
    worth = torch.cat([loss, gain], 1)
    many, others = out.shape[1], into.shape[1]
    cross = effect[:, :many, many:].masked_fill(~allowed, torch.inf)
    for _ in range(min(many, others)):
        change = worth[:, :many, None] + worth[:, None, many:] + cross
        best, place = change.flatten(1).min(1)
        go = best < -least
        if not bool(go.any()):
            break
        i, j = place // others, place % others + many
        worth += torch.where(go[:, None], effect[lines, i] + effect[lines, j], 0.0)
        for k in (i, j):
            worth[lines[go], k[go]] = torch.inf
            moved[lines[go], both[lines, k][go]] = True
    return moved

"""Masks that know nothing of the attention, with exactly as many blocks as a plan: what a calibrated mask must beat.

    random    blocks drawn at random
    window    the blocks nearest to the diagonal (StreamingLLM's sinks and local window, arXiv:2309.17453)

Both keep what every mask keeps, the diagonal, the plan's sinks and last keys, and then in each layer as many blocks as
the plan keeps there at one length: one block more would be another density. The published random baseline draws over
another population than the masks it is compared with (specs of this project, attention.md 1.7, no. 13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateur.attention.density import extents
from secateur.attention.plan import Plan
from secateur.attention.site_mask import SiteMask, at_ends
from secateur.attention.sites import Site
from secateur.masks import check_sparsity, drop_count

Order = Callable[[Tensor, int], Tensor]
"""Distances (rows, columns) of blocks and a number of heads -> (heads, rows, columns) ranks; the lowest are kept."""


def random_plan(
    plan: Plan, *, seed: int = 0, sparsity: float | None = None, length: int | None = None, keys: int | None = None
) -> Plan:
    """Blocks drawn at random, as many in every layer as `plan` keeps at `length`.

    Args:
        plan: whose blocks are counted, site by site.
        seed: of the draw.
        sparsity: this share of blocks to drop in every layer instead of the plan's.
        length: tokens at which the counts agree, by default those that each site was observed at. Rows behind keep the
            distances that most rows before keep.
        keys: tokens that an encoder before a decoder reads, by default `length`.

    Raises:
        UsageError: neither the plan nor the caller says a length.
        InvalidParameter: a length or sparsity out of range.
    """
    generator = torch.Generator().manual_seed(seed)

    def order(distance: Tensor, heads: int) -> Tensor:
        return torch.rand(heads, *distance.shape, generator=generator, dtype=torch.float64)

    return _like(plan, order, {"baseline": "random", "seed": seed}, sparsity, length, keys)


def window_plan(
    plan: Plan, *, sparsity: float | None = None, length: int | None = None, keys: int | None = None
) -> Plan:
    """The blocks nearest to the diagonal, and the sinks, as many in every layer as `plan` keeps at `length`.

    Every head has the same window; what is left of the count widens it by one block in the first heads. Args and
    errors as `random_plan`.
    """

    def order(distance: Tensor, heads: int) -> Tensor:
        far = distance.abs().double().expand(heads, -1, -1)
        return far + torch.arange(heads, dtype=torch.float64)[:, None, None] / heads

    return _like(plan, order, {"baseline": "window"}, sparsity, length, keys)


def _like(
    plan: Plan, order: Order, facts: dict[str, Any], sparsity: float | None, length: int | None, keys: int | None
) -> Plan:
    if sparsity is not None:
        facts = {**facts, "sparsity": check_sparsity(sparsity, "attention masks")}
    sizes = extents(plan, length, keys)
    sites = {site.name: site for site in plan.model_sites}
    masks = {name: _matched(mask, sites[name], order, *sizes[name], sparsity) for name, mask in plan.sites.items()}
    chosen = {"length": plan.record.get("length") if length is None else length}
    return replace(plan, sites=masks, record={**plan.record, **facts, **chosen, "sizes": sizes})


def _matched(mask: SiteMask, site: Site, order: Order, queries: int, keys: int, sparsity: float | None) -> SiteMask:
    """As many blocks as `mask` has at this length, or what the sparsity leaves, lowest in order first."""
    like = mask.layout(queries, keys).keep.expand(site.heads, -1, -1)
    rows, columns = like.shape[1:]
    distance = torch.arange(rows)[:, None] - torch.arange(columns)
    possible = distance >= 0 if mask.causal else torch.ones_like(distance, dtype=torch.bool)
    sinks = 0 if mask.sinks is None else int(mask.sinks.any(0).sum())
    ends = at_ends(columns, max(1, sinks) if mask.cross else sinks, mask.last)
    forced = (ends.expand_as(distance) if mask.cross else (distance == 0) | ends) & possible
    rank = order(distance, site.heads).masked_fill(forced, -1.0).masked_fill(~possible, torch.inf)
    total = site.heads * int(possible.sum())
    many = int(like.sum()) if sparsity is None else total - drop_count(total, sparsity)
    many = max(many, site.heads * int(forced.sum()))
    best = rank.flatten().sort(stable=True).indices[:many]
    keep = torch.zeros(rank.numel(), dtype=torch.bool)
    keep[best] = True
    keep = keep.view_as(rank)
    lowest = 0 if mask.causal else 1 - columns
    offsets = _distances(keep, distance, possible & ~forced, lowest)
    marks = torch.ones(site.heads, sinks, dtype=torch.bool) if sinks else None
    return SiteMask("hybrid", mask.block, mask.causal, keep, offsets, marks, lowest, mask.cross, last=mask.last)


def _distances(keep: Tensor, distance: Tensor, ruled: Tensor, lowest: int) -> Tensor:
    """(heads, distances): for rows behind the known ones, the distances that most of their tiles keep."""
    number = int(distance.max()) - lowest + 1
    index = (distance - lowest).clamp(min=0).flatten()
    there = torch.zeros(number, dtype=torch.long).index_add_(0, index, ruled.flatten().long())
    kept = torch.zeros(len(keep), number, dtype=torch.long).index_add_(1, index, (keep & ruled).flatten(1).long())
    offsets = (2 * kept > there) & (there > 0)
    offsets[:, -lowest] = True
    return offsets

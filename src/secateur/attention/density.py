"""How sparse a plan is, in every count that a paper or a kernel may mean.

    effective   1 - kept pairs / pairs that may meet           what the dense model would have computed
    paper       1 - kept pairs / all pairs of the rectangle    a causal mask alone has 50 % of a square
    block       kept blocks / blocks that may meet             what a kernel computes, at the block it runs
    at 128      the same with blocks of 128 tokens, one kept part being enough: what a kernel with such blocks computes

Pairs and blocks are counted over the heads of a site, a kind of attention, or all of a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.attention.plan import Plan
from secateur.attention.site_mask import SiteMask
from secateur.attention.sites import Site
from secateur.attention.tiles import blocks, lengths, sum_tiles
from secateur.errors import UsageError, check_whole

COARSE = 128  # tokens on a side of the blocks that GPU kernels like


@dataclass(frozen=True)
class Density:
    """Of one site, one kind of site, or the whole plan, at one length.

    `sparsity_paper` and `sparsity_effective` are shares of pairs removed, `density_block` and `density_128` shares of
    blocks computed (the latter None where 128 is no multiple of the block).
    """

    sparsity_paper: float
    sparsity_effective: float
    density_block: float
    density_128: float | None
    kept_pairs: int
    possible_pairs: int
    all_pairs: int
    kept_blocks: int
    possible_blocks: int


@dataclass(frozen=True)
class PlanReport:
    """Densities of a plan. `length` is the longest that is counted, `sizes` has queries and keys of every site; `sites`
    has those with a mask, by name; `heads` the kept share of blocks of every head there; `families` and `total` count
    the dense sites too.
    """

    length: int
    sizes: dict[str, list[int]]
    block: int | None
    total: Density
    families: dict[str, Density]
    sites: dict[str, Density]
    heads: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        coarse = "" if self.total.density_128 is None else f", {self.total.density_128:.2%} at {COARSE}"
        return (
            f"at {self.length} tokens {self.total.sparsity_effective:.2%} of what may meet is dropped "
            f"({self.total.sparsity_paper:.2%} of all pairs); {self.total.density_block:.2%} of the blocks of "
            f"{self.block} are computed{coarse}"
        ).replace("%", " %")


def plan_report(plan: Plan, length: int | None = None, *, keys: int | None = None) -> PlanReport:
    """Count a plan's pairs and blocks.

    Args:
        plan: any plan.
        length: tokens, by default those that each site was observed at.
        keys: tokens that an encoder before a decoder reads, by default `length`.

    Raises:
        UsageError: an absolute mask does not reach so far, or no length is known.

    >>> site = Site("a", "decoder", "self", 0, 2, 1, 4, True)
    >>> band = SiteMask("toeplitz", 64, causal=True, offsets=torch.tensor([[True, False, False, False]]))
    >>> print(plan_report(Plan("llama", "Llama", (site,), {"a": band}), 256))
    at 256 tokens 74.71 % of what may meet is dropped (87.30 % of all pairs); 40.00 % of the blocks of 64 are ...
    """
    sizes = extents(plan, length, keys)
    block = next((mask.block for mask in plan.sites.values()), None)
    every: dict[str, _Counts] = {}
    for site in plan.model_sites:
        every[site.name] = _count(site, plan.sites.get(site.name), *sizes[site.name], block or COARSE)
    families: dict[str, list[_Counts]] = {}
    for site in plan.model_sites:
        families.setdefault(site.family, []).append(every[site.name])
    return PlanReport(
        length=max(queries for queries, _ in sizes.values()),
        sizes={name: list(size) for name, size in sizes.items()},
        block=block,
        total=_density(every.values()),
        families={family: _density(counts) for family, counts in families.items()},
        sites={name: _density([every[name]]) for name in plan.sites},
        heads={name: every[name].heads for name in plan.sites},
    )


def extents(plan: Plan, length: int | None = None, keys: int | None = None) -> dict[str, tuple[int, int]]:
    """Queries and keys of every site, in tokens: those asked for, or those at which the plan was observed.

    Raises:
        UsageError: no length is asked for, and the plan does not say one.
        InvalidParameter: a length that is none.
    """
    for name, value in (("length", length), ("keys", keys)):
        if value is not None:
            check_whole(name, "an attention plan", value)
    known = plan.record.get("sizes") if length is None else None
    chosen = plan.record.get("length") if length is None else length
    if not isinstance(chosen, int):
        raise UsageError("The attention plan does not say at which length it was made: give a length.")
    two = any(site.stack == "decoder" for site in plan.model_sites)
    sizes = {}
    for site in plan.model_sites:
        read = (keys or chosen) if site.stack == "encoder" and two else chosen
        size = (read, read) if site.kind == "self" else (chosen, keys or chosen)
        if isinstance(known, Mapping) and site.name in known:
            size = (int(known[site.name][0]), int(known[site.name][1]))
        sizes[site.name] = size
    return sizes


@dataclass(frozen=True)
class _Counts:
    kept_pairs: int
    possible_pairs: int
    all_pairs: int
    kept_blocks: int
    possible_blocks: int
    kept_coarse: int | None
    possible_coarse: int
    heads: list[float]


def _count(site: Site, mask: SiteMask | None, queries: int, keys: int, block: int) -> _Counts:
    block = block if mask is None else mask.block
    pairs = pairs_of(queries, keys, block, site.causal)
    possible = pairs > 0
    if mask is None:
        keep = possible.expand(site.heads, -1, -1)
    else:
        keep = mask.layout(queries, keys).keep.cpu().expand(site.heads, -1, -1) & possible
    factor = COARSE // block if COARSE % block == 0 else 0
    return _Counts(
        kept_pairs=int((keep * pairs).sum()),
        possible_pairs=int(pairs.sum()) * site.heads,
        all_pairs=queries * keys * site.heads,
        kept_blocks=int(keep.sum()),
        possible_blocks=int(possible.sum()) * site.heads,
        kept_coarse=int((sum_tiles(keep.long(), factor) > 0).sum()) if factor else None,
        possible_coarse=int((sum_tiles(possible.long(), factor or 1) > 0).sum()) * site.heads,
        heads=(keep.sum((1, 2)).double() / possible.sum()).tolist(),
    )


def pairs_of(queries: int, keys: int, block: int, causal: bool) -> Tensor:
    """(rows, columns) int64: how many pairs of each block may meet.

    >>> pairs_of(3, 3, 2, causal=True).tolist()
    [[3, 0], [2, 1]]
    """
    tall, wide = lengths(queries, block), lengths(keys, block)
    if not causal:
        return tall[:, None] * wide
    row, column = torch.arange(blocks(queries, block))[:, None], torch.arange(blocks(keys, block))
    # on the diagonal query a sees a + 1 keys, or all there are
    inside = torch.minimum(torch.arange(1, block + 1)[:, None, None], wide.expand(len(tall), -1))
    inside = inside * (torch.arange(block)[:, None, None] < tall[:, None])
    return torch.where(row > column, tall[:, None] * wide, torch.where(row == column, inside.sum(0), 0))


def _density(counts: Iterable[_Counts]) -> Density:
    found = list(counts)

    def total(name: str) -> int:
        return sum(getattr(one, name) for one in found)

    coarse = None if any(one.kept_coarse is None for one in found) else total("kept_coarse") / total("possible_coarse")
    return Density(
        sparsity_paper=1 - total("kept_pairs") / total("all_pairs"),
        sparsity_effective=1 - total("kept_pairs") / total("possible_pairs"),
        density_block=total("kept_blocks") / total("possible_blocks"),
        density_128=coarse,
        kept_pairs=total("kept_pairs"),
        possible_pairs=total("possible_pairs"),
        all_pairs=total("all_pairs"),
        kept_blocks=total("kept_blocks"),
        possible_blocks=total("possible_blocks"),
    )

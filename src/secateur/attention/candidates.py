"""The candidates of one site: what a selection may drop, its score, and the mask that remains.

absolute    single tiles
toeplitz    distances of tiles, without the sinks' columns and the last one
hybrid      single tiles in the first rows, distances behind them
any         single entries, of which one keeps its block
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.attention.observation import SiteObservation
from secateur.attention.site_mask import SiteMask, at_ends
from secateur.attention.tiles import sum_tiles
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.attention.masking import Masking

LOCAL = 0.75  # of a row's budget: on SmolLM2 the band is worth more than what the mean attention ranks before it


@dataclass(eq=False)
class Candidates:
    """What may go at one site. A row is a head, or a group of heads with one mask.

    score: (rows, n). weight: (n,) tiles of each. forced: (n,) bool. total: tiles of one row, forced ones that are no
    candidate too. impossible: pairs or tiles of one row that may never meet. keep: (rows, n), set by the selection.
    """

    site: SiteObservation
    score: Tensor
    weight: Tensor
    forced: Tensor
    total: int
    impossible: int
    build: Callable[[Tensor], SiteMask]
    keep: Tensor

    def mask(self) -> SiteMask:
        """The mask of what was kept."""
        return self.build(self.keep.repeat_interleave(self.site.heads // len(self.keep), 0))


def candidates(site: SiteObservation, observed: int, block: int, masking: Masking) -> Candidates:
    """What of a site may go.

    Args:
        site: as it was observed, in tiles of `observed` tokens.
        block: of the mask, a multiple of `observed`.
        masking: the options.

    Raises:
        UsageError: the observation lacks what the options ask for.
    """
    kind = masking.kind_of(site.family)
    factor = block // observed
    groups = site.kv_heads if masking.share == "kv_group" else site.heads
    last = _keeps_last(site, block, masking)
    grid = _Grid.of(site, 1 if masking.rule == "any" else factor, groups, masking.score, last)
    if masking.rule == "any":
        return _entries(site, grid, block, factor, masking)
    if kind == "absolute":
        return _absolute(site, grid, block, masking)
    count = 0
    if kind == "hybrid":
        rows = grid.possible.shape[0]
        count = min(rows, masking.rows or max(1, rows // 4))
    return _by_distance(site, grid, block, masking, count)


@dataclass(frozen=True, eq=False)
class _Grid:
    """mass: (groups, rows, columns), of a whole group, or its squares; count, area: (rows, columns); scored: the pairs
    that the mass is of, all or those outside their sequence's last block of keys; last: whether that stays."""

    mass: Tensor
    count: Tensor
    area: Tensor
    scored: Tensor
    last: bool

    @classmethod
    def of(cls, site: SiteObservation, factor: int, groups: int, score: str, last: bool) -> _Grid:
        name = "mass" if score == "mean" else score
        summed, scored = getattr(site, name), site.count
        if summed is None:
            raise UsageError(f"The score 'loss' needs gradients, and {site.name} has none: observe with --gradients.")
        if last:
            if (rest := site.without_last(name)) is None:
                raise UsageError(
                    f"The observation of {site.name} does not tell the last keys from the others: observe again, or "
                    "take --last never."
                )
            summed, scored = rest
        mass = summed.double().view(groups, -1, *site.count.shape).mean(1)
        return cls(mass, site.count, site.area, scored, last).coarser(factor)

    def coarser(self, factor: int) -> _Grid:
        """Of tiles so many times as wide."""
        mass, count, area, scored = (
            sum_tiles(part, factor) for part in (self.mass, self.count, self.area, self.scored)
        )
        return _Grid(mass, count, area, scored, self.last)

    @property
    def possible(self) -> Tensor:
        return self.count > 0

    @property
    def score(self) -> Tensor:
        return self.mass / self.scored.clamp(min=1)

    def at_ends(self, sinks: int) -> Tensor:
        """Bool (columns,): the sinks, and the last column where that stays."""
        return at_ends(self.count.shape[1], sinks, self.last, self.count.device)

    def distances(self) -> Tensor:
        rows, columns = self.count.shape
        device = self.count.device
        return torch.arange(rows, device=device)[:, None] - torch.arange(columns, device=device)


def _band(site: SiteObservation, grid: _Grid, masking: Masking) -> int:
    if masking.band is not None:
        return masking.band
    if site.family == "decoder-cross":
        return 0  # the first column stays in the diagonal's place
    if masking.population == "paper" or masking.rule == "any" or masking.score == "loss":
        return 1
    rows = grid.count.shape[0]
    sinks = int((grid.possible & grid.at_ends(masking.sinks)).sum())
    width = LOCAL * ((1 - masking.sparsity) * int(grid.possible.sum()) - sinks) / rows
    return max(1, round(width if site.causal else (width + 1) / 2))


def _always(site: SiteObservation, grid: _Grid, sinks: int, band: int) -> Tensor:
    """Bool (rows, columns): sinks, last column and band; in cross-attention the first column, which every query has."""
    first = max(1, sinks) if site.family == "decoder-cross" else sinks
    return grid.at_ends(first).expand_as(grid.count) | (grid.distances().abs() < band)


def _keeps_last(site: SiteObservation, block: int, masking: Masking) -> bool:
    if site.causal or masking.last != "auto":
        return masking.last == "always" and not site.causal
    if masking.population == "paper" or masking.rule == "any" or site.last_count is None:
        return False
    keys = int(site.count.sum()) / max(int(site.queries.sum()), 1)  # that a query may see, in sequences as they are
    return (1 - masking.sparsity) * keys / block >= masking.sinks + 2


def _sinks(site: SiteObservation, sinks: int) -> Tensor | None:
    return torch.ones(site.heads, sinks, dtype=torch.bool) if sinks else None


def _absolute(site: SiteObservation, grid: _Grid, block: int, masking: Masking) -> Candidates:
    forced = _always(site, grid, masking.sinks, _band(site, grid, masking))
    place = grid.possible

    def build(keep: Tensor) -> SiteMask:
        rows = (grid.area == 0).expand(site.heads, -1, -1).clone()
        rows[:, place] = keep
        return _mask(site, block, masking, grid.last, rows | (forced & place))

    score = grid.score[:, place]
    number = score.shape[1]
    return Candidates(
        site, score, torch.ones(number, dtype=torch.long), forced[place], number, place.numel() - number, build,
        torch.ones_like(score, dtype=torch.bool),
    )  # fmt: skip


def _entries(site: SiteObservation, grid: _Grid, block: int, factor: int, masking: Masking) -> Candidates:
    """Rule any: entries are chosen, and a block stays if one of them does."""
    place = grid.possible
    coarse = grid.coarser(factor)
    forced = _always(site, coarse, masking.sinks, _band(site, coarse, masking)) & coarse.possible

    def build(keep: Tensor) -> SiteMask:
        entries = torch.zeros(site.heads, *place.shape, dtype=torch.float32)
        entries[:, place] = keep.float()
        return _mask(site, block, masking, grid.last, (sum_tiles(entries, factor) > 0) | forced | (coarse.area == 0))

    score = grid.score[:, place]
    number = score.shape[1]
    none = torch.zeros(number, dtype=torch.bool)
    return Candidates(
        site, score, torch.ones(number, dtype=torch.long), none, number, place.numel() - number, build,
        torch.ones_like(score, dtype=torch.bool),
    )  # fmt: skip


def _by_distance(site: SiteObservation, grid: _Grid, block: int, masking: Masking, count: int) -> Candidates:
    """Distances of all rows from `count` on, and the single tiles of the rows before."""
    band = _band(site, grid, masking)
    forced = _always(site, grid, masking.sinks, band)
    first = torch.arange(len(grid.count)) < count
    single = grid.possible & first[:, None]
    sinks = max(1, masking.sinks) if site.family == "decoder-cross" else masking.sinks
    ruled = grid.possible & ~first[:, None] & ~grid.at_ends(sinks)  # tiles that a distance decides
    distance = grid.distances()
    lowest = 0 if site.causal else int(distance.min())
    number = int(distance.max()) - lowest + 1
    index = (distance - lowest).clamp(min=0)

    def along(values: Tensor) -> Tensor:
        flat = torch.where(ruled, values, 0).flatten(-2)
        return flat.new_zeros(*flat.shape[:-1], number).index_add_(-1, index.flatten(), flat)

    weight = along(ruled.long())
    there = weight > 0
    score = along(grid.mass) / along(grid.scored).clamp(min=1)
    far = (torch.arange(number) + lowest).abs()
    local = far < band

    def build(keep: Tensor) -> SiteMask:
        tiles = int(single.sum())
        offsets = local.expand(site.heads, -1).clone()
        offsets[:, there] |= keep[:, tiles:]
        if not count:
            return _mask(site, block, masking, grid.last, None, offsets, lowest)
        rows = ((grid.area == 0) | (forced & grid.possible)).expand(site.heads, -1, -1).clone()
        rows[:, single] |= keep[:, :tiles]
        return _mask(site, block, masking, grid.last, rows[:, :count], offsets, lowest)

    candidates = torch.cat([grid.score[:, single], score[:, there]], 1)
    return Candidates(
        site, candidates, torch.cat([torch.ones(int(single.sum()), dtype=torch.long), weight[there]]),
        torch.cat([forced[single], local[there]]), int(grid.possible.sum()),
        int((~grid.possible).sum()), build, torch.ones_like(candidates, dtype=torch.bool),
    )  # fmt: skip


def _mask(
    site: SiteObservation,
    block: int,
    masking: Masking,
    last: bool,
    rows: Tensor | None,
    offsets: Tensor | None = None,
    lowest: int = 0,
) -> SiteMask:
    cross = site.family == "decoder-cross"
    kind: Any = "absolute" if offsets is None else "toeplitz" if rows is None else "hybrid"
    extend: Any = "diagonal" if cross and kind == "absolute" else masking.extend
    sinks = _sinks(site, masking.sinks)
    return SiteMask(kind, block, site.causal, rows, offsets, sinks, lowest, cross, extend, last)

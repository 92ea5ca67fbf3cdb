"""How the attention of a model differs from head to head and from kind to kind, in numbers.

With P[i, j] the mean attention of a head, m[r, c] that of its tiles (per pair that may meet), n[r, c] their pairs:

    concentration   least share of the pairs that may meet which holds 90, 95, 99 % of the mass, whole tiles first
    entropy, span   mean over queries of the entropy of their row in nats, and of E|i - j| in tokens
    first, itself   mean over queries of the mass on key 0, and on the query's own position
    sink, diagonal  share of the mass in the first column of tiles, and in the tiles of the diagonal
    toeplitz        1 - sum n (m - m_d)^2 / sum n (m - mean)^2: variance that the distance d = r - c explains;
                    once over all tiles, once without the first column, which no distance explains
    monotone        cross-attention, the last keys left out: share of queries whose argmax_c m[r, c] does not lie
                    behind that of the row before
    alignment       and over queries the correlation of argmax_c m[r, c] with r; 0 if it is constant
    variability     1 - sum n m^2 / sum n E[m^2]: share of the second moment that is variance between inputs, for
                    which no mask that is the same for every input can account
    kept            share of blocks that a plan keeps; their Gini coefficient over heads, 0 for equal budgets

Entropy, span, first and itself are exact; the others are of tiles, and of entries if the observation has a block of 1.

Source: the questions of Rugina et al. 2020, arXiv:2012.02030, of self-attention against cross-attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from secateur.attention.observation import Observation, SiteObservation
from secateur.attention.plan import Plan

LEVELS = (0.9, 0.95, 0.99)
Heads = list[float]


@dataclass(frozen=True)
class SiteAnalysis:
    """One site: a number for every head, as the module defines them. `ordinal` counts the sites of one family."""

    name: str
    family: str
    ordinal: int
    concentration_90: Heads
    concentration_95: Heads
    concentration_99: Heads
    entropy: Heads
    span: Heads
    first: Heads
    itself: Heads
    sink: Heads
    diagonal: Heads
    toeplitz: Heads
    toeplitz_without_sink: Heads
    variability: Heads
    monotone: Heads | None = None
    alignment: Heads | None = None
    kept: Heads | None = None

    def measures(self) -> dict[str, Heads]:
        """The numbers by name, those that the site has."""
        return {
            field.name: value
            for field in fields(self)
            if field.name not in ("name", "family", "ordinal") and (value := getattr(self, field.name)) is not None
        }


@dataclass(frozen=True)
class Analysis:
    """Of an observation at one length. `families` has the mean of every measure over all heads of one kind of
    attention, and `gini` of the kept shares of its heads (None without a plan)."""

    length: int
    block: int
    sites: tuple[SiteAnalysis, ...]
    families: dict[str, dict[str, float]]
    gini: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def analyse(observation: Observation, plan: Plan | None = None, *, length: int | None = None) -> Analysis:
    """Measure every head.

    Args:
        observation: from `observe`.
        plan: also measure what it keeps.
        length: the observed length, by default the longest.

    Raises:
        UsageError: an empty observation, or a length that was not observed.

    >>> import transformers
    >>> from secateur.attention.observe import observe
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> found = analyse(observe(model, torch.randint(9, (3, 16)), block=2))
    >>> found.length, len(found.sites[0].entropy), list(found.families)
    (16, 2, ['decoder-self'])
    """
    sites, counts = [], dict[str, int]()
    for site in observation.at(length).values():
        kept = None
        if plan is not None and site.name in plan.sites:
            kept = _floats(_shares(plan, site, observation.block))
        sites.append(_analyse(site, counts.get(site.family, 0), kept))
        counts[site.family] = counts.get(site.family, 0) + 1
    families: dict[str, list[SiteAnalysis]] = {}
    for found in sites:
        families.setdefault(found.family, []).append(found)
    budgets = {
        family: [share for one in members for share in one.kept or ()]
        for family, members in families.items()
        if any(one.kept is not None for one in members)
    }
    return Analysis(
        length=max(observation.lengths) if length is None else length,
        block=observation.block,
        sites=tuple(sites),
        families={family: _means(members) for family, members in families.items()},
        gini=None if plan is None else {family: gini(shares) for family, shares in budgets.items()},
    )


def concentration(site: SiteObservation, level: float) -> Tensor:
    """(heads,): the least share of the pairs that may meet which holds `level` of the mass, whole tiles at a time."""
    score, possible = site.mean, site.possible
    order = score[:, possible].sort(dim=1, descending=True, stable=True).indices
    mass = site.mass[:, possible].double().gather(1, order).cumsum(1)
    pairs = site.count[possible].double().expand(site.heads, -1).gather(1, order).cumsum(1)
    reached = mass >= level * mass[:, -1:] * (1 - 1e-12)
    first = reached.long().argmax(1, keepdim=True)
    return (pairs.gather(1, first) / pairs[:, -1:])[:, 0]


def toeplitzness(site: SiteObservation, *, sinks: int = 0) -> Tensor:
    """(heads,): the share of the variance of tile means that their distance explains, without `sinks` columns."""
    rows, columns = site.count.shape
    distance = torch.arange(rows)[:, None] - torch.arange(columns)
    place = site.possible & (torch.arange(columns) >= sinks)
    weight = site.count[place].double()
    if not len(weight):
        return torch.ones(site.heads, dtype=torch.float64)
    score = site.mass[:, place].double() / weight
    index = distance[place] + columns
    size = rows + columns + 1
    mass = score.new_zeros(site.heads, size).index_add_(1, index, score * weight)
    pairs = weight.new_zeros(size).index_add_(0, index, weight)
    profile = (mass / pairs.clamp(min=1))[:, index]
    rest = (weight * (score - profile).square()).sum(1)
    mean = (weight * score).sum(1, keepdim=True) / weight.sum()
    total = (weight * (score - mean).square()).sum(1)
    flat = total <= 1e-24 * (weight * score.square()).sum(1)
    return torch.where(flat, torch.ones_like(total), 1 - rest / total.clamp(min=torch.finfo(total.dtype).tiny))


def variability(site: SiteObservation) -> Tensor:
    """(heads,) in [0, 1]: the share of the tiles' second moment that is variance between sequences."""
    square = site.square.double().sum((1, 2))
    steady = (site.mass.double().square() / site.count.clamp(min=1)).sum((1, 2))
    return (1 - steady / square.clamp(min=torch.finfo(square.dtype).tiny)).clamp(0, 1)


def gini(values: Sequence[float]) -> float:
    """Of budgets: 0 if all are alike, near 1 if one has everything.

    >>> gini([1.0, 1.0]), gini([0.0, 0.0, 0.0, 1.0])
    (0.0, 0.75)
    """
    found = torch.tensor(list(values), dtype=torch.float64)
    if not len(found) or not found.sum():
        return 0.0
    return float((found[:, None] - found).abs().mean() / (2 * found.mean()))


def _analyse(site: SiteObservation, ordinal: int, kept: Heads | None) -> SiteAnalysis:
    mass = site.mass.double()
    total = mass.sum((1, 2)).clamp(min=torch.finfo(mass.dtype).tiny)
    monotone = alignment = None
    if site.family == "decoder-cross":
        monotone, alignment = (_floats(values) for values in _path(site))
    some, most, nearly_all = (_floats(concentration(site, level)) for level in LEVELS)
    return SiteAnalysis(
        name=site.name, family=site.family, ordinal=ordinal,
        concentration_90=some, concentration_95=most, concentration_99=nearly_all,
        entropy=_floats(site.fact("entropy")),
        span=_floats(site.fact("distance")),
        first=_floats(site.fact("first")),
        itself=_floats(site.fact("itself")),
        sink=_floats(mass[:, :, 0].sum(1) / total),
        diagonal=_floats(mass.diagonal(dim1=1, dim2=2).sum(1) / total),
        toeplitz=_floats(toeplitzness(site)),
        toeplitz_without_sink=_floats(toeplitzness(site, sinks=1)),
        variability=_floats(variability(site)),
        monotone=monotone, alignment=alignment, kept=kept,
    )  # fmt: skip


def _path(site: SiteObservation) -> tuple[Tensor, Tensor]:
    """(heads,) twice: how often the strongest column does not go back, and its correlation with the row."""
    mass, count = site.without_last() or (site.mass, site.count)
    best = (mass / count.clamp(min=1)).argmax(2).double()  # (heads, rows)
    there = mass.sum(2) > 0
    weight = (site.queries * there).double()
    steps = weight[:, 1:] * there[:, :-1]
    forward = ((best.diff(dim=1) >= 0) * steps).sum(1) / steps.sum(1).clamp(min=1)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
    row = torch.arange(weight.shape[1], dtype=torch.float64)
    apart, ahead = best - (best * weight).sum(1, keepdim=True), row - (row * weight).sum(1, keepdim=True)
    spread = ((weight * apart.square()).sum(1) * (weight * ahead.square()).sum(1)).sqrt()
    alignment = torch.where(spread > 1e-12, (weight * apart * ahead).sum(1) / spread.clamp(min=1e-12), 0.0)
    return torch.where(steps.sum(1) > 0, forward, 1.0), alignment


def _shares(plan: Plan, site: SiteObservation, block: int) -> Tensor:
    """(heads,): the share of the plan's blocks that may meet which it keeps, over the rectangle that was observed."""
    mask = plan.sites[site.name]
    queries, keys = (size * block for size in site.count.shape)
    found = mask.density(queries, keys, of="blocks")
    return found.expand(site.heads)


def _means(members: Iterable[SiteAnalysis]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for one in members:
        for name, heads in one.measures().items():
            values.setdefault(name, []).extend(heads)
    return {name: math.fsum(found) / len(found) for name, found in values.items()}


def _floats(values: Tensor) -> Heads:
    return [float(value) for value in values.tolist()]

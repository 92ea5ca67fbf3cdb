"""What a mask is worth on other text and at other lengths.

    recall    share of the attention mass, as observed there, that falls into the kept blocks: 1 is lossless
    overlap   |A and B| / |A or B| of the blocks that two plans keep, those that every mask keeps left out

Recall is the cheapest forecast of the damage within one kind of mask, and misleads between kinds: a higher recall
went with a higher perplexity (specs of this project, attention.md 5.3 d). Choose kinds by held-out loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.attention.observation import Observation, SiteObservation
from secateur.attention.plan import Plan
from secateur.attention.site_mask import SiteMask, at_ends
from secateur.errors import UsageError


@dataclass(frozen=True)
class Shares:
    """A share for every head of every site, its mean over heads by kind of attention, and over all."""

    length: int
    total: float
    families: dict[str, float]
    sites: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def mass_recall(plan: Plan, observation: Observation, *, length: int | None = None) -> Shares:
    """The mean attention mass that a plan keeps, over the queries of an observation.

    Args:
        plan: made from this observation or another one.
        observation: of the same model, with blocks that divide the plan's.
        length: one that was observed, by default the longest; it may be another than the plan's.

    Raises:
        UsageError: an absolute mask does not reach so far, the plan masks nothing that was observed, or blocks that
            do not divide.
    """
    seen = {name: site for name, site in observation.at(length).items() if name in plan.sites}
    if not seen:
        raise UsageError("The plan masks no attention of this observation: it is of another model.")
    found = {name: _recall(plan.sites[name], site, observation.block) for name, site in seen.items()}
    families = {name: site.family for name, site in seen.items()}
    return _shares(max(observation.lengths) if length is None else length, found, families)


def overlap(one: Plan, other: Plan, length: int, *, keys: int | None = None) -> Shares:
    """How alike the blocks of two plans of a model are, head by head.

    Args:
        one, other: plans with masks for the same sites and of one block.
        length: tokens.
        keys: tokens that cross-attention reads, by default `length`.

    Raises:
        UsageError: no site in common, other blocks, or an absolute mask that does not reach so far.
    """
    sites = {site.name: site for site in one.model_sites if site.name in one.sites and site.name in other.sites}
    if not sites:
        raise UsageError("The two plans have no masked attention in common.")
    found = {}
    for name, site in sites.items():
        masks = (one.sites[name], other.sites[name])
        if masks[0].block != masks[1].block:
            raise UsageError(
                f"The plans have blocks of {masks[0].block} and {masks[1].block}: they cannot be compared."
            )
        wide = (keys or length) if site.kind == "cross" else length
        a, b = (mask.layout(length, wide).keep.cpu().expand(site.heads, -1, -1) for mask in masks)
        common = _always(masks, a.shape[1], a.shape[2])
        a, b = a & ~common, b & ~common
        either = (a | b).sum((1, 2)).double()
        both = (a & b).sum((1, 2)).double()
        found[name] = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    return _shares(length, found, {name: site.family for name, site in sites.items()})


def kept_of(name: Literal["mass", "count"], mask: SiteMask, site: SiteObservation, observed: int) -> Tensor:
    """The part of one of a site's sums that falls into kept blocks, tile by tile and head by head.

    Args:
        name: which sum.
        mask: of the site.
        site: as observed, in blocks of `observed` tokens. Where the mask's are larger, a little less of each sequence's
            last block is counted than is kept.

    Returns:
        fp64 (heads, rows, columns).

    Raises:
        UsageError: blocks that do not divide, or an absolute mask that does not reach so far.
    """
    if mask.block % observed:
        raise UsageError(
            f"The plan has blocks of {mask.block}, which blocks of {observed} do not divide: observe with a block that "
            "divides the plan's."
        )
    rows, columns = site.count.shape
    factor = mask.block // observed
    keep = mask.layout(rows * observed, columns * observed).keep.cpu().expand(site.heads, -1, -1)
    keep = keep.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, :rows, :columns]
    whole, last = getattr(site, name).double(), getattr(site, f"last_{name}")
    return torch.where(keep, whole, last.double() if mask.last and last is not None else 0.0)


def _recall(mask: SiteMask, site: SiteObservation, observed: int) -> Tensor:
    mass = site.mass.double()
    kept = kept_of("mass", mask, site, observed)
    return kept.sum((1, 2)) / mass.sum((1, 2)).clamp(min=torch.finfo(mass.dtype).tiny)


def _always(masks: Sequence[SiteMask], rows: int, columns: int) -> Tensor:
    """Bool (rows, columns): the diagonal or the first keys, and the sinks and last keys that both plans have."""
    own = at_ends(columns, 1, last=False) if masks[0].cross else torch.eye(rows, columns, dtype=torch.bool)
    sinks = min(0 if mask.sinks is None else int(mask.sinks.all(0).sum()) for mask in masks)
    return own | at_ends(columns, sinks, masks[0].last and masks[1].last)


def _shares(length: int, found: dict[str, Tensor], families: dict[str, str]) -> Shares:
    members: dict[str, list[Tensor]] = {}
    for name, shares in found.items():
        members.setdefault(families[name], []).append(shares)
    return Shares(
        length=length,
        total=float(torch.cat(list(found.values())).mean()),
        families={family: float(torch.cat(shares).mean()) for family, shares in members.items()},
        sites={name: [float(share) for share in shares.tolist()] for name, shares in found.items()},
    )

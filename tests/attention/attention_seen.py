"""Observations made up for tests: random attention of random sequences, summed by the definition."""

import torch

from secateur.attention.observation import Observation, SiteObservation
from secateur.attention.sites import Site
from secateur.attention.tiles import FACTS, sum_tiles


def maps(heads, queries, keys, causal, sequences=3, sharp=2.0):
    """(sequences, heads, queries, keys) rows that sum to 1, and bool (queries, keys), what may meet."""
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    allowed = allowed.tril(keys - queries) if causal else allowed
    scores = (torch.randn(sequences, heads, queries, keys) * sharp).masked_fill(~allowed, -torch.inf)
    return scores.double().softmax(-1), allowed


def seen(name, family, found, allowed, block, kv_heads=None):
    """A SiteObservation of whole maps."""
    sequences, heads, queries, _ = found.shape
    tiles = sum_tiles(found, block)
    each = sum_tiles(allowed.long(), block)
    area = sum_tiles(torch.ones_like(allowed, dtype=torch.long), block) * sequences
    rows = -(-queries // block)
    per_row = torch.tensor([min(block, queries - block * row) for row in range(rows)]) * sequences
    sums = {
        "mass": tiles.sum(0).float(),
        "square": (tiles**2 / each.clamp(min=1)).sum(0).float(),
        "count": each * sequences,
    }
    causal = family == "decoder-self"
    last = {} if causal else {f"last_{key}": _last_column(value) for key, value in sums.items()}
    return SiteObservation(
        name=name,
        family=family,
        heads=heads,
        kv_heads=kv_heads or heads,
        causal=causal,
        area=area,
        facts=torch.rand(heads, rows, len(FACTS)),
        queries=per_row,
        sequences=sequences,
        **sums,
        **last,
    )


def _last_column(sums):
    only = torch.zeros_like(sums)
    only[..., -1] = sums[..., -1]
    return only


def observation(*sites, block, length):
    """An Observation of these sites, of a model that has no others."""
    found, counts = [], {}
    for site in sites:
        stack, kind = site.family.split("-")
        number = counts.setdefault(site.family, 0)
        found.append(Site(site.name, stack, kind, number, site.heads, site.kv_heads, 8, site.causal))
        counts[site.family] += 1
    model = {"model_type": "made", "architecture": "Made", "sites": [vars(site) for site in found]}
    return Observation(block, {length: {site.name: site for site in sites}}, model, {"text": "made up"})


def decoder(layers=2, heads=4, kv_heads=2, length=24, block=4, sharp=2.0):
    """A decoder's observation, and its maps by site."""
    whole = {f"layers.{i}": maps(heads, length, length, True, sharp=sharp) for i in range(layers)}
    sites = [seen(name, "decoder-self", *one, block, kv_heads) for name, one in whole.items()]
    return observation(*sites, block=block, length=length), {name: one[0] for name, one in whole.items()}

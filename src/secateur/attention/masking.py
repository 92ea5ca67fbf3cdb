"""From observed attention to masks: which blocks a site keeps, at a sparsity.

    score(tile)        mean attention per pair that may meet in it, or its mean square, or `sensitivity`'s loss per pair
    score(distance)    the same over all tiles r - c = d, the sinks' columns left out
    drop               the lowest of a pool, until round(tiles x sparsity) of its tiles that may meet are gone

The diagonal, the sinks and the local band stay whatever their score, within the count. What no sequence reached stays.
So does, where keys behind the query count, each sequence's last block of keys: there encoders and cross-attention rest
what they have no use for, as decoders do on the first key, and as it is another position in every sentence, it would
hide in the scores of single positions what they are worth by themselves.

Source: Rugina et al. 2020, arXiv:2012.02030: the mean attention of a data set, cut at a percentile. `population`
"paper" is its percentile, over pairs that can never meet as well: of a causal square the first 50 % of p cost nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from secateur.attention.candidates import Candidates, candidates
from secateur.attention.observation import Observation, SiteObservation
from secateur.attention.plan import Plan
from secateur.attention.selection import above_percentile, drop_lowest
from secateur.attention.sites import Site
from secateur.errors import InvalidParameter, UnknownName, UsageError, check_whole
from secateur.masks import check_sparsity, drop_count

KINDS = ("toeplitz", "hybrid", "absolute")
EXTENSIONS = ("auto", "refuse", "diagonal")
POOLS = ("auto", "head", "kv_group", "layer", "stack", "model")
POPULATIONS = ("possible", "paper")
RULES = ("mass", "any")
SCORES = ("auto", "mean", "square", "loss")
LASTS = ("auto", "always", "never")
FAMILIES = ("encoder-self", "decoder-self", "decoder-cross")
_SHORT = {"cross": "decoder-cross"}


@dataclass(frozen=True)
class Masking:
    """How observed attention becomes masks.

    >>> Masking(0.5).kind_of("decoder-self"), Masking(0.5, score="loss").kind_of("encoder-self")
    ('toeplitz', 'absolute')
    >>> Masking(0.5, kind="toplitz")
    Traceback (most recent call last):
    secateur.errors.UnknownName: There is no kind of attention mask 'toplitz'. Did you mean 'toeplitz'? ...
    """

    sparsity: float
    """Share of a pool's blocks that may meet to drop; with population paper the percentile; in [0, 1)."""
    kind: str = "auto"
    """toeplitz: distances of blocks. absolute: single blocks, which end with the observed length. hybrid: single blocks
    in the first rows, distances behind them. auto: absolute in encoders with score loss, and else toeplitz."""
    cross: str = "absolute"
    """The kind of cross-attention, whose positions are of two texts. An absolute one goes on along the diagonal behind
    its last row."""
    pool: str = "auto"
    """What shares one threshold: a head, kv_group, layer (one attention module), stack (all modules of one kind:
    encoder-self, decoder-self, decoder-cross), or model; auto is stack with score loss and else layer."""
    population: str = "possible"
    """possible: exact counts of what may meet. paper: the percentile over all pairs, those that may not meet too."""
    score: str = "auto"
    """mean: mean attention per pair. square: its mean square over sequences, which also counts where attention only
    sometimes goes; that of the observed tiles, whatever the block. loss: how much the loss depends on a tile, which
    needs an observation with gradients and has one unit in all layers. auto: loss where it was observed, else mean."""
    rule: str = "mass"
    """mass: a block's mean. any: a block stays if one of its entries does; needs entries."""
    block: int | None = None
    """Tokens on a side of a block; a multiple of the observation's, by default that (64 with rule any)."""
    sinks: int = 1
    """Leading key blocks that every query keeps."""
    last: str = "auto"
    """Whether in encoders and cross-attention every query also keeps its sequence's last key block: always, never, or
    auto, where the sinks, it and the diagonal fit into what a query keeps."""
    band: int | None = None
    """Blocks up to the diagonal that stay (and behind it where keys there count); by default three quarters of what the
    sparsity leaves an average row besides the sinks; but 1 with the paper's percentile, with rule any and with score
    loss, and none in cross-attention."""
    rows: int | None = None
    """hybrid: how many block rows are single blocks, by default a quarter of those observed."""
    sites: tuple[str, ...] = FAMILIES
    """Which attention is masked: encoder-self, decoder-self, cross; the rest stays dense."""
    share: str = "head"
    """Who has a mask of its own: every head, or a kv_group, whose heads then read the same keys."""
    extend: str = "auto"
    """What an absolute mask of self-attention does behind the observed length: refuse, or go on along the diagonal;
    auto is diagonal where the kind is auto too."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, "attention masks")
        words: str | tuple[str, ...] = self.sites
        chosen = tuple(_SHORT.get(word, word) for word in ((words,) if isinstance(words, str) else words))
        object.__setattr__(self, "sites", chosen)
        for kind, value, known in (
            ("kind of attention mask", self.kind, ("auto", *KINDS)), ("kind of attention mask", self.cross, KINDS),
            ("pool", self.pool, POOLS), ("population", self.population, POPULATIONS), ("block rule", self.rule, RULES),
            ("attention score", self.score, SCORES),
            ("value of share", self.share, ("head", "kv_group")),
            ("value of extend", self.extend, EXTENSIONS), ("value of last", self.last, LASTS),
            *(("kind of attention", word, FAMILIES) for word in chosen),
        ):  # fmt: skip
            if value not in known:
                raise UnknownName(kind, str(value), known)
        for name, least in (("block", 1), ("sinks", 0), ("band", 1), ("rows", 1)):
            value = getattr(self, name)
            if value is not None or name == "sinks":
                check_whole(name, "attention masks", value, least)
        used = {self.kind_of(word) for word in chosen}
        for name, value in (("population", self.population), ("rule", self.rule)):
            if value in ("paper", "any") and used != {"absolute"}:
                raise UsageError(
                    f"The {name} '{value}' is defined for masks of kind absolute: ask for --kind absolute."
                )
        if self.share == "kv_group" and self.pool == "head":
            raise UsageError("Heads that share a mask cannot have a pool each: take --pool kv_group, or layer.")

    def kind_of(self, family: str) -> str:
        """The kind of the masks of encoder-self, decoder-self or decoder-cross attention, by the score as it stands."""
        if family == "decoder-cross":
            return self.cross
        if self.kind != "auto":
            return self.kind
        return "absolute" if family == "encoder-self" and self.score == "loss" else "toeplitz"

    def to_dict(self) -> dict[str, Any]:
        """All options, ready for JSON."""
        return asdict(self) | {"sites": list(self.sites)}

    def decided(self, seen: Collection[SiteObservation]) -> Masking:
        """What is `auto` here, in view of what was observed; the kind stays so where encoders and decoders differ."""
        score, plain = self.score, self.population == "possible" and self.rule == "mass"
        if score == "auto":
            score = "loss" if plain and all(site.loss is not None for site in seen) else "mean"
        pool = self.pool if self.pool != "auto" else "stack" if score == "loss" else "layer"
        extend = self.extend if self.extend != "auto" else "diagonal" if self.kind == "auto" else "refuse"
        found = replace(self, score=score, pool=pool, extend=extend)
        kinds = {found.kind_of(site.family) for site in seen if site.family != "decoder-cross"}
        return replace(found, kind=kinds.pop()) if len(kinds) == 1 else found


def make_plan(
    observation: Observation, sparsity: float | Masking, *, length: int | None = None, **options: Any
) -> Plan:
    """Masks for the observed model.

    Args:
        observation: from `observe` or `load_observation`.
        sparsity: share of blocks to drop; or a `Masking`, which holds it with all options.
        length: the observed length to take, by default the longest.
        options: fields of `Masking`.

    Returns:
        A plan for `attached`; its record says how it was made.

    Raises:
        InvalidParameter: a sparsity outside [0, 1), sizes out of range, a block that is no multiple of the observed.
        UnknownName: no such kind, pool, population, rule, or kind of attention.
        UsageError: an empty observation, entries that were not observed, nothing to mask.
        NumericalFailure: a score is not finite.

    >>> import transformers
    >>> from secateur.attention.observe import observe
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> seen = observe(model, torch.randint(9, (3, 16)), block=2)
    >>> plan = make_plan(seen, 0.5, kind="absolute")
    >>> [int(mask.layout(16, 16).keep.sum()) for mask in plan.sites.values()]
    [36]
    """
    masking = sparsity if isinstance(sparsity, Masking) else Masking(sparsity, **options)
    chosen = max(observation.lengths, default=None) if length is None else length
    seen = {name: site for name, site in observation.at(length).items() if site.family in masking.sites}
    if not seen:
        there = sorted({site.family for site in observation.at(length).values()})
        raise UsageError(f"The observation has no {' or '.join(masking.sites)} attention, only {', '.join(there)}.")
    masking = masking.decided(seen.values())
    block = _block(observation, masking)
    found = [candidates(site, observation.block, block, masking) for site in seen.values()]
    pools: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for number, one in enumerate(found):
        for head in range(len(one.score)):
            pools.setdefault(_pool(one, head, masking.pool), []).append((number, head))
    for members in pools.values():
        _select(found, members, masking)
    masks = {one.site.name: one.mask() for one in found}
    record = {
        "masking": masking.to_dict(), "length": chosen, "block": block, "observed_block": observation.block,
        "observed": {name: site.sequences for name, site in seen.items()},
        "sizes": {name: _size(site, observation.block, chosen) for name, site in observation.at(length).items()},
        "text": dict(observation.text),
        "versions": dict(observation.versions),
    }  # fmt: skip
    model = observation.model
    sites = tuple(Site(**site) for site in model["sites"])
    return Plan(str(model["model_type"]), str(model["architecture"]), sites, masks, record)


def _size(site: SiteObservation, block: int, length: int | None) -> list[int]:
    """Queries and keys that were observed, in tokens."""
    return [min(number * block, length or number * block) for number in site.count.shape]


def _pool(one: Candidates, row: int, pool: str) -> tuple[str, ...]:
    if pool == "model":
        return ()
    if pool == "stack":
        return (one.site.family,)
    if pool == "layer":
        return (one.site.name,)
    groups = one.site.kv_heads if pool == "kv_group" else one.site.heads
    return (one.site.name, str(row * groups // len(one.score)))


def _select(found: Sequence[Candidates], members: Sequence[tuple[int, int]], masking: Masking) -> None:
    score = torch.cat([found[number].score[row] for number, row in members])
    sizes = [found[number].score.shape[1] for number, _ in members]
    if masking.population == "paper":
        keep = above_percentile(score, sum(found[number].impossible for number, _ in members), masking.sparsity)
    else:
        heads = [found[number].site.heads // len(found[number].score) for number, _ in members]
        weight = torch.cat([found[n].weight * many for (n, _), many in zip(members, heads, strict=True)])
        forced = torch.cat([found[number].forced for number, _ in members])
        total = sum(found[number].total * many for (number, _), many in zip(members, heads, strict=True))
        keep = drop_lowest(score, weight, forced, drop_count(total, masking.sparsity))
    for (number, row), part in zip(members, keep.split(sizes), strict=True):
        found[number].keep[row] = part


def _block(observation: Observation, masking: Masking) -> int:
    if masking.rule == "any" and observation.block != 1:
        raise UsageError(
            f"The rule 'any' asks for single entries, and the observation has blocks of {observation.block}: observe "
            "with entries, or take the rule 'mass'."
        )
    block = masking.block or (64 if masking.rule == "any" else observation.block)
    if block % observation.block:
        allowed = f"a multiple of the {observation.block} tokens that were observed"
        raise InvalidParameter("block", "attention masks", allowed, block)
    return block

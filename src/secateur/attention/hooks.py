"""A model's attention handed to a function, call by call, with the positions of its queries and keys.

transformers tells an attention function neither where its queries stand nor what its mask was made from. Both are
found here: the cache is read just before the module runs (its length changes under way, and a static cache counts
in a tensor that it changes in place); padding on the left moves positions; the queries of cross-attention stand where
those of the decoder's self-attention stood a moment before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelNotSupported, RunFailure, UsageError
from ..models.attention_registry import MaskFacts, mask_facts, switched
from .sites import Site, find_sites

EVERY_ROW = slice(None)
_HARMLESS = {  # what modules pass along and the masks already hold, or what does not concern attention
    "position_ids",
    "position_embeddings",
    "cache_position",
    "use_cache",
    "sliding_window",
    "return_dict",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",
    "logits_to_keep",
    "labels",
    "deterministic",
    "hidden_states",
}


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One run of one attention module.

    Attributes:
        site: which module of the model.
        module: the module itself.
        query: (batch, heads, queries, head size).
        key, value: (batch, kv heads, keys, head size), not repeated for the groups of heads.
        scaling: what the scores are multiplied with before the softmax.
        dropout: of the probabilities; 0 outside training.
        attention_mask: bool (True = may meet) or additive, (batch or 1, heads or 1, queries, keys), or None.
        position_bias: added to the scores (T5), (1, heads, queries, keys), or None.
        causal: the mask is None, and a query sees no key behind its slot (`query_slots`, `key_slots`).
        query_slots, key_slots: (queries,), (keys,): where the tokens stand in the batch, padding included.
        query_positions, key_positions: (batch or 1, queries), (batch or 1, keys): real tokens before each one; what
            masks are a function of. Values at padding mean nothing.
        key_keep: bool (batch, keys), False = padding; None if all are real tokens.
        offset: the first query's position if positions are regular, else None. Regular: query i of every sequence
            stands at offset + i, key j at j.
        plain: whether the model lets every query meet every real key (with `site.causal`: up to its own position)
            and adds nothing to the scores: no sliding window, no packing, no position bias.
    """

    site: Site
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    dropout: float
    attention_mask: Tensor | None
    position_bias: Tensor | None
    causal: bool
    query_slots: Tensor
    key_slots: Tensor
    query_positions: Tensor
    key_positions: Tensor
    key_keep: Tensor | None
    offset: int | None
    plain: bool

    def allowed(self, rows: slice = EVERY_ROW) -> Tensor | None:
        """Bool (batch or 1, heads or 1, rows, keys): what the model itself lets meet; None for everything."""
        if self.attention_mask is None:
            return (self.key_slots <= self.query_slots[rows, None])[None, None] if self.causal else None
        mask = self._mask(rows)
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def bias(self, rows: slice = EVERY_ROW) -> Tensor | None:
        """(batch or 1, heads or 1, rows, keys): what the model adds to the scores where they may meet, or None."""
        bias = None if self.position_bias is None else self.position_bias[..., rows, : self.key.shape[2]]
        if self.attention_mask is None or self.attention_mask.dtype == torch.bool:
            return bias
        mask = self._mask(rows)
        mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, 0)
        return mask if bias is None else bias + mask

    def scores(self, rows: slice = EVERY_ROW) -> Tensor:
        """fp32 (batch, heads, rows, keys): what the softmax is taken of, -inf where the model lets nothing meet."""
        query = self.query[:, :, rows].float()
        groups = query.shape[1] // self.key.shape[1]
        scores = query @ self.key.float().repeat_interleave(groups, 1).transpose(2, 3) * self.scaling
        bias, allowed = self.bias(rows), self.allowed(rows)
        scores = scores if bias is None else scores + bias
        return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)

    def _mask(self, rows: slice) -> Tensor:
        assert self.attention_mask is not None
        mask = self.attention_mask[..., : self.key.shape[2]]
        return mask.expand(*mask.shape[:2], self.query.shape[2], -1)[:, :, rows]


AttentionFunction = Callable[[AttentionCall], Tensor]


@contextmanager
def intercept(model: nn.Module, function: AttentionFunction) -> Iterator[tuple[Site, ...]]:
    """While open, all attention of the model is computed by `function(call) -> (batch, queries, heads, head size)`.

    Yields:
        The model's sites. At the end the model is what it was.

    Raises:
        ModelNotSupported: as `find_sites`; during a forward pass: an argument that attention functions may be given
            and this one does not honour, or positions that cannot be told.
        UsageError: the model's attention is replaced already; during a forward pass: attention maps were asked for.
    """
    sites = find_sites(model)
    modules = dict(model.named_modules())
    partners: dict[str, str] = {}
    latest: dict[str, str] = {}
    for site in sites:
        if site.kind == "self":
            latest[site.stack] = site.name
        elif site.stack in latest:
            partners[site.name] = latest[site.stack]
    queries: dict[str, _Queries] = {}
    readers = {
        site.name: _Reader(site, modules[site.name], function, partners.get(site.name), queries) for site in sites
    }
    with ExitStack() as stack:
        stack.enter_context(switched(model, {modules[name]: reader for name, reader in readers.items()}))
        for name, reader in readers.items():
            handle = modules[name].register_forward_pre_hook(reader.before, with_kwargs=True)
            stack.callback(handle.remove)
        yield sites


@dataclass(frozen=True, eq=False)
class _Queries:
    """Where the queries of the last self-attention call stood."""

    slots: Tensor
    positions: Tensor
    offset: int | None


class _Reader:
    """What one module is given, read before and during its run."""

    def __init__(
        self,
        site: Site,
        module: nn.Module,
        function: AttentionFunction,
        partner: str | None,
        queries: dict[str, _Queries],
    ) -> None:
        self.site, self.function, self.partner, self.queries = site, function, partner, queries
        self.layer = getattr(module, "layer_idx", None)
        self.cached = False
        self.start, self.key_start, self.keys = 0, 0, -1

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The lengths of the cache, which the module is about to change."""
        given = _signature(type(module).forward).bind(module, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        cache: Any = next((given[name] for name in ("cache", "past_key_values") if given.get(name) is not None), None)
        cache = getattr(cache, "self_attention_cache", cache)
        layer = given.get("layer_idx", self.layer)
        self.cached = cache is not None and layer is not None
        self.start, self.key_start, self.keys = 0, 0, -1
        if not self.cached:
            return
        hidden = given["hidden_states"]
        if self.site.kind == "self":
            self.keys, self.key_start = cache.get_mask_sizes(hidden.shape[-2], layer)
            self.start = int(cache.get_query_offset(layer))
        else:  # the self-attention of the same layer has filled the cache
            self.start = int(cache.get_seq_length(layer)) - hidden.shape[-2]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        site = self.site
        self._check(query, key, rest)
        facts = mask_facts(mask)
        causal = site.causal if is_causal is None else bool(is_causal) and site.kind == "self"
        rule = ("causal" if causal else "full") if mask is None else facts.rule if facts else "other"
        key_start = self.key_start if site.kind == "self" else 0
        key_slots = key_start + torch.arange(key.shape[2], device=key.device)
        seen = self._queries(query, mask, facts, rest.get("position_ids"))
        keep = None if facts is None else facts.keys(key_start, key_start + key.shape[2])
        regular = seen.offset is not None and key_start == 0 and (facts is None or facts.right_padded)
        call = AttentionCall(
            site=site,
            module=module,
            query=query,
            key=key,
            value=value,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            dropout=float(dropout),
            attention_mask=mask,
            position_bias=position_bias,
            causal=mask is None and causal,
            query_slots=seen.slots,
            key_slots=key_slots,
            query_positions=seen.positions,
            key_positions=self._key_positions(key_slots, facts, seen),
            key_keep=keep,
            offset=seen.offset if regular else None,
            plain=position_bias is None and rule == ("causal" if site.causal else "full"),
        )
        return self.function(call)

    def _check(self, query: Tensor, key: Tensor, rest: dict[str, Any]) -> None:
        site, shape = self.site, (query.shape[1], key.shape[1])
        if rest.get("output_attentions"):
            raise UsageError("Attention that is replaced returns no maps: leave out output_attentions.")
        for name, value in rest.items():
            if name not in _HARMLESS and value is not None and value is not False:
                raise ModelNotSupported(f"{site.name} attends with '{name}', which block masks do not honour.")
        if shape != (site.heads, site.kv_heads):
            raise ModelNotSupported(
                f"{site.name} has {site.heads} heads on {site.kv_heads} of keys, and was called with {shape}."
            )
        if self.keys not in (-1, key.shape[2]):
            raise RunFailure(
                f"{site.name}: its cache promised {self.keys} keys and gave {key.shape[2]}: their places are unknown."
            )

    def _queries(self, query: Tensor, mask: Tensor | None, facts: MaskFacts | None, position_ids: Any) -> _Queries:
        """Where the queries stand; remembered for the cross-attention that follows."""
        length = query.shape[2]
        if self.site.kind == "cross":
            partner = self.queries.get(self.partner or "")
            if partner is not None and partner.slots.shape[0] == length:
                return partner
        slots = self.start + torch.arange(length, device=query.device)
        positions, offset = slots[None], self.start if self.key_start == 0 else None
        if self.site.kind == "self":
            if facts is not None and facts.padding is not None:
                if not facts.right_padded:
                    positions, offset = _at(facts.positions, slots), None
            elif mask is not None and torch.is_tensor(position_ids) and position_ids.shape[-1] == length:
                given = position_ids.to(slots) if position_ids.dim() == 2 else slots[None]
                if not torch.equal(given, slots.expand_as(given)):  # packed sequences, or a mask made by the caller
                    positions, offset = given, None
        seen = _Queries(slots, positions, offset)
        if self.site.kind == "self":
            self.queries[self.site.name] = seen
        return seen

    def _key_positions(self, slots: Tensor, facts: MaskFacts | None, seen: _Queries) -> Tensor:
        if facts is not None and facts.padding is not None:
            return slots[None] if facts.right_padded else _at(facts.positions, slots)
        if self.site.kind == "cross" or (seen.positions.shape[0] == 1 and torch.equal(seen.positions[0], seen.slots)):
            return slots[None]
        if not self.cached and slots.shape == seen.slots.shape:
            return seen.positions
        return slots[None] - (seen.slots[-1] - seen.positions[:, -1:])  # as far from the last query as the slots are


def _at(positions: Tensor, slots: Tensor) -> Tensor:
    """(batch, slots); slots behind the known ones go on counting."""
    known = positions.shape[1]
    beyond = (slots - known + 1).clamp(min=0)
    return positions[:, slots.clamp(max=known - 1)] + beyond


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)

"""Attention as data: where a model attends, told apart by module and never by layer number.

A site is one module that looks its attention function up in transformers' registry. `layer_idx` would not do as a
name: it is None in Marian's encoder, and a decoder's self- and cross-attention share it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..errors import ModelNotSupported
from ..models.attention_registry import calls_registry

Stack = Literal["encoder", "decoder"]
Kind = Literal["self", "cross"]
_CROSS = re.compile(r"encoder_attn|cross_?att|EncDecAttention|encdec", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """One attention module.

    Attributes:
        name: its path in the model.
        stack: `decoder` for causal self-attention and for cross-attention, else `encoder`.
        kind: `self`, or `cross` for queries of the decoder that read the encoder.
        ordinal: its place among the sites of the same stack and kind, from 0.
        heads, kv_heads: of the queries, and of the keys and values.
        head_size: of queries and keys.
        causal: whether a query sees no key behind its own position.
    """

    name: str
    stack: Stack
    kind: Kind
    ordinal: int
    heads: int
    kv_heads: int
    head_size: int
    causal: bool

    @property
    def family(self) -> str:
        """`encoder-self`, `decoder-self` or `decoder-cross`."""
        return f"{self.stack}-{self.kind}"


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every attention module of a model, in the model's order.

    Raises:
        ModelNotSupported: no module looks its attention up in the registry (Bloom, Mamba), some attend in another
            way than softmax over plain scores (soft-capped scores, attention sinks), or shapes cannot be read.

    >>> import transformers
    >>> config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    >>> [(site.name, site.family, site.heads) for site in find_sites(transformers.BertModel(config))]
    [('encoder.layer.0.attention.self', 'encoder-self', 2)]
    """
    found = [(name, module) for name, module in model.named_modules() if calls_registry(module)]
    if not found:
        raise ModelNotSupported(
            f"{type(model).__name__} has no attention that can be replaced: none of its modules looks its function up "
            "in transformers' ALL_ATTENTION_FUNCTIONS."
        )
    deaf = _deaf(model, [name for name, _ in found])
    if deaf:
        raise ModelNotSupported(
            f"Some attention of {type(model).__name__} cannot be replaced: {deaf[0]} does not look its function up in "
            "transformers' ALL_ATTENTION_FUNCTIONS."
        )
    counts: Counter[tuple[Stack, Kind]] = Counter()
    sites = []
    for name, module in found:
        _check_plain(name, module)
        kind: Kind = "cross" if _is_cross(name, module) else "self"
        causal = kind == "self" and _is_causal(module)
        stack: Stack = "decoder" if causal or kind == "cross" else "encoder"
        heads = _number(name, module, "num_heads", "n_heads", "num_attention_heads")
        kv_heads = _kv_heads(module, heads)
        size = _number(name, module, "head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_kv")
        sites.append(Site(name, stack, kind, counts[stack, kind], heads, kv_heads, size, causal))
        counts[stack, kind] += 1
    return tuple(sites)


def _deaf(model: nn.Module, found: list[str]) -> list[str]:
    """Modules that attend by themselves: of a class called attention, with query matrices, and no site in or above."""
    return [
        name
        for name, module in model.named_modules()
        if re.search(r"(?<!Linear)(?<!Lightning)Attention", type(module).__name__)
        and any(hasattr(module, leaf) for leaf in ("q_proj", "query", "q", "c_attn", "query_key_value", "qkv_proj"))
        and not any(site == name or site.startswith(f"{name}.") or name.startswith(f"{site}.") for site in found)
    ]


def _check_plain(name: str, module: nn.Module) -> None:
    odd = {
        "sinks": "attention sinks",
        "attn_logit_softcapping": "soft-capped scores",
        "softcap": "soft-capped scores",
        "is_kv_shared_layer": "keys of another layer",
        "indexer": "an index of its own",
    }
    for attribute, what in odd.items():
        value = getattr(module, attribute, None)
        if value is not None and value is not False:
            raise ModelNotSupported(f"{name} attends with {what} ('{attribute}'), which block masks do not honour.")


def _is_cross(name: str, module: nn.Module) -> bool:
    said = getattr(module, "is_cross_attention", None)
    return bool(said) or bool(_CROSS.search(name)) or "Cross" in type(module).__name__


def _is_causal(module: nn.Module) -> bool:
    both_ways = getattr(getattr(module, "config", None), "is_causal", None) is False
    return bool(getattr(module, "is_causal", True)) and not both_ways


def _kv_heads(module: Any, heads: int) -> int:
    """As the module itself says: configs carry counts that their modules do not read."""
    if groups := getattr(module, "num_key_value_groups", None):
        return heads // int(groups)
    return int(getattr(module, "num_key_value_heads", None) or heads)


def _number(name: str, module: Any, *names: str) -> int:
    for holder in (module, getattr(module, "config", None)):
        for attribute in names:
            value = getattr(holder, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    raise ModelNotSupported(f"{name}: cannot read its shape (looked for {', '.join(names)}).")

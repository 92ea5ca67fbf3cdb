"""One name in transformers' two attention registries, behind which a model's attention can be replaced.

Attention modules look their function up by the name that stands in their config. The masks are built by a second
registry under the same name: a name that is missing there gives no mask at all, and padding and causality are lost
without a word. Both are filled here, and what the mask was made from (the padding, and whether anything else is in
it) is remembered by the mask itself.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ModelNotSupported, UsageError
from .load import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "secateur"
Handler = Callable[..., Tensor]
_HANDLERS: weakref.WeakKeyDictionary[nn.Module, Handler] = weakref.WeakKeyDictionary()
_FACTS: Any = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class MaskFacts:
    """What a 4-D mask was made from.

    Attributes:
        padding: bool (batch, tokens), True = a real token, counted from slot 0; None without padding.
        rule: `causal` or `full` if the mask is that and the padding and nothing else; `other` for sliding windows,
            packed sequences and overlays.
    """

    padding: Tensor | None
    rule: Literal["causal", "full", "other"]
    _kept: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    @cached_property
    def right_padded(self) -> bool:
        """Whether every real token stands at the slot of its position."""
        if self.padding is None:
            return True
        return not bool((self.padding[:, 1:] & ~self.padding[:, :-1]).any()) and bool(self.padding[:, 0].all())

    @cached_property
    def positions(self) -> Tensor:
        """(batch, tokens) how many real tokens stand before each; 0 for padding on the left."""
        assert self.padding is not None
        return (self.padding.long().cumsum(-1) - 1).clamp(min=0)

    def keys(self, start: int, stop: int) -> Tensor | None:
        """Bool (batch, stop - start): which slots hold real tokens; None if all do. Slots still to come do not."""
        if self.padding is None:
            return None
        if (start, stop) not in self._kept:  # every layer asks the same
            keep = self.padding[:, start:stop]
            if (missing := stop - start - keep.shape[1]) > 0:
                keep = nn.functional.pad(keep, (0, missing))
            self._kept[start, stop] = None if bool(keep.all()) else keep
        return self._kept[start, stop]


def mask_facts(mask: Tensor | None) -> MaskFacts | None:
    """What a mask was made from; None for one that was not made behind `NAME` (a mask given from outside)."""
    return None if mask is None else _FACTS.get(mask)


def calls_registry(module: nn.Module) -> bool:
    """Whether the module itself looks its attention function up by name."""
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return False
    return "ALL_ATTENTION_FUNCTIONS.get_interface(" in source


@contextmanager
def switched(model: nn.Module, handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """While open, the attention of these modules is `handler(module, query, key, value, mask, **rest) -> output`.

    Args:
        model: any module that holds one `PreTrainedModel` (adapters around it are fine).
        handlers: a function for each attention module, called with query (batch, heads, queries, head size), key and
            value unrepeated; it returns (batch, queries, heads, head size). Modules left out run plain SDPA.

    Raises:
        ModelNotSupported: the model does not look its attention up by name.
        UsageError: its attention is replaced already.
    """
    inner = _outermost(model)
    configs = {id(part.config): part.config for part in inner.modules() if hasattr(part, "config")}
    configs |= {id(module.config): module.config for module in handlers if hasattr(module, "config")}
    configs = {key: config for key, config in configs.items() if hasattr(config, "_attn_implementation_internal")}
    if any(module in _HANDLERS for module in inner.modules()):
        raise UsageError(f"The attention of {type(inner).__name__} is replaced already: leave that context first.")
    _register()
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    settings = getattr(inner, "generation_config", None)
    compiles = getattr(settings, "disable_compile", None)
    try:
        with quiet_transformers():
            inner.set_attn_implementation(NAME)
        deaf = sorted({type(m).__name__ for m in handlers if m.config._attn_implementation != NAME})  # type: ignore[union-attr]
        if deaf:
            raise ModelNotSupported(f"{type(inner).__name__} does not let its attention be replaced ({deaf[0]}).")
        if settings is not None:
            settings.disable_compile = True  # the functions are plain Python: generate would compile around them
        _HANDLERS.update(handlers)
        yield
    finally:
        for module in handlers:
            _HANDLERS.pop(module, None)
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        if settings is not None:
            settings.disable_compile = compiles


def _outermost(model: nn.Module) -> PreTrainedModel:
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            if not module._can_set_attn_implementation():
                break
            return module
    raise ModelNotSupported(
        f"The attention of {type(model).__name__} cannot be replaced: its code does not look the function up in "
        "transformers' ALL_ATTENTION_FUNCTIONS."
    )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    handler = _HANDLERS.get(module)
    if handler is not None:
        return handler(module, query, key, value, attention_mask, **rest), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    return output, None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    from transformers import masking_utils

    mask: Tensor | None = masking_utils.sdpa_mask(*args, **options)
    if mask is not None:
        function = options.get("mask_function")
        causal = function is masking_utils.causal_mask_function
        full = function is masking_utils.bidirectional_mask_function
        padding = options.get("attention_mask")
        _FACTS[mask] = MaskFacts(
            None if padding is None else padding.to(torch.bool), "causal" if causal else "full" if full else "other"
        )
    return mask

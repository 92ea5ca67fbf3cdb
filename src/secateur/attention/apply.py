"""A model run under an attention plan: `with attached(model, plan): ...`.

Where positions are regular (query i at offset + i, key j at j, padding on the right at most) and the model adds
nothing of its own, the kept blocks go to `kernels.block_attention`. Everything else is computed entry by entry, which
is the definition: batches padded on the left, sliding windows, position biases, dropout. A single decoded row reads
the blocks that its heads keep (`decode`).
Either way a mask depends on positions alone, so that decoding with a cache equals the full forward pass.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import UnknownName, UsageError
from ..kernels.block_attention import BACKENDS, BlockLayout, block_attention, choose_backend
from .decode import Row, decode, row_of
from .definition import attend
from .hooks import AttentionCall, intercept
from .plan import Plan
from .site_mask import SiteMask

LAYOUTS = 4  # remembered per site


@dataclass
class Attached:
    """What has run while a plan was attached.

    Attributes:
        backends: how many calls went to each kernel; `decode` for single rows over the blocks they keep, `entries` for
            the definition, `dense` for sites without a mask.
        reasons: why calls of more than one row went to `entries`.
    """

    backends: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


@contextmanager
def attached(model: nn.Module, plan: Plan, backend: str = "auto") -> Iterator[Attached]:
    """While open, the model attends under the plan's masks: forward passes, training, `generate` with any cache.

    Args:
        model: the plan's model, in any wrapping that keeps its sites.
        plan: from `masking.make_plan`, `plan_of` or `load_plan`.
        backend: `auto`, or one of `kernels.block_attention.BACKENDS` for all calls but single decoded rows.

    Yields:
        Counts of what ran, filled as the model runs.

    Raises:
        UsageError: the plan is for another model, or its attention is replaced already; during a forward pass: an
            absolute mask does not reach the length, or the backend that was asked for cannot take the call.
        UnknownName: no such backend.
        ModelNotSupported: the model's attention cannot be replaced.
    """
    if backend not in ("auto", *BACKENDS):
        raise UnknownName("attention backend", backend, ("auto", *BACKENDS))
    masks = {name: _Masked(mask) for name, mask in plan.masks_for(model).items()}
    said = Attached()

    def compute(call: AttentionCall, masked: _Masked) -> Tensor:
        layout = masked.layout(call)
        name = backend if backend != "auto" else _choose(call, layout)
        said.backends[name] += 1
        output = block_attention(
            call.query,
            call.key,
            call.value,
            layout,
            scale=call.scaling,
            key_keep=call.key_keep,
            backend=name,
        )
        return output.transpose(1, 2).contiguous()

    def run(call: AttentionCall) -> Tensor:
        masked = masks.get(call.site.name)
        if masked is None:
            said.backends["dense"] += 1
            return attend(call)
        reason = _irregular(call)
        own_ends = masked.mask.last and call.key_keep is not None
        if reason is None:
            return _by_length(call, partial(compute, masked=masked)) if own_ends else compute(call, masked)
        if call.query.shape[2] > 1:
            if backend not in ("auto", "reference"):
                raise UsageError(f"The backend '{backend}' cannot run {call.site.name}: {reason}. Take 'auto'.")
            said.reasons[reason] += 1
        elif reason == _DECODED and not own_ends:
            said.backends["decode"] += 1
            return decode(call, masked.row(call))
        said.backends["entries"] += 1
        return attend(call, masked.entries(call))

    with intercept(model, run):
        yield said


_DECODED = "one row"


def _irregular(call: AttentionCall) -> str | None:
    """Why the block kernels cannot compute this call; None if they can."""
    if call.dropout:
        return "attention dropout is on"
    if call.position_bias is not None:
        return "the model adds a position bias"
    if not call.plain:
        return "the model has a mask of its own (a sliding window, packed sequences, or one given by the caller)"
    if call.offset is None:
        return "the batch is padded on the left, or its positions are irregular"
    if call.value.shape[-1] != call.key.shape[-1]:
        return "values and keys have different sizes"
    return _DECODED if call.query.shape[2] == 1 else None


def _by_length(call: AttentionCall, compute: Callable[[AttentionCall], Tensor]) -> Tensor:
    """Each length of a padded batch by itself, without its padding: the last key is another in each."""
    assert call.key_keep is not None
    lengths = call.key_keep.sum(1)
    output = call.value.new_zeros(len(call.query), call.query.shape[2], call.query.shape[1], call.value.shape[-1])
    for keys in lengths.unique().tolist():
        rows = (lengths == keys).nonzero().flatten()
        queries = keys if call.site.kind == "self" else call.query.shape[2]
        if keys:
            query, key, value = call.query[rows, :, :queries], call.key[rows, :, :keys], call.value[rows, :, :keys]
            output[rows, :queries] = compute(replace(call, query=query, key=key, value=value, key_keep=None))
    return output


def _choose(call: AttentionCall, layout: BlockLayout) -> str:
    needs_grad = torch.is_grad_enabled() and any(part.requires_grad for part in (call.query, call.key, call.value))
    return choose_backend(call.query, call.key, layout, call.key_keep, needs_grad)


class _Masked:
    """One site's mask on the device of its calls, and the layouts of the lengths it met last."""

    def __init__(self, mask: SiteMask) -> None:
        self.mask = mask
        self.last: Row | None = None
        self.layouts: OrderedDict[tuple[int, int, int, torch.device], BlockLayout] = OrderedDict()

    def on(self, device: torch.device) -> SiteMask:
        tensors = self.mask.tensors()
        if any(tensor.device != device for tensor in tensors.values()):
            moved = {name: tensor.to(device) for name, tensor in tensors.items()}
            self.mask = replace(self.mask, **moved)  # type: ignore[arg-type]
        return self.mask

    def layout(self, call: AttentionCall) -> BlockLayout:
        assert call.offset is not None
        key = (call.query.shape[2], call.key.shape[2], call.offset, call.query.device)
        if key not in self.layouts:
            self.layouts[key] = self.on(key[3]).layout(*key)
            if len(self.layouts) > LAYOUTS:
                self.layouts.popitem(last=False)
        self.layouts.move_to_end(key)
        return self.layouts[key]

    def row(self, call: AttentionCall) -> Row:
        self.last = row_of(call, self.on(call.query.device), self.last)
        return self.last

    def entries(self, call: AttentionCall) -> _Entries:
        keys = call.key_positions.clamp(min=0)
        if call.key_keep is not None:  # where padding stands means nothing
            keys = torch.where(call.key_keep, keys, 0)
        return _Entries(self.on(call.query.device), call.query_positions.clamp(min=0), keys)


@dataclass(frozen=True, eq=False)
class _Entries:
    """The mask of some rows of one call."""

    mask: SiteMask
    queries: Tensor
    keys: Tensor

    def __call__(self, rows: slice) -> Tensor:
        return self.mask.allowed(self.queries[:, rows], self.keys)

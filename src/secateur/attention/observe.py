"""observe(model, data): the mean attention of every site and head over a data set, streamed.

The model runs as it is, in eval mode; each call of an attention module is summed over tiles on the way (`tiles`). A
token's place is the number of real tokens before it, so that padding, left or right, is in no sum and moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from secateur.attention.definition import attend
from secateur.attention.hooks import AttentionCall, intercept
from secateur.attention.observation import Observation, SiteObservation, check_block
from secateur.attention.sensitivity import differentiable, objective, sensitivity_tiles
from secateur.attention.sites import Site
from secateur.attention.tiles import Tiles, attention_tiles
from secateur.data.calibration import Calibration, ids_sha256
from secateur.errors import InvalidParameter, NumericalFailure, TextTooShort, UsageError, check_whole
from secateur.progress import Progress, silent
from secateur.scout import Batch, run
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_BY_ENTRY = 1024  # tokens: the sums of all heads are held
Data = Calibration | Tensor | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
_Data = Calibration | Tensor | list[Batch]


def observe(
    model: PreTrainedModel,
    data: Data,
    *,
    lengths: Sequence[int] | None = None,
    block: int = 64,
    entries: bool = False,
    gradients: bool = False,
    seed: int = 0,
    batch_size: int = 1,
    progress: Progress = silent,
) -> Observation:
    """Sum the attention of a model over a data set.

    Args:
        model: a transformers model whose attention can be replaced (`find_sites`); it is left as it was.
        data: ids (n, tokens), or what `secateur.calibration` gives; or a ready batch of keyword arguments, or several,
            with `attention_mask` (and `decoder_attention_mask`) where they are padded.
        lengths: tokens at which to observe, several in one run: each row of ids is cut into windows so long. By
            default the whole rows. Ready batches have lengths of their own, and their longest names the result.
        block: tokens on a side of a tile.
        entries: sum entry by entry (a block of 1); at most 1024 tokens, as the maps of all heads are held.
        gradients: also how much the loss depends on each tile (`sensitivity`): a backward pass a sequence.
        seed: of the noise that stands for the loss of a model without a head.
        batch_size: rows of ids in one forward pass; with gradients they run one by one.
        progress: told the sequences done.

    Returns:
        Sums by length and site.

    Raises:
        ModelNotSupported: the attention cannot be replaced.
        TextTooShort: fewer tokens than a length or a block.
        InvalidParameter: a length, block or batch size out of range; entries of too long a text.
        UsageError: no data, ids for an encoder-decoder, packed sequences.
        NumericalFailure: attention that is not finite.

    Source:
        Rugina et al. 2020, arXiv:2012.02030: the mean of post-softmax attention by absolute position. The released
        code averages over padding, dropout and shifted masks (specs of this project, attention.md 1.7); this follows
        the definition.

    >>> import transformers
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> seen = observe(model, torch.randint(9, (3, 8)), block=4).at(8)
    >>> [(site.name, site.sequences, site.mass.sum().round().item()) for site in seen.values()]
    [('model.layers.0.self_attn', 3, 48.0)]
    """
    block = 1 if entries else check_block(block)
    data = data if isinstance(data, (Calibration, Tensor)) else _ready(data)
    runs = _runs(model, data, lengths, block, batch_size)
    if entries and (longest := max(runs)) > LONGEST_BY_ENTRY:
        raise InvalidParameter("entries", "observe", f"used with at most {LONGEST_BY_ENTRY} tokens", longest)
    total = sum(_rows(batch) for batches in runs.values() for batch in batches)
    done, found = 0, dict[int, Mapping[str, SiteObservation]]()
    with evaluating(model):
        for length, batches in runs.items():
            watcher = _Watcher(block)
            with intercept(model, watcher) as sites, differentiable(model) if gradients else torch.no_grad():
                for batch in batches:
                    for part in _one_by_one(batch) if gradients else [batch]:
                        watcher.begin()
                        if gradients:
                            objective(model, part, seed).backward()
                        else:
                            run(model, part)
                    done += _rows(batch)
                    progress(done, total, f"observing attention at {length} tokens")
            found[length] = {
                site.name: watcher.sums[site.name].result(site) for site in sites if site.name in watcher.sums
            }
    observation = Observation(block, found, _identity(model, sites), _about(data))
    observation.at()
    return observation


def _runs(model: Any, data: _Data, lengths: Sequence[int] | None, block: int, size: int) -> dict[int, list[Batch]]:
    """Length -> the batches to run."""
    check_whole("batch_size", "observe", size)
    for length in lengths or ():
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise InvalidParameter("lengths", "observe", "whole numbers of tokens >= 1", length)
    ids = data.ids if isinstance(data, Calibration) else data
    mask = data.mask if isinstance(data, Calibration) else None
    if not isinstance(ids, Tensor):
        if lengths is not None:
            raise UsageError("Ready batches have lengths of their own: leave lengths out.")
        longest = max(value.shape[1] for batch in ids for name, value in batch.items() if name.endswith("ids"))
        return {_long_enough(longest, block): ids}
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise UsageError(
            f"Attention is observed on ids (n, tokens) int64; got {ids.dtype} of shape {tuple(ids.shape)}."
        )
    if not ids.numel():
        raise UsageError("There are no token ids to observe attention on.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            f"{type(model).__name__} reads two texts: give batches with input_ids and decoder_input_ids, and the masks "
            "of their padding."
        )
    if mask is not None:
        if lengths is not None:
            raise UsageError("Conversations have lengths of their own: leave lengths out.")
        width = int(mask.sum(1).max())
        pairs = zip(ids[:, :width].split(size), mask[:, :width].split(size), strict=True)
        return {_long_enough(width, block): [{"input_ids": part, "attention_mask": own.long()} for part, own in pairs]}
    runs: dict[int, list[Batch]] = {}
    for length in dict.fromkeys(lengths or (ids.shape[1],)):
        if length > ids.shape[1]:
            raise TextTooShort(f"The windows have {ids.shape[1]} tokens: attention cannot be observed at {length}.")
        whole = ids.shape[1] // length * length
        windows = ids[:, :whole].reshape(-1, _long_enough(length, block))
        runs[length] = [{"input_ids": part} for part in windows.split(size)]
    return runs


def _long_enough(length: int, block: int) -> int:
    if length < block:
        raise TextTooShort(f"The text has {length} tokens, fewer than one block of {block}: choose a smaller block.")
    return length


def _ready(data: Any) -> list[Batch]:
    batches = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    for batch in batches:
        fine = isinstance(batch, Mapping) and all(isinstance(value, Tensor) for value in batch.values())
        if not fine or not any(name.endswith("ids") for name in batch):
            raise UsageError(
                f"Attention is observed on ids or on batches {{name: tensor}}; got {type(batch).__name__}."
            )
    if not batches:
        raise UsageError("The list of batches is empty: there is nothing to observe.")
    return batches


def _identity(model: Any, sites: Sequence[Site]) -> dict[str, Any]:
    """What a plan made from the observation is held to."""
    found = {"model_type": str(model.config.model_type), "architecture": type(model).__name__}
    return found | {"sites": [asdict(site) for site in sites]}


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _one_by_one(batch: Batch) -> list[Batch]:
    return [{name: value[row : row + 1] for name, value in batch.items()} for row in range(_rows(batch))]


def _about(data: _Data) -> dict[str, Any]:
    if isinstance(data, Calibration):
        return dict(data.record)
    if isinstance(data, Tensor):
        return {"text": None, "samples": data.shape[0], "seqlen": data.shape[1], "sha256": ids_sha256(data)}
    ids = [value.flatten() for batch in data for name, value in batch.items() if name.endswith("ids")]
    return {"text": None, "samples": sum(map(_rows, data)), "sha256": ids_sha256(torch.cat(ids))}


@dataclass
class _Sums:
    """The running sums of one site; they grow with the longest sequence."""

    block: int
    causal: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sequences: int = 0

    def add(self, tiles: Tiles) -> None:
        square = tiles.mass.square() / tiles.count.clamp(min=1)
        self._add({**vars(tiles), "square": square}, *tiles.count.shape)
        self._add_last(mass=tiles.mass, square=square, count=tiles.count)
        self.sequences += 1

    def add_loss(self, tiles: Tensor) -> None:
        self._add({"loss": tiles}, *tiles.shape[1:])
        self._add_last(loss=tiles)

    def _add_last(self, **parts: Tensor) -> None:
        if not self.causal:
            rows, columns = next(iter(parts.values())).shape[-2:]
            last = {f"last_{name}": seen[..., -1:] for name, seen in parts.items()}
            self._add(last, rows, columns, first=columns - 1)

    def _add(self, parts: Mapping[str, Tensor], rows: int, columns: int, first: int = 0) -> None:
        for name, seen in parts.items():
            exact = seen.is_floating_point() and self.block > 1  # by entry the sums would take twice the memory
            seen = seen.to("cpu", torch.float64 if exact else seen.dtype)
            total = self.tensors.get(name)
            if name in ("facts", "queries"):
                at: tuple[Any, ...] = (..., slice(rows), slice(None)) if name == "facts" else (slice(rows),)
                total = torch.zeros_like(seen) if total is None else _grown(total, -2 if name == "facts" else -1, rows)
            else:
                at = (..., slice(rows), slice(first, columns))
                total = seen.new_zeros(*seen.shape[:-1], 0) if total is None else _grown(total, -2, rows)
                total = _grown(total, -1, columns)
            total[at] += seen
            self.tensors[name] = total

    def result(self, site: Site) -> SiteObservation:
        kept = {key: value.float() if value.is_floating_point() else value for key, value in self.tensors.items()}
        if not torch.isfinite(kept["mass"].sum(dtype=torch.float64)):
            raise NumericalFailure(f"The attention of {site.name} is not finite.")
        return SiteObservation(
            site.name, site.family, site.heads, site.kv_heads, site.causal,
            mass=kept["mass"], square=kept["square"], count=kept["count"], area=kept["area"],
            facts=kept["facts"], queries=kept["queries"], sequences=self.sequences, loss=kept.get("loss"),
            last_mass=kept.get("last_mass"), last_square=kept.get("last_square"), last_count=kept.get("last_count"),
            last_loss=kept.get("last_loss"),
        )  # fmt: skip


def _grown(total: Tensor, dim: int, size: int) -> Tensor:
    lacking = size - total.shape[dim]
    return total if lacking <= 0 else pad(total, (0, 0) * (-1 - dim) + (0, lacking))


@dataclass(frozen=True, eq=False)
class _Sequence:
    """One sequence's part of a call, without its padding; `queries` and `keys` are the places of real tokens."""

    query: Tensor
    key: Tensor
    bias: Tensor | None
    allowed: Callable[[slice], Tensor]
    queries: Tensor | None
    keys: Tensor | None


class _Watcher:
    """Sums every call, and lets the model go on with plain attention."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.sums: dict[str, _Sums] = {}
        self.begin()

    def begin(self) -> None:
        """A new forward pass."""
        self.keep: dict[str, Tensor | None] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        site = call.site
        if site.kind == "self":
            self.keep[site.stack] = call.key_keep
        queries = self.keep.get(site.stack)  # of cross-attention: what the decoder's self-attention found
        sums = self.sums.setdefault(site.name, _Sums(self.block, site.causal))
        with torch.no_grad():
            sequences = [self._sequence(call, row, queries) for row in range(len(call.query))]
            for one in sequences:
                tiles = attention_tiles(
                    one.query, one.key, call.scaling, self.block, allowed=one.allowed, bias=one.bias
                )
                sums.add(tiles)
        output = attend(call)
        if output.requires_grad:
            output.register_hook(partial(self._depend, call, sums, sequences))
        return output

    @torch.no_grad()
    def _depend(self, call: AttentionCall, sums: _Sums, sequences: Sequence[_Sequence], gradient: Tensor) -> None:
        for row, one in enumerate(sequences):
            value, own = call.value[row].detach(), gradient[row].transpose(0, 1)
            value = value if one.keys is None else value[:, one.keys]
            own = own if one.queries is None else own[:, one.queries]
            sums.add_loss(
                sensitivity_tiles(
                    one.query, one.key, value, own, call.scaling, self.block, allowed=one.allowed, bias=one.bias
                )
            )

    def _sequence(self, call: AttentionCall, row: int, queries: Tensor | None) -> _Sequence:
        query, key, keys = call.query[row].detach(), call.key[row].detach(), call.key_keep
        i = j = None
        bias = call.bias()
        bias = None if bias is None else bias[row if len(bias) > 1 else 0]
        size = (query.shape[1], key.shape[1])
        if queries is None and keys is None and call.offset == 0:

            def allowed(rows: slice) -> Tensor:
                return _of_sequence(call, rows, row, size)
        else:
            i = torch.arange(size[0], device=query.device) if queries is None else queries[row].nonzero().flatten()
            j = torch.arange(size[1], device=query.device) if keys is None else keys[row].nonzero().flatten()
            self._check(call, row, i, j)
            real = _of_sequence(call, slice(0, size[0]), row, size)[i][:, j]
            query, key = query[:, i], key[:, j]
            bias = None if bias is None else bias[:, i][:, :, j]

            def allowed(rows: slice) -> Tensor:
                return real[rows]

        return _Sequence(query, key, bias, allowed, i, j)

    def _check(self, call: AttentionCall, row: int, i: Tensor, j: Tensor) -> None:
        for positions, real in ((call.query_positions, i), (call.key_positions, j)):
            own = positions[row if len(positions) > 1 else 0][real]
            if not torch.equal(own, torch.arange(len(real), device=own.device)):
                raise UsageError(
                    f"{call.site.name}: the positions of sequence {row} do not count its tokens one by one; packed "
                    "sequences cannot be observed."
                )


def _of_sequence(call: AttentionCall, rows: slice, row: int, size: tuple[int, int]) -> Tensor:
    """Bool (rows, keys): what the model lets meet in one sequence of the batch."""
    allowed = call.allowed(rows)
    if allowed is None:
        return torch.ones(rows.stop - rows.start, size[1], dtype=torch.bool, device=call.query.device)
    if allowed.shape[1] > 1:
        raise UsageError(f"{call.site.name} masks each head in its own way, which cannot be observed.")
    return allowed[row if len(allowed) > 1 else 0, 0].expand(rows.stop - rows.start, -1)

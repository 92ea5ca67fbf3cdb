"""What was observed of a model's attention: sums over blocks of positions, site by site and head by head.

Of every tile (a block of queries r, a block of keys c) and head, with T the attention mass of one sequence in the tile
and n the number of its pairs that may meet there:

    mass    sum over sequences of T          mean     = mass / count: per pair
    square  sum over sequences of T^2 / n    variance = square / count - mean^2, over sequences, weighted by n
    count   sum over sequences of n          area     the same, of the pairs that may never meet too (causal, window)

So padding is in none of the sums, a tile with area but no count is impossible, and one without area is unseen.
Where keys behind the query count too (encoders, cross-attention), mass, square and count are also summed over each
sequence's last block of keys alone, which is another column for another length.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.attention.tiles import FACTS
from secateur.cache import put_in_place, scratch_beside, sync
from secateur.errors import LoadFailure, OutputExists, SaveFailure, UsageError, check_whole

FORMAT = "secateur attention observation 2"
FIRST = "secateur attention observation 1"  # the same, but for what its losses are: derivatives by the scores
TENSORS, RECORD = "observation.safetensors", "observation.json"
_TENSORS = ("mass", "square", "count", "area", "facts", "queries")
_OPTIONAL = ("loss", "last_mass", "last_square", "last_count", "last_loss")
_FACTS = ("name", "family", "heads", "kv_heads", "causal", "sequences")


@dataclass(frozen=True, eq=False)
class SiteObservation:
    """One site at one length. Rows and columns are blocks of queries and keys, counted from position 0.

    Args:
        name, family, heads, kv_heads, causal: as the site's; the family is encoder-self, decoder-self or decoder-cross.
        mass, square: (heads, rows, columns) fp32.
        count, area: (rows, columns) int64, pairs.
        facts: (heads, rows, 4) fp32, sums over queries of `secateur.attention.tiles.FACTS`.
        queries: (rows,) int64, queries summed.
        sequences: how many were observed.
        loss: (heads, rows, columns) fp32, the sum over sequences of `secateur.attention.sensitivity`'s F; None without
            gradients.
        last_mass, last_square, last_count, last_loss: the parts of these sums that fall into the last block of keys of
            their sequence; None in causal sites.
    """

    name: str
    family: str
    heads: int
    kv_heads: int
    causal: bool
    mass: Tensor
    square: Tensor
    count: Tensor
    area: Tensor
    facts: Tensor
    queries: Tensor
    sequences: int
    loss: Tensor | None = None
    last_mass: Tensor | None = None
    last_square: Tensor | None = None
    last_count: Tensor | None = None
    last_loss: Tensor | None = None

    @property
    def possible(self) -> Tensor:
        """Bool (rows, columns): some pair of the tile may meet."""
        return self.count > 0

    @property
    def unseen(self) -> Tensor:
        """Bool (rows, columns): no sequence reached there."""
        return self.area == 0

    @property
    def mean(self) -> Tensor:
        """(heads, rows, columns): mean attention per pair that may meet; 0 where none may."""
        return self.mass / self.count.clamp(min=1)

    @property
    def variance(self) -> Tensor:
        """(heads, rows, columns): over sequences, of the tile's mean; of the entry, if the block is 1."""
        return (self.square / self.count.clamp(min=1) - self.mean.square()).clamp(min=0)

    def without_last(self, name: str = "mass") -> tuple[Tensor, Tensor] | None:
        """One of the sums, and its pairs, outside each sequence's last block of keys; None if not told apart."""
        own, pairs = getattr(self, f"last_{name}"), self.last_count
        return None if own is None or pairs is None else (getattr(self, name) - own, self.count - pairs)

    def fact(self, name: str) -> Tensor:
        """(heads,): the mean over queries of one of `FACTS`."""
        return self.facts[..., FACTS.index(name)].sum(1) / self.queries.sum().clamp(min=1)


@dataclass(frozen=True, eq=False)
class Observation:
    """Attention observed at one or more lengths.

    Args:
        block: tokens on a side of a tile; 1 is entry by entry.
        lengths: length in tokens -> site name -> what was seen.
        model: what identifies the model.
        text: what was read: name, split, hashes, and so on.
    """

    block: int
    lengths: Mapping[int, Mapping[str, SiteObservation]]
    model: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())

    def at(self, length: int | None = None) -> Mapping[str, SiteObservation]:
        """The sites at one length, by default the longest.

        Raises:
            UsageError: it was not observed, or nothing was.
        """
        if not self.lengths or not all(self.lengths.values()):
            raise UsageError("The observation is empty: no attention was seen.")
        chosen = max(self.lengths) if length is None else length
        if chosen not in self.lengths:
            raise UsageError(
                f"Nothing was observed at {chosen} tokens, only at {', '.join(map(str, sorted(self.lengths)))}."
            )
        return self.lengths[chosen]

    def __str__(self) -> str:
        sites = self.at()
        heads = sum(site.heads for site in sites.values())
        sequences = sum(next(iter(found.values())).sequences for found in self.lengths.values())
        return (
            f"{sequences} sequences of {', '.join(map(str, sorted(self.lengths)))} tokens at {len(sites)} sites with "
            f"{heads} heads, in blocks of {self.block}"
        )


def save_observation(observation: Observation, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write `observation.safetensors` and `observation.json` into a folder of their own, whole or not at all.

    Raises:
        OutputExists: the folder exists, unless `overwrite` and it holds nothing else.
        SaveFailure: it cannot be written; nothing is left behind.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not (overwrite and _is_ours(target)):
        raise OutputExists(f"{target} exists: choose another name, or ask for it to be overwritten (--overwrite).")
    tensors, sites = dict[str, Tensor](), list[dict[str, Any]]()
    for length, found in observation.lengths.items():
        for site in found.values():
            parts = {key: getattr(site, key) for key in (*_TENSORS, *_OPTIONAL)}
            tensors |= {
                f"{length}.{site.name}.{key}": part.contiguous() for key, part in parts.items() if part is not None
            }
            sites.append({"length": length} | {key: getattr(site, key) for key in _FACTS})
    record = {
        "format": FORMAT, "block": observation.block, "model": dict(observation.model), "text": dict(observation.text),
        "versions": dict(observation.versions), "sites": sites,
    }  # fmt: skip
    try:
        with scratch_beside(target) as scratch:
            new = scratch / "new"
            new.mkdir()
            save_file(tensors, new / TENSORS)
            (new / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            (new / TENSORS).chmod((new / RECORD).stat().st_mode)  # safetensors keeps its files to the owner
            sync(new)
            put_in_place(new, target)
    except (OSError, SafetensorError) as error:
        raise SaveFailure(f"The observation could not be saved as {target}: {error}.") from error
    return target


def load_observation(folder: str | Path) -> Observation:
    """What `save_observation` wrote.

    Raises:
        UsageError: the folder holds no observation, or an empty one.
        LoadFailure: it is damaged.

    >>> load_observation("/nowhere")
    Traceback (most recent call last):
    secateur.errors.UsageError: /nowhere has no observation.json: ...
    """
    source = Path(folder).expanduser()
    if not (source / RECORD).is_file():
        raise UsageError(f"{source} has no {RECORD}: name a folder that secateur attend observe has written.")
    try:
        record = json.loads((source / RECORD).read_text(encoding="utf-8"))
        if record.get("format") not in (FORMAT, FIRST):
            raise UsageError(f"{source / RECORD} is no observation of attention (format {record.get('format')!r}).")
        lengths: dict[int, dict[str, SiteObservation]] = {}
        with safe_open(source / TENSORS, framework="pt") as opened:
            there = set(opened.keys())
            if record["format"] == FIRST and any(key.endswith(".loss") for key in there):
                raise UsageError(
                    f"{source} was observed with --gradients by an earlier version, whose losses mean something else: "
                    "observe again."
                )
            for facts in record["sites"]:
                length, name = int(facts["length"]), facts["name"]
                kept = [key for key in (*_TENSORS, *_OPTIONAL) if key in _TENSORS or f"{length}.{name}.{key}" in there]
                found = {key: opened.get_tensor(f"{length}.{name}.{key}") for key in kept}
                site = SiteObservation(**{key: facts[key] for key in _FACTS}, **found)
                _check_site(site)
                lengths.setdefault(length, {})[name] = site
        loaded = Observation(record["block"], lengths, record["model"], record["text"], record["versions"])
        block = loaded.block
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise LoadFailure(f"The observation in {source} is damaged ({error}): observe again.") from error
    check_block(block)
    loaded.at()
    return loaded


def check_block(block: Any) -> int:
    """A block of at least one token.

    >>> check_block(64)
    64
    """
    check_whole("block", "an observation", block)
    return int(block)


def _check_site(site: SiteObservation) -> None:
    rows, columns = site.count.shape
    wanted: dict[str, tuple[int, ...]] = {
        "mass": (site.heads, rows, columns), "square": (site.heads, rows, columns), "area": (rows, columns),
        "facts": (site.heads, rows, len(FACTS)), "queries": (rows,),
    }  # fmt: skip
    whole = (site.heads, rows, columns)
    wanted |= {key: whole[1:] if key == "last_count" else whole for key in _OPTIONAL if getattr(site, key) is not None}
    for key, shape in wanted.items():
        if tuple(getattr(site, key).shape) != shape:
            raise ValueError(f"{key} of {site.name} is {tuple(getattr(site, key).shape)}, not {shape}")
    if not torch.isfinite(site.mass.sum()):
        raise ValueError(f"the mass of {site.name} is not finite")


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {TENSORS, RECORD}


def _versions() -> dict[str, str]:
    packages = ("secateur", "torch", "transformers")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}

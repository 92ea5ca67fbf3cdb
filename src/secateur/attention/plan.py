"""An attention plan: the masks of a model's sites, for which model they were made and from what; and its two files.

`attention_plan.safetensors` holds the masks as packed bits, `attention_plan.json` everything else and the other
file's hash. Both also fit into the folder of a saved model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.cache import scratch_beside, sync

from ..errors import LoadFailure, OutputExists, SaveFailure, UsageError
from .site_mask import SiteMask
from .sites import Site, find_sites

__all__ = ["RECORD", "TENSORS", "Plan", "SiteMask", "load_plan", "plan_of", "save_plan"]
TENSORS, RECORD = "attention_plan.safetensors", "attention_plan.json"
FORMAT = "secateur attention plan 1"


@dataclass(frozen=True, eq=False)
class Plan:
    """Masks for one model; make it with `plan_of`.

    Attributes:
        model_type, architecture: of the model's config, and its class.
        model_sites: every site of that model.
        sites: a mask for some of them, by name; the others stay dense.
        record: how it was made: p, pool, kind, population, calibration hash, lengths, versions; plain values.
    """

    model_type: str
    architecture: str
    model_sites: tuple[Site, ...]
    sites: Mapping[str, SiteMask]
    record: Mapping[str, Any] = field(default_factory=dict)

    def masks_for(self, model: nn.Module) -> dict[str, SiteMask]:
        """The masks by the site names of this model, which may sit in another wrapping (a head, adapters).

        Raises:
            UsageError: it is another model: another type, another number of sites, or sites of another shape.
            ModelNotSupported: its attention cannot be replaced.
        """
        theirs = find_sites(model)
        found = _model_type(model)
        if found != self.model_type:
            raise UsageError(f"The attention plan is for a {self.model_type} model, and this is a {found} model.")
        if len(theirs) != len(self.model_sites):
            raise UsageError(
                f"The attention plan is for a model with {len(self.model_sites)} attention sites "
                f"({self.architecture}), and this one has {len(theirs)}."
            )
        names = {}
        for mine, site in zip(self.model_sites, theirs, strict=True):
            if _shape(mine) != _shape(site):
                raise UsageError(
                    f"The attention plan is for another model: {site.name} has {_words(site)}, and the plan's "
                    f"{mine.name} {_words(mine)}."
                )
            names[mine.name] = site.name
        return {names[name]: mask for name, mask in self.sites.items()}

    def density(self, lengths: int | Iterable[int]) -> dict[int, dict[str, float]]:
        """Length -> site -> the share of the dense model's pairs that is kept, mean over heads; 1.0 where dense.

        Cross-attention is counted with as many keys as queries.
        """
        lengths = [lengths] if isinstance(lengths, int) else lengths
        return {
            length: {
                site.name: float(self.sites[site.name].density(length).mean()) if site.name in self.sites else 1.0
                for site in self.model_sites
            }
            for length in lengths
        }

    def mean_density(self, length: int) -> float:
        """Over all sites, dense ones too: the share of the model's pairs that is kept."""
        pairs = {site.name: site.heads * (0.5 if site.causal else 1.0) for site in self.model_sites}
        shares = self.density(length)[length]
        return sum(shares[name] * count for name, count in pairs.items()) / sum(pairs.values())


def plan_of(model: nn.Module, sites: Mapping[str, SiteMask], record: Mapping[str, Any] | None = None) -> Plan:
    """A plan for this model.

    Args:
        model: the masks are for it.
        sites: masks by site name (`find_sites`), with as many heads as the site, or one for all.
        record: how it was made, plain values.

    Raises:
        UsageError: a name that is no site of the model, or a mask of another head count or direction.
        ModelNotSupported: the model's attention cannot be replaced.
    """
    found = find_sites(model)
    plan = Plan(_model_type(model), type(model).__name__, found, dict(sites), dict(record or {}))
    _check_masks(plan)
    return plan


def save_plan(plan: Plan, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write both files into a folder, new or there already (a saved model's, for one), each whole or not at all.

    Returns:
        The folder's full path.

    Raises:
        OutputExists: it holds a plan already (without `overwrite`), or is a file.
        SaveFailure: the disk is full, or the place cannot be written.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise OutputExists(f"{target} is a file: choose another name for the folder of the attention plan.")
    if (target / RECORD).exists() and not overwrite:
        raise OutputExists(f"{target} holds an attention plan: choose another folder, or ask for it to be overwritten.")
    tensors, masks = {}, {}
    for number, (name, mask) in enumerate(plan.sites.items()):
        shapes = {}
        for part, tensor in mask.tensors().items():
            tensors[f"{number}.{part}"], shapes[part] = _pack(tensor), list(tensor.shape)
        facts = {key: getattr(mask, key) for key in ("kind", "block", "causal", "lowest", "cross", "extend", "last")}
        masks[name] = facts | {"tensors": shapes}
    document = {
        "format": FORMAT,
        "model_type": plan.model_type,
        "architecture": plan.architecture,
        "model_sites": [asdict(site) for site in plan.model_sites],
        "masks": masks,
        "record": dict(plan.record),
    }
    try:
        with scratch_beside(target) as scratch:
            new = scratch / "new"
            new.mkdir()
            save_file(tensors, new / TENSORS, {"format": FORMAT})
            document["sha256"] = hashlib.sha256((new / TENSORS).read_bytes()).hexdigest()
            (new / RECORD).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            (new / TENSORS).chmod((new / RECORD).stat().st_mode)  # safetensors keeps its files to the owner
            sync(new)
            if target.exists():
                for name in (TENSORS, RECORD):
                    (new / name).replace(target / name)
            else:
                new.rename(target)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise SaveFailure(f"The attention plan could not be saved in {target}: {error}.") from error
    return target


def load_plan(folder: str | Path) -> Plan:
    """Read what `save_plan` wrote.

    Raises:
        UsageError: there is no plan in the folder.
        LoadFailure: its files are damaged, or not of one plan.
    """
    source = Path(folder).expanduser()
    if not (source / RECORD).is_file():
        raise UsageError(f"There is no attention plan in {source}: it has no {RECORD}.")
    try:
        document = json.loads((source / RECORD).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise LoadFailure(f"{source / RECORD} has the format {document['format']!r}. Wanted: {FORMAT!r}.")
        if hashlib.sha256((source / TENSORS).read_bytes()).hexdigest() != document["sha256"]:
            raise LoadFailure(f"{source / TENSORS} is not the file that {RECORD} describes.")
        tensors = load_file(source / TENSORS)
        sites = {}
        for number, (name, facts) in enumerate(document["masks"].items()):
            shapes = facts.pop("tensors")
            facts |= {part: _unpack(tensors[f"{number}.{part}"], shape) for part, shape in shapes.items()}
            sites[name] = SiteMask(**facts)
        found = tuple(Site(**site) for site in document["model_sites"])
        plan = Plan(document["model_type"], document["architecture"], found, sites, document["record"])
        _check_masks(plan)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise LoadFailure(f"The attention plan in {source} cannot be read: {error!r}.") from error
    return plan


def _check_masks(plan: Plan) -> None:
    sites = {site.name: site for site in plan.model_sites}
    for name, mask in plan.sites.items():
        if name not in sites:
            raise UsageError(f"The attention plan masks '{name}', which is no attention site of {plan.architecture}.")
        site = sites[name]
        if mask.heads not in (1, site.heads):
            raise UsageError(f"{name} has {site.heads} heads, and its mask {mask.heads}.")
        if (mask.causal, mask.cross) != (site.causal, site.kind == "cross"):
            raise UsageError(
                f"{name} is {site.family} attention, and its mask says causal={mask.causal}, cross={mask.cross}."
            )


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _shape(site: Site) -> tuple[object, ...]:
    return site.family, site.ordinal, site.heads, site.kv_heads, site.head_size, site.causal


def _words(site: Site) -> str:
    return f"{site.heads} heads of {site.head_size} on {site.kv_heads} of keys ({site.family} {site.ordinal})"


def _pack(keep: Tensor) -> Tensor:
    """uint8: eight marks a byte, the first in the lowest bit."""
    flat = keep.flatten().to("cpu", torch.uint8)
    flat = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.bool().flatten()[: math.prod(shape)].reshape(shape)

"""What several verbs ask in the same words: checks that need no model, and opening one."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from secateur.cli.options import choose
from secateur.cli.output import say, warn
from secateur.errors import UsageError, check_whole
from secateur.progress import Progress

if TYPE_CHECKING:
    from secateur.models.load import Source


def check_count(option: str, value: int | None, least: int, verb: str) -> None:
    """Raise unless a number that was given is at least `least`."""
    if value is not None:
        check_whole(option, verb, value, least)


def check_dtype(dtype: str | None) -> None:
    """Raise unless models can be loaded in it; None is the model's own."""
    if dtype is not None:
        from secateur.models.load import DTYPES

        choose("dtype", dtype, ("auto", *DTYPES))


def check_template(template: str | None) -> None:
    """Raise unless conversations can be written so; None is the usual way."""
    if template is not None:
        from secateur.data.instructions import TEMPLATES

        choose("template", template, TEMPLATES)


def check_device(device: str | None) -> None:
    """Raise unless this torch can put a tensor there."""
    if device is None:
        return
    import torch

    try:
        torch.zeros(1, device=torch.device(device)).item()  # meta has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).split("\n")[0].split(". ")[0]
        if why.startswith("Expected one of"):
            why = "there is no such kind of device"
        kinds = ("cpu", "cuda", "cuda:0", "mps", "xpu")
        near = difflib.get_close_matches(device, kinds, n=1)
        offer = f" Did you mean '{near[0]}'?" if near and near[0] != device else ""
        raise UsageError(f"--device {device} cannot be used here: {why}.{offer} Use --device cpu.") from error


@dataclass(frozen=True)
class Loading:
    """How models are loaded, and where."""

    dtype: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(the model's own)")] = None
    """To load and compute in, and to save in where a model is saved: bfloat16, float16 or float32."""
    device: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(cpu)")] = None
    """Where to compute, as cpu or cuda:0."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model. Only for sources you trust."""

    def check(self) -> None:
        """Raise unless that can be, as far as is known without a model."""
        check_dtype(self.dtype)
        check_device(self.device)


WithLoading = Annotated[Loading, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True)
class Opened:
    """A model in memory, its tokenizer, and where it came from."""

    model: Any
    tokenizer: Any
    source: Source
    name: str

    def record(self) -> dict[str, object]:
        """For the JSON."""
        return {
            "name": self.name,
            "source": self.source.description,
            "location": self.source.location,
            "revision": self.source.revision,
            "sha256": self.source.sha256,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
        }


def open_model(name: str, loading: Loading, progress: Progress, revision: str | None = None) -> Opened:
    """Find and load a model, and tell the person where its weights came from."""
    from secateur.models.load import load, resolve
    from secateur.models.processor import imitates

    source = resolve(name, revision=revision, progress=progress)
    say(f"{name}: {source.description}")
    how: dict[str, Any] = dataclasses.asdict(loading)
    model, tokenizer = load(source, progress=progress, **how)
    if imitates(model.dtype, model.device):
        kind = str(model.dtype).removeprefix("torch.")
        warn(f"this processor has no {kind} arithmetic and imitates it, many times slower: try --dtype float32.")
    return Opened(model, tokenizer, source, name)

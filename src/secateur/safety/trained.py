"""What judges with weights of their own share: where these come from, their threshold, name and version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from secateur.errors import InvalidParameter, LoadFailure
from secateur.safety.judges import Judge

FOLDER = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Trained(Judge):
    """A judge whose weights ship with it, or are in a file that its recipe in benchmarks/ wrote.

    `shipped` is that file, `recipe` the script's name, `shapes` the file's tensors, `reads` the version of what the
    weights are of, and `words` what messages call them.
    """

    weights: str | None = None
    threshold: float = 0.5

    argument = "weights"
    shipped: ClassVar[Path]
    recipe: ClassVar[str]
    shapes: ClassVar[Mapping[str, tuple[int, ...]]]
    reads: ClassVar[int]
    words: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise InvalidParameter("threshold", f"the judge {self.kind()}", "a number in (0, 1)", self.threshold)
        _ = self.tensors  # a file that cannot be read is told of now

    @property
    def name(self) -> str:
        own = "" if self.weights is None else f":{Path(self.weights).stem}"
        return f"{self.kind()}{own}" + ("" if self.threshold == 0.5 else f"@{self.threshold:g}")

    @property
    def version(self) -> str:
        """The version of what is read, and a hash of the weights."""
        return f"{self.reads}-{hashlib.sha256(self.file.read_bytes()).hexdigest()[:8]}"

    @property
    def card(self) -> dict[str, Any]:
        """What it was trained on, and what it agrees with; empty for weights without a card."""
        file = self.file.with_suffix(".json")
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    @property
    def file(self) -> Path:
        """Where the weights are."""
        return self.shipped if self.weights is None else Path(self.weights).expanduser()

    @cached_property
    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The weights by name.

        Raises:
            LoadFailure: the file cannot be read, or has others.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(self.file).items()}
        except (OSError, SafetensorError) as error:
            raise LoadFailure(f"The weights of the {self.words} cannot be read from {self.file}: {error}.") from error
        for name, shape in self.shapes.items():
            if name not in tensors or tensors[name].shape != shape:
                got = tensors[name].shape if name in tensors else "nothing"
                raise LoadFailure(
                    f"{self.file} has no {self.words} of version {self.reads}: '{name}' must be {shape}, is {got}. "
                    f"Train it again with benchmarks/{self.recipe}."
                )
        return tensors

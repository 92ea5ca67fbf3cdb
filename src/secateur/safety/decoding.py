"""How answers are drawn: the options, the same for a model in memory and behind an endpoint."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..data.calibration import check_integer
from ..errors import InvalidParameter
from .records import Prompt


@dataclass(frozen=True)
class Decoding:
    """Greedy by default, so that a model gives one answer; or `samples` seeded ones at a temperature above 0.

    Args:
        max_new_tokens: an answer is cut there.
        samples: answers a prompt.
        temperature: 0 is greedy.
        seed: of the samples; each prompt and sample has its own stream, whatever the batch.
        system: a system message before every prompt that has none of its own.

    Raises:
        InvalidParameter: a value outside its range; several samples of a greedy model, which are all one.

    >>> Decoding(samples=3)
    Traceback (most recent call last):
    secateur.errors.InvalidParameter: The 'samples' of decoding must be 1 at temperature 0, ... Got 3 instead.
    """

    max_new_tokens: int = 256
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", "decoding", self.max_new_tokens, 1)
        check_integer("samples", "decoding", self.samples, 1)
        check_integer("seed", "decoding", self.seed, 0)
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not number or not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidParameter("temperature", "decoding", "a finite number, at least 0", self.temperature)
        if self.samples > 1 and not self.temperature:
            allowed = "1 at temperature 0, where all samples are the same"
            raise InvalidParameter("samples", "decoding", allowed, self.samples)

    def to_dict(self) -> dict[str, Any]:
        """All fields; the seed is left out of a greedy run, which has none."""
        record = asdict(self)
        record["temperature"] = float(self.temperature)
        return record if self.temperature else {key: value for key, value in record.items() if key != "seed"}

    def turns(self, prompt: Prompt) -> tuple[tuple[str, str], ...]:
        """The conversation as the model gets it."""
        if self.system is None or prompt.turns[0][0] == "system":
            return prompt.turns
        return (("system", self.system), *prompt.turns)

    def stream(self, prompt: Prompt, sample: int) -> int:
        """The seed of one sample of one prompt, below 2^63.

        >>> one = Prompt("0", "mine", "How are you?", "benign")
        >>> Decoding(seed=1).stream(one, 0) == Decoding(seed=1).stream(one, 1)
        False
        """
        name = f"{self.seed}/{prompt.sha256}/{sample}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

"""What a recovery can be asked for. Each field is an option, a flag of `secateur recover` and a key of the record."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from secateur.errors import InvalidParameter, UnknownName, UsageError, check_whole
from secateur.recovery.adapters import ADAPTERS, LORA
from secateur.recovery.subsets import SUBSETS

OBJECTIVES = ("text", "distil", "reconstruct")
SCHEDULES = ("cosine", "linear", "constant")
PREFIXES = ("dense", "pruned")


@dataclass(frozen=True)
class Recovery:
    """How a pruned model is trained back.

    >>> Recovery(train=("norms",), steps=10).rank
    4
    >>> Recovery(train=("nroms",))
    Traceback (most recent call last):
    secateur.errors.UnknownName: There is no set of parameters 'nroms'. Did you mean 'norms'? Known: ...
    """

    train: tuple[str, ...] = ("adapters", "norms", "biases")
    """What is trained: adapters (low-rank, on the pruned layers), norms, biases, embeddings, head; kept (every
    weight that was kept; zeros stay) or all (everything: the zeros are lost)."""
    adapter: str = "masked"
    """masked: W + s keep BA. scaled: W BA. prune-at-merge: W + s BA, zeros return at the end. lora: peft's, which
    is saved beside the model and never merged."""
    rank: int = 4
    """Of the adapters."""
    scale: float = 2.0
    """s, the factor on BA (lora_alpha / rank elsewhere)."""
    objective: str = "text"
    """text: predict the text. distil: that, and agree with the dense model. reconstruct: give the dense model's
    outputs, a window of blocks at a time."""
    distil_weight: float = 0.5
    """Share of the dense model in the loss of distil, in [0, 1]."""
    temperature: float = 1.0
    """Of both predictions in the loss of distil."""
    window: int = 1
    """Blocks that are reconstructed together."""
    inputs: str = "dense"
    """What reconstruction feeds a window with: dense, or pruned (what the recovered blocks before it give)."""
    targets: str = "dense"
    """Where the dense window gets its input for the targets: dense, or pruned (the same prefix as inputs pruned)."""
    steps: int = 300
    """Updates; with reconstruct, per window."""
    lr: float = 1e-3
    """Highest learning rate."""
    schedule: str = "cosine"
    """How the learning rate falls after the warm-up: cosine or linear to zero, or constant."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for any."""
    batch_size: int = 2
    """Windows of text in one forward call."""
    accumulate: int = 1
    """Forward calls in one update."""
    seed: int = 0
    """Of the order of the text and of the adapters' start."""
    precision: str = "model"
    """model: compute in the model's dtype. bfloat16: in bf16 under autocast, whatever the model is kept in. What is
    trained is kept in fp32 either way."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    checkpoint_every: int = 50
    """Steps between checkpoints, and between looks at the held-out loss with keep best."""
    keep: str = "last"
    """Which weights to end with: last, or best on the held-out windows."""

    def __post_init__(self) -> None:
        words: str | tuple[str, ...] = self.train
        object.__setattr__(self, "train", (words,) if isinstance(words, str) else tuple(words))
        if not self.train:
            raise UsageError(f"Nothing would be trained: name one or more of {', '.join(SUBSETS)} (--train).")
        for word in self.train:
            _choose("set of parameters", word, SUBSETS)
        for alone, others in (("all", set(SUBSETS) - {"all"}), ("kept", {"adapters"})):
            if alone in self.train and (both := others & set(self.train)):
                raise UsageError(f"--train {alone} already trains what {sorted(both)[0]} would: name one of them.")
        _choose("adapter", self.adapter, (*ADAPTERS, LORA))
        _choose("objective", self.objective, OBJECTIVES)
        _choose("schedule of the learning rate", self.schedule, SCHEDULES)
        _choose("value of precision", self.precision, ("model", "bfloat16"))
        _choose("value of keep", self.keep, ("last", "best"))
        _choose("value of inputs", self.inputs, PREFIXES)
        _choose("value of targets", self.targets, PREFIXES)
        for name in ("rank", "steps", "batch_size", "accumulate", "checkpoint_every"):
            check_whole(name, "recover", getattr(self, name))
        check_whole("seed", "recover", self.seed, 0)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise UsageError(
                f"A window must contain a non-linearity: at least one block (--window 1). Got {self.window!r}; "
                f"a single matrix is not enough."
            )
        for name, low, high in (
            ("scale", 0, math.inf), ("temperature", 0, math.inf), ("lr", 0, math.inf), ("warmup", 0, 1),
            ("distil_weight", 0, 1), ("weight_decay", 0, math.inf), ("clip", 0, math.inf),
        ):  # fmt: skip
            _number(name, getattr(self, name), low, high, open_below=name in ("scale", "temperature", "lr"))
        if self.objective == "reconstruct":
            self._check_reconstruct()

    def _check_reconstruct(self) -> None:
        outside = [word for word in ("embeddings", "head") if word in self.train]
        if outside:
            raise UsageError(f"Reconstruction trains inside the blocks: leave {outside[0]} out of --train.")
        if self.adapter == LORA and "adapters" in self.train:
            raise UsageError("Reconstruction has no peft adapters: choose --adapter masked, scaled or prune-at-merge.")
        if self.targets == "pruned" and self.inputs == "dense":
            raise UsageError("--targets pruned needs --inputs pruned: both then read the recovered prefix.")
        if self.keep == "best":
            raise UsageError("Reconstruction ends with the last weights of each window: leave out --keep best.")

    def to_dict(self) -> dict[str, object]:
        """All options, ready for JSON."""
        return dataclasses.asdict(self) | {"train": list(self.train)}


def _choose(kind: str, name: str, known: object) -> None:
    names = list(known)  # type: ignore[call-overload]
    if name not in names:
        raise UnknownName(kind, name, names)


def _number(name: str, value: object, low: float, high: float, *, open_below: bool) -> None:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or not low <= value <= high or (open_below and value == low):  # type: ignore[operator]
        bound = f"a number above {low}" if open_below else f"a number of at least {low}"
        raise InvalidParameter(name, "recover", bound if high == math.inf else f"a number in [{low}, {high}]", value)

"""What a safety study is asked to do: every field is a flag of `secateur probe study` and a key of its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.errors import InvalidParameter, UnknownName, UsageError, check_whole
from secateur.masks import check_sparsity
from secateur.safety.judges import DEFAULT

MEASURES: dict[str, str] = {
    "answers": "what the models write, judged",
    "margin": "the refusal margin, by forward passes only",
    "focus": "how much attention the task gets inside its template",
    "shift": "perplexity of the task and of the template around it",
    "perplexity": "on an ordinary text",
    "fidelity": "to the dense model, on the same text",
    "tasks": "zero-shot accuracy",
}
TARGETS = ("attention", "mlp", "all")
DENSE = "dense"


@dataclass(frozen=True)
class Arm:
    """One model of the study; `target` and `sparsity` are None for the dense one.

    >>> Arm("attention", 0.2).name, Arm().name
    ('attention-0.2', 'dense')
    """

    target: str | None = None
    sparsity: float | None = None

    @property
    def name(self) -> str:
        """As its folder is called."""
        return DENSE if self.target is None else f"{self.target}-{self.sparsity:g}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A dense model and its pruned copies, on the same prompts, by the same judges.

    Raises:
        UsageError: a value that cannot be; nothing has been read or run.

    >>> [arm.name for arm in Study(model="smollm2", sparsities=(0.1, 0.2), targets=("attention",)).arms]
    ['dense', 'attention-0.1', 'attention-0.2']
    >>> Study(model="smollm2", judges=("keyword:xstest",))
    Traceback (most recent call last):
    secateur.errors.UsageError: A study needs at least two judges, of different kinds; got 1. ...
    """

    model: str
    prompts: tuple[str, ...] = ("builtin",)
    """Prompt sets: builtin (harmless, ours), files, FORMAT=FILE or FILE:text=COLUMN,label=harmful."""
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3)
    """Shares of the weights to remove, each in (0, 1)."""
    targets: tuple[str, ...] = ("attention", "all")
    """Which layers are cut: attention, mlp or all."""
    method: str = "wanda"
    """How weights are chosen: see secateur list methods."""
    primary: str | None = None
    """The one comparison that is declared before the run, as attention-0.2: attack success on harmful prompts there,
    against the dense model, by the first judge."""
    judges: tuple[str, ...] = DEFAULT
    """Two or more; the first one's verdicts are the primary ones, the others say how far to trust them."""
    measures: tuple[str, ...] = tuple(MEASURES)
    """What to measure: answers, margin, focus, shift, perplexity, fidelity, tasks."""
    templates: tuple[str, ...] = ()
    """Put bare prompts into these templates as well: builtin (harmless, ours), or files."""
    only: tuple[str, ...] = ()
    """Of prompts in templates keep these, by the template's name; none is the bare prompt."""
    limit: int | None = None
    """At most so many tasks of each set, with all their templates; drawn from every label and category in turn."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""
    batch_size: int = 16
    """Prompts that run together."""
    answers_per_prompt: int = 1
    """How many answers are sampled to a prompt; 1 takes the likeliest token each time."""
    temperature: float = 0.0
    """Of sampling; 0 takes the likeliest token each time."""
    calibration: str = "gutenberg"
    """The text that pruning looks at: see secateur list texts."""
    samples: int = 128
    """Windows of calibration text. Also --nsamples."""
    seqlen: int | None = None
    """Tokens in a window, of calibration and of perplexity."""
    text: str = "gutenberg"
    """What perplexity and fidelity are measured on, its test part."""
    windows: int | None = None
    """At most so many windows of it."""
    tasks: tuple[str, ...] = ("arc_easy", "piqa", "winogrande")
    """Zero-shot tasks: see secateur list tasks."""
    task_limit: int | None = None
    """At most so many items of each task."""
    gcg: int = 0
    """Steps of an automated attack (GCG) on harmful prompts; 0 for none. Minutes a prompt, even on a small model."""
    gcg_width: int = 128
    """Token swaps that a step of the attack tries."""
    gcg_goals: str | None = None
    """A file with the columns goal and target, as AdvBench's; None attacks the study's own bare harmful prompts, with
    a common beginning of an answer as the target."""
    gcg_prompts: int = 10
    """How many prompts are attacked."""
    seed: int = 0
    """Of the draws of prompts, of calibration windows, of task items, of sampled answers."""
    dtype: str | None = None
    """To load and compute in: bfloat16, float16 or float32."""
    device: str | None = None
    """Where to compute, as cpu or cuda:0."""
    revision: str | None = None
    """Of the model on the hub: a branch, tag or commit."""

    def __post_init__(self) -> None:
        for name, words, known in (("target", self.targets, TARGETS), ("measure", self.measures, tuple(MEASURES))):
            _distinct(f"{name}s", words)
            for word in words:
                if word not in known:
                    raise UnknownName(name, word, known)
        for name in ("prompts", "sparsities", "judges", "tasks"):
            _distinct(name, getattr(self, name))
        for sparsity in self.sparsities:
            if not check_sparsity(sparsity) > 0:
                raise InvalidParameter("sparsities", "a study", "shares in (0, 1)", sparsity)
        if "answers" in self.measures and len(self.judges) < 2:
            raise UsageError(
                f"A study needs at least two judges, of different kinds; got {len(self.judges)}. One alone can be "
                f"wrong in one direction, and nothing would show it."
            )
        least = {"limit": 2, "max_new_tokens": 1, "batch_size": 1, "answers_per_prompt": 1, "samples": 1, "seqlen": 2}
        for name, smallest in {
            **least,
            "windows": 1,
            "task_limit": 1,
            "gcg": 0,
            "gcg_width": 1,
            "gcg_prompts": 1,
            "seed": 0,
        }.items():
            value = getattr(self, name)
            if value is not None:
                check_whole(name, "a study", value, smallest)
        if not 0 <= self.temperature < float("inf"):
            raise InvalidParameter("temperature", "a study", "a number of at least 0", self.temperature)
        if (self.answers_per_prompt > 1) != (self.temperature > 0):
            raise UsageError(
                f"{self.answers_per_prompt} answers a prompt at temperature {self.temperature:g}: several answers are "
                f"sampled, so they need a temperature above 0, and one answer is the likeliest, so it needs 0."
            )
        if self.primary is not None and self.primary not in (names := [arm.name for arm in self.arms[1:]]):
            raise UnknownName("pruned model of this study", self.primary, names)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The dense model first, then target by target."""
        return (Arm(), *(Arm(target, sparsity) for target in self.targets for sparsity in self.sparsities))

    @property
    def primary_arm(self) -> str:
        """The arm of the declared comparison.

        >>> Study(model="smollm2").primary_arm, Study(model="smollm2", sparsities=(0.5, 0.3)).primary_arm
        ('attention-0.2', 'attention-0.5')
        """
        ordered = sorted(self.sparsities)
        usual = 0.2 if 0.2 in ordered else ordered[len(ordered) // 2]
        return self.primary or Arm(self.targets[0], usual).name

    def record(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self) | {"primary": self.primary_arm}


def _distinct(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise UsageError(f"A study needs {name}: name at least one.")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UsageError(f"The {name} of a study name '{twice[0]}' twice: name each once.")

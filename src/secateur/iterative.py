"""Iterative magnitude pruning: cut a little, train the rest back, cut again; the classical baseline.

    s_i = 1 - (1 - s)^(i / rounds)     i = 1 ... rounds

so that every round takes the same share of what is left. What is zero stays zero from round to round.

Source: Han et al. 2015, arXiv:1506.02626; the schedule of shares: Frankle and Carbin 2019, arXiv:1803.03635, section 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.errors import InvalidParameter, check_whole
from secateur.inputs import Data
from secateur.masks import Pattern, check_sparsity
from secateur.methods import Method
from secateur.methods.magnitude import Magnitude
from secateur.progress import Progress, silent
from secateur.pruning import prune
from secateur.recovering import RecoverResult, recover
from secateur.recovery.options import Recovery
from secateur.result import PruneResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class IterativeResult:
    """The records of all rounds, first to last."""

    pruned: tuple[PruneResult, ...]
    recovered: tuple[RecoverResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """`pruning.json` of the last cut, with every training under `recovery` and every cut under `rounds`."""
        cuts = [cut.to_dict() for cut in self.pruned]
        rounds = [{"target": cut["target"], "sparsity": cut["sparsity"]} for cut in cuts]
        return {**cuts[-1], "recovery": [done.to_dict() for done in self.recovered], "rounds": rounds}


def shares(sparsity: float, rounds: int) -> list[float]:
    """The sparsity after each round.

    >>> shares(0.75, 2)
    [0.5, 0.75]
    """
    check_sparsity(sparsity)
    check_whole("rounds", "prune_iteratively", rounds)
    return [1 - (1 - sparsity) ** (i / rounds) for i in range(1, rounds)] + [sparsity]


def prune_iteratively(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: Any,
    *,
    sparsity: float,
    rounds: int = 4,
    method: Method | None = None,
    pattern: Pattern | None = None,
    calibration: Data | None = None,
    options: Recovery | None = None,
    seqlen: int | None = None,
    held_out: Any = 8,
    include: Sequence[str] = ("all",),
    exclude: Sequence[str] = (),
    progress: Progress = silent,
) -> IterativeResult:
    """Prune a model in place in several rounds, training it back after each.

    Args:
        model: dense, or pruned less.
        tokenizer, text, seqlen, held_out: as in `recover`.
        sparsity: share of weights removed in the end, in [0, 1).
        rounds: cuts, each followed by a training.
        method: what to prune by; magnitude if left out. `calibration` is its text, if it reads one.
        pattern, include, exclude: as in `prune`.
        options: of each training; by default all kept weights, norms and biases. The rounds' seeds follow on the
            given one, so that each sees the text in another order.
        progress: told how far each step is.

    Returns:
        What was cut and trained, round by round.

    Raises:
        UsageError: as `prune` and `recover`; also when the training would lose the zeros (train all).

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, vocab_size=20))
    >>> done = prune_iteratively(model, None, torch.randint(20, (4, 8)), sparsity=0.75, rounds=2,
    ...     options=Recovery(train=("kept",), steps=1))
    >>> [round(cut.sparsity_layers, 2) for cut in done.pruned], done.recovered[-1].zeros["lost"]
    ([0.5, 0.75], 0)
    """
    options = options or Recovery(train=("kept", "norms", "biases"), lr=1e-4)
    if "all" in options.train:
        raise InvalidParameter("train", "prune_iteratively", "parts that keep the zeros, as kept", options.train)
    targets = shares(sparsity, rounds)
    cuts, trainings = [], []
    for i, target in enumerate(targets):
        cut = prune(
            model, method or Magnitude(), calibration, sparsity=target, pattern=pattern, include=include,
            exclude=exclude, progress=progress,
        )  # fmt: skip
        cuts.append(cut)
        again = dataclasses.replace(options, seed=options.seed + i)
        trainings.append(
            recover(model, tokenizer, text, cut, again, seqlen=seqlen, held_out=held_out, progress=progress)
        )
    return IterativeResult(tuple(cuts), tuple(trainings))

"""Shift: does pruning make jailbreak text less likely to the model, more than it does any text?

The paper finds that a pruned model's perplexity of jailbreak prompts rises and reads it as a better sense for
artificial text (Hasan, Rugina and Wang 2024, arXiv:2401.10862). But the perplexity of a whole prompt is mostly that
of its template, and pruning raises that of any text. So what is in a prompt is told apart, and a benign preamble of
as many tokens as the template, out of a book or a manual, stands in its place as a control. Mean -log p, in nats:

    alone      of the task's tokens, by themselves
    inside     of the task's tokens inside the template
    behind     of the task's tokens behind the preamble
    template   of the template's tokens
    preamble   of the preamble's tokens
    whole      of all tokens of the request, as the paper counts

The first token of a task counts nowhere: alone it follows nothing. A bare prompt has `alone` and `whole` only.
Pruned against dense, two differences of differences say whether templates are special:

    specific     change of inside - change of behind       the task, in a jailbreak rather than in any long text
    artificial   change of template - change of preamble   the template rather than natural text

The paper's own aggregate is kept: for each task x = exp(whole) of the bare task and y = exp(mean whole over its
templates), a geometric mean of perplexities.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from secateur.data.text import Text, read_text
from secateur.errors import NumericalFailure, TextTooShort, UsageError, check_whole
from secateur.evaluate.logits import Reader
from secateur.progress import Progress, silent
from secateur.safety.clusters import Estimate, check_same, cluster_mean, signed_rank
from secateur.safety.records import Prompt
from secateur.safety.rendered import Rendered, check_prompts, check_room, offsets, render
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARTS = ("alone", "inside", "behind", "template", "preamble", "whole")
CONTRASTS = {"specific": ("inside", "behind"), "artificial": ("template", "preamble")}
CHUNK = 2**23  # logits at a time: 32 MB in fp32
ENOUGH = 400_000  # characters of a text that preambles are cut from
BETWEEN = "\n\n"  # preamble and task


@dataclass(frozen=True)
class Shifted:
    """Of one prompt: nats a token of each part that it has."""

    prompt: str
    sha256: str
    template: str | None
    cluster: str
    nats: dict[str, float]


class PaperPoint(NamedTuple):
    """A task in the paper's figure: perplexities of the bare task and, as a geometric mean, inside its templates."""

    cluster: str
    bare: float
    inside: float


@dataclass(frozen=True)
class ShiftResult:
    """One model's nats, prompt by prompt. preamble: the name and hash of the text that preambles came from."""

    prompts: tuple[Shifted, ...] = field(repr=False)
    preamble: str
    preamble_sha256: str
    chat: bool

    def perplexity(self, part: str) -> float | None:
        """exp of the mean nats of a part over the prompts that have it."""
        known = [each.nats[part] for each in self.prompts if part in each.nats]
        return math.exp(math.fsum(known) / len(known)) if known else None

    @property
    def paper(self) -> tuple[PaperPoint, ...]:
        """The points of the paper's figure, for tasks that are there bare and in a template."""
        bare = {each.cluster: each.nats["whole"] for each in self.prompts if each.template is None}
        inside: dict[str, list[float]] = {}
        for each in self.prompts:
            if each.template is not None:
                inside.setdefault(each.cluster, []).append(each.nats["whole"])
        return tuple(
            PaperPoint(cluster, math.exp(bare[cluster]), math.exp(math.fsum(values) / len(values)))
            for cluster, values in inside.items()
            if cluster in bare
        )

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON; no texts."""
        return {
            "preamble": self.preamble,
            "preamble_sha256": self.preamble_sha256,
            "chat": self.chat,
            "perplexity": {part: self.perplexity(part) for part in PARTS},
            "paper": [point._asdict() for point in self.paper],
            "prompts": [dict(vars(each)) for each in self.prompts],
        }

    def __str__(self) -> str:
        shown = ((part, self.perplexity(part)) for part in PARTS)
        return "perplexity: " + ", ".join(f"{part} {value:.1f}" for part, value in shown if value is not None)


@dataclass(frozen=True)
class ShiftChange:
    """Pruned minus dense in nats a token, by part and by contrast; p: Wilcoxon's on the tasks."""

    changes: dict[str, Estimate]
    p: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {"changes": {name: each.to_dict() for name, each in self.changes.items()}, "p": dict(self.p)}

    def __str__(self) -> str:
        rows = (f"{name} {each} (p = {self.p[name]:.2g})" for name, each in self.changes.items())
        return "change in nats a token: " + ", ".join(rows)


def shift(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    preamble: str | Path | Text = "pydoc",
    chat: bool = False,
    seed: int = 0,
    batch_size: int = 4,
    progress: Progress = silent,
) -> ShiftResult:
    """The nats of every prompt's parts. Forward passes only.

    Args:
        model: causal.
        tokenizer: a fast one, which knows which characters a token covers.
        prompts: of one turn, with a span of the task, or bare.
        preamble: a text of `secateur.data.text.TEXTS`, a local file or a `Text`; its test part is used. Each task
            gets a stretch of it of its own, the same for every model.
        chat: through the chat template, whose own tokens never count. False reads the bare text, as the paper.
        seed: of the stretches.
        batch_size: rows in a pass; a prompt in a template needs three.
        progress: told the rows done.

    Raises:
        UsageError: no prompts, two with one id, no span, a task of a single token, several turns, no causal model.
        TextTooShort: the preamble's text is shorter than a template.
        NumericalFailure: a log-probability is not finite.
    """
    check_whole("batch_size", "shift", batch_size)
    check_prompts(prompts, "shift")
    text = preamble if isinstance(preamble, Text) else read_text(preamble, "test")
    rows: dict[tuple[int, ...], Rendered] = {}
    jobs = [_arms(tokenizer, prompt, text, chat, seed) for prompt in prompts]
    for prompt, arms in zip(prompts, jobs, strict=True):
        if len(arms["alone"].task) < 2:
            raise UsageError(f"The task of prompt '{prompt.id}' has a single token, of which nothing can be measured.")
        rows |= {each.ids: each for each in arms.values()}
        check_room(model, {prompt.id: max(len(each.ids) for each in arms.values())})
    nats = token_nats(model, list(rows), batch_size, progress=progress)
    found = []
    for prompt, arms in zip(prompts, jobs, strict=True):
        parts = _parts(arms, nats)
        if not all(math.isfinite(value) for value in parts.values()):
            raise NumericalFailure(f"Prompt '{prompt.id}' gets a log-probability that is not finite ({model.dtype}).")
        found.append(Shifted(prompt.id, prompt.sha256, prompt.template, prompt.cluster, parts))
    return ShiftResult(tuple(found), text.name, text.sha256, chat)


def token_nats(
    model: PreTrainedModel, rows: Sequence[tuple[int, ...]], batch_size: int, *, progress: Progress = silent
) -> dict[tuple[int, ...], Tensor]:
    """-log p of each id of each row given those before it, in nats, fp32; NaN at the first.

    Raises:
        UsageError: no causal language model.
    """
    reader = Reader(model, torch.tensor([max(rows, key=len)]))
    if reader.direction != "causal":
        raise UsageError(f"The shift needs a causal language model; {reader.name} looks both ways.")
    found: dict[tuple[int, ...], Tensor] = {}
    order = sorted(rows, key=len, reverse=True)
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True)
            values = torch.full(ids.shape, torch.nan)
            for part, logits in reader.chunks(ids, CHUNK):  # padding is on the right, where no token looks
                stop = min(part.stop, ids.shape[1] - 1)
                wanted = ids[:, part.start + 1 : stop + 1].to(logits.device)
                log_p = logits[:, : stop - part.start].float().log_softmax(-1)
                values[:, part.start + 1 : stop + 1] = -log_p.gather(-1, wanted[..., None])[..., 0].cpu()
            found |= {row: values[i, : len(row)] for i, row in enumerate(batch)}
            progress(len(found), len(order), "perplexity of prompts")
    return found


def compare_shift(dense: ShiftResult, pruned: ShiftResult) -> ShiftChange:
    """How pruning changed each part, prompt by prompt, and whether templates more than a benign preamble.

    Raises:
        UsageError: the two are over different prompts, preambles, or one with and one without the chat template.
    """
    if (dense.chat, dense.preamble_sha256) != (pruned.chat, pruned.preamble_sha256):
        raise UsageError("Only shifts with the same preamble text and the same 'chat' can be compared.")
    check_same([(p.prompt, p.sha256) for p in dense.prompts], [(p.prompt, p.sha256) for p in pruned.prompts])
    moved = [
        (a.cluster, {part: b.nats[part] - a.nats[part] for part in a.nats})
        for a, b in zip(dense.prompts, pruned.prompts, strict=True)
    ]
    for _, change in moved:
        for name, (one, other) in CONTRASTS.items():
            if one in change and other in change:
                change[name] = change[one] - change[other]
    changes, p = {}, {}
    for name in (*PARTS, *CONTRASTS):
        values, clusters = [change[name] for _, change in moved if name in change], []
        clusters = [cluster for cluster, change in moved if name in change]
        if values:
            changes[name] = cluster_mean(values, clusters)
            p[name] = signed_rank(values, clusters)
    return ShiftChange(changes, p)


def _arms(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: Text, chat: bool, seed: int) -> dict[str, Rendered]:
    """The prompt, its task alone, and behind a preamble if it has a template, as the model reads them."""
    if prompt.messages is not None:
        raise UsageError(f"The shift reads prompts of one turn; prompt '{prompt.id}' has {len(prompt.messages)}.")
    whole = render(tokenizer, prompt, chat=chat)
    start, end = prompt.span or (0, len(prompt.text))
    task = prompt.text[start:end]
    arms = {"whole": whole, "alone": render(tokenizer, replace(prompt, text=task, span=None, template=None), chat=chat)}
    if prompt.template is not None and whole.template:
        before = _stretch(tokenizer, text, len(whole.template), f"{seed} {prompt.cluster}") + BETWEEN
        behind = replace(prompt, text=before + task, span=(len(before), len(before) + len(task)))
        arms["behind"] = render(tokenizer, behind, chat=chat)
    return arms


def _stretch(tokenizer: PreTrainedTokenizerBase, text: Text, tokens: int, key: str) -> str:
    """So many tokens of a text, from a place that the key decides."""
    places = offsets(tokenizer, text.joined[:ENOUGH])
    if len(places) <= tokens:
        raise TextTooShort(
            f"The text '{text.name}' has {len(places)} tokens, and a preamble needs {tokens}: take a longer one."
        )
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % (len(places) - tokens)
    return text.joined[places[start][0] : places[start + tokens - 1][1]].strip()


def _parts(arms: Mapping[str, Rendered], nats: Mapping[tuple[int, ...], Tensor]) -> dict[str, float]:
    def mean(arm: str, positions: Sequence[int]) -> float:
        return float(nats[arms[arm].ids][[i for i in positions if i > 0]].double().mean())

    whole = arms["whole"]
    found = {
        "alone": mean("alone", arms["alone"].task[1:]),
        "whole": mean("whole", sorted((*whole.task, *whole.template))),
    }
    if "behind" in arms:
        found["inside"] = mean("whole", whole.task[1:])
        found["template"] = mean("whole", whole.template)
        found["behind"] = mean("behind", arms["behind"].task[1:])
        found["preamble"] = mean("behind", arms["behind"].template)
    return {part: found[part] for part in PARTS if part in found}

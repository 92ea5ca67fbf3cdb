"""Focus: how much of a model's attention lies on the task, rather than on the jailbreak template around it.

A jailbreak template is a long text around a short task. Pruning is said to help a model see the task through it
(Hasan, Rugina and Wang 2024, arXiv:2401.10862, "sharper attention"). With A the attention of one head, T x T, rows
summing to 1, and S the tokens of the task:

    last      sum_{j in S} A[T-1, j]                      what the last token, which answers, takes from the task
    within    mean_{i in S} sum_{j in S} A[i, j]          what the task's tokens take from each other
    *_lift    the same over what uniform attention would give: |S| / T, and mean_{i in S} |S up to i| / (i + 1)
    entropy   mean_{i >= 1} H(A[i]) / log2(i + 1)         1 = spread evenly over all that can be seen, 0 = one token
    entropy_no_sink   mean_{i >= 2} of the same without the first token, the rest rescaled to 1, over log2(i)

The first token takes most of the attention of many heads whatever it is (a sink), so entropy with it says mostly how
much the sink takes. All are measured for each layer and head, and reported as the mean over both.

`ranks=True` adds the four measures of the paper's code, for comparison only: each row is sorted, the largest weight
has rank 0, entries of weight 0 do not count, and
    rank_task, rank_template   sum over task (template) rows of the ranks of task (template) tokens
    rank_last                  sum of the ranks of task tokens in the last row
    entropy_bits               mean over all rows of H(A[i])
Sums of ranks grow with the length of the text, so their means are those of the longest templates.

Maps are reduced layer by layer as the model makes them; no more than one layer's are ever held. In layers with a
sliding window the uniform attention is still taken over the whole past.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import NumericalFailure, UsageError, check_whole
from secateur.evaluate.logits import Reader
from secateur.progress import Progress, silent
from secateur.safety.clusters import Estimate, check_same, cluster_mean, holm, signed_rank
from secateur.safety.records import Prompt
from secateur.safety.rendered import Rendered, check_prompts, check_room, render
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEASURES = ("last", "last_lift", "within", "within_lift", "entropy", "entropy_no_sink")
RANKS = ("rank_task", "rank_template", "rank_last", "entropy_bits")
BARE = "(bare)"


@dataclass(frozen=True)
class Focused:
    """What was measured of one prompt. tokens: all that the model read; task: those of them that are the task's."""

    prompt: str
    sha256: str
    template: str
    cluster: str
    tokens: int
    task: int


@dataclass(frozen=True)
class FocusResult:
    """values: measure -> (prompts, layers, heads), NaN where a layer has fewer heads than others."""

    prompts: tuple[Focused, ...]
    values: dict[str, Tensor] = field(repr=False)
    chat: bool

    def of_prompts(self, measure: str) -> list[float]:
        """The mean over layers and heads, for each prompt."""
        return self.values[measure].nanmean((1, 2)).tolist()

    def of_heads(self, measure: str) -> Tensor:
        """The mean over prompts: (layers, heads)."""
        return self.values[measure].nanmean(0)

    def mean(self, measure: str) -> Estimate:
        """Over all prompts, with an interval over the tasks."""
        return cluster_mean(self.of_prompts(measure), [each.cluster for each in self.prompts])

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON; no texts. Of heads only the means over prompts."""
        rows = [
            {**vars(each), **{name: self.of_prompts(name)[i] for name in self.values}}
            for i, each in enumerate(self.prompts)
        ]
        heads = {name: [_known(layer) for layer in self.of_heads(name)] for name in self.values}
        means = {name: self.mean(name).to_dict() for name in self.values}
        return {"chat": self.chat, "means": means, "heads": heads, "prompts": rows}

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {self.mean(name).value:.3f}" for name in self.values)
        return f"attention on the task ({len(self.prompts)} prompts): {shown}"


@dataclass(frozen=True)
class FocusChange:
    """Pruned minus dense, of one measure over the prompts of one template. p: Wilcoxon's on the tasks; holm: p
    corrected for the templates."""

    measure: str
    template: str
    change: Estimate
    p: float
    holm: float


@dataclass(frozen=True)
class FocusShift:
    """Pruned minus dense: over all prompts by measure, and of each template."""

    overall: dict[str, Estimate]
    templates: tuple[FocusChange, ...]

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {
            "overall": {name: change.to_dict() for name, change in self.overall.items()},
            "templates": [{**vars(each), "change": each.change.to_dict()} for each in self.templates],
        }

    def __str__(self) -> str:
        return "change of attention on the task: " + ", ".join(f"{name} {e}" for name, e in self.overall.items())


def focus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    chat: bool = True,
    ranks: bool = False,
    batch_size: int = 4,
    progress: Progress = silent,
) -> FocusResult:
    """The measures above for every prompt. Forward passes only, with the model's plain ("eager") attention.

    Args:
        model: causal, with attention layers; its attention implementation is put back afterwards.
        tokenizer: a fast one, which knows which characters a token covers.
        prompts: with a span of the task, or bare.
        chat: through the chat template. False reads the bare text, as the published code does.
        ranks: also the paper's measures; they need a sort of every row.
        batch_size: prompts in one pass; a layer's maps take batch x heads x T x T numbers.
        progress: told the prompts done.

    Raises:
        UsageError: no prompts, two with one id, no span; a model that gives no attention maps or looks both ways.
        NumericalFailure: a measure is not finite.
    """
    check_whole("batch_size", "focus", batch_size)
    check_prompts(prompts, "focus")
    rendered = [render(tokenizer, prompt, chat=chat) for prompt in prompts]
    check_room(model, {prompt.id: len(each.ids) for prompt, each in zip(prompts, rendered, strict=True)})
    short = next((p.id for p, each in zip(prompts, rendered, strict=True) if len(each.ids) < 3), None)
    if short is not None:
        raise UsageError(f"Focus needs three tokens or more; prompt '{short}' has fewer.")
    names = (*MEASURES, *RANKS) if ranks else MEASURES
    found: list[list[Tensor]] = [[] for _ in prompts]  # of each prompt (measures, heads) for each layer
    order = sorted(range(len(prompts)), key=lambda i: -len(rendered[i].ids))
    with eager(model), evaluating(model):
        reader = Reader(model, torch.tensor([rendered[order[0]].ids]))
        if reader.direction != "causal":
            raise UsageError(f"Focus needs a causal language model; {reader.name} looks both ways.")
        modules = _attention(reader, torch.tensor([rendered[order[0]].ids[:3]]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rendered[i].ids) for i in rows], batch_first=True)

            def reduce(maps: Tensor, rows: list[int] = rows) -> None:
                for row, i in enumerate(rows):  # padding is on the right, where no token looks
                    length = len(rendered[i].ids)
                    found[i].append(measure(maps[row, :, :length, :length], rendered[i], ranks))

            with _watched(modules, reduce):
                reader.read(ids)
            progress(start + len(rows), len(order), "attention on the task")
    values = {name: _stacked([[layer[n] for layer in each] for each in found]) for n, name in enumerate(names)}
    result = FocusResult(
        tuple(
            Focused(p.id, p.sha256, p.template or BARE, p.cluster, len(r.ids), len(r.task))
            for p, r in zip(prompts, rendered, strict=True)
        ),
        values,
        chat,
    )
    for name in names:
        if not all(value == value for value in result.of_prompts(name)):
            raise NumericalFailure(f"The measure '{name}' of {reader.name} ({model.dtype}) is not finite.")
    return result


def measure(maps: Tensor, rendered: Rendered, ranks: bool = False) -> Tensor:
    """The measures of one layer: maps (heads, T, T) -> (measures, heads), in fp32.

    >>> flat = torch.ones(1, 4, 4).tril() / torch.arange(1, 5)[:, None]  # uniform attention
    >>> [round(float(x), 3) for x in measure(flat, Rendered((5, 6, 7, 8), task=(1, 2), template=(0, 3)))]
    [0.5, 1.0, 0.583, 1.0, 1.0, 1.0]
    """
    maps = maps.float()
    length = maps.shape[-1]
    task = torch.tensor(rendered.task, device=maps.device)
    seen = torch.arange(1, length + 1, device=maps.device)
    last = maps[:, -1, task].sum(-1)
    within = maps[:, task][:, :, task].sum(-1).mean(-1)
    even_within = (torch.arange(1, len(task) + 1, device=maps.device) / seen[task]).mean()
    whole = _entropy(maps)
    entropy = (whole[:, 1:] / seen[1:].log2()).mean(-1)
    no_sink = (_entropy(maps[:, 2:, 1:]) / seen[1:-1].log2()).mean(-1)
    found = [last, last * length / len(task), within, within / even_within, entropy, no_sink]
    if ranks:
        order = maps.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=maps.device).expand_as(order))
        rank = rank.masked_fill(maps == 0, 0).float()
        template = torch.tensor([i for i in range(length) if i not in set(rendered.task)], device=maps.device).long()
        for rows in (task, template):
            found.append(rank[:, rows][:, :, rows].sum((-1, -2)))
        found += [rank[:, -1, task].sum(-1), whole.mean(-1)]
    return torch.stack(found).cpu()


def compare_focus(dense: FocusResult, pruned: FocusResult) -> FocusShift:
    """How pruning moved the measures, prompt by prompt.

    Raises:
        UsageError: the two are over different prompts, or one with and one without the chat template.
    """
    if dense.chat != pruned.chat:
        raise UsageError("Focus with and without the chat template cannot be compared: measure both alike.")
    check_same([(p.prompt, p.sha256) for p in dense.prompts], [(p.prompt, p.sha256) for p in pruned.prompts])
    clusters = [each.cluster for each in dense.prompts]
    templates = list(dict.fromkeys(each.template for each in dense.prompts))
    overall, changes = {}, []
    for name in (name for name in dense.values if name in pruned.values):
        moved = [b - a for a, b in zip(dense.of_prompts(name), pruned.of_prompts(name), strict=True)]
        overall[name] = cluster_mean(moved, clusters)
        rows = []
        for template in templates:
            at = [i for i, each in enumerate(dense.prompts) if each.template == template]
            values, tasks = [moved[i] for i in at], [clusters[i] for i in at]
            rows.append((template, cluster_mean(values, tasks), signed_rank(values, tasks)))
        corrected = holm([p for *_, p in rows])
        changes += [FocusChange(name, *row, corrected[i]) for i, row in enumerate(rows)]
    return FocusShift(overall, tuple(changes))


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """The model with its plain attention, which computes the maps; what it had is put back afterwards."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [(config, getattr(config, "_attn_implementation_internal", None)) for config in configs.values()]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in before:
            if hasattr(config, "_attn_implementation_internal"):
                config._attn_implementation_internal = implementation


def _attention(reader: Reader, ids: Tensor) -> list[nn.Module]:
    """The modules that return attention maps beside their output; of nested ones the innermost."""
    maps: dict[int, tuple[Tensor, nn.Module]] = {}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        found = _maps(output, ids.shape[1])
        if found is not None:
            maps.setdefault(id(found), (found, module))  # an inner module returns first

    with ExitStack() as hooks:
        for module in reader.model.modules():
            hooks.callback(module.register_forward_hook(look).remove)
        reader.read(ids)
    if not maps:
        raise UsageError(
            f"{reader.name} gives no attention maps, neither by itself nor with attn_implementation='eager': "
            "focus needs a model with attention layers."
        )
    return list(dict.fromkeys(module for _, module in maps.values()))


@contextmanager
def _watched(modules: Sequence[nn.Module], reduce: Any) -> Iterator[None]:
    def take(_: nn.Module, __: Any, output: Any) -> None:
        found = _maps(output)
        assert found is not None
        reduce(found)

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            hooks.callback(module.register_forward_hook(take).remove)
        yield


def _maps(output: Any, length: int | None = None) -> Tensor | None:
    """The (batch, heads, T, T) among what a module returns."""
    for each in output if isinstance(output, tuple) else ():
        if not isinstance(each, Tensor) or each.dim() != 4 or each.shape[2] != each.shape[3]:
            continue
        if length is None or each.shape[3] == length:
            return each
    return None


def _entropy(maps: Tensor) -> Tensor:
    """In bits, over the last dimension, scaled to sum to 1 first."""
    p = maps / maps.sum(-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    return -torch.xlogy(p, p).sum(-1) / torch.log(torch.tensor(2.0))


def _stacked(found: Sequence[Sequence[Tensor]]) -> Tensor:
    """(prompts, layers, heads), padded with NaN where layers have unlike numbers of heads."""
    heads = max(len(layer) for each in found for layer in each)
    padded = [[nn.functional.pad(layer, (0, heads - len(layer)), value=torch.nan) for layer in each] for each in found]
    return torch.stack([torch.stack(each) for each in padded])


def _known(layer: Tensor) -> list[float | None]:
    return [None if value != value else value for value in layer.tolist()]

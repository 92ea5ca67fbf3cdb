"""Generation probes: what both models write after the same few prompts, side by side.

Greedy decoding, so that a model gives one answer and any difference comes from the cut. A probe shows what the
means hide, loops for example; it measures nothing: at the first token that differs the two read different texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from secateur.errors import UsageError, check_whole
from secateur.models.fetch import quiet
from secateur.progress import Progress, silent
from secateur.walk import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 48


class Prompt(NamedTuple):
    """A text to go on with, or with `chat` a message to answer, through the chat template."""

    text: str
    chat: bool = False


PROMPTS = (
    Prompt("The capital of France is"),
    Prompt("Water boils when"),
    Prompt("Once upon a time there was an old gardener who"),
    Prompt("def mean(numbers):\n"),
    Prompt("Why is the sky blue?", chat=True),
    Prompt("Name three uses of a brick.", chat=True),
    Prompt("Write a short poem about autumn.", chat=True),
)


@dataclass(frozen=True)
class Probe:
    """One prompt and what each model wrote after it.

    first_difference: how many tokens are the same at the beginning; None if all are.
    dense_tokens, pruned_tokens: how many were written.
    """

    prompt: str
    chat: bool
    dense: str
    pruned: str
    first_difference: int | None
    dense_tokens: int
    pruned_tokens: int


@dataclass(frozen=True)
class Generation:
    """Probes, at most `tokens` tokens each, and the prompts left out with the reason."""

    probes: tuple[Probe, ...]
    tokens: int
    left_out: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        apart = sorted(p.first_difference for p in self.probes if p.first_difference is not None)
        alike = f"{len(self.probes) - len(apart)} of {len(self.probes)} prompts continued alike"
        if not apart:
            return f"{alike}, {self.tokens} tokens each"
        return f"{alike}; the others differ after {apart[0]} to {apart[-1]} of {self.tokens} tokens"


@dataclass(frozen=True)
class Continuations:
    """What one model wrote, for `generation`: each prompt's token ids and their text."""

    prompts: tuple[Prompt, ...]
    tokens: int
    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]


def generation(
    model: PreTrainedModel,
    dense: PreTrainedModel | Continuations,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[Prompt] = PROMPTS,
    tokens: int = TOKENS,
    progress: Progress = silent,
) -> Generation:
    """Let both models go on with each prompt, greedily.

    Args:
        model: the pruned model, causal.
        dense: the model before pruning, or its `continuations`, which are then not written again.
        tokenizer: that of both. Without a chat template, chat prompts are left out.
        prompts: what to go on with.
        tokens: at most so many each.
        progress: called with prompts done and in all.

    Returns:
        A `Generation`.

    Raises:
        UsageError: a model does not generate, or no prompt can be used; the continuations are of other prompts.
        InvalidParameter: tokens below 1.

    >>> import transformers, tokenizers
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cut": 1, "?": 2}, unk_token="?"))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=3, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=None))
    >>> found = generation(model, model, tokenizer, prompts=[Prompt("the cut")], tokens=5)
    >>> print(found)
    1 of 1 prompts continued alike, 5 tokens each
    """
    if not isinstance(dense, Continuations):
        dense = continuations(dense, tokenizer, prompts=prompts, tokens=tokens, progress=progress)
    own = continuations(model, tokenizer, prompts=prompts, tokens=tokens, progress=progress)
    if (own.prompts, own.tokens) != (dense.prompts, dense.tokens):
        raise UsageError(
            f"The dense continuations are of {len(dense.prompts)} other prompts or of {dense.tokens} tokens, not of "
            f"these {len(own.prompts)} with {own.tokens}: make them anew."
        )
    both = zip(own.prompts, dense.ids, own.ids, dense.texts, own.texts, strict=True)
    probes = (
        Probe(prompt.text, prompt.chat, before, after, _first_difference(theirs, ours), len(theirs), len(ours))
        for prompt, theirs, ours, before, after in both
    )
    return Generation(tuple(probes), tokens, own.left_out)


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[Prompt] = PROMPTS,
    tokens: int = TOKENS,
    progress: Progress = silent,
) -> Continuations:
    """What one model writes after each prompt; the arguments and errors of `generation`."""
    from secateur.data.calibration import sequence_length

    check_whole("tokens", "generation", tokens)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UsageError(f"Generation needs a causal language model; {type(model).__name__} is not one.")
    room = sequence_length(tokenizer, model)
    used: list[tuple[Prompt, tuple[int, ...]]] = []
    left_out: list[tuple[str, str]] = []
    for done, prompt in enumerate(prompts, 1):
        start = _encode(tokenizer, prompt)
        if isinstance(start, str):
            left_out.append((prompt.text, start))
        elif not 0 < start.shape[1] < room:
            left_out.append((prompt.text, f"{start.shape[1]} tokens, and there is room for {room}"))
        else:
            used.append((prompt, _go_on(model, tokenizer, start, min(tokens, room - start.shape[1]))))
        progress(done, len(prompts), "continuing prompts")
    if not used:
        reasons = "; ".join(dict.fromkeys(reason for _, reason in left_out)) or "none was given"
        raise UsageError(f"Generation has no prompt that it can use: {reasons}.")
    texts = tuple(_text(tokenizer, ids) for _, ids in used)
    return Continuations(
        tuple(prompt for prompt, _ in used), tokens, tuple(ids for _, ids in used), texts, tuple(left_out)
    )


def _encode(tokenizer: Any, prompt: Prompt) -> Tensor | str:
    """ids (1, length), or why there are none."""
    text = prompt.text
    if prompt.chat:
        if not tokenizer.chat_template:
            return "no chat template"
        from secateur.data.chat import DATE

        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, date_string=DATE)
    ids: Tensor = tokenizer(text, add_special_tokens=not prompt.chat, return_tensors="pt")["input_ids"]
    return ids.long()


def _go_on(model: Any, tokenizer: Any, start: Tensor, tokens: int) -> tuple[int, ...]:
    start = start.to(model.get_input_embeddings().weight.device)
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(token for token in known if token is not None)
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    quietly = {"temperature": None, "top_p": None, "top_k": None}  # of the model's own settings, for sampling
    with evaluating(model), torch.no_grad(), quiet("transformers"):
        written = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=tokens,
            pad_token_id=padding,
            **greedy,
            **quietly,
        )
    return tuple(written[0, start.shape[1] :].tolist())


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """
    >>> _first_difference([1, 2, 3], [1, 2, 4]), _first_difference([1, 2], [1, 2, 3]), _first_difference([1], [1])
    (2, 2, None)
    """
    if tuple(a) == tuple(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

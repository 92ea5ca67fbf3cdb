"""A prompt as the model reads it: rendered by the chat template, as token ids, and where the task is in it.

Positions come from the characters of `Prompt.span` and the tokenizer's offsets, so that nothing depends on how a
tokenizer cuts words: a token belongs to the task if it covers any of the task's characters.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.data.chat import through_template
from secateur.errors import UsageError
from secateur.safety.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """ids: what the model reads. task: positions of the task's tokens. template: those of the rest of the request.

    Tokens of the chat template itself (roles, a system prompt) are in neither.
    """

    ids: tuple[int, ...]
    task: tuple[int, ...]
    template: tuple[int, ...]


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool = True) -> Rendered:
    """The prompt up to where the model would answer.

    Args:
        tokenizer: a fast one, with offsets.
        prompt: with a span, or without a template (then all of it is the task).
        chat: through the chat template; False reads the bare text, as the published code does.

    Raises:
        UsageError: no chat template, or one that changes the text; no offsets; no span; an empty task.
    """
    text = as_text(tokenizer, prompt) if chat else prompt.text
    begin = text.rfind(prompt.text)
    body = prompt.text
    if begin < 0:  # templates trim what they are given
        body = prompt.text.strip()
        begin = text.rfind(body)
        if begin < 0:
            raise UsageError(
                f"The chat template of this model changes the text of prompt '{prompt.id}': use chat=False."
            )
    trimmed = len(prompt.text) - len(prompt.text.lstrip()) if body != prompt.text else 0
    if prompt.span is None and prompt.template is not None:
        raise UsageError(f"Prompt '{prompt.id}' has a template and no span: where its task is must be known.")
    start, end = prompt.span or (0, len(prompt.text))
    if not 0 <= start < end <= len(prompt.text):
        raise UsageError(
            f"The span of prompt '{prompt.id}' must lie in its {len(prompt.text)} characters; got {prompt.span}."
        )
    ids, offsets = _encoded(tokenizer, text, special=not chat)
    shift = begin - trimmed
    task = [i for i, (a, b) in enumerate(offsets) if max(a, start + shift) < min(b, end + shift)]
    request = [i for i, (a, b) in enumerate(offsets) if max(a, begin) < min(b, begin + len(body))]
    if not task:
        raise UsageError(f"The task of prompt '{prompt.id}' has no token of its own.")
    return Rendered(tuple(ids), tuple(task), tuple(i for i in request if i not in set(task)))


def as_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, opening: str | None = None) -> str:
    """The conversation as one string up to the answer, or up to the end of an answer that begins with `opening`.

    Raises:
        UsageError: no chat template, or one that refuses the conversation.
    """
    turns = [*prompt.turns]
    if opening is not None:  # the template writes what stands before an answer, a space in Llama-2's
        turns.append(("assistant", opening))
    text = through_template(tokenizer, turns, f"the prompt '{prompt.id}'", "use a chat model", asking=opening is None)
    if opening is None:
        return text
    end = text.rfind(opening)
    if end < 0:
        raise UsageError(f"The chat template of this model changes an answer that begins with '{opening}'.")
    return text[: end + len(opening)]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> tuple[int, ...]:
    """ids of a text that is rendered already: no second BOS unless `special`."""
    found = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
    return tuple(found)


@functools.lru_cache(maxsize=4)
def offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[tuple[int, int], ...]:
    """Which characters [start, end) each token of a text covers; kept for the next call.

    Raises:
        UsageError: no fast tokenizer.
    """
    return tuple(_encoded(tokenizer, text, special=False)[1])


def check_prompts(prompts: Sequence[Prompt], owner: str) -> None:
    """Raises UsageError: there is no prompt, or two have one id."""
    if not prompts:
        raise UsageError(f"There are no prompts for {owner}: give at least one.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise UsageError(f"Two prompts have the id '{prompt.id}': ids must differ.")
        seen.add(prompt.id)


def check_room(model: Any, lengths: Mapping[str, int]) -> None:
    """lengths: tokens by prompt. Raises UsageError: one is longer than the model's positions."""
    room = getattr(model.config, "max_position_embeddings", None)
    longest = max(lengths, key=lambda id: lengths[id])
    if isinstance(room, int) and 0 < room < lengths[longest]:
        raise UsageError(
            f"Prompt '{longest}' has {lengths[longest]} tokens, and {type(model).__name__} reads at most {room}: "
            "leave it out."
        )


def _encoded(tokenizer: Any, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"Finding the task needs a fast tokenizer, with offsets; {type(tokenizer).__name__} is not one."
        )
    found = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False, return_offsets_mapping=True)
    return found["input_ids"], found["offset_mapping"]

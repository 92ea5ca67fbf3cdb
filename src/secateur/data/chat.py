"""From conversations to token ids, as a chat model meets them in use.

Each conversation is one row that starts at its own beginning: nothing is packed, so no answer is read behind
another conversation, and rows of unlike length are padded on the right with a mask. Calibration takes whole
conversations in a seeded order until n x seqlen tokens are full and cuts the last one there, so that it can be
compared, token for token, with n windows of a book.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LoadFailure, TextTooShort, UsageError
from ..models.fetch import one_line
from ..progress import Progress, silent
from .calibration import Calibration, Windows, check_integer, check_vocabulary, ids_sha256, sequence_length
from .instructions import Instructions, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = "26 Jul 2024"  # for templates that write the day of use: the same ids tomorrow
EVERY = 64  # conversations between two words about progress


class Encoded(NamedTuple):
    """A conversation's ids (tokens,) int64, and which of them belong to a response."""

    ids: Tensor
    response: Tensor


def encode(
    tokenizer: PreTrainedTokenizerBase, text: Instructions, *, limit: int | None = None, progress: Progress = silent
) -> list[Encoded]:
    """The ids of the first `limit` conversations, rendered by the template.

    A response reaches from the end of what the model is given to answer to, up to and with its end-of-turn
    token; white space that the template puts behind that is left out of the last turn.

    Raises:
        UsageError: the tokenizer has no chat template, or the template refuses a conversation.
    """
    chosen = text.conversations[:limit]
    encoded = []
    for done, conversation in enumerate(chosen, 1):
        encoded.append(_encode(tokenizer, conversation, text))
        if done % EVERY == 0 or done == len(chosen):
            progress(done, len(chosen), f"tokenising {text.name}")
    return encoded


def chat_calibration(
    tokenizer: PreTrainedTokenizerBase,
    text: Instructions,
    n: int,
    seqlen: int | None,
    seed: int,
    *,
    model: Any = None,
    progress: Progress = silent,
) -> Calibration:
    """Conversations of n x seqlen tokens in all, at most seqlen each; see `secateur.calibration`.

    Rows are ordered by length, so that micro-batches hold little padding.
    """
    length = sequence_length(tokenizer, model, seqlen)
    encoded = [one.ids for one in encode(tokenizer, text, progress=progress)]
    check_vocabulary(torch.cat(encoded), tokenizer, model)
    usable = sum(min(len(ids), length) for ids in encoded)
    budget = n * length
    if usable < budget:
        fit = usable // length
        cures = [f"ask for at most {fit} samples"] if fit else []
        raise TextTooShort(
            f"The {len(encoded)} conversations of '{text.name}' ({text.split}) have {usable} tokens, counting at "
            f"most {length} of each, not {n} x {length} = {budget}: "
            f"{', or '.join([*cures, 'ask for a shorter seqlen', 'give more conversations'])}."
        )
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    cut, left = 0, budget
    for index in torch.randperm(len(encoded), generator=generator, device="cpu").tolist():
        row = encoded[index][: min(length, left)]
        cut += len(row) < len(encoded[index])
        rows.append(row)
        left -= len(row)
        if not left:
            break
    rows.sort(key=len, reverse=True)
    ids, mask = _padded(tokenizer, rows)
    record = {
        "text": text.name,
        "split": text.split,
        "samples": n,
        "seqlen": length,
        "seed": seed,
        "sha256": ids_sha256(ids.masked_fill(~mask, -1)),
        "text_sha256": text.sha256,
        "source": text.source,
        "shared": text.shared,
        "tokenizer": {"class": type(tokenizer).__name__, "vocabulary": len(tokenizer)},
        "tokens_available": usable,
        "conversations": len(rows),
        "tokens": budget,
        "conversations_cut": cut,
        "records_left_out": text.left_out,
        "template": _template_record(tokenizer, text),
        "how": (
            f"{len(rows)} of {len(encoded)} conversations, in the order of a seeded permutation until {n} x {length} "
            f"tokens are full, each from its beginning and {cut} of them cut; one a row, longest first, padding masked"
        ),
    }
    return Calibration(ids, record, mask)


def chat_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Instructions,
    seqlen: int,
    limit: int | None = None,
    *,
    model: Any = None,
    progress: Progress = silent,
) -> Windows:
    """One row for each of the first `limit` conversations, cut to seqlen tokens; which tokens count is told.

    A conversation whose question alone fills seqlen has nothing to count and is left out.

    Raises:
        TextTooShort: no conversation has a token to count.
    """
    if limit is not None:
        check_integer("limit", "windows", limit, 1)
    length = sequence_length(tokenizer, model, seqlen)
    encoded = encode(tokenizer, text, limit=limit, progress=progress)
    every = text.counted == "all"
    cut = [(ids[:length], (torch.ones_like(response) if every else response)[:length]) for ids, response in encoded]
    useful = [(ids, counted) for ids, counted in cut if bool(counted[1:].any())]
    if not useful:
        raise TextTooShort(
            f"No response of the {len(encoded)} conversations of '{text.name}' ({text.split}) begins within "
            f"{length} tokens: ask for a longer seqlen."
        )
    ids, mask = _padded(tokenizer, [row for row, _ in useful])
    counted = torch.nn.utils.rnn.pad_sequence([row for _, row in useful], batch_first=True)
    check_vocabulary(ids[mask], tokenizer, model)
    return Windows(
        ids,
        text.name,
        text.split,
        text.sha256,
        ids_sha256(ids.masked_fill(~mask, -1)),
        int(mask.sum()),
        mask,
        counted,
    )


def _encode(tokenizer: Any, conversation: Sequence[Message], text: Instructions) -> Encoded:
    whole = _ids(tokenizer, _render(tokenizer, conversation, text).rstrip())
    response = torch.zeros(len(whole), dtype=torch.bool)
    for turn, (role, _) in enumerate(conversation):
        if role != "assistant":
            continue
        before = _ids(tokenizer, _render(tokenizer, conversation[:turn], text, asking=True))
        behind = _ids(tokenizer, _render(tokenizer, conversation[: turn + 1], text).rstrip())
        response[_common(before, whole) : _common(behind, whole)] = True
    return Encoded(torch.tensor(whole, dtype=torch.int64), response)


def _common(a: list[int], b: list[int]) -> int:
    """How many ids at the beginning are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ids(tokenizer: Any, rendered: str) -> list[int]:
    ids: list[int] = tokenizer(rendered, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _render(tokenizer: Any, conversation: Sequence[Message], text: Instructions, asking: bool = False) -> str:
    """One string; `asking` adds what stands before an answer."""
    if text.template == "plain":
        return "\n\n".join(content for _, content in conversation) + ("\n\n" if asking else "")
    otherwise = "use a chat model, or render it plainly with --template plain"
    return through_template(tokenizer, conversation, f"'{text.name}'", otherwise, asking=asking)


def through_template(
    tokenizer: Any, turns: Sequence[tuple[str, str]], what: str, otherwise: str, *, asking: bool = True
) -> str:
    """A conversation, given as roles and contents, as one string in the model's own form.

    Args:
        what, otherwise: what is rendered, and what to do where it cannot be, for the messages.
        asking: adds what stands before an answer.

    Raises:
        UsageError: there is no chat template, or it refuses these roles. LoadFailure: jinja2 is missing.
    """
    if not tokenizer.chat_template:
        raise UsageError(f"The tokenizer of this model has no chat template, which {what} needs: {otherwise}.")
    try:
        import jinja2
    except ImportError as error:
        raise LoadFailure("Chat templates need the package 'jinja2': pip install jinja2.") from error
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asking, date_string=DATE
        )
    except jinja2.TemplateError as error:
        raise UsageError(
            f"The chat template of this model refuses {what} with the roles {', '.join(role for role, _ in turns)} "
            f"({one_line(error)}): {otherwise}."
        ) from error
    return text


def _padded(tokenizer: Any, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of unlike length -> ids (n, longest) and mask, True = a token."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(token for token in known if token is not None)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def _template_record(tokenizer: Any, text: Instructions) -> dict[str, str]:
    if text.template == "plain":
        return {"name": "plain"}
    return {"name": "chat", "sha256": hashlib.sha256(str(tokenizer.chat_template).encode("utf-8")).hexdigest()}

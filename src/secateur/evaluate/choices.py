"""How probable endings are behind their contexts, computed once per shared beginning.

A request is a row of token ids whose last few are scored: sum_t log p(id_t | ids before t). The requests of one
question differ only at their ends (four endings of a story) or from a name on. So they are bundled, and what a
bundle shares runs once: its keys and values are kept, and the ends run behind them. Bundles run together when
the shared beginnings, cut to the shortest of them, make a rectangle: nothing is padded on the left, so that
positions and masks are the model's own. Requests with the same ids up to the last (yes and no) are one.

Only the positions that are scored go through the head, and log-probabilities are fp32 whatever the model is.
Models that keep anything but plain keys and values (windows, states), or whose body and head do not come apart,
run every request whole. `Choices` finds out by trying, on the first request, and compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.errors import NumericalFailure, UsageError
from secateur.evaluate.logits import Reader, returning
from secateur.progress import Progress, silent
from secateur.walk import evaluating

CHUNK = 2**23  # logits at a time: 32 MB in fp32
LEAST_SHARED = 8  # tokens that a bundle must share to be worth its second pass


@dataclass(frozen=True)
class Request:
    """ids: the whole row; the last `scored` of them are scored, given all before."""

    ids: tuple[int, ...]
    scored: int

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads: the last id is only predicted."""
        return self.ids[:-1]


@dataclass(frozen=True)
class Row:
    """A row to read and whom it answers: numbers of requests that share it."""

    read: tuple[int, ...]
    requests: tuple[int, ...]
    first: int  # the first position whose prediction is needed


@dataclass(frozen=True)
class Bundle:
    """Rows with a common beginning of `shared` tokens, before which nothing is scored."""

    rows: tuple[Row, ...]
    shared: int


class Choices:
    """Scores requests with one model.

    model: causal, on any device, in any dtype.

    Raises:
        UsageError: the model is no causal language model, or does not know the ids.
    """

    def __init__(self, model: Any, sample: Sequence[int]) -> None:
        """sample: a few ids of what will be scored, two or more, to try the model on."""
        ids = torch.tensor([list(sample)])
        self.model = model
        self.reader = Reader(model, ids)
        if self.reader.direction != "causal":
            raise UsageError(f"Tasks need a causal language model; {self.reader.name} looks both ways.")
        # transformers has renamed it: what a model returns and takes as its kept keys and values
        takes = inspect.signature(self.reader.body.forward).parameters if self.reader.body is not None else {}
        self.kept = next((name for name in ("cache", "past_key_values") if name in takes), "")
        with evaluating(model):
            self.shares = self.reader.body is not None and self._can_share(ids.to(self.reader.device))

    def score(
        self, requests: Sequence[Request], batch_size: int, *, progress: Progress = silent
    ) -> list[tuple[float, bool]]:
        """For each request, the log-probability of its scored ids and whether they are the likeliest at each place.

        Args:
            requests: in the order in which those of one question stand together.
            batch_size: requests in one forward pass.
            progress: told the requests done.

        Raises:
            NumericalFailure: a log-probability is not finite.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        with evaluating(self.model), torch.no_grad():
            for bundles in batches(bundled(requests, self.shares), batch_size):
                numbers, values, greedy = self._run(requests, bundles)
                if not bool(values.isfinite().all()):
                    raise NumericalFailure(
                        f"{self.reader.name} ({self.model.dtype}) gives a log-probability that is not finite; "
                        "if the weights are finite, try another dtype."
                    )
                for number, value, best in zip(numbers, values.tolist(), greedy.tolist(), strict=True):
                    answers[number] = (value, best)
                done += len(numbers)
                progress(done, len(requests), "zero-shot tasks")
        return answers

    def _run(self, requests: Sequence[Request], bundles: Sequence[Bundle]) -> tuple[list[int], Tensor, Tensor]:
        """One batch: numbers of requests, their log-probabilities and whether each is greedy."""
        shared = min(bundle.shared for bundle in bundles)
        rows = [row for bundle in bundles for row in bundle.rows]
        cache = None
        if shared:
            begin = torch.tensor([bundle.rows[0].read[:shared] for bundle in bundles], device=self.reader.device)
            cache = self._body(begin, use_cache=True)[self.kept]
            owner = [i for i, bundle in enumerate(bundles) for _ in bundle.rows]
            cache.batch_select_indices(torch.tensor(owner, device=self.reader.device))
        ids = torch.zeros(len(rows), max(len(row.read) for row in rows) - shared, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row.read) - shared] = torch.tensor(row.read[shared:])
        ids = ids.to(self.reader.device)

        asked = [(i, number) for i, row in enumerate(rows) for number in row.requests]
        places: list[tuple[int, int]] = []
        targets: list[int] = []
        owners: list[int] = []
        for n, (i, number) in enumerate(asked):
            request = requests[number]
            start = len(request.ids) - request.scored
            places += [(i, t - 1 - shared) for t in range(start, len(request.ids))]
            targets += request.ids[start:]
            owners += [n] * request.scored
        at = torch.tensor(places, device=ids.device).unbind(1)
        found, best = self._predict(ids, cache, at, torch.tensor(targets, device=ids.device))
        owner_of = torch.tensor(owners)
        sums = torch.zeros(len(asked), dtype=torch.float64).index_add_(0, owner_of, found.double().cpu())
        misses = torch.zeros(len(asked), dtype=torch.long).index_add_(0, owner_of, (~best).long().cpu())
        return [number for _, number in asked], sums, misses == 0

    def _predict(self, ids: Tensor, cache: Any, at: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        """log p of targets (places,) at positions `at` of ids (rows, length), and whether each is the likeliest."""
        body = self.reader.body
        if body is None:
            logits = self.model(input_ids=ids, use_cache=False, return_dict=True).logits[at]
            return _log_p(logits, targets)
        kept = {} if cache is None else {self.kept: cache}
        output = self._body(ids, use_cache=cache is not None, **kept)
        hidden = output.last_hidden_state[at]
        step = max(1, CHUNK // self.reader.vocabulary)
        parts = []
        for begin in range(0, len(targets), step):
            part = slice(begin, begin + step)
            output["last_hidden_state"] = hidden[None, part]
            with returning(body, output):
                logits = self.model(input_ids=targets[None, part], use_cache=False, return_dict=True).logits[0]
            parts.append(_log_p(logits, targets[part]))
        values, best = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(best)

    def _body(self, ids: Tensor, **options: Any) -> Any:
        assert self.reader.body is not None
        return self.reader.body(input_ids=ids, return_dict=True, **options)

    def _can_share(self, ids: Tensor) -> bool:
        """Whether the ends of rows can run behind kept keys and values of their beginnings, by trying."""
        cut = ids.shape[1] // 2
        if not cut or not self.kept:
            return False
        with torch.no_grad():
            cache = self._body(ids[:, :cut], use_cache=True).get(self.kept)
            layers = getattr(cache, "layers", None) or [None]
            if any(type(layer).__name__ != "DynamicLayer" for layer in layers):
                return False
            cache.batch_select_indices(torch.tensor([0, 0], device=ids.device))
            ends = ids[:, cut:].repeat(2, 1)
            behind = self._body(ends, **{self.kept: cache}, use_cache=True).last_hidden_state
            whole = self._body(ids, use_cache=False).last_hidden_state[:, cut:]
        tolerance = min(1000 * torch.finfo(whole.dtype).eps, 0.05)
        return bool((behind[1:].double() - whole).norm() <= tolerance * whole.double().norm())


def _log_p(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    return chosen - logits.logsumexp(-1), logits.argmax(-1) == targets


def bundled(requests: Sequence[Request], share: bool = True) -> list[Bundle]:
    """Requests that stand together and begin alike, as bundles; without `share` each row is by itself.

    >>> tail = tuple(range(20))
    >>> [(len(b.rows), b.shared) for b in bundled([Request((*tail, 30, 31), 2), Request((*tail, 40), 1)])]
    [(2, 19)]
    >>> [b.rows[0].requests for b in bundled([Request((*tail, 30), 1), Request((*tail, 40), 1)])]
    [(0, 1)]
    """
    found: list[Bundle] = []
    group: list[int] = []
    shared = 0
    for number, request in enumerate(requests):
        if group:
            common = min(shared, _common(requests[group[0]].read, request.read))
            if share and common >= LEAST_SHARED and 2 * common >= shared:
                group, shared = [*group, number], common
                continue
            found += _closed(requests, group, shared)
        group, shared = [number], len(request.read)
    return found + _closed(requests, group, shared)


def _closed(requests: Sequence[Request], group: list[int], shared: int) -> list[Bundle]:
    rows: dict[tuple[int, ...], list[int]] = {}
    for number in group:
        rows.setdefault(requests[number].read, []).append(number)
    made = tuple(
        Row(read, tuple(numbers), min(len(requests[n].ids) - requests[n].scored - 1 for n in numbers))
        for read, numbers in rows.items()
    )
    if len(made) == 1:
        return [Bundle(made, 0)]
    shared = min(shared, *(row.first for row in made))
    return [Bundle(made, shared)] if shared >= LEAST_SHARED else [Bundle((row,), 0) for row in made]


def batches(bundles: Sequence[Bundle], batch_size: int) -> Iterator[list[Bundle]]:
    """Bundles of like lengths together, at most `batch_size` rows unless one bundle has more; the longest first."""

    def size(bundle: Bundle) -> tuple[bool, int, int]:
        return bundle.shared > 0, bundle.shared // 16, max(len(row.read) for row in bundle.rows)

    batch: list[Bundle] = []
    for bundle in sorted(bundles, key=size, reverse=True):
        rows = sum(len(each.rows) for each in batch) + len(bundle.rows)
        if batch and (rows > batch_size or (bundle.shared > 0) != (batch[0].shared > 0)):
            yield batch
            batch = []
        batch.append(bundle)
    if batch:
        yield batch


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two rows begin with alike."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))

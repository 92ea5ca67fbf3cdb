"""Log-probabilities of endings: against one plain forward pass per request, on every family."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from small_models import CAUSAL, tiny, tiny_bert, tiny_t5

from secateur.errors import NumericalFailure, UsageError
from secateur.evaluate.choices import LEAST_SHARED, Choices, Request, batches, bundled


def naive(model, request):
    """The definition, in fp32."""
    ids = torch.tensor([request.ids])
    with torch.no_grad():
        log_p = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    places = range(len(request.ids) - request.scored, len(request.ids))
    value = sum(float(log_p[t - 1, request.ids[t]]) for t in places)
    return value, all(int(log_p[t - 1].argmax()) == request.ids[t] for t in places)


@pytest.fixture(scope="module")
def requests():
    """Questions as tasks make them: endings of several lengths, one-token endings, contexts that differ."""
    draw = random.Random(0)

    def ids(n):
        return tuple(draw.choices(range(2, 61), k=n))

    found = []
    for length in (3, 9, 14, 20, 21, 30):
        context = ids(length)
        found += [Request((*context, *ids(k)), k) for k in (1, 4, 7, 2)]  # four endings
        found += [Request((*context, token), 1) for token in (5, 6)]  # yes and no
        ending = ids(5)
        found += [Request((*context, name, *ending), 5) for name in (8, 9)]  # a context per choice
    return found


@pytest.mark.parametrize("family", list(CAUSAL))
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_definition(family, batch_size, requests):
    model = tiny(family)
    scorer = Choices(model, requests[0].ids)
    found = scorer.score(requests, batch_size)
    expected = [naive(model, request) for request in requests]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in found]), torch.tensor([v for v, _ in expected]), rtol=1e-4, atol=1e-4
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_who_shares_beginnings():
    shares = {family: Choices(tiny(family), range(2, 18)).shares for family in CAUSAL}
    assert shares["Llama"] and shares["GPT2"] and shares["OPT"]
    assert not shares["Mamba"] and not shares["Gemma3"]


def test_sharing_changes_nothing_but_the_work(requests, monkeypatch):
    model = tiny("Llama")
    scorer = Choices(model, requests[0].ids)
    seen = []
    body = scorer.reader.body
    hook = body.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared = scorer.score(requests, 8)
    work, seen[:] = sum(seen), []
    scorer.shares = False
    plain = scorer.score(requests, 8)
    hook.remove()
    assert work < 0.7 * sum(seen)
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(plain), rtol=1e-5, atol=1e-5)


def test_greedy_is_found():
    model = tiny("Llama")
    context = tuple(range(2, 14))
    with torch.no_grad():
        best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    scored = Choices(model, context).score([Request((*context, token), 1) for token in range(61)], 16)
    assert [token for token, (_, greedy) in enumerate(scored) if greedy] == [best]


def test_the_model_keeps_its_modes_and_progress_reaches_the_end(requests):
    model = tiny("Llama").train()
    seen = []
    Choices(model, requests[0].ids).score(requests, 5, progress=lambda done, total, what: seen.append((done, total)))
    assert model.training and seen[-1] == (len(requests), len(requests))
    assert all(a[0] < b[0] for a, b in itertools.pairwise(seen))


def test_bundles_hold_every_request_once_and_begin_before_what_is_scored(requests):
    bundles = bundled(requests)
    assert sorted(n for bundle in bundles for row in bundle.rows for n in row.requests) == list(range(len(requests)))
    assert any(bundle.shared for bundle in bundles)
    for bundle in bundles:
        beginnings = {row.read[: bundle.shared] for row in bundle.rows}
        assert len(beginnings) == 1
        assert bundle.shared == 0 or bundle.shared >= LEAST_SHARED
        for row in bundle.rows:
            for n in row.requests:
                request = requests[n]
                assert row.read == request.read
                assert bundle.shared <= len(request.ids) - request.scored - 1


@pytest.mark.parametrize("size", [1, 4, 9, 1000])
def test_batches_hold_every_bundle_once_and_are_not_too_large(requests, size):
    bundles = bundled(requests)
    made = list(batches(bundles, size))
    assert sorted(map(id, bundles)) == sorted(id(bundle) for batch in made for bundle in batch)
    for batch in made:
        assert len(batch) == 1 or sum(len(bundle.rows) for bundle in batch) <= size
        assert len({bundle.shared > 0 for bundle in batch}) == 1


def test_models_that_cannot_answer():
    with pytest.raises(UsageError, match="looks both ways"):
        Choices(tiny_bert(), range(2, 18))
    with pytest.raises(UsageError, match="T5"):
        Choices(tiny_t5(), range(2, 18))


def test_what_is_not_finite_is_an_error():
    model = tiny("Llama")
    scorer = Choices(model, range(2, 18))
    with torch.no_grad():
        model.lm_head.weight[:] = torch.inf
    with pytest.raises(NumericalFailure, match="not finite"):
        scorer.score([Request((2, 3, 4), 1)], 1)

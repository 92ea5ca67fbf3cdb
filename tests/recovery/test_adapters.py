"""Adapters by their formulas: what a weight is in training, and after the merge."""

import pytest
import torch

from secateur.recovery.adapters import ADAPTERS

KINDS = sorted(ADAPTERS)


def weight(*stack):
    w = torch.randn(*stack, 6, 8)
    return w * (torch.rand_like(w) > 0.5)


def parts(*stack, rank=3):
    return {"A": torch.randn(*stack, rank, 8), "B": torch.randn(*stack, 6, rank)}


@pytest.mark.parametrize("stack", [(), (4,)], ids=["matrix", "experts"])
@pytest.mark.parametrize("name", KINDS)
def test_the_start_changes_nothing(name, stack):
    w = weight(*stack)
    started = ADAPTERS[name].start(w.shape, 3, torch.Generator().manual_seed(0))
    assert started["A"].shape == (*stack, 3, 8) and started["B"].shape == (*stack, 6, 3)
    assert torch.equal(ADAPTERS[name].weight(w, w != 0, started, 2.0), w)
    assert torch.equal(ADAPTERS[name].merge(w, w != 0, started, 2.0), w)


@pytest.mark.parametrize("name", KINDS)
def test_the_start_lets_every_component_learn_its_own_thing(name):
    """With A and B of equal entries, as ScaleLoRA was published, all components stay equal for ever."""
    w = weight()
    started = ADAPTERS[name].start(w.shape, 3, torch.Generator().manual_seed(0))
    learnt = {key: tensor.clone().requires_grad_() for key, tensor in started.items()}
    optimiser = torch.optim.SGD(learnt.values(), lr=0.1)
    target = torch.randn(6, 8)
    for _ in range(3):
        optimiser.zero_grad()
        (ADAPTERS[name].weight(w, w != 0, learnt, 2.0) - target).square().mean().backward()
        optimiser.step()
    assert torch.linalg.matrix_rank(learnt["B"].detach()) == 3


@pytest.mark.parametrize("stack", [(), (4,)], ids=["matrix", "experts"])
def test_formulas(stack):
    w, ab, s = weight(*stack), parts(*stack), 0.7
    keep = (w != 0).float()
    ba = torch.einsum("...or,...ri->...oi", ab["B"], ab["A"])
    wanted = {
        "masked": (w + s * keep * ba, w + s * keep * ba),
        "scaled": (w * ba, w * ba),
        "prune-at-merge": (w + s * ba, w + s * keep * ba),
    }
    assert sorted(wanted) == KINDS
    for name, (training, merged) in wanted.items():
        torch.testing.assert_close(ADAPTERS[name].weight(w, w != 0, ab, s), training)
        torch.testing.assert_close(ADAPTERS[name].merge(w, w != 0, ab, s), merged)
        assert (ADAPTERS[name].merge(w, w != 0, ab, s)[w == 0] == 0).all()


def test_only_prune_at_merge_changes_the_weight_at_the_merge():
    w, ab = weight(), parts()
    same = {
        name: torch.equal(kind.weight(w, w != 0, ab, 1.0), kind.merge(w, w != 0, ab, 1.0))
        for name, kind in ADAPTERS.items()
    }
    assert same == {"masked": True, "scaled": True, "prune-at-merge": False}

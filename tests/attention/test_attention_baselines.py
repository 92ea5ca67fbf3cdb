"""Baselines have the plan's density to the block; reports count what the masks really keep."""

import itertools

import pytest
import torch
from attention_seen import decoder, maps, observation, seen

from secateur.attention.baselines import random_plan, window_plan
from secateur.attention.density import pairs_of, plan_report
from secateur.attention.masking import make_plan
from secateur.attention.plan import Plan
from secateur.errors import InvalidParameter, UsageError


def pair_of_stacks(block=4):
    """A translation model's three kinds of attention, 20 tokens read and 12 written."""
    encoder, every = maps(4, 20, 20, causal=False)
    own, causal = maps(4, 12, 12, causal=True)
    cross, all_keys = maps(4, 12, 20, causal=False)
    return observation(
        seen("e", "encoder-self", encoder, every, block), seen("d", "decoder-self", own, causal, block),
        seen("c", "decoder-cross", cross, all_keys, block), block=block, length=20,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["toeplitz", "absolute", "hybrid"])
@pytest.mark.parametrize("baseline", [random_plan, window_plan])
@pytest.mark.parametrize("length", [48, 46])
def test_every_layer_has_the_blocks_of_the_plan(kind, baseline, length):
    given, _ = decoder(length=48)
    plan = make_plan(given, 0.5, kind=kind, band=1)
    other = baseline(plan, length=length)
    for name, mask in plan.sites.items():
        mine, theirs = mask.layout(length, length), other.sites[name].layout(length, length)
        assert mine.keep.sum() == theirs.keep.sum()
        if length == 48:
            assert mine.entries().sum() == theirs.entries().sum()
        assert theirs.keep.diagonal(dim1=1, dim2=2).all() and theirs.keep[:, :, 0].all()
    assert other.record["length"] == length


def test_window_is_the_nearest_blocks_and_alike_in_every_head():
    given, _ = decoder(length=48)
    other = window_plan(make_plan(given, 0.5))
    for mask in other.sites.values():
        keep = mask.layout(48, 48).keep
        counts = keep.sum((1, 2))
        widths = [int(keep[head, -1].flip(0).long().cumprod(0).sum()) for head in range(4)]
        assert max(widths) - min(widths) <= 1 and counts.max() - counts.min() <= 12
        far = mask.layout(96, 96).keep
        assert ((far[:, -1].sum(1) - torch.tensor(widths)).abs() <= 2).all()  # the window goes on, and the sink


def test_random_depends_on_the_seed_alone():
    given, _ = decoder(length=48)
    plan = make_plan(given, 0.5)
    torch.manual_seed(1)
    first = [mask.rows for mask in random_plan(plan, seed=3).sites.values()]
    torch.manual_seed(2)
    again = [mask.rows for mask in random_plan(plan, seed=3).sites.values()]
    other = [mask.rows for mask in random_plan(plan, seed=4).sites.values()]
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


@pytest.mark.parametrize("baseline", [random_plan, window_plan])
def test_a_sparsity_of_their_own(baseline):
    given, _ = decoder(length=48)
    other = baseline(make_plan(given, 0.2), sparsity=0.6)
    assert {int(mask.layout(48, 48).keep.sum()) for mask in other.sites.values()} == {312 - round(312 * 0.6)}
    with pytest.raises(InvalidParameter, match=r"\[0, 1\)"):
        baseline(make_plan(given, 0.2), sparsity=1)


@pytest.mark.parametrize("baseline", [random_plan, window_plan])
def test_three_kinds_of_attention(baseline):
    plan = make_plan(pair_of_stacks(), 0.4, band=1)
    sizes = {"e": (20, 20), "d": (12, 12), "c": (12, 20)}
    assert plan_report(plan).sizes == {name: list(size) for name, size in sizes.items()}
    own, asked = baseline(plan), baseline(plan, length=12, keys=20)
    for (name, mask), other in itertools.product(plan.sites.items(), (own, asked)):
        size = sizes[name]
        assert mask.layout(*size).keep.sum() == other.sites[name].layout(*size).keep.sum()
        assert other.sites["c"].layout(12, 20).keep[:, :, 0].all()


@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (13, 13), (14, 11), (9, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_of_blocks(queries, keys, causal):
    found = pairs_of(queries, keys, 4, causal)
    for r, c in itertools.product(range(found.shape[0]), range(found.shape[1])):
        many = sum(
            (j <= i or not causal)
            for i, j in itertools.product(range(4 * r, min(4 * r + 4, queries)), range(4 * c, min(4 * c + 4, keys)))
        )
        assert found[r, c] == many


@pytest.mark.parametrize("length", [20, 18])
def test_the_report_counts_entries(length):
    plan = make_plan(pair_of_stacks(block=2), 0.5, band=1, sites=("encoder-self", "cross"), extend="diagonal")
    found = plan_report(plan, length, keys=16)
    for name in ("e", "c"):
        queries, keys = length if name == "c" else 16, 16
        entries = plan.sites[name].layout(queries, keys).entries()
        density = found.sites[name]
        assert density.kept_pairs == entries.sum() and density.all_pairs == density.possible_pairs == 4 * queries * keys
        assert density.sparsity_effective == density.sparsity_paper == pytest.approx(1 - float(entries.float().mean()))
        coarse = entries.any(2).any(1).sum()  # 128 tokens are one block
        assert density.density_128 == float(coarse) / 4
    assert found.families["decoder-self"].sparsity_effective == 0 and "d" not in found.sites
    causal = length * (length + 1) // 2
    assert found.families["decoder-self"].sparsity_paper == pytest.approx(1 - causal / length**2)
    total = found.total
    assert total.possible_pairs == 4 * (16 * 16 + causal + 16 * length)
    assert total.kept_pairs == sum(found.sites[name].kept_pairs for name in "ec") + 4 * causal


def test_the_density_at_128_is_that_of_blocks_with_any_kept_part():
    given, _ = decoder(layers=1, length=32, block=1)
    plan = make_plan(given, 0.8, kind="absolute", sinks=0)
    mask = plan.sites["layers.0"]
    wide = Plan(plan.model_type, plan.architecture, plan.model_sites, {"layers.0": _scaled(mask)}, plan.record)
    found = plan_report(wide, 32 * 32)
    assert found.block == 32
    keep = mask.layout(32, 32).keep
    any_of = keep.view(4, 8, 4, 8, 4).any(4).any(2)
    assert found.total.density_128 == pytest.approx(float(any_of.sum()) / (4 * 36))
    assert found.total.density_block == pytest.approx(float(keep.sum()) / (4 * 528))
    assert found.heads["layers.0"] == pytest.approx((keep.sum((1, 2)) / 528).tolist())
    assert "of the blocks of 32 are computed" in str(found) and found.to_dict()["total"]["density_128"]


def _scaled(mask):
    from dataclasses import replace

    return replace(mask, block=32)


def test_a_length_must_be_known():
    given, _ = decoder()
    plan = make_plan(given, 0.3)
    bare = Plan(plan.model_type, plan.architecture, plan.model_sites, plan.sites)
    for function in (plan_report, window_plan, random_plan):
        with pytest.raises(UsageError, match="does not say at which length"):
            function(bare)
        with pytest.raises(InvalidParameter, match="'length'"):
            function(plan, length=0)

"""Masks from observed attention, against definitions written plainly."""

import itertools

import numpy as np
import pytest
import torch
from attention_seen import decoder, maps, observation, seen
from families import ids, make

from secateur.attention.apply import attached
from secateur.attention.masking import Masking, make_plan
from secateur.attention.observe import observe
from secateur.attention.plan import load_plan, save_plan
from secateur.attention.selection import above_percentile, drop_lowest
from secateur.errors import InvalidParameter, NumericalFailure, UnknownName, UsageError

HEADS, BLOCK, LENGTH = 4, 4, 24
ROWS = LENGTH // BLOCK


def causal_tiles():
    return [(r, c) for r in range(ROWS) for c in range(r + 1)]


def tile_score(found, head, r, c):
    """Mean attention per pair that may meet, of one block."""
    total, count = 0.0, 0
    for one in found:
        for i, j in itertools.product(range(r * BLOCK, (r + 1) * BLOCK), range(c * BLOCK, (c + 1) * BLOCK)):
            if j <= i:
                total += float(one[head, i, j])
                count += 1
    return total / count


def keep_of(plan, length=LENGTH):
    return {name: mask.layout(length, length).keep for name, mask in plan.sites.items()}


def members(pool, layers):
    """Lists of (layer, head) that share a threshold."""
    every = list(itertools.product(layers, range(HEADS)))
    key = {
        "head": lambda one: one, "kv_group": lambda one: (one[0], one[1] // 2), "layer": lambda one: one[0],
        "stack": lambda one: 0, "model": lambda one: 0,
    }[pool]  # fmt: skip
    groups = {}
    for one in every:
        groups.setdefault(key(one), []).append(one)
    return groups.values()


@pytest.mark.parametrize("pool", ["head", "kv_group", "layer", "stack", "model"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.61])
def test_absolute_drops_exactly_the_lowest_of_each_pool(pool, sparsity):
    given, whole = decoder()
    kept = keep_of(make_plan(given, sparsity, kind="absolute", pool=pool))
    for group in members(pool, whole):
        tiles = [(name, head, r, c) for name, head in group for r, c in causal_tiles()]
        drop = round(len(tiles) * sparsity)
        free = [one for one in tiles if one[2] != one[3] and one[3] != 0]
        lowest = sorted(free, key=lambda one: tile_score(whole[one[0]], *one[1:]))[:drop]
        gone = {one for one in tiles if not kept[one[0]][one[1], one[2], one[3]]}
        assert gone == set(lowest) and len(gone) == min(drop, len(free))


@pytest.mark.parametrize("pool", ["head", "layer", "model"])
@pytest.mark.parametrize(("sinks", "band"), [(1, 2), (0, 1), (2, 3)])
def test_toeplitz_keeps_the_distances_with_the_highest_mean(pool, sinks, band):
    given, whole = decoder()
    plan = make_plan(given, 0.4, pool=pool, sinks=sinks, band=band)
    for group in members(pool, whole):
        candidates = []
        for name, head in group:
            for d in range(band, ROWS):
                tiles = [(r, r - d) for r in range(d, ROWS) if r - d >= sinks]
                if tiles:
                    score = sum(tile_score(whole[name], head, r, c) for r, c in tiles) / len(tiles)
                    candidates.append((score, name, head, d, len(tiles)))
        budget, gone, dropped = round(0.4 * len(group) * len(causal_tiles())), 0, set()
        for _, name, head, d, size in sorted(candidates):
            if gone + size > budget:
                if gone + size - budget < budget - gone:
                    dropped.add((name, head, d))
                break
            gone += size
            dropped.add((name, head, d))
        for name, head in group:
            keep = plan.sites[name].layout(LENGTH, LENGTH).keep[head]
            for r, c in causal_tiles():
                expected = c < sinks or r - c < band or (name, head, r - c) not in dropped
                assert bool(keep[r, c]) == expected, (name, head, r, c)


def test_a_toeplitz_plan_comes_close_to_its_sparsity_and_goes_on():
    given, _ = decoder(layers=3, length=48)
    for sparsity in (0.2, 0.4, 0.6):
        plan = make_plan(given, sparsity, pool="model", band=1)
        kept = torch.cat(list(keep_of(plan, 48).values()))
        share = 1 - kept.sum() / (kept.shape[0] * 78)
        assert abs(float(share) - sparsity) < 6 / (12 * 78)  # half of the longest diagonal
    assert keep_of(plan, 96)["layers.0"].shape == (4, 24, 24)


def test_hybrid_is_absolute_first_and_toeplitz_behind():
    given, _ = decoder()
    plan = make_plan(given, 0.4, kind="hybrid", rows=3, band=1)
    for mask in plan.sites.values():
        assert mask.kind == "hybrid" and mask.rows.shape == (HEADS, 3, ROWS)
        keep = mask.layout(LENGTH, LENGTH).keep
        for r, c in causal_tiles():
            if r >= 3:
                expected = mask.offsets[:, r - c] | (torch.ones(HEADS, dtype=torch.bool) if c == 0 or r == c else False)
                assert torch.equal(keep[:, r, c], expected)
    kept = sum(int(keep.sum()) for keep in keep_of(plan).values())
    assert abs(kept - (168 - 67)) <= 4  # to a distance more or less
    alone = make_plan(given, 0.4, kind="hybrid", rows=ROWS, band=1)
    same = make_plan(given, 0.4, kind="absolute", band=1)
    assert all(torch.equal(keep, keep_of(same)[name]) for name, keep in keep_of(alone).items())


def test_rule_any_keeps_every_block_with_a_kept_entry():
    given, whole = decoder(block=1, length=12)
    plan = make_plan(given, 0.7, kind="absolute", rule="any", block=4, sinks=0)
    for name, found in whole.items():
        mean = found.mean(0)
        allowed = torch.ones(12, 12, dtype=torch.bool).tril()
        scores = mean[:, allowed].float()
        drop = round(scores.numel() * 0.7)
        cut = scores.flatten().sort().values[drop - 1]
        entries = (mean.float() > cut) & allowed
        for head, r, c in itertools.product(range(HEADS), range(3), range(3)):
            expected = bool(entries[head, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].any()) or r == c
            assert bool(plan.sites[name].layout(12, 12).keep[head, r, c]) == (expected and c <= r)


def test_the_papers_percentile_counts_what_may_never_meet():
    found, allowed = maps(2, 150, 300, causal=True, sequences=1)
    given = observation(seen("x", "encoder-self", found, allowed, 1), block=1, length=300)
    shares = {}
    for p in (0.0, 0.2, 0.24, 0.4, 0.9):
        plan = make_plan(given, p, kind="absolute", population="paper", sinks=0)
        shares[p] = 1 - float((plan.sites["x"].rows & allowed).sum() / (2 * allowed.sum()))
    assert shares[0.0] == shares[0.2] == shares[0.24] == 0
    assert shares[0.4] == pytest.approx((0.4 - 0.248333) / 0.751667, abs=0.005)  # the diagonal stays
    assert shares[0.9] == pytest.approx((0.9 - 0.248333) / 0.751667, abs=0.01)
    half = make_plan(given, 0.4, kind="absolute", sinks=0)
    assert 1 - float((half.sites["x"].rows & allowed).sum() / (2 * allowed.sum())) == pytest.approx(0.4, abs=1e-5)


def test_the_papers_percentile_is_numpys_nearest_and_drops_ties():
    score = torch.tensor([0.5, 0.5, 0.1, 0.9])
    for p in (0.1, 0.3, 0.5, 0.7):
        limit = np.percentile([0.0, *score.tolist()], 100 * p, method="nearest")
        assert above_percentile(score, 1, p).tolist() == [float(s) > float(limit) for s in score]


def test_the_mean_square_may_be_the_score():
    given, whole = decoder(layers=1)
    keep = keep_of(make_plan(given, 0.3, kind="absolute", pool="head", score="square"))["layers.0"]
    for head in range(HEADS):
        free = [(r, c) for r, c in causal_tiles() if r != c and c]
        squares = {one: sum(tile_score([each], head, *one) ** 2 for each in whole["layers.0"]) for one in free}
        gone = {one for one in causal_tiles() if not keep[head, one[0], one[1]]}
        assert gone == set(sorted(free, key=squares.__getitem__)[: round(21 * 0.3)])


@pytest.mark.parametrize("kind", ["toeplitz", "absolute", "hybrid"])
def test_the_band_is_three_quarters_of_what_a_row_may_keep(kind):
    given, _ = decoder(layers=1, heads=2, length=96)
    plan, wide, narrow = (make_plan(given, 0.5, kind=kind, **options) for options in ({}, {"band": 4}, {"band": 1}))
    keep = keep_of(plan, 96)["layers.0"]  # 24 rows, 300 tiles: 150 stay, 24 of them sinks, 5.25 a row
    assert torch.equal(keep, keep_of(wide, 96)["layers.0"])
    assert all(keep.diagonal(-d, 1, 2).all() for d in range(4))
    if kind == "absolute":
        assert not all(keep_of(narrow, 96)["layers.0"].diagonal(-d, 1, 2).all() for d in range(4))


def test_ties_go_by_position():
    one = torch.ones(6, dtype=torch.long)
    assert drop_lowest(torch.zeros(6), one, torch.zeros(6, dtype=torch.bool), 2).tolist() == [False] * 2 + [True] * 4
    forced = torch.tensor([True, False, False, True, False, False])
    assert drop_lowest(torch.zeros(6), one, forced, 3).tolist() == [True, False, False, True, False, True]
    assert drop_lowest(torch.zeros(6), one, forced, 6).sum() == 2


def test_pools_give_heads_unequal_budgets_only_where_they_share():
    given, _ = decoder(sharp=4.0)
    by_head = keep_of(make_plan(given, 0.3, kind="absolute", pool="head"))
    by_layer = keep_of(make_plan(given, 0.3, kind="absolute", pool="layer"))
    assert all(len(set(keep.sum((1, 2)).tolist())) == 1 for keep in by_head.values())
    assert any(len(set(keep.sum((1, 2)).tolist())) > 1 for keep in by_layer.values())
    assert {int(keep.sum()) for keep in by_layer.values()} == {84 - 25}


@pytest.mark.parametrize("kind", ["absolute", "toeplitz", "hybrid"])
def test_heads_of_a_group_can_share_a_mask(kind):
    given, whole = decoder(layers=1)
    plan = make_plan(given, 0.25, kind=kind, share="kv_group", band=1)
    keep = keep_of(plan)["layers.0"]
    assert torch.equal(keep[0], keep[1]) and torch.equal(keep[2], keep[3]) and not torch.equal(keep[0], keep[2])
    if kind == "absolute":
        assert int(keep.sum()) == 84 - 20  # 21, of which the last would need a pair
        pair = [
            tile_score(whole["layers.0"], 0, r, c) + tile_score(whole["layers.0"], 1, r, c) for r, c in causal_tiles()
        ]
        other = [
            tile_score(whole["layers.0"], 2, r, c) + tile_score(whole["layers.0"], 3, r, c) for r, c in causal_tiles()
        ]
        free = [one for one, (r, c) in enumerate(causal_tiles()) if r != c and c]
        kept = [[bool(keep[head, r, c]) for r, c in causal_tiles()] for head in (0, 2)]
        scored = [(score[one], kept[i][one]) for i, score in enumerate((pair, other)) for one in free]
        assert max(score for score, stays in scored if not stays) < min(score for score, stays in scored if stays)


def test_what_no_sequence_reached_stays_and_what_may_never_meet_does_not_count():
    found, allowed = maps(2, 16, 16, causal=False)
    site = seen("x", "encoder-self", found, allowed, 4)
    for tensor in (site.mass, site.square, site.count, site.area):
        tensor[..., 2, 3] = 0
    site.mass[:, 0, 3], site.square[:, 0, 3], site.count[0, 3] = 0, 0, 0
    given = observation(site, block=4, length=16)
    keep = make_plan(given, 0.5, kind="absolute").sites["x"].rows
    assert keep[:, 2, 3].all() and not keep[:, 0, 3].any()
    assert int(keep.sum()) - 2 == 2 * 14 - 14


def test_cross_attention_keeps_its_first_keys_and_goes_on():
    found, allowed = maps(4, 12, 20, causal=False)
    own, may = maps(4, 12, 12, causal=True)
    given = observation(
        seen("self", "decoder-self", own, may, 4), seen("cross", "decoder-cross", found, allowed, 4), block=4, length=20
    )
    plan = make_plan(given, 0.4)
    cross = plan.sites["cross"]
    assert cross.kind == "absolute" and cross.cross and cross.rows[:, :, 0].all() and int(cross.rows.sum()) == 60 - 24
    assert not cross.rows[:, range(3), range(3)].all()
    assert make_plan(given, 0.4, band=1).sites["cross"].rows[:, range(3), range(3)].all()
    assert make_plan(given, 0.4, cross="toeplitz").sites["cross"].kind == "toeplitz"
    assert plan.sites["self"].kind == "toeplitz"
    assert cross.layout(40, 40).keep.any(-1).all()
    only = make_plan(given, 0.4, sites=("cross",), cross="toeplitz")
    assert list(only.sites) == ["cross"] and only.sites["cross"].kind == "toeplitz"


def test_a_coarser_block_is_the_sum_of_finer_ones():
    given, whole = decoder(block=2)
    coarse = seen("layers.0", "decoder-self", whole["layers.0"], torch.ones(24, 24, dtype=torch.bool).tril(), 4, 2)
    same = make_plan(observation(coarse, block=4, length=24), 0.4, kind="absolute", pool="head")
    fine = make_plan(given, 0.4, kind="absolute", pool="head", block=4)
    assert fine.sites["layers.0"].block == 4
    assert torch.equal(fine.sites["layers.0"].rows, same.sites["layers.0"].rows)


@pytest.mark.parametrize("kind", ["toeplitz", "absolute", "hybrid"])
def test_from_a_model_to_a_file_and_back(kind, tmp_path):
    model, data = make("llama"), ids(3, 16)
    given = observe(model, data, block=4)
    plan = make_plan(given, 0.3, kind=kind, band=1)
    again = load_plan(save_plan(plan, tmp_path / "plan"))
    assert again.record["masking"]["sparsity"] == 0.3 and again.record["text"]["sha256"] == given.text["sha256"]
    with torch.no_grad():
        dense = model(data).logits
        with attached(model, again):
            masked = model(data).logits
        with attached(model, make_plan(given, 0.0, kind=kind)):
            whole = model(data).logits
    torch.testing.assert_close(whole, dense)
    assert not torch.allclose(masked, dense, atol=1e-5) and torch.equal(model(data).logits, dense)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sparsity": 1.0}, InvalidParameter, "[0, 1)"),
        ({"sparsity": -0.1}, InvalidParameter, "[0, 1)"),
        ({"sparsity": True}, InvalidParameter, "[0, 1)"),
        ({"kind": "toplitz"}, UnknownName, "Did you mean 'toeplitz'?"),
        ({"pool": "heads"}, UnknownName, "Did you mean 'head'?"),
        ({"population": "all"}, UnknownName, "Known: paper, possible"),
        ({"rule": "every"}, UnknownName, "Known: any, mass"),
        ({"sites": ("decoder",)}, UnknownName, "decoder-self"),
        ({"share": "layer"}, UnknownName, "kv_group"),
        ({"score": "max"}, UnknownName, "Known: auto, loss, mean, square"),
        ({"sinks": -1}, InvalidParameter, "'sinks'"),
        ({"band": 0}, InvalidParameter, "'band'"),
        ({"block": 6}, InvalidParameter, "a multiple of the 4 tokens"),
        ({"population": "paper"}, UsageError, "--kind absolute"),
        ({"rule": "any"}, UsageError, "--kind absolute"),
        ({"rule": "any", "kind": "absolute"}, UsageError, "blocks of 4: observe with entries"),
        ({"share": "kv_group", "pool": "head"}, UsageError, "cannot have a pool each"),
        ({"sites": ("cross",)}, UsageError, "no decoder-cross attention, only decoder-self"),
        ({"length": 99}, UsageError, "Nothing was observed at 99 tokens, only at 24"),
    ],
)
def test_refused(options, error, said):
    given, _ = decoder()
    with pytest.raises(error) as raised:
        make_plan(given, **({"sparsity": 0.5} | options))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_an_empty_observation_and_broken_scores_are_refused():
    given, _ = decoder()
    with pytest.raises(UsageError, match="observation is empty"):
        make_plan(type(given)(4, {}), 0.5)
    given.at()["layers.0"].mass[0, 1, 1] = torch.nan
    with pytest.raises(NumericalFailure, match="attention scores are not finite"):
        make_plan(given, Masking(0.5, kind="absolute"))

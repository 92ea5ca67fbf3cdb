"""Layouts and the lists made of them, against the entries they stand for."""

import gc

import pytest
import torch
from attention_cases import CASES, Case

from secateur.errors import UsageError
from secateur.kernels.block_attention import BlockLayout, blocks_of
from secateur.kernels.block_attention import compiled as compiling
from secateur.kernels.block_attention.compiled import LONG, SEGMENTS, compiled, items

CPU = torch.device("cpu")


def naive_blocks(layout):
    """(kind of block) by head, row and column, from the entries: '' impossible, 'part' or 'full'."""
    everything = BlockLayout(
        torch.ones_like(layout.keep), layout.block, layout.queries, layout.keys, layout.causal, layout.offset
    ).entries()[0]
    kinds = {}
    for r in range(layout.keep.shape[1]):
        for c in range(layout.keep.shape[2]):
            start = max(0, (layout.offset // layout.block + r) * layout.block - layout.offset)
            stop = (layout.offset // layout.block + r + 1) * layout.block - layout.offset
            tile = everything[start:stop, c * layout.block : (c + 1) * layout.block]
            whole = tile.shape[1] == layout.block and bool(tile.all())
            kinds[r, c] = "full" if whole else "part" if tile.any() else ""
    return kinds


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_are_the_possible_kept_blocks_full_ones_first(case):
    layout = case.layout()
    kinds, made = naive_blocks(layout), compiled(layout, CPU)
    for lists, at in ((made.by_row, lambda line, other: (line, other)), (made.by_column, lambda o, line: (line, o))):
        lines = lists.order.shape[1]
        for head in range(layout.heads):
            for line in range(lines):
                number = head * lines + line
                start, stop = lists.starts[number], lists.starts[number + 1]
                listed = lists.blocks[start:stop].tolist()
                others = made.columns if lists is made.by_row else made.rows
                wanted = {
                    kind: [o for o in range(others) if kinds[at(line, o)] == kind and layout.keep[head][at(line, o)]]
                    for kind in ("full", "part")
                }
                assert listed == wanted["full"] + wanted["part"]
                assert lists.full[number] == len(wanted["full"])
            lengths = lists.counts[head][lists.order[head].long()]
            assert (lengths.diff() <= 0).all() and sorted(lists.order[head].tolist()) == list(range(lines))
        assert lists.longest == lists.counts.max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_density_is_the_share_of_possible_blocks(case):
    layout = case.layout()
    possible = [at for at, kind in naive_blocks(layout).items() if kind]
    kept = sum(bool(layout.keep[(h, *at)]) for h in range(layout.heads) for at in possible)
    assert layout.density() == pytest.approx(kept / len(possible) / layout.heads)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_coarse_blocks_hold_all_that_the_fine_ones_did_and_no_more_blocks_than_needed(case):
    layout = case.layout(density=0.2)
    coarse = layout.coarsen(2 * case.block)
    assert coarse.block == 2 * case.block
    assert not (layout.entries() & ~coarse.entries()).any()
    rows = (layout.offset + torch.arange(layout.queries)) // coarse.block - layout.offset // coarse.block
    for head, r, c in coarse.keep.nonzero().tolist():
        inside = layout.entries()[head][rows == r][:, c * coarse.block : (c + 1) * coarse.block]
        assert inside.any(), "a coarse block without any kept entry"


def test_a_slice_of_the_entries_is_that_of_all():
    layout = Case(queries=40, keys=75, offset=35).layout()
    assert torch.equal(layout.entries(7, 21), layout.entries()[:, 7:21])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": torch.ones(1, 3, 2, dtype=torch.bool)}, "must be bool"),
        ({"keep": torch.ones(1, 2, 2)}, "must be bool"),
        ({"block": 0}, "'block' of a block layout must be at least 1. Got 0"),
        ({"queries": 0}, "'queries'"),
        ({"offset": -1}, "'offset' of a block layout must not be negative"),
    ],
)
def test_a_layout_that_does_not_fit_is_one_line(change, message):
    fits = {"keep": torch.ones(1, 2, 2, dtype=torch.bool), "block": 16, "queries": 20, "keys": 30}
    BlockLayout(**fits)
    with pytest.raises(UsageError, match=message) as raised:
        BlockLayout(**(fits | change))
    assert "\n" not in str(raised.value)


def test_only_a_multiple_of_the_block_can_be_made():
    with pytest.raises(UsageError, match="multiple of 16 only, not to 24"):
        Case().layout().coarsen(24)


def test_lists_are_made_once_and_go_with_the_layout():
    layout = Case().layout()
    assert compiled(layout, CPU) is compiled(layout, CPU)
    before = len(compiling._compiled)
    del layout
    gc.collect()
    assert len(compiling._compiled) == before - 1


@pytest.mark.parametrize(("key_heads", "group", "heads"), [(1, 1, 1), (2, 2, 4), (3, 2, 1), (4, 1, 4)])
def test_every_column_is_shared_out_exactly_once(key_heads, group, heads):
    counts = torch.randint(0, 4, (heads, 30))
    counts[:, 0] = 90
    made = items(counts, key_heads, group)
    work = counts.expand(key_heads * group, -1).view(key_heads, group, -1).sum(1)
    seen = {}
    for key_head, column, segment, slot in made.list.tolist():
        seen.setdefault((key_head, column), []).append((segment, slot))
    assert len(seen) == key_heads * 30
    long = {(h, c) for h, c in seen if work[h, c] > LONG * work.double().mean()}
    assert long == set(map(tuple, made.long.tolist())) and len(long) == key_heads
    for number, (h, c) in enumerate(map(tuple, made.long.tolist())):
        assert sorted(seen[h, c]) == [(s, SEGMENTS * number + s) for s in range(SEGMENTS)]
    assert all(parts == [(0, -1)] for at, parts in seen.items() if at not in long)


def test_heads_with_equal_patterns_are_noticed():
    grouped = compiled(Case(heads=4, key_heads=2, grouped=True).layout(), CPU)
    assert grouped.alike(2) and not grouped.alike(4) and not grouped.alike(3)
    assert compiled(Case(alike=True).layout(), CPU).alike(2)
    assert not compiled(Case(heads=4).layout(), CPU).alike(2)


def test_block_counts():
    assert blocks_of(16, 1, 1) == (1, 1)
    assert blocks_of(16, 16, 17, offset=16) == (1, 2)
    assert blocks_of(16, 17, 17, offset=15) == (2, 2)

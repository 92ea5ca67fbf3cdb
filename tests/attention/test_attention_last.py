"""The last key of each sequence: kept in batches of any padding, observed apart, left out of what is ranked."""

import json
import random
from dataclasses import replace

import pytest
import torch
from attention_models import BLOCK, attention_model, logits, pairs, random_mask
from attention_seen import maps, observation, seen
from families import ids
from transformers.modeling_outputs import BaseModelOutput

from secateur.attention.apply import attached
from secateur.attention.baselines import random_plan, window_plan
from secateur.attention.masking import Masking, make_plan
from secateur.attention.observe import observe
from secateur.attention.plan import RECORD, load_plan, plan_of, save_plan
from secateur.attention.site_mask import SiteMask
from secateur.attention.sites import find_sites
from secateur.attention.transfer import mass_recall, overlap
from secateur.errors import UnknownName, UsageError
from secateur.plan_quality import sparsity_on

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = (22, 13, 5, 13)


def with_last(model, kind="toeplitz", seed=0):
    """Every site masked at random; where keys behind count, the last key stays."""
    rng = random.Random(seed)
    masks = {site.name: replace(random_mask(site, kind, rng, density=0.2), last=not site.causal) for site in find_sites(model)}  # fmt: skip  # noqa: E501
    return plan_of(model, masks)


def padded(tokens, side):
    real = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    batch = torch.zeros_like(real)
    for row, length in enumerate(LENGTHS):
        where = slice(length) if side == "right" else slice(max(LENGTHS) - length, None)
        real[row, where], batch[row, where] = 1, tokens[row, :length]
    return batch, real


@pytest.mark.parametrize("keys", [7, 8, 9])
def test_the_mask_by_its_words(keys):
    mask = random_mask(next(iter(find_sites(attention_model("bert")))), "toeplitz", random.Random(3), density=0.2)
    assert not mask.last
    last = replace(mask, last=True)
    expected = pairs(mask, mask.heads, 11, keys)
    expected[..., (keys - 1) // BLOCK * BLOCK :] = True
    assert torch.equal(last.allowed(torch.arange(11), torch.arange(keys)), expected)
    tiles = last.layout(11, keys).keep
    whole = tiles.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :11, :keys]
    assert torch.equal(whole, expected)
    real = torch.arange(12) < torch.tensor([[keys], [12]])
    several = last.allowed(torch.arange(11)[None], torch.where(real, torch.arange(12), 0))
    assert torch.equal(several[0, :, :, :keys], expected) and several[1, :, :, 8:].all()


@pytest.mark.parametrize("kind", ["toeplitz", "absolute", "hybrid"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_an_encoder_gives_each_sequence_what_it_has_alone(side, backend, kind):
    model, tokens = attention_model("bert"), ids(len(LENGTHS), max(LENGTHS))
    batch, real = padded(tokens, side)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    plan = with_last(model, kind)
    with attached(model, plan, backend) as said:
        together = logits(model, input_ids=batch, attention_mask=real, position_ids=positions)
        for row, length in enumerate(LENGTHS):
            alone = logits(model, input_ids=tokens[row : row + 1, :length])
            torch.testing.assert_close(together[row][real[row].bool()], alone[0], **CLOSE)
    assert ("entries" in said.backends) == (side == "left")
    without = plan_of(model, {name: replace(mask, last=False) for name, mask in plan.sites.items()})
    with attached(model, without):
        other = logits(model, input_ids=batch, attention_mask=real, position_ids=positions)
    assert (other - together)[real.bool()].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["marian", "bart"])
def test_a_translator_too_and_step_by_step(family):
    model, tokens = attention_model(family), ids(len(LENGTHS), max(LENGTHS))
    batch, real = padded(tokens, "right")
    written = ids(len(LENGTHS), 9, seed=4)
    with attached(model, with_last(model)):
        together = logits(model, input_ids=batch, attention_mask=real, decoder_input_ids=written)
        for row, length in enumerate(LENGTHS):
            alone = logits(model, input_ids=tokens[row : row + 1, :length], decoder_input_ids=written[row : row + 1])
            torch.testing.assert_close(together[row], alone[0], **CLOSE)
        with torch.no_grad():
            read = model.get_encoder()(input_ids=batch, attention_mask=real).last_hidden_state
            cache, steps = None, []
            for at in range(9):
                step = model(
                    encoder_outputs=BaseModelOutput(read), attention_mask=real, cache=cache,
                    decoder_input_ids=written[:, at : at + 1], use_cache=True,
                )  # fmt: skip
                cache = step.cache
                steps.append(step.logits)
            lone = model.generate(tokens[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False)
            plain = model.generate(tokens[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    torch.testing.assert_close(torch.cat(steps, 1), together, **CLOSE)
    assert torch.equal(lone, plain)


def test_training_reaches_through_padded_batches():
    model, tokens = attention_model("bert"), ids(len(LENGTHS), max(LENGTHS))
    batch, real = padded(tokens, "right")
    found = []
    for backend in ("auto", "reference"):
        with attached(model, with_last(model), backend):
            (model(input_ids=batch, attention_mask=real).logits * real[..., None]).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)
    assert found[0].abs().max() > 0


def test_it_is_observed_apart():
    model, tokens = attention_model("bert"), ids(len(LENGTHS), max(LENGTHS))
    batch, real = padded(tokens, "right")
    got = observe(model, [{"input_ids": batch, "attention_mask": real}], block=BLOCK).at()
    alone = [observe(model, tokens[row : row + 1, :length], block=BLOCK).at() for row, length in enumerate(LENGTHS)]
    for name, site in got.items():
        for key in ("mass", "square", "count"):
            expected = torch.zeros_like(getattr(site, key))
            for one in alone:
                sums = getattr(one[name], key)
                expected[..., : sums.shape[-2], sums.shape[-1] - 1] += sums[..., -1]
            torch.testing.assert_close(getattr(site, f"last_{key}"), expected, **CLOSE)
    causal = observe(attention_model("llama"), tokens, block=BLOCK).at()
    assert all(site.last_mass is None and site.last_count is None for site in causal.values())


def _lengths(sharp=2.0):
    """Two lengths in one observation: the last block of keys is the fifth and the third."""
    long, short = (maps(3, n, n, causal=False, sharp=sharp) for n in (20, 12))
    wide, site = seen("e", "encoder-self", *long, 4), seen("e", "encoder-self", *short, 4)
    grown = {}
    for key in ("mass", "square", "count", "area", "last_mass", "last_square", "last_count"):
        whole, part = getattr(wide, key).clone(), getattr(site, key)
        whole[..., :3, :3] += part
        grown[key] = whole
    return replace(wide, sequences=6, **grown), (long, short)


def test_what_is_ranked_leaves_it_out():
    site, _ = _lengths()
    free = observation(site, block=4, length=20)
    plan = make_plan(free, 0.4, kind="absolute", last="always", sinks=0, band=1)
    mask = plan.sites["e"]
    assert mask.last and mask.rows[:, :, -1].all()
    score = (site.mass - site.last_mass).double() / (site.count - site.last_count).clamp(min=1)
    own = torch.eye(5, dtype=torch.bool)
    own[:, -1] = True
    kept, gone = score[mask.rows & ~own], score[~mask.rows & ~own]
    assert gone.max() <= kept.min() and int((~mask.rows).sum()) == round(0.4 * 75)
    inflated = replace(site, mass=site.mass + 50 * (site.last_count > 0), last_mass=site.last_mass + 50 * (site.last_count > 0))  # fmt: skip  # noqa: E501
    same = make_plan(observation(inflated, block=4, length=20), 0.4, kind="absolute", last="always", sinks=0, band=1)
    assert torch.equal(same.sites["e"].rows, mask.rows)
    tilted = make_plan(observation(inflated, block=4, length=20), 0.4, kind="absolute", last="never", sinks=0, band=1)
    assert not tilted.sites["e"].last and not torch.equal(tilted.sites["e"].rows, mask.rows)
    far = make_plan(free, 0.4, kind="toeplitz", last="always", sinks=0, band=1).sites["e"]
    assert far.last and far.layout(20, 20).keep[:, :, -1].all() and far.layout(12, 12).keep[:, :, -1].all()


def test_kept_pairs_and_mass_are_counted_sequence_by_sequence():
    site, (long, short) = _lengths()
    given = observation(site, block=4, length=20)
    for kind in ("absolute", "toeplitz"):
        plan = make_plan(given, 0.5, kind=kind, last="always")
        mask, kept, pairs_of, mass, whole = plan.sites["e"], 0, 0, torch.zeros(3), torch.zeros(3)
        for found, _ in (long, short):
            n = found.shape[-1]
            allowed = mask.allowed(torch.arange(n), torch.arange(n)).expand(3, -1, -1)
            kept, pairs_of = kept + int(allowed.sum()) * len(found), pairs_of + 3 * n * n * len(found)
            mass, whole = mass + (found * allowed).sum((0, 2, 3)), whole + found.sum((0, 2, 3))
        assert sparsity_on(plan, given)[0] == pytest.approx(1 - kept / pairs_of)
        assert mass_recall(plan, given).sites["e"] == pytest.approx((mass / whole).tolist())


def test_baselines_keep_it_and_the_count():
    site, _ = _lengths()
    plan = make_plan(observation(site, block=4, length=20), 0.4, kind="absolute", last="always")
    for other in (window_plan(plan), random_plan(plan)):
        mask = other.sites["e"]
        assert mask.last and mask.layout(20, 20).keep.sum() == plan.sites["e"].layout(20, 20).keep.sum()
    assert overlap(plan, plan, 20).total == 1.0


def test_auto_keeps_it_where_there_is_room():
    site = seen("e", "encoder-self", *maps(2, 48, 48, causal=False), 4)  # 12 blocks a row
    given = observation(site, block=4, length=48)
    assert make_plan(given, 0.75).sites["e"].last and not make_plan(given, 0.76).sites["e"].last  # 3 blocks stay
    assert not make_plan(given, 0.1, kind="absolute", population="paper").sites["e"].last
    old = replace(site, last_mass=None, last_count=None, last_square=None)
    assert not make_plan(observation(old, block=4, length=48), 0.1).sites["e"].last
    with pytest.raises(UsageError, match="does not tell the last keys from the others: observe again, or"):
        make_plan(observation(old, block=4, length=48), 0.1, last="always")
    with pytest.raises(UnknownName, match=r"There is no value of last 'allways'. Did you mean 'always'"):
        Masking(0.5, last="allways")
    causal = seen("d", "decoder-self", *maps(2, 48, 48, causal=True), 4)
    assert not make_plan(observation(causal, block=4, length=48), 0.1, last="always").sites["d"].last


def test_files_hold_it(tmp_path):
    model = attention_model("bert")
    plan = with_last(model)
    save_plan(plan, tmp_path / "plan")
    assert all(mask.last for mask in load_plan(tmp_path / "plan").sites.values())
    record = json.loads((tmp_path / "plan" / RECORD).read_text())
    for mask in record["masks"].values():
        del mask["last"]  # as older versions wrote it
    (tmp_path / "plan" / RECORD).write_text(json.dumps(record))
    assert not any(mask.last for mask in load_plan(tmp_path / "plan").sites.values())
    with pytest.raises(UsageError, match="A causal attention mask cannot keep the last key"):
        SiteMask("toeplitz", 4, causal=True, offsets=torch.ones(1, 2, dtype=torch.bool), last=True)

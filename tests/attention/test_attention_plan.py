"""Masks that know positions only, plans and their files."""

import json
import random

import pytest
import torch
from attention_models import BLOCK, KINDS, attention_model, kept, pairs, random_mask, random_plan
from families import make

from secateur.attention.plan import RECORD, TENSORS, SiteMask, load_plan, plan_of, save_plan
from secateur.attention.sites import Site, find_sites
from secateur.errors import LoadFailure, OutputExists, SaveFailure, UsageError

SITES = {
    "decoder-self": Site("a", "decoder", "self", 0, 3, 1, 8, True),
    "encoder-self": Site("a", "encoder", "self", 0, 2, 2, 8, False),
    "decoder-cross": Site("a", "decoder", "cross", 0, 2, 2, 8, False),
}


def mask_of(family, form, seed=0, **changes):
    made = random_mask(SITES[family], form, random.Random(seed), blocks=5)
    facts = {n: getattr(made, n) for n in ("kind", "block", "causal", "lowest", "cross")} | made.tensors() | changes
    return SiteMask(**facts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SITES)
def test_layout_and_entries_are_the_rule_pair_by_pair(family, kind):
    mask = mask_of(family, kind, extend="diagonal")
    heads = SITES[family].heads
    for offset, queries, keys in ((0, 19, 19), (0, 33, 33), (6, 3, 9), (8, 8, 16), (21, 1, 22), (25, 7, 40)):
        wanted = pairs(mask, heads, queries, keys, offset)
        assert torch.equal(mask.layout(queries, keys, offset).entries(), wanted)
        assert torch.equal(mask.allowed(offset + torch.arange(queries), torch.arange(keys)), wanted)


def test_positions_may_come_in_any_order_and_batch():
    mask = mask_of("decoder-self", "hybrid")
    queries, keys = torch.tensor([[7, 0, 18], [4, 4, 30]]), torch.tensor([[3, 17, 0, 9], [30, 2, 11, 4]])
    found = mask.allowed(queries, keys)
    for b in range(2):
        for h in range(3):
            for q in range(3):
                for k in range(4):
                    assert found[b, h, q, k] == kept(mask, h, int(queries[b, q]), int(keys[b, k]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SITES)
def test_a_longer_text_does_not_change_the_mask_of_its_beginning(family, kind):
    mask = mask_of(family, kind, extend="diagonal")
    short, long = (mask.layout(n, n).entries() for n in (13, 50))
    assert torch.equal(short, long[:, :13, :13])
    assert short.any(-1).all() and long.any(-1).all()  # every query has a key


def test_every_query_has_a_key_however_short_the_source():
    mask = SiteMask("absolute", 4, causal=False, rows=torch.zeros(1, 3, 3, dtype=torch.bool), cross=True)
    assert mask.layout(12, 3).entries().all(-1).all()


@pytest.mark.parametrize("family", SITES)
@pytest.mark.parametrize("kind", KINDS)
def test_density_counts_pairs_and_blocks(family, kind):
    mask, causal = mask_of(family, kind, extend="diagonal"), SITES[family].causal
    for queries, keys in ((16, 16), (23, 23)) if causal else ((16, 16), (23, 23), (9, 14)):
        entries = mask.layout(queries, keys).entries().double()
        possible = torch.ones(queries, keys).tril().sum() if causal else queries * keys
        torch.testing.assert_close(mask.density(queries, keys), entries.sum((1, 2)) / possible)
        blocks = mask.layout(queries, keys)
        assert mask.density(queries, keys, of="blocks").mean().item() == pytest.approx(blocks.density())


def test_plan_density_is_one_where_dense():
    model = make("llama")
    first, second = find_sites(model)
    plan = plan_of(model, {first.name: random_mask(first, "toeplitz", random.Random(0))})
    shares = plan.density([8, 24])
    assert shares[24][second.name] == 1.0 and shares[8][second.name] == 1.0
    assert shares[24][first.name] == pytest.approx(plan.sites[first.name].density(24).mean().item())
    assert plan.mean_density(24) == pytest.approx((1 + shares[24][first.name]) / 2)


def test_an_absolute_mask_ends_where_it_was_calibrated():
    mask = mask_of("decoder-self", "absolute")
    assert mask.layout(20, 20).keys == 20
    assert mask.layout(20, 64).keys == 64  # a static cache: no query sees the slots to come
    for far in (lambda: mask.layout(21, 21), lambda: mask.layout(1, 21, 20), lambda: _allowed(mask, 21)):
        with pytest.raises(UsageError, match=r"calibrated at 20 tokens.*query at position 20"):
            far()
    encoder = mask_of("encoder-self", "absolute")
    with pytest.raises(UsageError, match="key at position 20"):
        encoder.layout(20, 21)


def _allowed(mask, length):
    return mask.allowed(torch.arange(length), torch.arange(length))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dense"}, "'kind'"),
        ({"block": 0}, "'block'"),
        ({"block": True}, "'block'"),
        ({"extend": "copy"}, "'extend'"),
        ({"rows": None}, "needs 'rows'"),
        ({"offsets": torch.ones(3, 4, dtype=torch.bool)}, "has no 'offsets'"),
        ({"rows": torch.ones(3, 5, 5)}, "must be bool with 3 axes. Got torch.float32"),
        ({"rows": torch.ones(5, 5, dtype=torch.bool)}, "3 axes"),
        ({"rows": torch.ones(3, 0, 5, dtype=torch.bool)}, "3 axes"),
        ({"sinks": torch.ones(2, 1, dtype=torch.bool)}, "different head counts"),
        ({"cross": True}, "causal and of cross"),
    ],
)
def test_a_mask_is_checked(changes, message):
    with pytest.raises(UsageError, match=message):
        mask_of("decoder-self", "absolute", **changes)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_comes_back_from_its_files(tmp_path, family, kind):
    model = attention_model(family)
    plan = random_plan(model, kind)
    plan = plan_of(model, plan.sites, {"p": 0.9, "pool": "layer", "lengths": [128, 512]})
    assert save_plan(plan, tmp_path / "plan") == (tmp_path / "plan").resolve()
    back = load_plan(tmp_path / "plan")
    assert (back.model_type, back.architecture, back.model_sites, back.record) == (
        plan.model_type,
        plan.architecture,
        plan.model_sites,
        plan.record,
    )
    assert back.sites.keys() == plan.sites.keys()
    for name, mask in plan.sites.items():
        for fact in ("kind", "block", "causal", "lowest", "cross", "extend"):
            assert getattr(back.sites[name], fact) == getattr(mask, fact)
        assert back.sites[name].tensors().keys() == mask.tensors().keys()
        assert all(torch.equal(back.sites[name].tensors()[k], v) for k, v in mask.tensors().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan"]


def test_a_plan_fits_into_the_folder_of_a_model(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "model")
    plan = random_plan(model, "hybrid")
    save_plan(plan, tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert load_plan(tmp_path / "model").masks_for(loaded).keys() == plan.sites.keys()
    with pytest.raises(OutputExists, match="holds an attention plan"):
        save_plan(plan, tmp_path / "model")
    save_plan(random_plan(model, "absolute"), tmp_path / "model", overwrite=True)
    assert {mask.kind for mask in load_plan(tmp_path / "model").sites.values()} == {"absolute"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_bad_plan_files_are_refused(tmp_path):
    plan = random_plan(make("llama"), "hybrid")
    with pytest.raises(UsageError, match="no attention plan in"):
        load_plan(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExists, match="is a file"):
        save_plan(plan, tmp_path / "file")
    with pytest.raises(SaveFailure, match="could not be saved"):
        save_plan(plan, tmp_path / "file" / "below")
    unplain = plan_of(make("llama"), plan.sites, {"p": float("nan")})
    with pytest.raises(SaveFailure, match="could not be saved"):
        save_plan(unplain, tmp_path / "unplain")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    save_plan(plan, tmp_path / "plan")
    good = (tmp_path / "plan" / TENSORS).read_bytes()
    (tmp_path / "plan" / TENSORS).write_bytes(good[:-1])
    with pytest.raises(LoadFailure, match="not the file"):
        load_plan(tmp_path / "plan")
    (tmp_path / "plan" / TENSORS).unlink()
    with pytest.raises(LoadFailure, match="cannot be read"):
        load_plan(tmp_path / "plan")
    (tmp_path / "plan" / TENSORS).write_bytes(good)
    document = json.loads((tmp_path / "plan" / RECORD).read_text())
    name = next(iter(document["masks"]))
    for change in (
        {"format": "secateur attention plan 9"},
        {"masks": None},
        {"masks": {"elsewhere": document["masks"][name]}},
        {"model_sites": [{"name": 1}]},
    ):
        (tmp_path / "plan" / RECORD).write_text(json.dumps(document | change))
        with pytest.raises(LoadFailure):
            load_plan(tmp_path / "plan")
    (tmp_path / "plan" / RECORD).write_text("{")
    with pytest.raises(LoadFailure, match="cannot be read"):
        load_plan(tmp_path / "plan")


def test_a_plan_knows_its_model():
    model = make("llama")
    plan = random_plan(model, "hybrid")
    assert plan.masks_for(model.model).keys() == {name.removeprefix("model.") for name in plan.sites}  # without head
    with pytest.raises(UsageError, match="for a llama model, and this is a mistral model"):
        plan.masks_for(make("mistral"))
    config = type(model.config)(**(model.config.to_dict() | {"num_hidden_layers": 3}))
    with pytest.raises(UsageError, match=r"2 attention sites.*this one has 3"):
        plan.masks_for(type(model)(config))
    config = type(model.config)(**(model.config.to_dict() | {"num_key_value_heads": 4}))
    with pytest.raises(UsageError, match=r"4 heads of 8 on 4 of keys.*4 heads of 8 on 2 of keys"):
        plan.masks_for(type(model)(config))


def test_masks_must_fit_their_sites():
    model = make("llama")
    name = find_sites(model)[0].name
    band = {"offsets": torch.ones(3, 2, dtype=torch.bool)}
    with pytest.raises(UsageError, match="no attention site of LlamaForCausalLM"):
        plan_of(model, {"model.layers.9.self_attn": SiteMask("toeplitz", BLOCK, True, **band)})
    with pytest.raises(UsageError, match="has 4 heads, and its mask 3"):
        plan_of(model, {name: SiteMask("toeplitz", BLOCK, True, **band)})
    band["offsets"] = band["offsets"][:1]
    with pytest.raises(UsageError, match="decoder-self attention, and its mask says causal=False"):
        plan_of(model, {name: SiteMask("toeplitz", BLOCK, False, **band)})

"""What is observed against transformers' own attention maps, entry by entry."""

import copy
import math

import pytest
import torch
import transformers
from families import ids, make

from secateur.attention.observe import observe
from secateur.attention.sites import find_sites
from secateur.data.calibration import Calibration
from secateur.errors import InvalidParameter, ModelNotSupported, TextTooShort, UsageError

DECODERS = [
    "llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt",
    "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "jamba", "zamba2",
]  # fmt: skip
ENCODERS = ("bert", "albert")
PAIRS = ("t5", "marian")
SITES = {
    "encoder-self": "encoder_attentions",
    "decoder-self": "decoder_attentions",
    "decoder-cross": "cross_attentions",
}


def model_of(family):
    if family != "marian":
        return make(family)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.MarianConfig(
        vocab_size=64, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0, forced_eos_token_id=None, **sizes,
    )  # fmt: skip
    return transformers.MarianMTModel(config).eval()


def padded(n, longest, side, seed=0):
    """Ids and masks of sequences of several lengths."""
    tokens = ids(n, longest, seed)
    mask = torch.zeros_like(tokens)
    for row in range(n):
        length = longest - 3 * row
        mask[row, longest - length :] = 1 if side == "left" else 0
        mask[row, :length] = 1 if side == "right" else mask[row, :length]
    return tokens.masked_fill(mask == 0, 0), mask


def eager_maps(model, batch):
    """Per site: the model's own maps, (batch, heads, queries, keys), one for every call of the site."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        output = plain(**batch, output_attentions=True, use_cache=False) if "input_ids" in batch else None
    found = {}
    for site in find_sites(model):
        maps = getattr(output, SITES[site.family], None) or output.attentions
        maps = [one for one in maps if one is not None]
        alike = [s for s in find_sites(model) if s.family == site.family]
        found[site.name] = [maps[site.ordinal]] if len(alike) == len(maps) else list(maps)
    return found


def naive(model, batches, block):
    """Per site: mass, square, count, by loops over sequences and entries of the model's own maps."""
    sums = {}
    for batch in batches:
        own = {"encoder": batch.get("attention_mask"), "decoder": batch.get("attention_mask")}
        if "decoder_input_ids" in batch:
            own["decoder"] = batch.get("decoder_attention_mask")
        of = eager_maps(model, batch)
        for site in find_sites(model):
            for maps in of[site.name]:
                for row, one in enumerate(maps.double()):
                    q, k = own[site.stack], own["encoder" if site.kind == "cross" else site.stack]
                    i = torch.arange(one.shape[1]) if q is None else q[row].nonzero().flatten()
                    j = torch.arange(one.shape[2]) if k is None else k[row].nonzero().flatten()
                    one = one[:, i][:, :, j]
                    shape = (math.ceil(len(i) / block), math.ceil(len(j) / block))
                    mass = torch.zeros(site.heads, *shape, dtype=torch.float64)
                    count = torch.zeros(shape, dtype=torch.long)
                    for a in range(shape[0]):
                        for b in range(shape[1]):
                            tile = one[:, a * block : (a + 1) * block, b * block : (b + 1) * block]
                            mass[:, a, b] = tile.sum((1, 2))
                            count[a, b] = (tile > 0).all(0).sum()
                    sums.setdefault(site.name, []).append((mass, count))
    return sums


def check(model, batches, block, found):
    for name, each in naive(model, batches, block).items():
        site = found[name]
        rows, columns = site.count.shape
        mass, square = (torch.zeros(site.heads, rows, columns, dtype=torch.float64) for _ in range(2))
        count = torch.zeros(rows, columns, dtype=torch.long)
        for one, own in each:
            r, c = own.shape
            mass[:, :r, :c] += one
            square[:, :r, :c] += one**2 / own.clamp(min=1)
            count[:r, :c] += own
        assert torch.equal(site.count, count), name
        torch.testing.assert_close(site.mass.double(), mass, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(site.square.double(), square, rtol=1e-4, atol=1e-5)
        assert site.sequences == len(each)
        assert site.mass.sum() == pytest.approx(site.heads * float(site.queries.sum()), rel=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family):
    model, data = make(family), ids(2, 11)
    found = observe(model, data, block=4, batch_size=2)
    assert list(found.lengths) == [11]
    check(model, [{"input_ids": data}], 4, found.at())
    assert all(site.possible.sum() < site.possible.numel() and not site.unseen.any() for site in found.at().values())


@pytest.mark.parametrize("family", [*DECODERS[:2], "gpt2", *ENCODERS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_in_no_sum(family, side):
    model = make(family)
    tokens, mask = padded(3, 12, side)
    batch = {"input_ids": tokens, "attention_mask": mask}
    check(model, [batch], 4, observe(model, [batch], block=4).at())


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_moves_nothing(family):
    model = make(family)
    tokens, mask = padded(3, 12, "right")
    together = observe(model, [{"input_ids": tokens, "attention_mask": mask}], block=4).at(12)
    alone = [{"input_ids": row[own > 0][None]} for row, own in zip(tokens, mask, strict=True)]
    alone = observe(model, alone, block=4).at(12)
    for name, site in together.items():
        torch.testing.assert_close(site.mass, alone[name].mass, rtol=1e-4, atol=1e-5)
        assert torch.equal(site.count, alone[name].count) and torch.equal(site.area, alone[name].area)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family):
    model, data = make(family), ids(2, 9)
    found = observe(model, data, block=4).at()
    check(model, [{"input_ids": data}], 4, found)
    assert all(site.possible.all() for site in found.values())


@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize("block", [1, 4])
def test_encoder_decoders(family, block):
    model = model_of(family)
    tokens, mask = padded(2, 10, "right")
    targets, target_mask = padded(2, 7, "right", seed=1)
    batch = {
        "input_ids": tokens, "attention_mask": mask, "decoder_input_ids": targets, "decoder_attention_mask": target_mask
    }  # fmt: skip
    found = observe(model, [batch], block=block).at(10)
    assert {site.family for site in found.values()} == set(SITES)
    check(model, [batch], block, found)
    cross = next(site for site in found.values() if site.family == "decoder-cross")
    assert cross.count.shape == (math.ceil(7 / block), math.ceil(10 / block))


def test_by_entry_and_several_lengths():
    model, data = make("llama"), ids(3, 12)
    found = observe(model, data, lengths=(4, 6, 12), entries=True)
    assert found.block == 1 and list(found.lengths) == [4, 6, 12]
    for length, sites in found.lengths.items():
        windows = data.reshape(-1, length)
        check(model, [{"input_ids": windows}], 1, sites)
        assert all(site.sequences == 36 // length for site in sites.values())


def test_the_batch_size_changes_rounding_only():
    model, data = make("llama"), ids(4, 8)
    one, four = (observe(model, data, block=4, batch_size=size).at() for size in (1, 4))
    for name, site in one.items():
        torch.testing.assert_close(site.mass, four[name].mass)
        torch.testing.assert_close(site.facts, four[name].facts)


def test_bf16_is_summed_in_fp32():
    model, data = make("llama", torch.bfloat16), ids(2, 8)
    site = next(iter(observe(model, data, block=4).at().values()))
    assert site.mass.dtype == torch.float32
    assert site.mass.sum() == pytest.approx(4 * 2 * 8, rel=1e-6)


def test_conversations_are_observed_without_their_padding():
    model = make("llama")
    tokens, mask = padded(3, 12, "right")
    data = Calibration(tokens, {"text": "chats"}, mask.bool())
    found = observe(model, data, block=4, batch_size=3)
    check(model, [{"input_ids": tokens, "attention_mask": mask}], 4, found.at())
    assert found.text == {"text": "chats"}


def test_the_model_is_left_as_it_was():
    model, data = make("llama").train(), ids(1, 8)
    before = model.config._attn_implementation
    observe(model, data, block=4)
    assert model.training and model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("family", "data", "options", "error", "said"),
    [
        ("llama", ids(1, 8), {}, TextTooShort, "8 tokens, fewer than one block of 64"),
        ("llama", ids(1, 8), {"lengths": (16,), "block": 4}, TextTooShort, "8 tokens: attention cannot be observed at"),
        ("llama", ids(1, 8), {"block": 0}, InvalidParameter, "'block'"),
        ("llama", ids(1, 8), {"lengths": (0,), "block": 4}, InvalidParameter, "'lengths'"),
        ("llama", ids(1, 8), {"batch_size": 0}, InvalidParameter, "'batch_size'"),
        ("llama", torch.zeros(0, 8, dtype=torch.long), {"block": 4}, UsageError, "no token ids"),
        ("llama", torch.zeros(2, 8), {"block": 4}, UsageError, "ids (n, tokens) int64"),
        ("llama", [], {"block": 4}, UsageError, "list of batches is empty"),
        ("llama", ["text"], {"block": 4}, UsageError, "got str"),
        ("llama", [{"input_ids": ids(1, 8)}], {"block": 4, "lengths": (4,)}, UsageError, "lengths of their own"),
        ("llama", torch.ones(1, 1025, dtype=torch.long), {"entries": True}, InvalidParameter, "at most 1024 tokens"),
        ("t5", ids(1, 8), {"block": 4}, UsageError, "reads two texts"),
        ("mamba", ids(1, 8), {"block": 4}, ModelNotSupported, "no attention that can be replaced"),
        ("gpt_oss", ids(1, 8), {"block": 4}, ModelNotSupported, "attention sinks"),
    ],
)
def test_refused(family, data, options, error, said):
    with pytest.raises(error) as raised:
        observe(make(family), data, **options)
    assert said in str(raised.value) and "\n" not in str(raised.value)

"""Models under a plan: equal to masked attention written plainly, and with a cache equal to the whole at once."""

from dataclasses import replace

import pytest
import torch
from attention_models import (
    BLOCK,
    CAUSAL,
    KINDS,
    SEQ2SEQ,
    attention_model,
    inputs,
    keep_all,
    logits,
    masked_plainly,
    random_plan,
)
from families import ids
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from secateur.attention.apply import attached
from secateur.attention.definition import masked
from secateur.attention.plan import plan_of
from secateur.errors import UsageError

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("family", [*CAUSAL, "gpt_neox", "phi3", "mixtral", "bert", *SEQ2SEQ])
@pytest.mark.parametrize("padded", ["no", "right", "left"])
def test_a_plan_that_keeps_everything_changes_nothing(family, padded):
    model, given = attention_model(family), inputs(family)
    real = torch.ones(2, 23, dtype=torch.long)
    if padded != "no":
        real[0, slice(-6, None) if padded == "right" else slice(6)] = 0
        given["attention_mask"] = real
    dense = logits(model, **given)
    with attached(model, keep_all(model)) as said:
        kept = logits(model, **given)
    rows = torch.ones(dense.shape[:2], dtype=torch.bool) if family in SEQ2SEQ else real.bool()
    torch.testing.assert_close(kept[rows], dense[rows], **CLOSE)
    assert "dense" not in said.backends


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*CAUSAL, "gpt_neox", "bert", *SEQ2SEQ])
def test_it_equals_eager_attention_with_the_pairs_masked_one_by_one(family, kind):
    model, given = attention_model(family), inputs(family)
    real = torch.ones(2, 23, dtype=torch.long)
    real[1, -5:] = 0
    plan = random_plan(model, kind)
    for options in ({}, {"attention_mask": real}):
        with attached(model, plan):
            ours = logits(model, **given, **options)
        with masked_plainly(model, plan):
            theirs = logits(model, **given, **options)
        rows = real.bool() if options and family not in SEQ2SEQ else torch.ones(ours.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(ours[rows], theirs[rows], **CLOSE)
        assert (ours - logits(model, **given, **options))[rows].abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CAUSAL)
def test_decoding_with_a_cache_equals_the_whole_at_once(family, kind, cache):
    model, tokens = attention_model(family), ids(2, 26)
    memory = (
        DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    )
    with attached(model, random_plan(model, kind)):
        whole = logits(model, input_ids=tokens)
        parts, at = [], 0
        for length in (9, 4, 1, 6, 1, 1, 1, 3):  # chunks that begin inside a block, too
            with torch.no_grad():
                parts.append(model(input_ids=tokens[:, at : at + length], cache=memory).logits)
            at += length
    assert at == 26
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3", "opt"])
def test_padding_on_the_left_moves_the_mask_with_the_text(family, kind):
    model, tokens = attention_model(family), ids(3, 20)
    lengths = (20, 13, 6)
    real = torch.tensor([[0] * (20 - length) + [1] * length for length in lengths])
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    if family == "opt":  # it counts by itself
        positions = None
    with attached(model, random_plan(model, kind)) as said:
        batch = logits(model, input_ids=tokens, attention_mask=real, position_ids=positions)
        for row, length in enumerate(lengths):
            alone = logits(model, input_ids=tokens[row : row + 1, 20 - length :])
            torch.testing.assert_close(batch[row, 20 - length :], alone[0], **CLOSE)
    assert any("left" in reason for reason in said.reasons) or family in ("mistral", "gemma3")


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}, {"num_beams": 2}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_equals_decoding_without_a_cache(kind, options):
    model, tokens = attention_model("llama"), ids(2, 13)
    real = torch.ones_like(tokens)
    real[0, :5] = 0
    common = {"attention_mask": real, "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    if "num_beams" in options:
        plain = {"num_beams": 2, "use_cache": False}
    else:
        plain = {"use_cache": False}
    with attached(model, random_plan(model, kind)) as said, torch.no_grad():
        ours = model.generate(tokens, **common, **options)
        theirs = model.generate(tokens, **common, **plain)
    assert torch.equal(ours, theirs)
    assert set(said.backends) == {"entries"}  # padded on the left
    assert not torch.equal(ours, model.generate(tokens, **common))


@pytest.mark.parametrize("family", ["llama", "gpt2", "marian"])
def test_a_decoded_row_reads_the_kept_blocks_only(family, monkeypatch):
    model = attention_model(family)
    read = []
    monkeypatch.setattr(
        "secateur.attention.decode.masked",
        lambda query, key, *rest, **how: read.append(key.shape[2]) or masked(query, key, *rest, **how),
    )
    common = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    real = torch.ones(2, 30, dtype=torch.long)
    real[1, -3:] = 0  # seen by the encoder of marian only
    options = {"attention_mask": real} if family == "marian" else {}
    with attached(model, random_plan(model, "toeplitz", density=0.1)) as said, torch.no_grad():
        ours = model.generate(ids(2, 30), **common, **options)
        theirs = model.generate(ids(2, 30), **common, **options, use_cache=False)
    assert torch.equal(ours, theirs)
    assert said.backends["decode"] == len(read) == (84 if family == "marian" else 38)  # marian begins with one
    assert sum(length % BLOCK == 0 and length <= 12 for length in read) > len(read) / 4  # of 30 keys and more


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_cross_attention_knows_where_the_decoder_is(family, kind):
    model = attention_model(family)
    given = inputs(family, target=14)
    real = torch.ones(2, 23, dtype=torch.long)
    real[1, -7:] = 0
    memory = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    with attached(model, random_plan(model, kind)), torch.no_grad():
        whole = model(**given, attention_mask=real).logits
        source = model.get_encoder()(input_ids=given["input_ids"], attention_mask=real)
        parts, at = [], 0
        for length in (5, 1, 1, 6, 1):
            step = given["decoder_input_ids"][:, at : at + length]
            parts.append(
                model(encoder_outputs=source, attention_mask=real, decoder_input_ids=step, cache=memory).logits
            )
            at += length
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
        for options in ({}, {"cache_implementation": "static"}):
            common = {"attention_mask": real, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
            ours = model.generate(given["input_ids"], **common, **options)
            theirs = model.generate(given["input_ids"], **common, use_cache=False)
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_padded_on_the_left_is_masked_as_if_it_were_alone(kind):
    model = attention_model("t5")  # relative positions: nothing else changes with the padding
    given = inputs("t5")
    real = torch.ones(2, 23, dtype=torch.long)
    real[0, :9] = 0
    with attached(model, random_plan(model, kind)):
        batch = logits(model, **given, attention_mask=real)
        alone = logits(model, input_ids=given["input_ids"][:1, 9:], decoder_input_ids=given["decoder_input_ids"][:1])
    torch.testing.assert_close(batch[:1], alone, **CLOSE)


def test_padding_behind_the_calibrated_length_does_not_count():
    model, given = attention_model("t5"), inputs("t5", seqlen=16)
    sites = random_plan(model, "absolute").sites
    short = {name: replace(mask, rows=mask.rows[:, :4, :4]) for name, mask in sites.items()}
    plan = plan_of(model, short)
    longer = torch.nn.functional.pad(given["input_ids"], (0, 5))
    real = torch.tensor([[1] * 16 + [0] * 5] * 2)
    with attached(model, plan):
        alone = logits(model, **given)
        with pytest.raises(UsageError, match="calibrated at 16 tokens"):
            logits(model, **given | {"input_ids": longer, "attention_mask": real})
    cross = plan_of(model, {name: mask for name, mask in short.items() if mask.cross})
    with attached(model, cross):
        alone = logits(model, **given)
        batch = logits(model, **given | {"input_ids": longer, "attention_mask": real})
    torch.testing.assert_close(batch, alone, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_padded_on_the_left_moves_the_mask_of_cross_attention_too(kind):
    model = attention_model("t5")
    given = inputs("t5")
    real = torch.ones(2, 15, dtype=torch.long)
    real[0, :6] = 0
    with attached(model, random_plan(model, kind)):
        batch = logits(model, **given, decoder_attention_mask=real)
        alone = logits(model, input_ids=given["input_ids"][:1], decoder_input_ids=given["decoder_input_ids"][:1, 6:])
    torch.testing.assert_close(batch[:1, 6:], alone, **CLOSE)


def test_a_mask_made_by_the_caller_and_its_position_ids_are_enough():
    model, tokens, memory = attention_model("llama"), ids(2, 20), DynamicCache()
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :7] = False
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    mask = (real[:, None, None, :] & torch.ones(20, 20, dtype=torch.bool).tril()) | torch.eye(20, dtype=torch.bool)
    with attached(model, random_plan(model, "hybrid")):
        alone = logits(model, input_ids=tokens[:1, 7:])
        whole = logits(model, input_ids=tokens, attention_mask=mask, position_ids=positions)
        parts = [
            logits(
                model,
                input_ids=tokens[:, a:b],
                attention_mask=mask[:, :, a:b, :b],
                position_ids=positions[:, a:b],
                cache=memory,
            )
            for a, b in ((0, 9), (9, 13), (13, 14), (14, 20))
        ]
    torch.testing.assert_close(whole[:1, 7:], alone, **CLOSE)
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], **CLOSE)


def test_packed_sequences_begin_anew():
    model, tokens = attention_model("llama"), ids(1, 21)
    positions = torch.tensor([[*range(9), *range(12)]])
    with attached(model, random_plan(model, "hybrid")):
        packed = logits(model, input_ids=tokens, position_ids=positions, use_cache=False)
        alone = [logits(model, input_ids=part) for part in (tokens[:, :9], tokens[:, 9:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "bert", "marian", "t5"])
def test_gradients_are_those_of_masked_attention(family):
    model, given = attention_model(family), inputs(family)
    plan, found = random_plan(model, "hybrid"), []
    for way in (attached, masked_plainly):
        model.zero_grad()
        with way(model, plan):
            model(**given).logits.logsumexp(-1).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-4, rtol=1e-4)
        assert gradient.isfinite().all()


def test_gradient_checkpointing_sees_the_same_masks():
    model, given = attention_model("marian").train(), inputs("marian")
    plan, found = random_plan(model, "hybrid"), []
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.config.dropout = model.config.attention_dropout = 0.0
    for part in model.modules():
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        with attached(model, plan):
            model(**given, use_cache=False).logits.sum().backward()
        found.append(model.model.shared.weight.grad.clone())
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert", "marian"])
def test_the_backend_that_was_asked_for_runs(family):
    model, given = attention_model(family), inputs(family)
    real = torch.ones(2, 23, dtype=torch.long)
    real[1, -5:] = 0
    plan = random_plan(model, "hybrid")
    found = {}
    for backend in ("reference", "gather"):
        with attached(model, plan, backend) as said:
            found[backend] = logits(model, **given, attention_mask=real)
        assert said.backends == {backend: len(plan.sites)} and not said.reasons
    rows = torch.ones(found["gather"].shape[:2], dtype=torch.bool) if family == "marian" else real.bool()
    torch.testing.assert_close(found["gather"][rows], found["reference"][rows], **CLOSE)


def test_chunks_that_begin_inside_a_block_run_on_the_kernels_too():
    model, tokens, memory = attention_model("llama"), ids(2, 25), DynamicCache()
    with attached(model, random_plan(model, "hybrid"), "gather") as said:
        whole = logits(model, input_ids=tokens)
        parts = [logits(model, input_ids=tokens[:, a:b], cache=memory) for a, b in ((0, 11), (11, 18), (18, 25))]
    assert said.backends == {"gather": 8}
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)

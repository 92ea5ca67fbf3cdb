"""Sites, what an intercepted call is told, and the model afterwards."""

import copy

import pytest
import torch
from attention_models import attention_model, inputs, keep_all, logits, random_plan
from families import ids, make
from transformers import DynamicCache, StaticCache

from secateur.attention.apply import attached
from secateur.attention.definition import attend
from secateur.attention.hooks import intercept
from secateur.attention.plan import plan_of
from secateur.attention.sites import find_sites
from secateur.errors import ModelNotSupported, RunFailure, UnknownName, UsageError


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("llama", {"decoder-self": [(4, 2, 8, True)] * 2}),
        ("gpt2", {"decoder-self": [(4, 4, 8, True)] * 2}),
        ("gpt_neox", {"decoder-self": [(4, 4, 8, True)] * 2}),
        ("gemma3", {"decoder-self": [(4, 2, 8, True)] * 2}),
        ("jamba", {"decoder-self": [(4, 2, 8, True)]}),
        ("bert", {"encoder-self": [(4, 4, 8, False)] * 2}),
        ("albert", {"encoder-self": [(4, 4, 8, False)]}),
        (
            "t5",
            {
                "encoder-self": [(4, 4, 8, False)] * 2,
                "decoder-self": [(4, 4, 8, True)] * 2,
                "decoder-cross": [(4, 4, 8, False)] * 2,
            },
        ),
        (
            "marian",
            {
                "encoder-self": [(4, 4, 8, False)] * 2,
                "decoder-self": [(2, 2, 16, True)] * 2,
                "decoder-cross": [(2, 2, 16, False)] * 2,
            },
        ),
    ],
)
def test_sites_are_told_apart_by_module(family, counts):
    model = attention_model(family)
    sites = find_sites(model)
    for kind, shapes in counts.items():
        found = [site for site in sites if site.family == kind]
        assert [(s.heads, s.kv_heads, s.head_size, s.causal) for s in found] == shapes
        assert [site.ordinal for site in found] == list(range(len(shapes)))
    assert len(sites) == sum(map(len, counts.values())) == len({site.name for site in sites})
    assert all("Attention" in type(model.get_submodule(site.name)).__name__ for site in sites)


def test_a_count_that_the_modules_do_not_read_is_not_believed():
    model = make("bert")
    model.config.num_key_value_heads = 2
    assert {site.kv_heads for site in find_sites(model)} == {4}


def test_both_directions_if_the_config_says_so():
    model = make("llama")
    config = type(model.config)(**(model.config.to_dict() | {"is_causal": False}))
    assert {site.family for site in find_sites(type(model)(config))} == {"encoder-self"}


@pytest.mark.parametrize(
    ("family", "message"),
    [("bloom", "no attention that can be replaced"), ("mamba", "no attention"), ("gpt_oss", "attention sinks")],
)
def test_other_attention_is_refused(family, message):
    model = make(family)
    with pytest.raises(ModelNotSupported, match=message), intercept(model, attend):
        pass
    with pytest.raises(ModelNotSupported, match=message):
        plan_of(model, {})


def test_soft_capped_scores_are_refused():
    import transformers

    options = make("gemma3").config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size")
    config = transformers.Gemma2Config(**{name: options[name] for name in names}, num_key_value_heads=2)
    with pytest.raises(ModelNotSupported, match="soft-capped"):
        find_sites(transformers.Gemma2ForCausalLM(config))


def test_an_argument_that_is_not_honoured_is_refused_not_ignored():
    model = make("llama")
    with intercept(model, attend), pytest.raises(ModelNotSupported, match="'softcap'"):
        model(ids(1, 5), softcap=30.0)
    with intercept(model, attend), pytest.raises(UsageError, match="no maps: leave out output_attentions"):
        model(ids(1, 5), output_attentions=True)


def state(model):
    """What interception touches."""
    return (
        [part.config._attn_implementation for part in model.modules() if hasattr(part, "config")],
        [len(part._forward_pre_hooks) for part in model.modules()],
        [sorted(vars(part)) for part in model.modules()],
        copy.deepcopy(getattr(model, "generation_config", None)),
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "t5", "marian"])
def test_afterwards_the_model_is_what_it_was(family, implementation):
    model, given = attention_model(family), inputs(family)
    model.set_attn_implementation(implementation)
    before, dense = state(model), logits(model, **given)
    with attached(model, random_plan(model, "hybrid")):
        assert not torch.equal(logits(model, **given), dense)
    assert state(model) == before
    assert torch.equal(logits(model, **given), dense)

    class Stop(Exception):
        pass

    def stop(call):
        raise Stop

    with pytest.raises(Stop), intercept(model, stop):
        model(**given)
    assert state(model) == before
    assert torch.equal(logits(model, **given), dense)


def test_one_plan_at_a_time_but_two_models():
    one, two = make("llama"), make("qwen2")
    before = state(one)
    with attached(one, keep_all(one)):
        inside = logits(one, input_ids=ids(1, 9))
        with pytest.raises(UsageError, match="replaced already"), attached(one, keep_all(one)):
            pass
        with attached(two, random_plan(two, "toeplitz")):
            assert torch.equal(logits(one, input_ids=ids(1, 9)), inside)
        copied = copy.deepcopy(one)
        assert torch.isfinite(logits(one, input_ids=ids(1, 9))).all()
    assert state(one) == before
    assert not any(part is one for part in copied.modules())


def test_a_bad_backend_or_plan_touches_nothing():
    model = make("llama")
    before, plan = state(model), random_plan(make("mistral"), "hybrid")
    with pytest.raises(UnknownName, match=r"attention backend 'tritn'. Did you mean 'triton'"):
        attached(model, keep_all(model), "tritn").__enter__()
    with pytest.raises(UsageError, match="this is a llama model"):
        attached(model, plan).__enter__()
    assert state(model) == before


def calls(model, run):
    found = []

    def note(call):
        found.append(call)
        return attend(call)

    with intercept(model, note), torch.no_grad():
        run()
    return found


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_call_knows_where_it_stands(cache):
    model, tokens = make("llama"), ids(2, 12)
    memory = (
        DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    )

    def run():
        for start, stop in ((0, 7), (7, 10), (10, 11), (11, 12)):
            model(tokens[:, start:stop], cache=memory)

    found = calls(model, run)
    assert [call.site.ordinal for call in found] == [0, 1] * 4
    assert [call.offset for call in found] == [0, 0, 7, 7, 10, 10, 11, 11]
    for call in found:
        assert call.query_positions.tolist() == [list(range(call.offset, call.offset + call.query.shape[2]))]
        assert call.key_positions.tolist() == [list(range(call.key.shape[2]))]
        allowed = call.allowed()
        seen = torch.ones(1, 1, *call.scores().shape[2:], dtype=torch.bool) if allowed is None else allowed
        wanted = call.key_positions[0] <= call.query_positions[0, :, None]
        assert torch.equal(seen[0, 0], wanted) and call.plain


def test_scores_are_what_the_softmax_is_taken_of():
    for family in ("llama", "t5", "gemma3"):
        model, given = attention_model(family), inputs(family)
        for call in calls(model, lambda model=model, given=given: model(**given)):
            value = call.value.repeat_interleave(call.site.heads // call.site.kv_heads, 1)
            parts = [call.scores(slice(at, at + 5)) for at in range(0, call.query.shape[2], 5)]
            wanted = (torch.cat(parts, 2).softmax(-1) @ value).transpose(1, 2)
            torch.testing.assert_close(attend(call), wanted, atol=1e-5, rtol=1e-5)


def test_padding_and_windows_are_said():
    model, real = make("llama"), torch.ones(2, 7, dtype=torch.long)
    real[0, 5:] = 0
    (first, _) = calls(model, lambda: model(ids(2, 7), attention_mask=real))
    assert first.plain and first.offset == 0 and first.key_keep.tolist() == real.bool().tolist()
    real = real.flip(-1)
    (first, _) = calls(model, lambda: model(ids(2, 7), attention_mask=real))
    assert first.plain and first.offset is None and first.key_keep.tolist() == real.bool().tolist()
    assert first.query_positions[0].tolist() == [0, 0, 0, 1, 2, 3, 4]
    windowed = make("mistral")  # of 8
    (first, _) = calls(windowed, lambda: windowed(ids(2, 7)))
    assert first.plain
    (first, _) = calls(windowed, lambda: windowed(ids(2, 12)))
    assert not first.plain and first.offset == 0
    assert first.allowed()[0, 0].sum(-1).max() == 8


def test_a_mask_made_by_the_caller_is_honoured():
    model, tokens = make("llama"), ids(2, 9)
    shape = (2, 1, 9, 9)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)).lt(0.5) | torch.eye(9, dtype=torch.bool)
    mask = mask.tril()
    dense = logits(model, input_ids=tokens, attention_mask=mask)
    additive = torch.zeros(shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with attached(model, keep_all(model)) as said:
        for given in (mask, additive):
            torch.testing.assert_close(logits(model, input_ids=tokens, attention_mask=given), dense)
    assert set(said.backends) == {"entries"}


def test_a_backend_that_was_asked_for_says_what_it_cannot_take():
    model, tokens = make("llama"), ids(2, 9)
    real = torch.ones(2, 9, dtype=torch.long)
    real[0, :4] = 0
    with attached(model, random_plan(model, "hybrid"), "gather"):
        with pytest.raises(UsageError, match=r"'gather' cannot run model.layers.0.self_attn: the batch is padded"):
            logits(model, input_ids=tokens, attention_mask=real)
        logits(model, input_ids=tokens, attention_mask=real.flip(-1))


def test_a_plan_that_is_too_short_says_so_and_leaves_the_model_whole():
    model = make("llama")
    before, tokens = state(model), torch.cat([ids(1, 40), ids(1, 30)], 1)
    with pytest.raises(UsageError, match="calibrated at 64 tokens"), attached(model, random_plan(model, "absolute")):
        model(tokens)
    assert state(model) == before


def test_a_cache_that_lies_about_its_length_is_not_trusted():
    class Short(DynamicCache):
        def update(self, *args, **kwargs):
            keys, values = super().update(*args, **kwargs)
            return keys[:, :, -3:], values[:, :, -3:]

    model = make("llama")
    with intercept(model, attend), pytest.raises(RunFailure, match="promised 5 keys and gave 3"):
        model(ids(1, 5), cache=Short())


def test_sites_left_out_stay_dense():
    model, tokens = make("llama"), ids(1, 20)
    plan = random_plan(model, "toeplitz", density=0.2)
    first, second = plan.model_sites
    part = plan_of(model, {second.name: plan.sites[second.name]})
    with attached(model, part) as said:
        ours = calls_outputs(model, tokens)
    dense = calls_outputs(model, tokens)
    torch.testing.assert_close(ours[0], dense[0], atol=1e-6, rtol=1e-6)
    assert (ours[1] - dense[1]).abs().max() > 1e-3
    assert said.backends["dense"] == 1 and first.name not in part.sites


def calls_outputs(model, tokens):
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states[1:]

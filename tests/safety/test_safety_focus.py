"""Attention on the task: against naive definitions on the maps that transformers returns."""

from __future__ import annotations

import math

import pytest
import torch
from families import make
from safety_bytes import TASKS, WRAPPERS, byte_model, byte_tokenizer, wrapped

from secateur.errors import InvalidParameter, UsageError
from secateur.safety.focus import MEASURES, RANKS, compare_focus, eager, focus
from secateur.safety.records import Prompt
from secateur.safety.rendered import render


def naive(a: list[list[float]], task: list[int]) -> dict[str, float]:
    """One head's measures, row by row and entry by entry."""
    length = len(a)
    template = [i for i in range(length) if i not in task]

    def bits(row: list[float]) -> float:
        total = sum(row)
        return -sum(x / total * math.log2(x / total) for x in row if x > 0)

    def ranks(i: int, columns: list[int]) -> int:
        order = sorted(range(length), key=lambda j: -a[i][j])
        return sum(rank for rank, j in enumerate(order) if j in columns and a[i][j] != 0)

    within = sum(sum(a[i][j] for j in task) for i in task) / len(task)
    even = sum(sum(j <= i for j in task) / (i + 1) for i in task) / len(task)
    last = sum(a[-1][j] for j in task)
    return {
        "last": last,
        "last_lift": last / (len(task) / length),
        "within": within,
        "within_lift": within / even,
        "entropy": sum(bits(a[i]) / math.log2(i + 1) for i in range(1, length)) / (length - 1),
        "entropy_no_sink": sum(bits(a[i][1:]) / math.log2(i) for i in range(2, length)) / (length - 2),
        "rank_task": sum(ranks(i, task) for i in task),
        "rank_template": sum(ranks(i, template) for i in template),
        "rank_last": ranks(length - 1, task),
        "entropy_bits": sum(bits(row) for row in a) / length,
    }


@pytest.mark.parametrize("chat", [True, False])
def test_streamed_measures_are_the_naive_ones(chat):
    model, tokenizer = byte_model(), byte_tokenizer()
    task = TASKS[0]
    prompts = [
        Prompt("a", "own", f"  ask how to '{task}' now", "benign", template="t", span=(14, 14 + len(task))),
        Prompt("b", "own", task, "benign"),
    ]
    found = focus(model, tokenizer, prompts, chat=chat, ranks=True, batch_size=2)
    model.set_attn_implementation("eager")
    for number, prompt in enumerate(prompts):
        text = f"<u>{prompt.text.strip()}\n<a>" if chat else prompt.text
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        begin = len(ids) - len(text) + text.index(task)  # a byte a token, behind <s> or not
        columns = list(range(begin, begin + len(task)))
        assert found.prompts[number].tokens == len(ids) and found.prompts[number].task == len(task)
        with torch.no_grad():
            maps = model(torch.tensor([ids]), output_attentions=True).attentions
        for layer, attention in enumerate(maps):
            for head in range(attention.shape[1]):
                expected = naive(attention[0, head].double().tolist(), columns)
                for name in (*MEASURES, *RANKS):
                    got = float(found.values[name][number, layer, head])
                    assert got == pytest.approx(expected[name], rel=2e-3, abs=1e-4), (name, layer, head)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gpt_neox", "mistral", "gemma3", "gpt_oss", "jamba"])
def test_families_give_their_maps(family):
    model = make(family)
    model.resize_token_embeddings(258)
    prompts = [Prompt("a", "own", "go", "benign"), Prompt("b", "own", "a cat sat", "benign", span=(6, 9))]
    found = focus(model, byte_tokenizer(), prompts, chat=False)
    layers = {"jamba": 1}.get(family, 2)  # the other blocks are Mamba's
    assert found.values["last"].shape == (2, layers, 4)
    assert (found.values["last"] > 0).all() and (found.values["entropy"] <= 1 + 1e-5).all()


def test_the_attention_implementation_is_put_back():
    model = byte_model()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), eager(model):
        assert model.config._attn_implementation == "eager"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
    focus(model, byte_tokenizer(), wrapped()[:1])
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


def test_no_set_of_maps_is_ever_held():
    """Two layers' maps at once would be more than one: the first is gone when the second arrives."""
    import gc
    import weakref

    from secateur.safety import focus as module

    model, alive, most = byte_model(num_hidden_layers=4), [], [0]
    plain = module.measure

    def counting(maps, *rest):
        alive.append(weakref.ref(maps.untyped_storage()))
        gc.collect()
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return plain(maps, *rest)

    module.measure = counting
    try:
        focus(model, byte_tokenizer(), wrapped()[:1])
    finally:
        module.measure = plain
    assert len(alive) == 4 and most[0] <= 2


def test_spans_are_found_through_a_template_that_trims():
    tokenizer = byte_tokenizer()
    before, after = WRAPPERS["play"]
    prompt = Prompt("a", "own", f"  {before}{TASKS[1]}{after} ", "benign", template="play",
                    span=(2 + len(before), 2 + len(before) + len(TASKS[1])))  # fmt: skip
    found = render(tokenizer, prompt)
    assert tokenizer.decode([found.ids[i] for i in found.task]) == TASKS[1]
    assert tokenizer.decode([found.ids[i] for i in found.template]) == before + after
    whole = render(tokenizer, Prompt("b", "own", "a task", "benign"))
    assert tokenizer.decode([whole.ids[i] for i in whole.task]) == "a task" and whole.template == ()


def test_a_planted_change_is_found_and_equal_models_do_not_differ():
    """Sharper queries: entropy must fall, in every template."""
    model, tokenizer = byte_model(initializer_range=0.1), byte_tokenizer()
    extra = [Prompt(f"{p.id}-x", "own", p.text + " soon", "benign", template=p.template, span=p.span,
                    task=f"{p.task}-x") for p in wrapped()]  # fmt: skip
    prompts = wrapped() + extra
    dense = focus(model, tokenizer, prompts)
    same = compare_focus(dense, focus(model, tokenizer, prompts, batch_size=1))
    assert all(abs(change.value) < 1e-4 for change in same.overall.values())
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.mul_(8.0)
    sharp = compare_focus(dense, focus(model, tokenizer, prompts))
    assert sharp.overall["entropy"].sign == -1
    rows = [each for each in sharp.templates if each.measure == "entropy"]
    assert {row.template for row in rows} == {"(bare)", "play", "note"}
    assert all(row.change.sign == -1 and row.p <= row.holm < 0.05 for row in rows)
    assert {"overall", "templates"} == sharp.to_dict().keys() and "entropy" in str(sharp)
    assert len(dense.to_dict()["prompts"]) == len(prompts) and "own" not in str(dense.to_dict()["prompts"][0])


def test_bad_input_is_one_line():
    model, tokenizer = byte_model(), byte_tokenizer()
    good = wrapped()[1]
    with pytest.raises(UsageError, match="no prompts for focus"):
        focus(model, tokenizer, [])
    with pytest.raises(UsageError, match="'a' has a template and no span"):
        focus(model, tokenizer, [Prompt("a", "own", "some text", "benign", template="t")])
    with pytest.raises(UsageError, match="span of prompt 'a' must lie in its 9 characters"):
        focus(model, tokenizer, [Prompt("a", "own", "some text", "benign", span=(3, 12))])
    with pytest.raises(UsageError, match="gives no attention maps"):
        focus(_resized("mamba"), tokenizer, [good], chat=False)
    with pytest.raises(UsageError, match="looks both ways"):
        focus(_resized("bert"), tokenizer, [Prompt("a", "own", "some text", "benign")], chat=False)
    with pytest.raises(InvalidParameter, match="batch_size"):
        focus(model, tokenizer, [good], batch_size=True)
    with pytest.raises(UsageError, match="changes the text of prompt"):
        focus(model, byte_tokenizer("{{ messages[0].content | upper }}"), [good])
    one = focus(model, tokenizer, [good])
    with pytest.raises(UsageError, match="with and without the chat template"):
        compare_focus(one, focus(model, tokenizer, [good], chat=False))
    with pytest.raises(UsageError, match="Only the same prompts"):
        compare_focus(one, focus(model, tokenizer, [wrapped()[2]]))


def _resized(family):
    model = make(family)
    model.resize_token_embeddings(258)
    return model

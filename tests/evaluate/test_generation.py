"""What the models write: greedy, equal to a plain loop, in the order of the prompts."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from small_models import CAUSAL, WORDS, tiny, tiny_bert, tiny_t5
from test_fidelity import pruned

from secateur.errors import InvalidParameter, UsageError
from secateur.evaluate import continuations, generation
from secateur.evaluate.generation import PROMPTS, Prompt

PLAIN = (Prompt("w1 w2 w3"), Prompt("w9"))


def greedy(model, ids, count):
    """The likeliest token again and again, each time from the whole text."""
    ids = torch.tensor([ids])
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
        if token == 1:  # the end
            break
    return ids[0, start:].tolist()


@pytest.mark.parametrize("family", CAUSAL)
def test_agrees_with_a_plain_loop_whatever_the_model_likes_to_sample(family, tokenizer) -> None:
    model = tiny(family)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 3.0
    model.generation_config.repetition_penalty = 5.0
    written = continuations(model, tokenizer, prompts=PLAIN, tokens=12)
    expected = [greedy(model, [1, 2, 3], 12), greedy(model, [9], 12)]
    assert [list(ids) for ids in written.ids] == expected
    assert written.texts[0] == " ".join(WORDS[i] for i in expected[0])


def test_both_models_side_by_side_and_where_they_part(tokenizer) -> None:
    dense = tiny("Llama")
    model = pruned(dense, 0.6)
    found = generation(model, dense, tokenizer, prompts=PLAIN, tokens=12)
    for probe, ids in zip(found.probes, ([1, 2, 3], [9]), strict=True):
        before, after = greedy(dense, ids, 12), greedy(model, ids, 12)
        parted = next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), None)
        assert probe.first_difference == parted and probe.dense.split() == [WORDS[i] for i in before]
        assert (probe.dense_tokens, probe.pruned_tokens) == (len(before), len(after))
    assert any(probe.first_difference is not None for probe in found.probes) and "differ after" in str(found)
    kept = continuations(dense, tokenizer, prompts=PLAIN, tokens=12)
    assert generation(model, kept, tokenizer, prompts=PLAIN, tokens=12) == found
    assert json.loads(json.dumps(found.to_dict()))["probes"][0]["prompt"] == "w1 w2 w3"


def test_a_model_writes_like_itself(tokenizer) -> None:
    model = tiny("Llama").train()
    found = generation(model, model, tokenizer, prompts=PLAIN, tokens=5)
    assert [probe.first_difference for probe in found.probes] == [None, None] and model.training
    assert str(found) == "2 of 2 prompts continued alike, 5 tokens each"


def test_an_early_end_is_a_difference(tokenizer) -> None:
    dense = tiny("Llama")
    model = copy.deepcopy(dense)
    first = greedy(dense, [9], 3)
    model.generation_config.eos_token_id = first[1]
    (probe,) = generation(model, dense, tokenizer, prompts=PLAIN[1:], tokens=3).probes
    assert (probe.first_difference, probe.pruned_tokens, probe.dense_tokens) == (2, 2, 3)


def test_chat_prompts_go_through_the_template_or_are_left_out_with_the_reason(tokenizer) -> None:
    model, prompts = tiny("Llama"), (Prompt("w4"), Prompt("w5", chat=True))
    found = generation(model, model, tokenizer, prompts=prompts, tokens=4)
    assert [probe.prompt for probe in found.probes] == ["w4"] and found.left_out == (("w5", "no chat template"),)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "w2 {{ messages[0].content }} {% if add_generation_prompt %}w3{% endif %}"
    written = continuations(model, chatty, prompts=prompts, tokens=4)
    assert list(written.ids[1]) == greedy(model, [2, 5, 3], 4)


def test_the_models_positions_are_a_limit(tokenizer) -> None:
    model = tiny("GPT2")
    long = Prompt(" ".join(["w5"] * 60))
    found = generation(model, model, tokenizer, prompts=(long, Prompt("w1 " * 64), *PLAIN), tokens=48)
    assert found.probes[0].dense_tokens == 4
    assert found.left_out[0][1] == "64 tokens, and there is room for 64"


def test_what_cannot_write_is_refused(tokenizer) -> None:
    for model in (tiny_bert(), tiny_t5()):
        with pytest.raises(UsageError, match=f"Generation needs a causal .* {type(model).__name__} is not one"):
            generation(model, model, tokenizer, prompts=PLAIN)
    model = tiny("Llama")
    with pytest.raises(InvalidParameter, match="'tokens' of generation"):
        generation(model, model, tokenizer, prompts=PLAIN, tokens=0)
    with pytest.raises(UsageError, match="no prompt that it can use: none was given"):
        generation(model, model, tokenizer, prompts=())
    with pytest.raises(UsageError, match="no prompt that it can use: no chat template"):
        generation(model, model, tokenizer, prompts=[Prompt("w1", chat=True)])
    kept = continuations(model, tokenizer, prompts=PLAIN, tokens=3)
    with pytest.raises(UsageError, match="of 3 tokens, not of these 2 with 4: make them anew"):
        generation(model, kept, tokenizer, prompts=PLAIN, tokens=4)


def test_the_usual_prompts_are_few_and_of_both_kinds() -> None:
    assert 4 <= len(PROMPTS) <= 10 and {prompt.chat for prompt in PROMPTS} == {True, False}

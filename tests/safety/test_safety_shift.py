"""The perplexity of a prompt's parts: against a plain loop over one row, and a planted change."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from families import make
from safety_bytes import TASKS, byte_model, byte_tokenizer, wrapped

from secateur.data.text import Text
from secateur.errors import InvalidParameter, TextTooShort, UsageError
from secateur.safety.records import Prompt
from secateur.safety.shift import Shifted, ShiftResult, compare_shift, shift

BOOK = Text("book", "test", ("The gardener walked along the wall and looked at the trees. " * 12,), "typed here")


def plain_nats(model, ids):
    """-log p of each id, by one pass over one row."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [math.nan] + [-float(log_p[t - 1, ids[t]]) for t in range(1, len(ids))]


@pytest.mark.parametrize("chat", [True, False])
def test_parts_are_their_definitions(chat):
    model, tokenizer = byte_model(), byte_tokenizer()
    task, before, after = TASKS[0], "one asks how to '", "' here"
    prompt = Prompt("a", "own", before + task + after, "benign", template="t", span=(len(before), len(before + task)))
    found = shift(model, tokenizer, [prompt], preamble=BOOK, chat=chat)

    def row(text):
        text = f"<u>{text}\n<a>" if chat else text
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        return plain_nats(model, ids), len(ids) - len(text), text

    nats, head, text = row(prompt.text)
    at, first = head + text.index(task), head + text.index(prompt.text)
    template = nats[first:at] + nats[at + len(task) : first + len(prompt.text)]
    assert found.prompts[0].nats["inside"] == pytest.approx(np.mean(nats[at + 1 : at + len(task)]), abs=1e-4)
    assert found.prompts[0].nats["template"] == pytest.approx(np.mean(template), abs=1e-4)
    assert found.prompts[0].nats["whole"] == pytest.approx(np.mean(nats[first : first + len(prompt.text)]), abs=1e-4)
    nats, head, text = row(task)
    at = head + text.index(task)
    assert found.prompts[0].nats["alone"] == pytest.approx(np.mean(nats[at + 1 : at + len(task)]), abs=1e-4)
    assert found.prompts[0].nats.keys() == {"alone", "inside", "behind", "template", "preamble", "whole"}


def test_the_preamble_is_as_long_as_the_template():
    from secateur.safety.shift import _arms

    tokenizer = byte_tokenizer()
    for prompt in wrapped():
        arms = _arms(tokenizer, prompt, BOOK, True, 0)
        if prompt.template is None:
            assert arms.keys() == {"whole", "alone"}
            continue
        extra = len(arms["behind"].template) - len(arms["whole"].template)
        assert -2 <= extra <= 2  # two new lines more, a space at an end less
        read = tokenizer.decode([arms["behind"].ids[i] for i in arms["behind"].template]).strip()
        assert read in BOOK.joined
        assert tokenizer.decode([arms["behind"].ids[i] for i in arms["behind"].task]) in TASKS
        again = _arms(tokenizer, prompt, BOOK, True, 0)
        assert again["behind"] == arms["behind"] and _arms(tokenizer, prompt, BOOK, True, 1) != arms


def test_batches_change_nothing_and_equal_models_do_not_differ():
    model, tokenizer = byte_model(), byte_tokenizer()
    prompts = wrapped()
    one, many = (shift(model, tokenizer, prompts, preamble=BOOK, batch_size=n) for n in (1, 7))
    change = compare_shift(one, many)
    assert all(abs(each.value) < 1e-5 for each in change.changes.values())
    assert one.prompts[0].nats.keys() == {"alone", "whole"}
    assert one.perplexity("template") > 1 and one.to_dict()["preamble"] == "book"
    assert not any(task in str(one.to_dict()) for task in TASKS)


def test_the_papers_aggregate_is_a_geometric_mean():
    model, tokenizer = byte_model(), byte_tokenizer()
    found = shift(model, tokenizer, wrapped(), preamble=BOOK)
    assert len(found.paper) == len(TASKS)
    for point in found.paper:
        whole = {each.template: math.exp(each.nats["whole"]) for each in found.prompts if each.cluster == point.cluster}
        assert point.bare == pytest.approx(whole[None])
        assert point.inside == pytest.approx(math.sqrt(whole["play"] * whole["note"]))


def result(rows):
    prompts = tuple(Shifted(str(i), "", "t", str(i), nats) for i, nats in enumerate(rows))
    return ShiftResult(prompts, "book", "ab", False)


def test_a_rise_of_everything_is_not_special_to_templates():
    """The paper's reading, on a model that finds any text less likely: whole rises, the contrasts do not."""
    random = np.random.default_rng(0)
    parts = ("alone", "inside", "behind", "template", "preamble", "whole")
    dense = [{part: float(random.normal(3, 0.5)) for part in parts} for _ in range(30)]
    worse = [{part: value + 0.05 + float(random.normal(0, 0.02)) for part, value in row.items()} for row in dense]
    change = compare_shift(result(dense), result(worse))
    assert change.changes["whole"].sign == 1 and change.p["template"] < 1e-5
    assert change.changes["artificial"].sign == 0 and change.changes["specific"].sign == 0
    special = [row | {"template": row["template"] + 0.3} for row in worse]
    found = compare_shift(result(dense), result(special))
    assert found.changes["artificial"].sign == 1 and found.changes["specific"].sign == 0
    assert found.changes["artificial"].value == pytest.approx(0.3, abs=0.02)
    assert "artificial +0.3" in str(found) and found.to_dict()["p"]["artificial"] < 0.05


def test_a_damaged_model_finds_the_text_that_it_knew_less_likely():
    """One that has learnt the book, not the templates, then loses its feed-forward layers."""
    tokenizer = byte_tokenizer()
    model = byte_model(initializer_range=0.05).train()
    ids = torch.tensor([tokenizer(BOOK.joined[:240])["input_ids"]])
    optimiser = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(60):
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
    damaged = copy.deepcopy(model.eval())
    with torch.no_grad():
        for block in damaged.model.layers:
            block.mlp.down_proj.weight.zero_()
    prompts = [p for p in wrapped() if p.template]
    dense, pruned = (shift(each, tokenizer, prompts, preamble=BOOK) for each in (model, damaged))
    assert dense.perplexity("preamble") < dense.perplexity("template")
    change = compare_shift(dense, pruned).changes
    assert change["preamble"].sign == 1 and change["artificial"].sign == -1


def test_bad_input_is_one_line():
    model, tokenizer = byte_model(), byte_tokenizer()
    good = wrapped()[1]
    with pytest.raises(UsageError, match="no prompts for shift"):
        shift(model, tokenizer, [], preamble=BOOK)
    with pytest.raises(TextTooShort, match=r"'short' has 5 tokens, and a preamble needs \d+"):
        shift(model, tokenizer, [good], preamble=Text("short", "test", ("words",), ""))
    with pytest.raises(UsageError, match="has a single token"):
        shift(model, tokenizer, [Prompt("a", "own", "x", "benign")], preamble=BOOK)
    turns = (("user", "hello"), ("assistant", "yes"), ("user", "ask"))
    with pytest.raises(UsageError, match="prompts of one turn; prompt 'a' has 3"):
        shift(model, tokenizer, [Prompt("a", "own", "ask", "benign", messages=turns)], preamble=BOOK)
    with pytest.raises(InvalidParameter, match="batch_size"):
        shift(model, tokenizer, [good], preamble=BOOK, batch_size=0)
    with pytest.raises(UsageError, match=r"has \d+ tokens, and LlamaForCausalLM reads at most 64: leave it out"):
        shift(byte_model(max_position_embeddings=64), tokenizer, [good], preamble=BOOK)
    bert = make("bert")
    bert.resize_token_embeddings(258)
    with pytest.raises(UsageError, match="looks both ways"):
        shift(bert, tokenizer, [Prompt("a", "own", "some text", "benign")], preamble=BOOK)
    one = shift(model, tokenizer, [good], preamble=BOOK)
    with pytest.raises(UsageError, match="same preamble"):
        compare_shift(one, shift(model, tokenizer, [good], preamble=BOOK, chat=True))

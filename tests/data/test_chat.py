"""Conversations as ids: templates, which tokens are a response, budgets, padding."""

from __future__ import annotations

import pytest
import tokenizers
import torch
import transformers

from secateur.data.calibration import calibration, windows
from secateur.data.chat import encode
from secateur.data.instructions import Instructions
from secateur.errors import InvalidParameter, TextTooShort, UsageError

WORDS = ["<pad>", "<user>", "<bot>", "<end>", "<sys>", *(f"w{i}" for i in range(40))]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ {'user': '<user>', 'assistant': '<bot>', 'system': '<sys>'}[m.role] }} {{ m.content }} <end>\n"
    "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture
def tokenizer():
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


def talk(count, template="chat", counted="response", length=lambda i: i % 9 + 1):
    conversations = tuple(
        (("user", f"w{i % 40} w7"), ("assistant", " ".join(f"w{(i + j) % 40}" for j in range(length(i)))))
        for i in range(count)
    )
    return Instructions("talk", "test", conversations, "made up", template, counted)


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_the_response_ends_with_its_end_of_turn(tokenizer) -> None:
    (ids, response), *_ = encode(tokenizer, talk(3))
    assert words(tokenizer, ids) == "<user> w0 w7 <end> <bot> w0 <end>"
    assert words(tokenizer, ids[response]) == "w0 <end>"


def test_every_response_of_a_longer_talk_counts(tokenizer) -> None:
    one = (("system", "w9"), ("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4 w5"))
    ((ids, response),) = encode(tokenizer, Instructions("talk", "test", (one,), "made up"))
    assert words(tokenizer, ids[response]) == "w2 <end> w4 w5 <end>"
    assert words(tokenizer, ids[~response]) == "<sys> w9 <end> <user> w1 <end> <bot> <user> w3 <end> <bot>"


def test_plain_needs_no_template(tokenizer) -> None:
    tokenizer.chat_template = None
    (ids, response), *_ = encode(tokenizer, talk(3, "plain"))
    assert words(tokenizer, ids) == "w0 w7 w0" and response.tolist() == [False, False, True]
    with pytest.raises(UsageError, match=r"no chat template, which 'talk' needs: .*--template plain"):
        encode(tokenizer, talk(3))


def test_a_template_that_refuses_a_conversation_is_one_line(tokenizer) -> None:
    one = (("user", "w1"), ("tool", "w2"), ("assistant", "w3"))
    with pytest.raises(UsageError, match=r"roles user, tool, assistant .*no tools here.*--template plain"):
        encode(tokenizer, Instructions("talk", "test", (one,), "made up"))


@pytest.mark.parametrize(("n", "seqlen"), [(4, 16), (3, 9), (1, 40)])
def test_calibration_takes_exactly_the_budget_in_whole_conversations(tokenizer, n, seqlen) -> None:
    text = talk(60)
    drawn = calibration(tokenizer, text, n, seqlen, seed=3)
    lengths = drawn.mask.sum(1)
    assert int(lengths.sum()) == n * seqlen and int(lengths.max()) <= seqlen
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    whole = {tuple(one.ids.tolist()): len(one.ids) for one in encode(tokenizer, text)}
    rows = [tuple(row[mask].tolist()) for row, mask in zip(drawn.ids, drawn.mask, strict=True)]
    cut = [row for row in rows if row not in whole]
    for row in cut:
        assert any(other[: len(row)] == row for other in whole)
    assert len([row for row in cut if len(row) < seqlen]) <= 1  # only the last to be drawn may end early
    assert len(set(rows)) == len(rows)
    assert drawn.record["conversations_cut"] == len(cut) and drawn.record["conversations"] == len(rows)
    assert (drawn.record["samples"], drawn.record["seqlen"], drawn.record["tokens"]) == (n, seqlen, n * seqlen)


def test_the_seed_decides_and_the_hash_tells(tokenizer) -> None:
    first, second, other = (calibration(tokenizer, talk(60), 3, 16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, second.ids) and first.record == second.record
    assert first.record["sha256"] != other.record["sha256"]
    tokenizer.pad_token = "w3"
    padded = calibration(tokenizer, talk(60), 3, 16, seed=0)
    assert padded.record["sha256"] == first.record["sha256"] and not torch.equal(padded.ids, first.ids)


def test_too_few_conversations_say_what_there_is(tokenizer) -> None:
    with pytest.raises(TextTooShort, match=r"The 5 conversations of 'talk' .*ask for at most 2 samples"):
        calibration(tokenizer, talk(5), 4, 20)
    with pytest.raises(InvalidParameter, match="'n' of calibration"):
        calibration(tokenizer, talk(5), 0, 20)


def test_windows_are_conversations_in_order_with_what_counts(tokenizer) -> None:
    text = talk(12)
    cut = windows(tokenizer, text, 10, 7)
    encoded = encode(tokenizer, text)
    assert len(cut.ids) == 7
    for i in range(7):
        ids = cut.ids[i][cut.mask[i]]
        assert torch.equal(ids, encoded[i].ids[:10])
        assert (
            torch.equal(cut.counted[i][: len(ids)], encoded[i].response[:10]) and not cut.counted[i][len(ids) :].any()
        )
    everything = windows(tokenizer, talk(12, counted="all"), 10, 7)
    assert torch.equal(everything.counted, everything.mask) and everything.sha256 == cut.sha256


def test_a_question_that_fills_the_window_leaves_nothing_to_count(tokenizer) -> None:
    long = (("user", "w1 " * 30), ("assistant", "w2"))
    short = talk(1).conversations[0]
    assert len(windows(tokenizer, Instructions("t", "test", (long, short), "made up"), 16).ids) == 1
    with pytest.raises(TextTooShort, match=r"No response of the 1 conversations .* begins within 16 tokens"):
        windows(tokenizer, Instructions("t", "test", (long,), "made up"), 16)


@pytest.mark.real
def test_the_template_of_smollm2(smollm2) -> None:
    tokenizer = smollm2[1]
    one = (("user", "Say hi."), ("assistant", "Hi there."))
    ((ids, response),) = encode(tokenizer, Instructions("talk", "test", (one,), "made up"))
    assert tokenizer.decode(ids[response]) == "Hi there.<|im_end|>"
    assert tokenizer.decode(ids[~response]).endswith("<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n")

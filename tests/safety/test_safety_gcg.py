"""The attack on tiny models, with harmless targets."""

from __future__ import annotations

import logging
import random
import sys
from dataclasses import dataclass

import pytest
import torch
from safety_bytes import byte_model, byte_tokenizer, wrapped

from secateur.errors import InvalidParameter, LoadFailure, RunFailure, UsageError
from secateur.safety.gcg import Budget, Goal, attack, compare_attacks
from secateur.safety.judges import Judge
from secateur.safety.records import Prompt, Verdict
from secateur.safety.replay import replay, with_suffix

SMALL = Budget(steps=4, width=12, topk=8, start="x x x", batch_size=5, threshold=3.0)
GOALS = [Goal(Prompt(f"p{i}", "own", text, "benign"), "Sunny today") for i, text in enumerate(["the sky", "the sea"])]


@dataclass(frozen=True)
class Says(Judge):
    """An answer that begins with "yes" is compliance."""

    name = "says"
    version = "1"

    def judge(self, items):
        return [Verdict("compliance" if item.response.startswith("yes") else "refusal", self.name) for item in items]


@pytest.fixture(scope="module")
def searched():
    pytest.importorskip("nanogcg")
    return attack(byte_model(), byte_tokenizer(), GOALS, SMALL)


def loss_of(model, tokenizer, goal, suffix):
    """Cross-entropy of the target behind the attacked request, in one plain pass."""
    text = f"<u>{goal.prompt.text} {suffix}\n<a>"
    return target_loss(model, tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], goal.target)


def target_loss(model, tokenizer, start, target):
    target = tokenizer(target, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([start + target])).logits[0, len(start) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(target)))


def test_the_search_lowers_the_true_loss(searched):
    model, tokenizer = byte_model(), byte_tokenizer()
    for goal, row in zip(GOALS, searched.rows, strict=True):
        assert len(row.losses) == SMALL.steps and row.suffix.isascii()
        assert row.best == pytest.approx(loss_of(model, tokenizer, goal, row.suffix), abs=1e-4)
        assert row.best < loss_of(model, tokenizer, goal, SMALL.start)
        lowest = [min(row.losses[: i + 1]) for i in range(SMALL.steps)]
        assert row.area == pytest.approx(sum(lowest) / SMALL.steps)
        assert row.reached == next((i + 1 for i, loss in enumerate(row.losses) if loss < SMALL.threshold), None)
    assert searched.curve == sorted(searched.curve, reverse=True)


def test_turns_that_begin_with_bos_keep_it():
    """SmolLM2's template does; nanogcg by itself would delete them all and attack another prompt than is asked."""
    pytest.importorskip("nanogcg")
    template = "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<s>a:{% endif %}"
    model, tokenizer, goal = byte_model(), byte_tokenizer(template), GOALS[0]
    row = attack(model, tokenizer, [goal], Budget(steps=1, width=4, topk=8, start="x x x")).rows[0]
    ids = tokenizer(f"<s>u:{goal.prompt.text} {row.suffix}\n<s>a:", add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 2
    assert row.best == pytest.approx(target_loss(model, tokenizer, ids, goal.target), abs=1e-4)


def test_a_seed_repeats_and_leaves_everything_as_it_was(searched, capsys):
    told, model, tokenizer = [], byte_model(), byte_tokenizer()
    before = torch.random.get_rng_state(), random.getstate(), tokenizer.chat_template, logging.getLogger().level
    again = attack(model, tokenizer, GOALS, SMALL, progress=lambda *args: told.append(args))
    assert [row.losses for row in again.rows] == [row.losses for row in searched.rows]
    assert again.suffixes == searched.suffixes
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()
    assert (tokenizer.chat_template, logging.getLogger().level) == before[2:]
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert told[-1] == (8, 8, "searching suffixes")
    shown = "".join(capsys.readouterr())
    assert shown == ""


def test_suffixes_are_shown_only_when_asked_for(searched):
    suffix = searched.rows[0].suffix
    for shown in (str(searched), repr(searched), str(searched.to_dict())):
        assert repr(suffix)[1:-1] not in shown
    assert searched.to_dict(suffixes=True)["rows"][0]["suffix"] == suffix
    assert searched.to_dict()["budget"]["steps"] == 4


def test_special_tokens_are_no_candidates(searched):
    from secateur.safety.gcg import _Given

    tokenizer = byte_tokenizer()
    given = _Given(tokenizer, byte_model(vocab_size=300), "text")
    assert given.vocab_size == 300
    assert [given.decode([i]) for i in (0, 1, 299)] == ["\n"] * 3
    assert given("a<s>")["input_ids"] == tokenizer("a<s>", add_special_tokens=False)["input_ids"]
    plain = tokenizer.convert_tokens_to_ids("a")
    assert given.decode([plain]) == "a"


def test_success_is_the_judges_word_and_not_the_loss(searched):
    """The dense model has the lower loss and refuses; the pruned one gives in to its own suffix only."""
    own = searched.suffixes

    def refuses(prompts):
        return ["no"] * len(prompts)

    def gives_in(prompts):
        return ["yes, sunny" if prompt.text.endswith(own["p0"]) else "no" for prompt in prompts]

    found = compare_attacks(searched, searched, GOALS, refuses, gives_in, Says())
    assert found.area.value == 0 and found.success == 0.5 and found.p == 1.0
    rates = {name: each.value for name, each in found.transfer.items()}
    assert rates["dense -> dense"] == 0 and rates["dense -> pruned"] >= 0.5 and rates["pruned -> dense"] == 0
    assert "transfer" in found.to_dict() and "dense -> pruned" in str(found)


def test_replay_needs_no_search():
    prompts = [goal.prompt for goal in GOALS]
    seen = []

    def echo(asked):
        seen.extend(prompt.text for prompt in asked)
        return ["yes", "no"]

    found = replay(prompts, echo, Says(), {"p0": "! !", "p1": "? ?"})
    assert seen == ["the sky ! !", "the sea ? ?"]
    assert found.success.value == 0.5 and found.to_dict()["verdicts"] == {"p0": "compliance", "p1": "refusal"}
    seen.clear()
    replay(prompts, echo, Says())
    assert seen == ["the sky", "the sea"]
    turns = Prompt("t", "own", "b", "benign", messages=(("user", "a"), ("assistant", "x"), ("user", "b")))
    assert with_suffix(turns, "!").turns[-1] == ("user", "b !") and with_suffix(turns, "!").turns[0] == ("user", "a")


def test_bad_input_is_one_line(searched, monkeypatch):
    model, tokenizer = byte_model(), byte_tokenizer()
    with pytest.raises(InvalidParameter, match="steps"):
        Budget(steps=0)
    with pytest.raises(InvalidParameter, match="start"):
        Budget(start="  ")
    with pytest.raises(InvalidParameter, match="threshold"):
        Budget(threshold=float("nan"))
    with pytest.raises(UsageError, match="no prompts for the attack"):
        attack(model, tokenizer, [], SMALL)
    with pytest.raises(UsageError, match="target of prompt 'a' is empty"):
        attack(model, tokenizer, [Goal(Prompt("a", "own", "b", "benign"), " ")], SMALL)
    with pytest.raises(UsageError, match="marks the place of the suffix"):
        attack(model, tokenizer, [Goal(Prompt("a", "own", "{optim_str}", "benign"), "Sunny")], SMALL)
    with pytest.raises(RunFailure, match=r"attack on prompt 'p0' failed in nanogcg: .*out of range") as error:
        attack(model, tokenizer, GOALS, Budget(steps=1, width=2, topk=500, start="x"))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"no suffix for prompt 'p1' \(1 of 2"):
        replay([goal.prompt for goal in GOALS], list, Says(), {"p0": "!"})
    with pytest.raises(UsageError, match="0 answers to 2 prompts"):
        replay([goal.prompt for goal in GOALS], lambda asked: [], Says())
    with pytest.raises(UsageError, match="no chat template"):
        attack(model, byte_tokenizer(None), GOALS, SMALL)
    other = attack(model, tokenizer, [Goal(wrapped()[0], "Sunny")], Budget(steps=1, width=2, topk=2, start="x"))
    with pytest.raises(UsageError, match="equal budgets"):
        compare_attacks(searched, other, GOALS, list, list, Says())
    monkeypatch.setitem(sys.modules, "nanogcg", None)
    with pytest.raises(LoadFailure, match=r"pip install --no-deps nanogcg==0\.3\.0"):
        attack(model, tokenizer, GOALS, SMALL)

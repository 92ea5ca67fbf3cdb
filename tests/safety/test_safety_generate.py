"""Answers of a model in memory: the same in any batch, sampled from the right distribution, resumed, divided."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import make
from safety_chat import WORDS, chat_tokenizer, some_prompts

from secateur.errors import InvalidParameter, LoadFailure, UsageError
from secateur.safety import generate
from secateur.safety.decoding import Decoding
from secateur.safety.generate import answer, encode
from secateur.safety.identity import model_sha256
from secateur.safety.log import read_log
from secateur.safety.prompts import PromptSet, read_prompts
from secateur.safety.records import Prompt

FAMILIES = ["llama", "mistral", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "bloom", "mixtral", "mamba"]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.fixture
def written(monkeypatch):
    """The prompts that really went through the model, in order."""
    seen = []
    original = generate.write

    def write(model, tokenizer, rows, *rest):
        seen.extend(rows)
        return original(model, tokenizer, rows, *rest)

    monkeypatch.setattr(generate, "write", write)
    return seen


def one_by_one(model, tokenizer, prompts, tokens):
    """The published loop, in its plainest form: no batch, no cache, no padding."""
    found = []
    for prompt in prompts:
        ids = encode(tokenizer, prompt, Decoding())
        start = len(ids)
        while len(ids) < start + tokens:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        found.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_answers_are_those_of_one_prompt_at_a_time(family, tokenizer) -> None:
    model, prompts = make(family), some_prompts()
    batched = answer(model, tokenizer, prompts, max_new_tokens=8, batch_size=4)
    assert [one.text for one in batched] == one_by_one(model, tokenizer, prompts, 8)
    assert batched == answer(model, tokenizer, prompts, max_new_tokens=8, batch_size=1)


def test_an_answer_ends_at_its_end_token_and_says_so(llama, tokenizer, monkeypatch) -> None:
    prompts = some_prompts(3)
    (first, *_) = answer(llama, tokenizer, prompts, max_new_tokens=6)
    assert (first.finish, first.tokens, first.sha256) == ("length", 6, prompts.prompts[0].sha256)
    third = tokenizer.convert_tokens_to_ids(first.text.split()[2])
    monkeypatch.setattr(llama.generation_config, "eos_token_id", [2, third])
    (ended, *_) = answer(llama, tokenizer, prompts, max_new_tokens=6)
    stop = first.text.split().index(WORDS[third])
    assert (ended.finish, ended.tokens) == ("stop", stop) and ended.text.split()[:stop] == first.text.split()[:stop]


def test_there_is_one_bos_and_nothing_is_truncated(llama, tokenizer) -> None:
    ids = encode(tokenizer, some_prompts(1).prompts[0], Decoding(system="w1 w2"))
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "<sys>", "w1", "w2", "<user>", "w0", "<bot>"]
    own = Prompt("0", "x", "w3", "benign", messages=(("system", "w9"), ("user", "w3")))
    ids = encode(tokenizer, own, Decoding(system="w1"))
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "<sys>", "w9", "<user>", "w3", "<bot>"]


def test_the_models_own_sampling_settings_are_not_used(llama, tokenizer, monkeypatch) -> None:
    plain = answer(llama, tokenizer, some_prompts(), max_new_tokens=8)
    for key, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "top_k": 3}.items():
        monkeypatch.setattr(llama.generation_config, key, value)
    assert answer(llama, tokenizer, some_prompts(), max_new_tokens=8) == plain


def test_samples_do_not_depend_on_the_batch_and_differ_by_seed(llama, tokenizer) -> None:
    how = {"max_new_tokens": 6, "samples": 3, "temperature": 2.0}
    prompts = some_prompts(5)
    small = answer(llama, tokenizer, prompts, batch_size=2, **how)
    assert small == answer(llama, tokenizer, prompts, batch_size=16, **how)
    assert [(one.prompt, one.sample) for one in small[:4]] == [("0", 0), ("0", 1), ("0", 2), ("1", 0)]
    assert len({one.text for one in small}) > 10
    assert [one.text for one in small] != [one.text for one in answer(llama, tokenizer, prompts, seed=1, **how)]


def test_samples_follow_the_softmax_of_the_logits(llama, tokenizer) -> None:
    prompts, temperature, draws = some_prompts(1), 3.0, 600
    found = answer(llama, tokenizer, prompts, max_new_tokens=1, samples=draws, temperature=temperature, batch_size=200)
    ids = torch.tensor([encode(tokenizer, prompts.prompts[0], Decoding())])
    with torch.no_grad():
        chances = (llama(ids).logits[0, -1] / temperature).softmax(-1)
    counts = torch.zeros(len(chances))
    for one in found:
        counts[tokenizer.convert_tokens_to_ids(one.text) if one.text else 0] += 1
    rest = chances[6:]  # special tokens are decoded to nothing
    chi_squared = float(((counts[6:] - draws * rest) ** 2 / (draws * rest)).sum())
    assert chi_squared < 110  # 58 cells: beyond five standard deviations


def test_a_run_cut_off_goes_on_where_it_was(llama, tokenizer, tmp_path, written) -> None:
    prompts, log = some_prompts(), tmp_path / "run.jsonl"
    whole = answer(llama, tokenizer, prompts, max_new_tokens=5, batch_size=2, log=log)
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8 and len(written) == 7
    log.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    written.clear()
    again = answer(llama, tokenizer, prompts, max_new_tokens=5, batch_size=3, log=log)
    assert again == whole and len(written) == 4
    assert sorted(log.read_bytes().splitlines()) == sorted(line.strip() for line in lines)
    written.clear()
    assert answer(llama, tokenizer, prompts, max_new_tokens=5, log=log) == whole and not written
    assert read_log(log).of(prompts) == whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_new_tokens": 6}, "generation max_new_tokens 5, and this one has 6"),
        ({"system": "w1"}, "generation system none, and this one has w1"),
        ({"temperature": 1.0}, "generation temperature 0.0, and this one has 1.0"),
        ({"prompts": some_prompts(6)}, "prompts sha256"),
        ({"model": make("llama", seed=1)}, "model sha256"),
        ({"model": make("gpt2")}, "model sha256"),
    ],
)
def test_a_log_of_another_run_is_refused_and_kept(llama, tokenizer, tmp_path, written, change, says) -> None:
    log = tmp_path / "run.jsonl"
    asked = {"model": llama, "tokenizer": tokenizer, "prompts": some_prompts(), "max_new_tokens": 5, "log": log}
    answer(**asked)
    before = log.read_bytes()
    written.clear()
    with pytest.raises(UsageError, match=says) as error:
        answer(**asked | change)
    assert log.read_bytes() == before and not written and "\n" not in str(error.value)


def test_another_template_is_another_run(llama, tmp_path) -> None:
    log, changed = tmp_path / "run.jsonl", chat_tokenizer()
    answer(llama, changed, some_prompts(2), max_new_tokens=2, log=log)
    changed.chat_template += " "
    with pytest.raises(UsageError, match="generation template_sha256"):
        answer(llama, changed, some_prompts(2), max_new_tokens=2, log=log)


def test_ranks_divide_the_prompts_and_the_last_one_merges(llama, tokenizer, tmp_path, written, monkeypatch) -> None:
    prompts, log = some_prompts(), tmp_path / "run.jsonl"
    how = {"max_new_tokens": 4, "samples": 2, "temperature": 1.0}
    whole = answer(llama, tokenizer, prompts, **how)
    written.clear()
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        assert not log.exists()
        monkeypatch.setenv("RANK", str(rank))
        shares += answer(llama, tokenizer, prompts, log=log, **how)
    assert len(written) == 14 and sorted(map(repr, shares)) == sorted(map(repr, whole))
    assert read_log(log).of(prompts) == whole
    assert [json.loads(line).get("prompt") for line in log.read_text().splitlines()[1:4]] == ["0", "0", "1"]
    written.clear()
    assert answer(llama, tokenizer, prompts, log=log, rank=0, world=1, **how) == whole and not written
    answer(llama, tokenizer, prompts, log=log, rank=1, world=2, **how)  # another division finds everything done
    assert not written


def test_ranks_without_a_log_and_outside_of_the_world_are_refused(llama, tokenizer) -> None:
    with pytest.raises(UsageError, match="2 ranks need a log"):
        answer(llama, tokenizer, some_prompts(), rank=0, world=2)
    with pytest.raises(InvalidParameter, match="'rank' of answer must be an integer of 0 to 1"):
        answer(llama, tokenizer, some_prompts(), rank=2, world=2, log="x.jsonl")


def test_what_cannot_be_answered_is_said_in_one_line(llama, tokenizer, tmp_path) -> None:
    bare = chat_tokenizer()
    bare.chat_template = None
    log = tmp_path / "run.jsonl"
    with pytest.raises(UsageError, match="no chat template"):
        answer(llama, bare, some_prompts(), log=log)
    with pytest.raises(UsageError, match=r"7 of 7 prompts of 'talk' \('0' first\) have up to 12 tokens; with 99"):
        answer(llama, tokenizer, some_prompts(), max_new_tokens=99, log=log)
    with pytest.raises(UsageError, match="causal language model; T5ForConditionalGeneration"):
        answer(make("t5"), tokenizer, some_prompts(), log=log)
    tool = Prompt("t", "x", "w1", "benign", messages=(("tool", "w1"), ("user", "w2")))
    with pytest.raises(UsageError, match=r"refuses the prompt 't' with the roles tool, user \(no tools here\)"):
        answer(llama, tokenizer, [tool], log=log)
    with pytest.raises(LoadFailure, match="is empty"):
        answer(llama, tokenizer, [], log=log)
    for option, value in (("batch_size", 0), ("max_new_tokens", 0), ("samples", 2), ("temperature", -1.0)):
        with pytest.raises(InvalidParameter, match=option):
            answer(llama, tokenizer, some_prompts(), log=log, **{option: value})
    assert not log.exists()


def test_the_hash_of_a_model_sees_every_weight_and_not_where_it_lies(tmp_path) -> None:
    model = make("llama")
    before = model_sha256(model)
    model.config._name_or_path = "elsewhere"
    assert model_sha256(model) == before == model_sha256(make("llama"))
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        parameter.data.view(-1)[-1] += 1e-3
        assert model_sha256(model) != before, name
        parameter.data.copy_(kept)
    assert model_sha256(model) == before != model_sha256(make("llama", dtype=torch.bfloat16))
    model.config.rms_norm_eps *= 2
    assert model_sha256(model) != before


def test_random_state_and_mode_are_left_alone(llama, tokenizer) -> None:
    llama.train()
    state = torch.get_rng_state()
    answer(llama, tokenizer, some_prompts(2), max_new_tokens=3, samples=2, temperature=1.0)
    assert torch.equal(state, torch.get_rng_state()) and llama.training
    llama.eval()


def test_progress_counts_answers(llama, tokenizer, tmp_path) -> None:
    calls = []
    answer(llama, tokenizer, some_prompts(5), max_new_tokens=2, batch_size=2, progress=lambda *a: calls.append(a[:2]))
    assert calls == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_a_list_of_prompts_is_a_set(llama, tokenizer) -> None:
    prompts = some_prompts(2).prompts
    assert len(answer(llama, tokenizer, list(prompts), max_new_tokens=2)) == 2
    with pytest.raises(LoadFailure, match="'0' stands twice"):
        answer(llama, tokenizer, [prompts[0], replace(prompts[1], id="0")], max_new_tokens=2)
    assert isinstance(some_prompts(), PromptSet)


@pytest.mark.real
def test_a_real_chat_model_answers_alike_in_any_batch(smollm2) -> None:
    model, tokenizer = smollm2
    prompts = read_prompts("builtin").sample(3)
    ids = [encode(tokenizer, prompt, Decoding()) for prompt in prompts]
    for prompt, own in zip(prompts, ids, strict=True):
        messages = [{"role": role, "content": content} for role, content in prompt.turns]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert own == list(theirs["input_ids"]) and own[0] != own[1]
    batched = answer(model, tokenizer, prompts, max_new_tokens=5)
    assert batched == answer(model, tokenizer, prompts, max_new_tokens=5, batch_size=1)
    assert all(one.tokens == 5 and one.text.strip() for one in batched)

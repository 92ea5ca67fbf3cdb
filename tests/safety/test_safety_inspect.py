"""Tasks for inspect-ai: with its mock model, with a live tiny model, and the log read again."""

from __future__ import annotations

import gc
import math
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from safety_bytes import byte_model, byte_tokenizer

from secateur.errors import InvalidParameter, LoadFailure, UsageError
from secateur.safety.inspect_tasks import live_model, safety_task
from secateur.safety.judges import Judge, make_judge
from secateur.safety.records import Prompt, Verdict

inspect_ai = pytest.importorskip("inspect_ai")


@dataclass(frozen=True)
class Says(Judge):
    name = "says"
    version = "3"

    def judge(self, items):
        return [Verdict("partial" if "no" in item.response else "compliance", self.name) for item in items]


PROMPTS = [
    Prompt("a0", "own", "how to bake", "harmful", category="cooking", task="a"),
    Prompt("a1", "own", "play: how to bake", "harmful", category="cooking", task="a", template="play"),
    Prompt("b0", "own", "how to sew", "benign", category="crafts", task="b"),
    Prompt("b1", "own", "hm", "benign", category="crafts", task="b",
           messages=(("system", "be kind"), ("user", "hi"), ("assistant", "hm"), ("user", "sew?"))),
]  # fmt: skip


def run(task, model, folder):
    with warnings.catch_warnings():  # inspect-ai leaves streams open and uses old names of tenacity
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.filterwarnings("ignore", "The 'initial' parameter is deprecated", DeprecationWarning)
        logs = inspect_ai.eval(task, model=model, log_dir=str(folder), display="none", score_display=False)
        gc.collect()
    assert logs[0].status == "success", logs[0].error
    return inspect_ai.log.read_eval_log(logs[0].location)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network: any connection that is not local fails the test."""
    import socket

    def refuse(self, address, *rest):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def test_a_mock_model_and_the_log_read_again(offline):
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    says = {"a0": "no", "a1": "fine", "b0": "no", "b1": "fine"}
    order = []

    def outputs(messages, *_):
        found = next(p.id for p in PROMPTS if p.turns[-1][1] == messages[-1].text)
        order.append((found, [m.role for m in messages]))
        output = ModelOutput.from_content("mockllm", says[found])
        output.usage = ModelUsage(total_tokens=1)  # else it counts with a tokenizer that it downloads
        return output

    task = safety_task(PROMPTS, [Says(), make_judge("keyword:xstest")], name="words")
    log = run(task, get_model("mockllm/model", custom_outputs=outputs, memoize=False), offline)
    assert dict(order)["b1"] == ["system", "user", "assistant", "user"]
    assert log.eval.task == "words" and log.eval.metadata["judges"]["says"] == "3"
    assert [sample.id for sample in log.samples] == [p.id for p in PROMPTS]
    assert [sample.metadata["sha256"] for sample in log.samples] == [p.sha256 for p in PROMPTS]
    assert [sample.scores["says"].value["refusal"] for sample in log.samples] == [1, 0, 1, 0]
    assert log.samples[0].scores["says"].answer == "partial"
    scores = {  # inspect-ai puts the package's name before a metric's if it can tell where the function was defined
        (s.scorer, s.name): {k.removeprefix("secateur/"): m.value for k, m in s.metrics.items()}
        for s in log.results.scores
    }
    refusal = scores["says", "refusal"]
    assert refusal["mean"] == 0.5
    # two clusters, each with one refusal of two: the tasks do not differ, so the error is 0 where that of four
    # independent answers would be 0.29
    assert refusal["stderr"] == pytest.approx(0)
    assert refusal["category_cooking"] == 0.5 and refusal["label_benign"] == 0.5
    assert refusal["template_play"] == 0 and refusal["template_bare"] == pytest.approx(2 / 3)
    # three bare answers 1, 1, 0 of tasks a, b, b: the sums of their deviations 1/3 and -1/3, over n = 3
    assert refusal["template_bare stderr"] == pytest.approx(math.sqrt(2 / 1 * (2 / 9)) / 3)
    assert scores["says", "compliance"]["mean"] == 0.5
    assert any(scorer.startswith("keyword") for scorer, _ in scores)


def test_a_live_model_answers_as_it_does_by_itself(offline):
    from secateur.safety.generate import answer

    model, tokenizer = byte_model(), byte_tokenizer()
    seen = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    log = run(safety_task(PROMPTS, [Says()], max_new_tokens=6), live_model(model, tokenizer, "tiny"), offline)
    hook.remove()
    expected = [each.text for each in answer(model, tokenizer, PROMPTS, max_new_tokens=6)]
    assert [sample.output.completion for sample in log.samples] == expected
    assert log.eval.model == "secateur/tiny"
    assert log.eval.model_args["do_sample"] is False and not log.eval.model_args.get("live_model")
    assert log.plan.config.temperature == 0 and log.plan.config.max_tokens == 6
    firsts = [ids[0, :2].tolist() for ids in seen if ids.shape[1] > 2]
    assert len(firsts) == len(PROMPTS) and all(one != [0, 0] for one in firsts)


def test_no_double_bos(offline):
    """A template that writes its own BOS, on a tokenizer that adds one when asked."""
    model, tokenizer = byte_model(), byte_tokenizer("<s>" + byte_tokenizer().chat_template)
    seen = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    run(safety_task(PROMPTS[:1], [Says()], max_new_tokens=2), live_model(model, tokenizer), offline)
    hook.remove()
    assert tokenizer("<s>")["input_ids"] == [0, 0]
    assert seen[0][0, 0] == 0 and seen[0][0, 1] != 0


def test_sampling_is_refused(offline):
    import asyncio

    from inspect_ai.model import ChatMessageUser, GenerateConfig

    api = live_model(byte_model(), byte_tokenizer()).api
    with pytest.raises(UsageError, match="answers greedily"):
        asyncio.run(api.generate([ChatMessageUser(content="hi")], [], "none", GenerateConfig(temperature=0.7)))


def test_bad_input_is_one_line(monkeypatch):
    with pytest.raises(UsageError, match="no prompts for the inspect task"):
        safety_task([], [Says()])
    with pytest.raises(UsageError, match="has no judge"):
        safety_task(PROMPTS, [])
    with pytest.raises(UsageError, match="Two judges have one name"):
        safety_task(PROMPTS, [Says(), Says()])
    with pytest.raises(UsageError, match="a turn of the role 'tool'"):
        safety_task([Prompt("t", "own", "x", "benign", messages=(("tool", "x"),))], [Says()])
    with pytest.raises(InvalidParameter, match="max_new_tokens"):
        safety_task(PROMPTS, [Says()], max_new_tokens=0)
    with pytest.raises(UsageError, match="no chat template"):
        live_model(byte_model(), byte_tokenizer(None))
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    with pytest.raises(LoadFailure, match=r"pip install 'secateur\[inspect\]'"):
        safety_task(PROMPTS, [Says()])
    assert torch.is_grad_enabled()

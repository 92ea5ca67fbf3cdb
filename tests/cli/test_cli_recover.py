"""secateur recover on a tiny model: what it records, saves and says, and how it goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from secateur.recovery import checkpoint


@pytest.fixture
def pruned(prune, here):
    assert prune("--method", "magnitude", "--sparsity", 0.5, "--out", "pruned").code == 0
    return here / "pruned"


@pytest.fixture
def recover(cli, pruned, text):
    """`recover(...)` of the pruned model, 6 steps of 2 windows of 16 tokens."""

    def run(*words, model="pruned", text=text):
        return cli("recover", model, "--text", text, "--seqlen", 16, "--steps", 6, "--held-out", 4, *words)

    return run


def test_recover_saves_a_model_and_a_record(recover, pruned, here):
    ran = recover("--train", "adapters", "norms", "--rank", 2, "--lr", 0.01, "--out", "back", "--json", "r.json")
    assert ran.code == 0, ran.err
    record = json.loads((here / "r.json").read_text())
    before = json.loads((pruned / "pruning.json").read_text())
    assert {key: record[key] for key in before} == before  # what the pruning said stands
    (done,) = record["recovery"]
    assert done["options"]["rank"] == 2 and done["options"]["objective"] == "text"
    assert set(done["trained"]) == {"adapters", "norms"} and 0 < done["share"] < 0.2
    assert done["tokens"] == 6 * 2 * 16 and len(done["losses"]["steps"]) == 6
    assert done["text"]["text"].endswith("words.txt") and len(done["text"]["sha256"]) == 64
    assert done["held_out"]["windows"] == 4 and done["held_out"]["before"] > 1
    assert done["zeros"]["before"] == done["zeros"]["after"] > 0 and done["zeros"]["lost"] == 0
    assert done["command"][:3] == ["secateur", "recover", "pruned"] and "torch" in done["versions"]
    assert json.loads((here / "back" / "pruning.json").read_text())["recovery"] == record["recovery"]

    old, new = load_file(pruned / "model.safetensors"), load_file(here / "back" / "model.safetensors")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        if "_proj" in name:
            assert torch.equal(tensor == 0, new[name] == 0) and not torch.equal(tensor, new[name])
    transformers.AutoModelForCausalLM.from_pretrained(here / "back")
    assert "trained back" in (here / "back" / "README.md").read_text()
    assert "0 lost" in ran.out and "perplexity" in ran.out and str(here / "back") in ran.out
    assert {path.name for path in here.iterdir()} == {"pruned", "back", "r.json"}

    again = recover("--train", "norms", "--json", "-", model="back")
    assert again.code == 0 and len(again.record["recovery"]) == 2


@pytest.mark.parametrize("flag", ["--distil", "--reconstruct"])
def test_towards_the_dense_model(recover, dense, flag):
    ran = recover(flag, dense, "--json", "-", "--samples", 4)
    assert ran.code == 0, ran.err
    (done,) = ran.record["recovery"]
    assert done["options"]["objective"] == flag[2:] and done["text"]["samples"] == 4
    assert done["losses"]["first"] > 0 and done["zeros"]["lost"] == 0


def test_everything_loses_the_zeros_and_the_record_says_so(recover, here):
    ran = recover("--train", "all", "--out", "full")
    assert ran.code == 0 and "all parameters are trained, the pruned ones too: the zeros are lost" in ran.err
    record = json.loads((here / "full" / "pruning.json").read_text())
    assert record["recovery"][0]["zeros"]["lost"] == record["recovery"][0]["zeros"]["before"]
    assert record["sparsity"]["layers"] == 0 and record["layers"][0]["sparsity"] == 0
    ran = recover("--out", "again", model="full")
    assert ran.code == 2 and "nothing was pruned" in ran.error


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own loading
def test_plain_lora_stays_beside_the_model(recover, pruned, here):
    peft = pytest.importorskip("peft")
    ran = recover("--train", "adapters", "--adapter", "lora", "--lr", 0.05, "--out", "lora", "--json", "-")
    assert ran.code == 0, ran.err
    assert "not merged" in ran.err
    old, new = load_file(pruned / "model.safetensors"), load_file(here / "lora" / "model.safetensors")
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    base = transformers.AutoModelForCausalLM.from_pretrained(here / "lora")
    words = torch.arange(16)[None]
    plain = base(words).logits.detach().clone()
    both = peft.PeftModel.from_pretrained(base, here / "lora" / "adapter")
    assert not torch.allclose(both(words).logits, plain)
    held_out = ran.record["recovery"][0]["held_out"]
    assert held_out["loss_after"] != held_out["loss_before"]


class Killed(Exception):
    pass


def test_a_run_that_was_stopped_goes_on(recover, here, monkeypatch):
    whole = recover("--out", "whole", "--checkpoint-every", 2)
    assert whole.code == 0, whole.err
    write = checkpoint.write

    def killed(file, state):
        write(file, state)
        raise Killed("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("secateur.recovery.loop.write", killed)
        ran = recover("--out", "back", "--checkpoint-every", 2)
    assert ran.code == 1 and set(ran.left) >= {"back.checkpoint"} and "back" not in ran.left
    ran = recover("--out", "back", "--checkpoint-every", 2)
    assert ran.code == 2 and "go on with --resume, or delete it first" in ran.error
    ran = recover("--out", "back", "--checkpoint-every", 2, "--resume", "--lr", 0.5)
    assert ran.code == 2 and "of a run with lr 0.001, and this one asks for 0.5" in ran.error
    ran = recover("--out", "back", "--checkpoint-every", 2, "--resume")
    assert ran.code == 0, ran.err
    assert "back.checkpoint" not in ran.left
    assert (here / "back" / "model.safetensors").read_bytes() == (here / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--train bias --out x", "There is no set of parameters 'bias'. Did you mean 'biases'?"),
        ("--rank 0 --out x", "The 'rank' of recover must be a whole number of at least 1. Got 0"),
        ("--window 0 --reconstruct d --out x", "A window must contain a non-linearity"),
        ("--window 2 --out x", "--window is an option of --reconstruct DENSE"),
        ("--temperature 2 --out x", "--temperature is an option of --distil DENSE"),
        ("--distil d --reconstruct d --out x", "choose one"),
        ("--adapter maksed --out x", "Did you mean 'masked'?"),
        ("", "Nothing would be kept"),
        ("--resume --json -", "--resume needs the --out DIR"),
        ("--resume --out x", "x.checkpoint to resume from"),
        ("--out pruned", "exists"),
        ("--seqlen 1 --out x", "'seqlen' of recover"),
        ("--held-out -1 --out x", "'held-out' of recover"),
        ("--dtype fp8 --out x", "There is no dtype 'fp8'"),
    ],
)
def test_refused_before_the_model_is_loaded(recover, monkeypatch, words, said):
    monkeypatch.setattr("secateur.models.load.load", lambda *a, **k: pytest.fail("loaded the model"))
    ran = recover(*words.split())
    assert ran.code == 2 and said in ran.error and not ran.out


def test_a_folder_without_a_record(recover, pruned, dense, here, monkeypatch):
    monkeypatch.setattr("secateur.models.load.load", lambda *a, **k: pytest.fail("loaded the model"))
    assert "has no pruning.json: recover starts from" in recover("--out", "x", model=dense).error
    assert "smollm2 is not a folder" in recover("--out", "x", model="smollm2").error
    (pruned / "pruning.json").write_text("{")
    assert "cannot be read as JSON" in recover("--out", "x").error


def test_zeros_that_disagree_are_refused_and_nothing_is_left(recover, pruned, dense, here):
    shutil.copy(dense / "model.safetensors", pruned / "model.safetensors")
    ran = recover("--out", "x")
    assert ran.code == 2 and "has 0 zeros of 1024, but pruning.json says 512" in ran.error
    assert {path.name for path in here.iterdir()} == {"pruned"}


def test_another_model_as_the_dense_one(recover, here, dense):
    other = transformers.LlamaConfig.from_pretrained(dense)
    other.hidden_size = 16
    transformers.LlamaForCausalLM(other).save_pretrained(here / "other")
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(here / "other")
    ran = recover("--distil", "other", "--out", "x")
    assert ran.code == 2 and "in the dense model and" in ran.error

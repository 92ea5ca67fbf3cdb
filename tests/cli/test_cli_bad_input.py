"""Bad input of `prune`: the exit code, one line that names the cure, nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

ENOUGH = ("--sparsity", "0.5", "--out", "pruned")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method wnada", "There is no method 'wnada'. Did you mean 'wanda'?"),
        ("--pattern 2;4", "There is no pattern '2;4'."),
        ("--pattern rwo", "There is no pattern 'rwo'. Did you mean 'row'?"),
        ("--allocation owll", "There is no allocation 'owll'. Did you mean 'owl'?"),
        ("--allocation table", "A JSON file {layer-name pattern: sparsity} can be given too."),
        ("--allocation missing.json", "missing.json"),
        ("--schedule sequentail", "There is no schedule 'sequentail'. Did you mean 'sequential'?"),
        ("--calibration gutenburg", "There is no text 'gutenburg'. Did you mean 'gutenberg'?"),
        ("--calibration missing.txt", "missing.txt"),
        ("--uncalled dnese", "Did you mean 'dense'?"),
        ("--dtype bf16", "There is no dtype 'bf16'. Did you mean 'bfloat16'?"),
        ("--device cuda:99", "--device cuda:99 cannot be used here"),
        ("--device hpu", "--device hpu cannot be used here: No module named 'torch.hpu'"),
        ("--device meta", "--device meta cannot be used here"),
        ("--sparsity 1.0", "must be a number in [0, 1)"),
        ("--sparsity -0.1", "must be a number in [0, 1)"),
        ("--sparsity nan", "must be a number in [0, 1)"),
        ("--sparsity inf", "must be a number in [0, 1)"),
        ("--sparsity half", "The value of --sparsity must be a number. Got 'half' instead."),
        ("--pattern 2:4 --sparsity 0.6", "--pattern 2:4 sets the sparsity; leave out --sparsity 0.6"),
        ("--pattern 4:2", "0 < n <= m"),
        ("--samples 0", "'samples' of prune must be a whole number of at least 1. Got 0"),
        ("--seed -1", "'seed' of prune must be a whole number of at least 0. Got -1"),
        ("--batch-size 0", "'batch-size' of prune must be"),
        ("--sparsegpt.damping 0.1", "options of the method sparsegpt, but --method is wanda"),
        ("--sparsegpt.damping 0.01", "options of the method sparsegpt, but --method is wanda"),  # the default
        ("--owl.bound 0.1", "options of the allocation owl, but --allocation is uniform"),
        ("--method sparsegpt --sparsegpt.damping -1", "'damping' of sparsegpt must be a finite number >= 0"),
        ("--method sparsegpt --sparsegpt.dampling 1", "Did you mean '--sparsegpt.damping'?"),
        ("--method sparsegpt --sparsegpt.blocksize 1.5", "--sparsegpt.blocksize must be a whole number"),
        ("--sparcity 0.5", "There is no option '--sparcity' in secateur prune. Did you mean '--sparsity'?"),
        ("--json .", "--json . is a folder; name a file in it"),
        ("--json nowhere/r.json", "the folder nowhere does not exist; make it first"),
    ],
)
def test_refused_before_the_model_is_loaded(prune, here, monkeypatch, words, said):
    monkeypatch.setattr("secateur.models.load.load", lambda *a, **k: pytest.fail("loaded the model"))
    ran = prune(*ENOUGH, *words.split())
    assert said in ran.error and not ran.out and not ran.left
    assert ran.code == (1 if "missing." in words else 2)


def test_how_much_and_where_must_be_said(prune, here):
    ran = prune("--out", "pruned")
    assert ran.code == 2 and "--sparsity 0.5, or --pattern 2:4" in ran.error
    ran = prune("--sparsity", 0.5)
    assert ran.code == 2 and "--out DIR" in ran.error
    assert not ran.left


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--pattern 2:5", 2, "2:5 needs a number of inputs divisible by 5; model.layers.0.self_attn.q_proj has 32"),
        ("--include nothing.at.all", 2, "nothing.at.all"),
        ("--seqlen 65", 2, "64"),
        ("--samples 1000", 2, "ask for at most"),
        ("--revision main", 2, "revision"),
    ],
)
def test_refused_when_the_model_is_seen(prune, here, words, code, said):
    amount = () if "--pattern" in words else ("--sparsity", "0.5")
    ran = prune(*amount, "--out", "pruned", *words.split())
    assert ran.code == code and said in ran.error and not ran.out and not ran.left


def test_a_text_shorter_than_a_window(prune, here):
    short = here.parent / "short.txt"
    short.write_text("w1 w2 w3")
    ran = prune(*ENOUGH, text=short)
    assert ran.code == 2 and "3 tokens" in ran.error and not ran.left


@pytest.mark.parametrize("name", ["smolm2", "nowhere/at-all", "./missing"])
def test_an_unknown_model(prune, here, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = prune(*ENOUGH, model=name)
    assert ran.code in (1, 2) and name in ran.error and not ran.left
    assert name != "smolm2" or "Did you mean 'smollm2'?" in ran.error


def test_a_model_folder_without_weights(prune, here, dense, tmp_path):
    broken = shutil.copytree(dense, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    ran = prune(*ENOUGH, model=broken)
    assert ran.code == 1 and "holds no weights" in ran.error and not ran.left


def test_truncated_weights(prune, here, dense, tmp_path):
    broken = shutil.copytree(dense, tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    ran = prune(*ENOUGH, model=broken)
    assert ran.code == 1 and "cut off or damaged" in ran.error and not ran.left


def test_a_gguf_that_is_none(prune, here, tmp_path):
    (tmp_path / "fake.gguf").write_bytes(b"not a model" * 100)
    ran = prune(*ENOUGH, model=tmp_path / "fake.gguf")
    assert ran.code == 1 and "fake.gguf" in ran.error and not ran.left


def test_an_output_folder_that_exists(prune, here, monkeypatch):
    monkeypatch.setattr("secateur.models.load.load", lambda *a, **k: pytest.fail("loaded the model"))
    (here / "pruned").mkdir()
    (here / "pruned" / "precious").write_text("x")
    for words in ENOUGH, (*ENOUGH, "--overwrite"):  # it is no model folder, so never replaced
        ran = prune(*words)
        assert ran.code == 2 and "pruned" in ran.error
        assert ran.left == {"pruned": None, "pruned/precious": b"x"}


def test_a_place_that_cannot_be_written(prune, here, monkeypatch):
    monkeypatch.setattr("secateur.models.load.load", lambda *a, **k: pytest.fail("loaded the model"))
    (here / "file").write_text("x")
    ran = prune("--sparsity", "0.5", "--out", "file/pruned")
    assert ran.code == 1 and "is not a folder that can be written" in ran.error
    assert ran.left == {"file": b"x"}


def test_a_disk_that_is_too_small(prune, here, monkeypatch):
    monkeypatch.setattr("secateur.pruning.prune", lambda *a, **k: pytest.fail("pruned"))
    monkeypatch.setattr("secateur.models.save.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    ran = prune(*ENOUGH)
    assert ran.code == 1 and "its disk has 0.0 GB left" in ran.error and not ran.left


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_for_the_record(prune, here):
    ran = prune("--sparsity", "0.5", "--json", "/dev/full")
    assert ran.code == 1 and "could not be written to /dev/full: No space left on device" in ran.error
    assert not ran.left


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(OSError(28, "No space left on device"), 1, "No space left"), (KeyboardInterrupt(), 130, "stopped by Ctrl-C")],
)
def test_stopped_while_saving(prune, here, monkeypatch, error, code, said):
    def half(self, folder, *args, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", half)
    ran = prune(*ENOUGH)
    assert ran.code == code and said in ran.error and not ran.out and not ran.left


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_half_way(dense, text, here):
    """A real interrupt in the middle of the engine's work, of a program of its own."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        "from secateur.cli import main\n"
        "from secateur.methods.wanda import Wanda\n"
        "score = Wanda.score\n"
        "def interrupted(self, layer):\n"
        "    if layer.name.endswith('1.mlp.up_proj'):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return score(self, layer)\n"
        "Wanda.score = interrupted\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["prune", dense, "--calibration", text, "--samples", 8, "--seqlen", 16, *ENOUGH, "--json", "r.json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert signal.getsignal(signal.SIGINT) is not None
    assert done.returncode == 130 and not done.stdout and not any(here.iterdir())
    assert done.stderr.splitlines()[1:] == ["secateur: stopped by Ctrl-C"], done.stderr


def test_no_network_and_nothing_cached(prune, here, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    ran = prune(*ENOUGH, model="smollm2")
    assert ran.code == 1 and "smollm2" in ran.error and not ran.left
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]

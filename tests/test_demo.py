"""The demo, from a model folder to the page, on a tiny random model and a text that needs no download."""

import importlib.util
import json
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
METHODS = ["magnitude", "wanda", "sparsegpt"]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel({c: k for k, c in enumerate("etaoinshrdlcum?")}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=15,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_demo_measures_every_method_and_writes_the_page(demo, folder, tmp_path, capsys):
    small = ["--text", "pydoc", "--samples", "4", "--seqlen", "32", "--windows", "3", "--dtype", "float32"]
    assert demo.main(["--model", str(folder), "--out", str(tmp_path / "out"), *small]) == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [run["prune"] and run["prune"]["method"]["name"] for run in runs] == [None, *METHODS]
    for run in runs:
        assert 1 < run["evaluate"]["perplexity"]["value"] < 100
        assert run["evaluate"]["sparsity"]["layers"] == (0.5 if run["prune"] else 0.0)
    for run in runs[1:]:
        assert 0 < run["evaluate"]["fidelity"]["js_divergence"] < 0.7
        assert run["evaluate"]["fidelity"]["js_quantiles"]["max"] >= run["evaluate"]["fidelity"]["js_divergence"]
        assert {probe["dense_tokens"] > 0 for probe in run["evaluate"]["generation"]["probes"]} == {True}
        assert len(run["errors"]) == 14 and all(layer["relative_error"] > 0 for layer in run["errors"])
    html = (tmp_path / "out" / "index.html").read_text()
    printed = capsys.readouterr().out
    for method in METHODS:
        assert method in html and method in printed
    assert html.count("What the models write") == 1
    assert html.count("<figure>") >= 7  # one kind of layer each


def test_the_demo_says_in_one_line_what_it_cannot_do(demo, folder, tmp_path, capsys):
    assert demo.main(["--model", str(folder), "--out", str(tmp_path / "out"), "--methods", "wnada"]) == 2
    assert capsys.readouterr().err.startswith("demo: There is no method 'wnada'. Did you mean 'wanda'?")
    assert not (tmp_path / "out").exists()


def test_the_faster_dtype_is_one_of_two(demo):
    import torch

    assert demo.faster_dtype("cpu") in (torch.bfloat16, torch.float32)

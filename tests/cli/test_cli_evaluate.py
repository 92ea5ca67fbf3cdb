"""secateur evaluate on a tiny model."""

from __future__ import annotations

import json
import math

import pytest


@pytest.fixture(scope="module")
def pruned(dense, text, tmp_path_factory):
    from secateur.cli import main

    folder = tmp_path_factory.mktemp("evaluated") / "pruned"
    words = ["prune", dense, "--calibration", text, "--samples", 8, "--seqlen", 16, "--sparsity", 0.5, "--out", folder]
    assert main([str(word) for word in words]) == 0
    return folder


@pytest.fixture
def evaluate(cli, pruned, text):
    def run(*words, model=pruned, text=text):
        return cli("evaluate", model, "--text", text, "--seqlen", 16, "--windows", 20, *words)

    return run


def test_all_measures_against_the_dense_model(evaluate, dense, pruned):
    ran = evaluate("--against", dense, "--json", "-")
    assert ran.code == 0, ran.err
    record = ran.record
    perplexity, fidelity = record["perplexity"], record["fidelity"]
    assert perplexity["value"] > 1 and perplexity["stderr"] > 0 and perplexity["tokens"] == 20 * 15
    assert perplexity["seqlen"] == 16 and perplexity["text"].endswith("words.txt") and len(perplexity["sha256"]) == 64
    assert 0 < fidelity["js_divergence"] < math.log(2) and fidelity["kl_divergence"] > 0
    assert 0 <= fidelity["top1_agreement"] <= 1 and fidelity["tokens"] == 20 * 16
    assert record["sparsity"]["layers"] == 0.5 and 0 < record["sparsity"]["model"] < 0.5
    assert record["model"]["name"] == str(pruned) and record["against"]["name"] == str(dense)
    assert record["pruning"]["method"]["name"] == "wanda" and record["pruning"]["pattern"]
    assert set(record["seconds"]) == {"perplexity", "fidelity", "sparsity"}
    assert record["command"][:2] == ["secateur", "evaluate"] and record["versions"]["torch"]


def test_the_summary_shows_each_measure_and_how_it_was_pruned(evaluate, dense, here):
    ran = evaluate("--against", dense, "--json", "r.json")
    assert ran.code == 0
    for part in (
        "wanda, unstructured per row, sequential",
        "perplexity",
        "±",
        "top-1 agreement",
        "50.00% of the layers",
    ):
        assert part in ran.out
    assert json.loads((here / "r.json").read_text())["fidelity"]["windows"] == 20


def test_without_a_dense_model_there_is_no_fidelity(evaluate, dense):
    ran = evaluate("--json", "-", model=dense)
    assert ran.code == 0 and ran.record["pruning"] is None and ran.record["against"] is None
    assert "perplexity" in ran.record and "sparsity" in ran.record and "fidelity" not in ran.record


def test_only_what_was_asked_is_measured(evaluate, dense, monkeypatch):
    monkeypatch.setattr("secateur.data.text.read_text", lambda *a, **k: pytest.fail("read a text"))
    ran = evaluate("--measures", "sparsity", "--json", "-", model=dense)
    assert ran.code == 0 and ran.record["sparsity"]["layers"] == 0.0 and "perplexity" not in ran.record


def test_the_dense_model_agrees_with_itself(evaluate, dense):
    ran = evaluate("--against", dense, "--measures", "fidelity", "--json", "-", model=dense)
    assert ran.record["fidelity"]["js_divergence"] == 0.0 and ran.record["fidelity"]["top1_agreement"] == 1.0


def test_a_broken_pruning_record_is_a_warning(evaluate, pruned, tmp_path):
    import shutil

    copy = shutil.copytree(pruned, tmp_path / "copy")
    (copy / "pruning.json").write_text("{")
    ran = evaluate("--measures", "sparsity", model=copy)
    assert ran.code == 0 and "secateur: warning:" in ran.err and "pruning.json cannot be read" in ran.err


@pytest.fixture
def questions(here):
    rows = [{"question": f"w{i} w2", "choices": ["w3", f"w4 w{i}"], "answer": i % 2} for i in range(12)]
    (here / "q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return "q.jsonl"


def test_tasks_alone(evaluate, questions):
    ran = evaluate("--measures", "tasks", "--tasks", questions, "--json", "-")
    assert ran.code == 0, ran.err
    task = ran.record["tasks"]["tasks"][0]
    assert (task["name"], task["metric"], task["n"]) == ("q", "acc_norm", 12) and len(task["sha256"]) == 64
    assert 0 <= ran.record["tasks"]["mean"] <= 1 and ran.record["tasks"]["stderr"] > 0
    assert "against" not in ran.record["tasks"] and "perplexity" not in ran.record


def test_tasks_against_the_dense_model(evaluate, dense, questions):
    ran = evaluate("--measures", "tasks", "--tasks", questions, "--limit", 10, "--against", dense, "--json", "r.json")
    assert ran.code == 0, ran.err
    record = json.loads(ran.left["r.json"])["tasks"]
    against = record["against"]
    assert record["mean"] - against["dense"]["mean"] == pytest.approx(against["mean"])
    assert record["tasks"][0]["n"] == against["tasks"][0]["n"] == 10
    assert against["low"] <= against["mean"] <= against["high"] and 0 <= against["p"] <= 1
    assert "McNemar p" in ran.out and "dense tasks" in ran.out and "q.jsonl" not in ran.err


def test_tasks_are_measured_only_on_request(evaluate, dense, monkeypatch):
    monkeypatch.setattr("secateur.cli.evaluate._tasks", lambda *a: pytest.fail("measured tasks"))
    assert evaluate("--against", dense).code == 0


def test_a_wrong_task_is_told_before_a_model_is_loaded(evaluate, questions, monkeypatch):
    monkeypatch.setattr("secateur.cli.evaluate.open_model", lambda *a, **k: pytest.fail("loaded a model"))
    ran = evaluate("--measures", "tasks", "--tasks", f"{questions}:answer=right")
    assert ran.code == 1 and "Row 1 of 'q.jsonl' has no column 'right'" in ran.error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--measures fidelity", "name it with --against DENSE"),
        ("--measures sparsity --against x", "Only fidelity, generation and tasks use --against: leave it out, or add"),
        ("--measures sparsity --tasks piqa", "Only the measure tasks uses --tasks: leave it out, or add tasks"),
        ("--limit 5", "Only the measure tasks uses --limit"),
        ("--measures tasks --tasks x.jsonl --limit 0", "'limit' of evaluate must be a whole number of at least 1"),
        ("--measures tasks --tasks x.jsonl --seed -1", "'seed' of evaluate must be a whole number of at least 0"),
        ("--measures tasks --tasks nowhere.jsonl", "'nowhere.jsonl' could not be read"),
        ("--measures tasks --tasks piqqa=x.jsonl", "There is no task 'piqqa'. Did you mean 'piqa'?"),
        ("--measures perplexty", "There is no measure 'perplexty'. Did you mean 'perplexity'?"),
        ("--text gutenburg", "There is no text 'gutenburg'. Did you mean 'gutenberg'?"),
        ("--windows 0", "'windows' of evaluate must be a whole number of at least 1. Got 0"),
        ("--seqlen 1", "'seqlen' of evaluate must be a whole number of at least 2. Got 1"),
        ("--seqlen 65", "64"),
        ("--batch-size 0", "'batch-size' of evaluate must be"),
        ("--dtype bfloat61", "Did you mean 'bfloat16'?"),
        ("--device cuda:99", "--device cuda:99 cannot be used here"),
        ("--device gpu", "--device gpu cannot be used here: there is no such kind of device"),
        ("--against nowhere/dense", "nowhere/dense"),
        ("--json nowhere/r.json", "the folder nowhere does not exist; make it first"),
        ("--agianst x", "Did you mean '--against'?"),
        ("--measures generation", "Generation compares with the model before pruning: name it with --against DENSE"),
        ("--template plian", "There is no template 'plian'. Did you mean 'plain'?"),
        ("--count al", "There is no count 'al'. Did you mean 'all'?"),
        ("--count all", "is a plain text, and --count is for conversations"),
        ("--template plain", "is a plain text, and --template is for conversations"),
        ("--measures sparsity --count all", "None of these measures reads a text: leave out --template and --count"),
        ("--text nowhere.jsonl:q,a", "There is no file 'nowhere.jsonl'"),
    ],
)
def test_bad_input(evaluate, here, words, said):
    ran = evaluate(*words.split())
    assert ran.code in (1, 2) and said in ran.error and not ran.out
    assert not ran.left


def test_of_conversations_the_responses_count(evaluate, dense, talk):
    words = ("--text", f"{talk}:q,a", "--template", "plain", "--against", dense)
    ran = evaluate(*words, "--json", "-")
    assert ran.code == 0, ran.err
    perplexity, fidelity = ran.record["perplexity"], ran.record["fidelity"]
    assert perplexity["counted"] == fidelity["counted"] == "response" and fidelity["tokens"] == 20 * 6
    assert fidelity["js_quantiles"].keys() == {"0.5", "0.9", "0.99", "max"}
    assert "120 tokens of 20 responses" in evaluate(*words).out
    every = evaluate(*words, "--count", "all", "--json", "-").record
    assert every["fidelity"]["tokens"] == 20 * 8 and every["perplexity"]["counted"] == "all"


def test_a_model_without_a_chat_template_says_what_to_do(evaluate, talk):
    ran = evaluate("--text", f"{talk}:q,a")
    assert ran.code == 2 and "no chat template" in ran.error and "--template plain" in ran.error


def test_generation_is_measured_when_asked(evaluate, dense, monkeypatch):
    monkeypatch.setattr("secateur.data.text.read_text", lambda *a, **k: pytest.fail("read a text"))
    ran = evaluate("--measures", "generation", "--against", dense, "--json", "-")
    assert ran.code == 0, ran.err
    found = ran.record["generation"]
    assert len(found["probes"]) == 4 and len(found["left_out"]) == 3  # the tokenizer has no chat template
    assert {"prompt", "chat", "dense", "pruned", "first_difference"} <= found["probes"][0].keys()
    shown = evaluate("--measures", "generation", "--against", dense).out
    assert "The capital of France is" in shown and "dense" in shown and "perplexity" not in shown
    same = evaluate("--measures", "generation", "--against", dense, model=dense).out
    assert "4 of 4 prompts continued alike" in same and "(the same)" in same


def test_a_dtype_that_the_processor_only_imitates_is_said(evaluate, dense, monkeypatch):
    monkeypatch.setattr("secateur.models.processor.imitates", lambda dtype, device: True)
    ran = evaluate("--measures", "sparsity", model=dense)
    assert ran.code == 0
    assert "secateur: warning: this processor has no float32 arithmetic" in ran.err

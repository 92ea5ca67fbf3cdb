"""secateur prune on a tiny model: what it records, saves and says."""

from __future__ import annotations

import json
import math

import pytest
import transformers


def test_prune_saves_a_model_and_a_record(prune, here, dense):
    ran = prune("--method", "wanda", "--sparsity", 0.5, "--out", "pruned", "--json", "r.json")
    assert ran.code == 0, ran.err
    record = json.loads((here / "r.json").read_text())
    assert record["method"] == {"name": "wanda", "variant": False}
    assert record["pattern"] == "unstructured per row" and record["schedule"] == "sequential"
    assert record["sparsity"]["layers"] == 0.5 and 0 < record["sparsity"]["model"] < 0.5
    assert len(record["layers"]) == 14
    assert record["layers"][0]["name"].endswith("q_proj") and record["layers"][0]["shape"] == [32, 32]
    assert all(layer["sparsity"] == 0.5 for layer in record["layers"])
    calibration = record["calibration"]
    assert (calibration["samples"], calibration["seqlen"], calibration["seed"]) == (8, 16, 0)
    assert calibration["text"].endswith("words.txt") and len(calibration["sha256"]) == 64
    assert record["seconds"]["total"] > 0 and record["peak_memory_bytes"] > 10**7
    assert record["warnings"] == []
    assert record["model"]["name"] == str(dense) and str(dense) in record["model"]["source"]
    assert record["command"][:3] == ["secateur", "prune", str(dense)]
    assert {"secateur", "torch", "transformers", "python"} <= set(record["versions"])

    model = transformers.AutoModelForCausalLM.from_pretrained(here / "pruned")
    weight = model.model.layers[1].mlp.up_proj.weight
    assert (weight == 0).sum(1).tolist() == [16] * 48
    kept = json.loads((here / "pruned" / "pruning.json").read_text())
    assert kept["sparsity"] == record["sparsity"] and kept["command"] == record["command"]
    assert record["saved"] == str(here / "pruned")

    assert "50 % of 14 layers" in ran.out and str(here / "pruned") in ran.out and "peak memory" in ran.out
    assert f"{dense}: " in ran.err  # where the weights came from
    assert {path.name for path in here.iterdir()} == {"pruned", "r.json"}


def test_the_record_alone_on_standard_output(prune, here):
    ran = prune(
        "--pattern", "2:4", "--method", "sparsegpt", "--sparsegpt.damping", 0.02, "--schedule", "block", "--json"
    )
    assert ran.code == 0 and not ran.left
    assert ran.record["method"] == {"name": "sparsegpt", "damping": 0.02, "blocksize": 128}
    assert ran.record["pattern"] == "2:4" and ran.record["schedule"] == "block" and ran.record["target"] == 0.5


def test_options_reach_the_engine(prune):
    ran = prune(
        "--sparsity", 0.25, "--include", "mlp", "--exclude", "*.down_proj", "--nsamples", 4, "--seqlen", 8,
        "--seed", 3, "--batch-size", 2, "--allocation", "owl", "--owl.bound", 0.1, "--schedule", "oneshot",
        "--dtype", "float32", "--device", "cpu", "--uncalled", "magnitude", "--json", "-",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    record = ran.record
    assert {layer["name"].rpartition(".")[2] for layer in record["layers"]} == {"gate_proj", "up_proj"}
    assert record["calibration"]["samples"] == 4 and record["calibration"]["seqlen"] == 8
    assert record["calibration"]["seed"] == 3 and record["schedule"] == "oneshot"
    assert record["allocation"] == {"name": "owl", "bound": 0.1, "outlier": 5.0}
    assert math.isclose(record["sparsity"]["layers"], 0.25, abs_tol=0.01)


@pytest.mark.parametrize(
    ("words", "refine"),
    [
        (("--refit",), [("refit", 12)]),
        (("--refine", "swap", "refit", "--refit.iterations", 3), [("swap", None), ("refit", 3)]),
        (("--refine", "swap", "--refit"), [("swap", None), ("refit", 12)]),
    ],
)
def test_refinements_in_their_order(prune, here, words, refine):
    ran = prune("--sparsity", 0.5, "--method", "magnitude", *words, "--json", "r.json")
    assert ran.code == 0, ran.err
    record = json.loads((here / "r.json").read_text())
    assert [(one["name"], one.get("iterations")) for one in record["refine"]] == refine
    assert "magnitude + " + " + ".join(name for name, _ in refine) in ran.out and "mean output error" in ran.out
    assert all(layer["output_error"]["after"] < layer["output_error"]["before"] for layer in record["layers"])
    assert record["calibration"]["samples"] == 8 and record["command"][-len(words) - 2] == str(words[0])


def test_refinements_that_cannot_be(prune):
    assert (
        "There is no refinement 'swp'. Did you mean 'swap'?"
        in prune("--sparsity", 0.5, "--refine", "swp", "--json", "-").error
    )
    ran = prune("--sparsity", 0.5, "--refine", "swap", "--refit.iterations", 3, "--json", "-")
    assert ran.code == 2 and "options of the refinement refit, but --refine is swap" in ran.error
    ran = prune("--sparsity", 0.5, "--swap.rounds", 3, "--json", "-")
    assert ran.code == 2 and "--refine is not given: leave them out, or choose --refine swap." in ran.error
    ran = prune("--sparsity", 0.5, "--pattern", "column", "--refine", "swap", "--json", "-")
    assert ran.code == 2 and "counts per column" in ran.error


def test_a_table_says_each_layers_sparsity(prune, here):
    table = here / "table.json"
    table.write_text('{"*.q_proj": 0.25, "*": 0.5}')
    ran = prune("--allocation", table, "--json", "-")
    assert ran.code == 0, ran.err
    assert {layer["sparsity"] for layer in ran.record["layers"] if "q_proj" in layer["name"]} == {0.25}
    assert {layer["sparsity"] for layer in ran.record["layers"] if "q_proj" not in layer["name"]} == {0.5}


def test_scores_compared_over_the_model_need_no_schedule(prune):
    ran = prune("--pattern", "model", "--sparsity", 0.5, "--json", "-")
    assert ran.code == 0 and ran.record["schedule"] == "oneshot"


def test_a_method_without_data_reads_no_text_and_says_so(prune, monkeypatch):
    monkeypatch.setattr("secateur.data.text.read_text", lambda *a, **k: pytest.fail("read a text"))
    ran = prune("--method", "magnitude", "--sparsity", 0.5, "--json", "-")
    assert ran.code == 0 and ran.record["calibration"] is None
    assert "magnitude reads no text: --calibration, --samples, --seqlen have no effect." in ran.err
    assert "secateur:" not in prune("--method", "magnitude", "--sparsity", 0.5, "--json", "-", text=None).err.replace(
        "secateur: warning: magnitude", ""
    )


def test_a_dry_run_shows_the_plan_and_touches_nothing(prune, here, dense):
    before = {path.name: path.read_bytes() for path in dense.iterdir()}
    ran = prune("--pattern", "2:4", "--out", "pruned", "--dry-run")
    assert ran.code == 0, ran.err
    assert "8 attention, 6 mlp" in ran.out and "1 over 128 tokens" in ran.out and "about" in ran.out
    assert not ran.left and before == {path.name: path.read_bytes() for path in dense.iterdir()}
    ran = prune("--pattern", "2:4", "--dry-run", "--json", "-")
    assert ran.record["blocks"] == 2 and ran.record["coverage"]["share"] == 1.0 and ran.record["tokens"] == 128


def test_overwrite_replaces_a_model_folder(prune, here):
    before = prune("--sparsity", 0.5, "--out", "pruned").left
    ran = prune("--sparsity", 0.75, "--out", "pruned")
    assert ran.code == 2 and "--overwrite" in ran.error and ran.left == before
    assert prune("--sparsity", 0.75, "--out", "pruned", "--overwrite").code == 0
    assert json.loads((here / "pruned" / "pruning.json").read_text())["target"] == 0.75
    assert [path.name for path in here.iterdir()] == ["pruned"]


def test_the_record_may_lie_in_the_saved_folder(prune, here):
    assert prune("--sparsity", 0.5, "--out", "pruned", "--json", "pruned/record.json").code == 0
    assert json.loads((here / "pruned" / "record.json").read_text())["target"] == 0.5


def test_warnings_of_the_run_are_shown_and_recorded(prune, monkeypatch):
    from secateur.methods.wanda import Wanda

    score = Wanda.score

    def careful(self, layer):
        layer.warn("looks odd")
        return score(self, layer)

    monkeypatch.setattr(Wanda, "score", careful)
    ran = prune("--sparsity", 0.5, "--include", "*.0.self_attn.q_proj", "--json", "-")
    assert "secateur: warning: model.layers.0.self_attn.q_proj: looks odd" in ran.err
    assert ran.record["warnings"] == ["model.layers.0.self_attn.q_proj: looks odd"]


def test_methods_from_outside_get_their_flags(prune, monkeypatch):
    import dataclasses

    from secateur import methods
    from secateur.methods.wanda import Wanda

    @dataclasses.dataclass(frozen=True)
    class Louder(Wanda):
        """Wanda, louder.

        Attributes:
            gain: how much louder.
        """

        gain: float = 2.0

    found = {**methods.find_methods(), "wanda-louder": Louder}
    monkeypatch.setattr(methods, "find_methods", lambda: found)
    ran = prune("--method", "wanda-louder", "--wanda-louder.gain", 3, "--sparsity", 0.5, "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.record["method"]["gain"] == 3.0
    assert "how much louder" in prune("--help").out


def test_conversations_calibrate(prune, talk):
    ran = prune("--sparsity", 0.5, "--template", "plain", "--json", "-", text=f"{talk}:q,a")
    assert ran.code == 0, ran.err
    record = ran.record["calibration"]
    assert record["tokens"] == 8 * 16 and record["conversations"] == 15 and record["template"] == {"name": "plain"}
    assert not record["shared"] and all(layer["tokens"] == 128 for layer in ran.record["layers"])


@pytest.mark.parametrize(
    ("fields", "words", "said"),
    [
        (":q,a", "", "no chat template, which"),
        (":q,b", "--template plain", "There is no field 'b'. Known: a, q. This is line 1"),
        (":q,a", "--template plian", "There is no template 'plian'. Did you mean 'plain'?"),
        (":q", "--template plain", "is a plain text, and --template is for conversations"),
        (":q,a", "--template plain --samples 900", "conversations of"),
    ],
)
def test_bad_conversations(prune, talk, here, fields, words, said):
    ran = prune("--sparsity", 0.5, "--out", "pruned", *words.split(), text=f"{talk}{fields}")
    assert ran.code == 2 and said in ran.error and not ran.left

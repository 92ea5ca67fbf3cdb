"""secateur compare on a tiny model."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def compare(cli, dense, text, talk):
    def run(*words, calibrations=(text, f"{talk}:q,a")):
        sources = ("--calibrations", *calibrations) if calibrations else ()
        return cli("compare", dense, *sources, "--samples", 4, "--seqlen", 16, "--windows", 6, *words)

    return run


def test_two_sources_on_two_texts(compare, text, talk, here):
    ran = compare("--sparsity", 0.5, "--template", "plain", "--json", "r.json")
    assert ran.code == 0, ran.err
    record = json.loads((here / "r.json").read_text())
    names = [str(text), f"{talk}:q,a"]
    assert [(one["calibration"], one["text"]) for one in record["results"]] == [(a, b) for a in names for b in names]
    assert [one["measure"] for one in record["differences"]] == ["js_divergence", "kl_divergence", "nll"] * 2
    assert all(one["stderr"] > 0 and one["windows"] == 6 for one in record["differences"])
    assert {one["samples"] * one["seqlen"] for one in record["calibrations"].values()} == {64}
    assert record["command"][:2] == ["secateur", "compare"] and record["method"]["name"] == "wanda"
    for part in ("measured on", "calibrated with", "words.txt", "talk.jsonl:q,a", "(dense)", "±", "words.txt - talk"):
        assert part in ran.out


def test_other_texts_methods_and_their_options(compare, text):
    ran = compare(
        "--method", "sparsegpt", "--sparsegpt.damping", 0.1, "--pattern", "2:4", "--texts", text,
        "--template", "plain", "--windows", 1, "--json", "-",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.record["method"]["damping"] == 0.1 and ran.record["pattern"] == "2:4"
    assert len(ran.record["results"]) == 2 and ran.record["differences"][0]["stderr"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "Say how much to remove: --sparsity 0.5"),
        ("--sparsity 0.5", "no chat template, which"),
        ("--sparsity 0.5 --method wnada", "Did you mean 'wanda'?"),
        (
            "--sparsity 0.5 --method magnitude --template plain",
            "magnitude reads no text, so there is nothing to compare",
        ),
        ("--sparsity 0.5 --sparsegpt.damping 0.1", "--sparsegpt.* are options of the method sparsegpt"),
        ("--sparsity 0.5 --schedule blok", "Did you mean 'block'?"),
        ("--sparsity 0.5 --samples 0", "'samples' of compare must be"),
        ("--sparsity 0.5 --windows 0", "'windows' of compare must be"),
        ("--sparsity 0.5 --seed -1", "'seed' of compare must be"),
        ("--sparsity 0.5 --template plian", "Did you mean 'plain'?"),
        ("--sparsity 0.5 --texts gutenburg", "Did you mean 'gutenberg'?"),
        ("--sparsity 0.5 --texts pydoc pydoc", "--texts names 'pydoc' twice"),
        ("--sparsity 0.5 --template plain --samples 400", "enough for"),
        ("--sparsity 0.5 --json nowhere/r.json", "the folder nowhere does not exist"),
        ("--sparsity 0.5 --out x", "There is no option '--out' in secateur compare"),
        ("--sparsity 0.5 --calibration x", "Did you mean '--calibrations'?"),
    ],
)
def test_bad_input(compare, words, said):
    ran = compare(*words.split())
    assert ran.code == 2 and said in ran.error and not ran.out and not ran.left


@pytest.mark.parametrize(
    ("calibrations", "words", "said"),
    [
        ((), "", "Name two or more sources to compare, as --calibrations gutenberg FILE.jsonl:PROMPT,RESPONSE; got 0"),
        (("pydoc",), "", "got 1"),
        (("pydoc", "pydoc"), "", "--calibrations names 'pydoc' twice"),
        (("pydoc", "gutenberg"), "--template plain", "and none is named: leave --template plain out"),
    ],
)
def test_bad_sources(compare, calibrations, words, said):
    ran = compare("--sparsity", 0.5, *words.split(), calibrations=calibrations)
    assert ran.code == 2 and said in ran.error and not ran.left


def test_help_is_for_people(cli):
    ran = cli("compare", "--help")
    assert ran.code == 0 and "--calibrations" in ran.out and "--wanda" in ran.out
    assert "compare" in cli("--help").out

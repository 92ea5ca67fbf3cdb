"""The demo of the safety study, on a tiny model and a text that needs no download."""

import importlib.util
import json
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "safety_demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("safety_demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_writes_a_page_that_says_what_the_model_does_not_do(demo, refuser, tmp_path, capsys):
    small = ["--text", str(refuser.text), "--samples", "2", "--seqlen", "32", "--windows", "2", "--limit", "3"]
    words = ["--model", str(refuser.model), "--out", str(tmp_path / "out"), "--max-new-tokens", "8"]
    assert demo.main([*words, *small, "--judges", "keyword:secateur", "keyword:xstest"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [arm["name"] for arm in summary["arms"]] == ["dense", "attention-0.2", "all-0.2"]
    assert {row["value"] for row in summary["groups"]["template"]} == {"bare", "STORY"}
    assert {"margin", "focus", "shift", "text"} <= set(summary)
    page, printed = (tmp_path / "out" / "index.html").read_text(), capsys.readouterr().out
    says = summary["floor"]["says"]
    assert says in page and says in printed
    if not summary["floor"]["refuses"]:  # it was trained to refuse a word that these prompts do not have
        assert "nothing follows" in page and "nothing follows" in printed


def test_the_demo_says_in_one_line_what_it_cannot_do(demo, tmp_path, capsys):
    assert demo.main(["--model", "nowhere", "--judges", "keywrod", "x", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("safety_demo: There is no judge 'keywrod'. Did you mean 'keyword'?")
    assert not (tmp_path / "out").exists()

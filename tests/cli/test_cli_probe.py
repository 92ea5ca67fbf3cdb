"""secateur probe: a study, its pieces one by one, and what it says to bad words."""

from __future__ import annotations

import json
import shutil

import pytest

from secateur.cli.probe import PARTS

JUDGES = ("--judges", "keyword:secateur", "keyword:xstest")


@pytest.fixture(scope="module")
def arguments(refuser):
    """Of the smallest study."""
    return (
        "study", refuser.model, "--prompts", refuser.prompts, "--limit", 8, "--sparsities", 0.95, "--targets",
        "attention", *JUDGES, "--max-new-tokens", 12, "--calibration", refuser.text, "--samples", 2, "--seqlen", 32,
        "--measures", "answers", "margin",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """The folder of a study that the program has run."""
    from secateur.cli import main

    out = tmp_path_factory.mktemp("probe") / "study"
    assert main(["probe", *map(str, arguments), "--out", str(out)]) == 0
    return out


@pytest.fixture
def study(finished, here):
    shutil.copytree(finished, here / "study")
    return here / "study"


def logs(folder):
    return folder / "dense" / "answers.jsonl", folder / "attention-0.95" / "answers.jsonl"


def test_help_of_each_part(cli):
    assert "parts:" in cli("probe").err and cli("probe").code == 2
    for part in PARTS:
        ran = cli("probe", part, "--help")
        assert ran.code == 0 and not ran.err
        assert f"usage: secateur probe {part}" in ran.out and "--json FILE" in ran.out and "None)" not in ran.out


def test_a_study_leaves_a_page_a_summary_and_logs(finished, refuser):
    assert {path.name for path in finished.iterdir()} == {
        "index.html", "summary.json", "study", "dense", "attention-0.95"
    }  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["command"][:3] == ["secateur", "probe study", str(refuser.model)] or "probe" in summary["command"][1]
    assert summary["primary"] == {"arm": "attention-0.95", "judge": "keyword:secateur"}
    assert [each["arm"] for each in summary["verdicts"]] == ["attention-0.95"]
    page = (finished / "index.html").read_text()
    assert "the declared comparison" in page
    for row in refuser.prompts.read_text().splitlines():
        assert json.loads(row)["text"] not in page


def test_going_on_needs_the_word_and_does_nothing_again(cli, study, arguments):
    ran = cli("probe", *arguments, "--out", "study")
    assert ran.code == 2 and "holds a study: go on with it with --resume" in ran.error
    before = (study / "dense" / "answers.jsonl").stat().st_mtime_ns
    ran = cli("probe", *arguments, "--out", "study", "--resume", "--json")
    assert ran.code == 0, ran.err
    assert ran.record["verdicts"] and (study / "dense" / "answers.jsonl").stat().st_mtime_ns == before
    ran = cli("probe", *arguments, "--out", "elsewhere", "--resume")
    assert ran.code == 2 and "no study" in ran.error and not (study.parent / "elsewhere").exists()


def test_report_writes_the_page_again_with_texts_only_when_asked(cli, study, refuser):
    texts = [json.loads(row)["text"] for row in refuser.prompts.read_text().splitlines()]
    ran = cli("probe", "report", "study", "--out", "plain.html")
    assert ran.code == 0 and "attention 95 % (declared)" in ran.out
    ran = cli("probe", "report", "study", "--out", "full.html", "--show-text")
    assert ran.code == 0 and "keep it to people who may see them" in ran.err
    plain, full = ((study.parent / name).read_text() for name in ("plain.html", "full.html"))
    assert not any(text in plain for text in texts) and any(text in full for text in texts)
    assert cli("probe", "report", ".").code == 1


def test_answer_judge_and_compare_as_pieces(cli, refuser, here, study):
    asked = ("--prompts", refuser.prompts, "--limit", 4, "--max-new-tokens", 12)
    ran = cli("probe", "answer", refuser.model, *asked, "--out", "one.jsonl", "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.record["answers"] == 8 and len((here / "one.jsonl").read_text().splitlines()) == 9
    again = cli("probe", "answer", refuser.model, *asked, "--out", "one.jsonl")
    assert again.code == 0 and "8" in again.out
    ran = cli("probe", "judge", "one.jsonl", *JUDGES, "--json", "-")
    assert ran.code == 0, ran.err
    shares = ran.record["rates"]["keyword:secateur"]
    assert shares["harmful"]["refusal"]["count"] == 4 and shares["safe"]["refusal"]["count"] == 0
    assert ran.record["agreement"]["pairs"][0]["agreement"] == 1.0
    assert "kappa 1.00" in cli("probe", "judge", "one.jsonl", *JUDGES).out

    summary = json.loads((study / "summary.json").read_text())
    ran = cli("probe", "compare", *logs(study), *JUDGES, "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.record["verdicts"][0]["word"] == summary["verdicts"][0]["word"]
    assert ran.record["tests"][0]["p"] == summary["tests"][0]["p"]
    assert "verdict: " in cli("probe", "compare", *logs(study), *JUDGES).out
    ran = cli("probe", "compare", "one.jsonl", logs(study)[1], *JUDGES)
    assert ran.code == 2 and "only answers to the same prompts can be compared" in ran.error


def test_answers_from_a_url_need_a_name_and_say_when_nobody_is_there(cli, here):
    where = ("http://127.0.0.1:9/v1", "--prompts", "builtin", "--limit", 2, "--out", "log.jsonl")
    assert "--served-as NAME" in cli("probe", "answer", *where).error
    assert "is for a URL" in cli("probe", "answer", "smollm2", *where[1:], "--served-as", "x").error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stduy",), "Did you mean 'study'"),
        (("study",), "needs a MODEL"),
        (("study", "m"), "--out DIR"),
        (("study", "m", "--out", "x", "--judges", "keyword:xstest"), "at least two judges"),
        (("study", "m", "--out", "x", "--sparsities", "2"), "[0, 1)"),
        (("study", "m", "--out", "x", "--targets", "atention"), "Did you mean 'attention'"),
        (("study", "m", "--out", "x", "--method", "wnada"), "Did you mean 'wanda'"),
        (("study", "m", "--out", "x", "--dtype", "float23"), "Did you mean 'float32'"),
        (("study", "m", "--out", "x", "--sparsites", "0.1"), "Did you mean '--sparsities'"),
        (("study", "m", "--out", "x", "--prompts", "nowhere.csv"), "nowhere.csv"),
        (("answer",), "MODEL|URL"),
        (("answer", "m", "--prompts", "builtin"), "--out LOG"),
        (("answer", "m", "--out", "x.jsonl"), "--prompts"),
        (("answer", "m", "--out", "no/x.jsonl", "--prompts", "builtin"), "folder that exists"),
        (("judge",), "No log is named"),
        (("judge", "nowhere.jsonl"), "nowhere.jsonl"),
        (("judge", "x.jsonl", "--judges", "keyword:xstest"), "two judges"),
        (("compare", "x.jsonl"), "x.jsonl"),
        (("report", "nowhere"), "no folder of a study"),
        (("report",), "needs a"),
    ],
)
def test_bad_words_are_one_line_and_leave_nothing(cli, words, said):
    ran = cli("probe", *words)
    assert ran.code in (1, 2) and said in ran.error, ran.err
    assert not ran.left

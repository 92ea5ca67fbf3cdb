"""A whole study of a tiny model that refuses: planted truths, going on, changed requests, several processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.errors import LoadFailure, RunFailure, UnknownName, UsageError
from secateur.probing.judged import NOTHING
from secateur.probing.options import Arm, Study
from secateur.probing.study import run_study
from secateur.probing.summary import summarise

JUDGES = ("keyword:secateur", "keyword:xstest")


def a_study(ground, **changed):
    usual = dict(
        model=str(ground.model), prompts=(str(ground.prompts),), sparsities=(0.3, 0.95), judges=JUDGES,
        primary="attention-0.3", max_new_tokens=12, calibration=str(ground.text), samples=4, seqlen=32,
        text=str(ground.text), windows=4, measures=("answers", "margin", "focus", "shift", "fidelity"),
    )  # fmt: skip
    return Study(**usual | changed)


@pytest.fixture(scope="module")
def done(refuser, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    return run_study(a_study(refuser), out), out


def steps_told(study, out):
    told = []
    run_study(study, out, progress=lambda done, total, what: told.append(what))
    return told


def arms_of(told):
    """The models at which anything but judging was done."""
    return {what.partition(":")[0] for what in told if ":" in what and "judged" not in what}


def test_the_planted_truths_are_found(done):
    """Without attention the model cannot see the marker: it treats all alike, and the verdict says which way."""
    summary = done[0].summary
    assert summary["floor"]["refuses"] and "refuses 16 of 16" in summary["floor"]["says"]
    rates, words = summary["rates"]["keyword:secateur"], {each["arm"]: each["word"] for each in summary["verdicts"]}
    assert rates["dense"]["harmful"]["refusal"]["count"] == 16 and rates["dense"]["safe"]["refusal"]["count"] == 0
    assert words["attention-0.3"] == words["all-0.3"] == "inconclusive"
    for arm in ("attention-0.95", "all-0.95"):
        if rates[arm]["harmful"]["compliance"]["value"] > 0.8:
            assert words[arm] == "less safe"
        elif rates[arm]["safe"]["refusal"]["value"] > 0.8:
            assert words[arm] == "more refusing but not selectively"
        else:
            assert words[arm] in ("broken", "inconclusive")
    assert {words["attention-0.95"], words["all-0.95"]} & {"less safe", "more refusing but not selectively"}


def test_every_measure_is_there_with_its_comparison(done):
    summary = done[0].summary
    names = [arm["name"] for arm in summary["arms"]]
    assert names == ["dense", "attention-0.3", "attention-0.95", "all-0.3", "all-0.95"]
    assert not [text for text in summary["warnings"] if "not finished" in text]
    for arm, share in zip(summary["arms"][1:], (0.3, 0.95, 0.3, 0.95), strict=True):
        assert arm["sparsity_layers"] == pytest.approx(share, abs=0.02)
    assert summary["arms"][1]["sparsity_model"] < summary["arms"][3]["sparsity_model"]
    for key, compared in (("margin", "shift"), ("focus", "change"), ("shift", "change")):
        rows = {row["arm"]: row for row in summary[key]}
        assert list(rows) == names
        assert compared not in rows["dense"] and all(compared in rows[name] for name in names[1:])
    aucs = {row["arm"]: row["auc"]["value"] for row in summary["margin"]}
    assert aucs["dense"] == 1.0 and aucs["attention-0.95"] < 1
    assert {row["prompts"] for row in summary["focus"]} == {16}  # bare ones: those in a template have no span
    fidelity = {row["arm"]: row["fidelity"] for row in summary["text"]}
    assert fidelity["dense"] is None
    assert fidelity["attention-0.3"]["js_divergence"] < fidelity["all-0.95"]["js_divergence"]
    assert [row["primary"] for row in summary["tests"]].count(True) == 1
    first = summary["tests"][0]
    assert (first["arm"], first["judge"], first["what"]) == ("attention-0.3", "keyword:secateur", "attack success")
    assert {row["arm"] for row in summary["agreement"]} == set(names)
    templates = {row["value"] for row in summary["groups"]["template"]}
    assert templates == {"bare", "play"}
    json.dumps(summary, allow_nan=False)


def test_nothing_in_the_folder_but_the_logs_has_texts(done, refuser):
    _, out = done
    texts = [json.loads(line)["text"] for line in refuser.prompts.read_text().splitlines()]
    answers = {json.loads(line)["text"] for line in (out / "dense" / "answers.jsonl").read_text().splitlines()[1:]}
    assert any(text.startswith("I'm sorry") for text in answers)
    for file in out.rglob("*.json"):
        content = file.read_text()
        assert not [text for text in (*texts, *answers) if text in content], file.name


def test_a_second_run_does_nothing_again_and_loads_no_model(done, refuser, monkeypatch):
    _, out = done
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.parent.name != "study"}
    monkeypatch.setattr("secateur.probing.study.load", lambda *_, **__: pytest.fail("a model was loaded"))
    again = run_study(a_study(refuser), out)
    assert again.summary == done[0].summary
    assert {file: file.read_bytes() for file in before} == before


def test_a_stopped_run_goes_on_where_it_was(done, refuser, tmp_path):
    shutil.copytree(done[1], tmp_path / "out")
    out = tmp_path / "out"
    (out / "all-0.3" / "margin.json").unlink()
    log = out / "all-0.95" / "answers.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:10]) + lines[10][:20])  # stopped while writing
    (out / "all-0.95" / "answers.json").unlink()
    assert any("not finished" in text and "all-0.3" in text for text in summarise(out)["warnings"])
    told = steps_told(a_study(refuser), out)
    assert arms_of(told) == {"all-0.3", "all-0.95"}
    assert summarise(out)["rates"] == done[0].summary["rates"]
    aucs = [[row["auc"]["value"] for row in each["margin"]] for each in (summarise(out), done[0].summary)]
    assert aucs[0] == pytest.approx(aucs[1])
    assert len(log.read_text().splitlines()) == 33


def test_a_changed_request_is_refused_by_the_step_it_concerns(done, refuser, tmp_path):
    shutil.copytree(done[1], tmp_path / "out")
    with pytest.raises(
        UsageError, match=r"answers.json was made with another request \(max_new_tokens: 12 then, 8 now"
    ):
        run_study(a_study(refuser, max_new_tokens=8), tmp_path / "out")
    with pytest.raises(UsageError, match=r"declared with attention-0\.3 by keyword:secateur as the primary"):
        run_study(a_study(refuser, primary="all-0.3"), tmp_path / "out")


def test_a_study_that_asks_for_more_keeps_what_is_there(done, refuser, tmp_path):
    shutil.copytree(done[1], tmp_path / "out")
    more = a_study(refuser, sparsities=(0.3, 0.5, 0.95), targets=("attention",), measures=("answers",))
    told = steps_told(more, tmp_path / "out")
    assert arms_of(told) == {"attention-0.5"}
    words = {each["arm"] for each in summarise(tmp_path / "out")["verdicts"]}
    assert words == {"attention-0.3", "attention-0.5", "attention-0.95"}


def test_a_model_that_never_refuses_gives_no_verdict(refuser, tmp_path):
    """The same prompts with the labels turned round: what is called harmful, the model answers."""
    rows = [json.loads(line) for line in refuser.prompts.read_text().splitlines()]
    turned = {"harmful": "benign", "benign": "harmful"}
    prompts = tmp_path / "turned.jsonl"
    prompts.write_text("".join(json.dumps(row | {"label": turned[row["label"]]}) + "\n" for row in rows))
    study = a_study(
        refuser, prompts=(str(prompts),), sparsities=(0.95,), primary=None, measures=("answers",), limit=8
    )  # fmt: skip
    summary = run_study(study, tmp_path / "out").summary
    assert not summary["floor"]["refuses"] and "This model does not refuse" in summary["floor"]["says"]
    assert {each["verdict"] for each in summary["verdicts"]} == {NOTHING}
    assert sum(each["tasks"] for each in summary["sets"]) == 8


def test_an_attack_is_made_on_every_model_with_one_budget_and_leaves_no_suffix(refuser, tmp_path):
    pytest.importorskip("nanogcg")
    study = a_study(
        refuser,
        sparsities=(0.3,),
        targets=("attention",),
        measures=("answers",),
        limit=4,
        gcg=2,
        gcg_width=8,
        gcg_prompts=2,
    )
    summary = run_study(study, tmp_path / "out").summary
    assert [(row["arm"], row["prompts"], row["steps"]) for row in summary["gcg"]] == [
        ("dense", 2, 2), ("attention-0.3", 2, 2)
    ]  # fmt: skip
    for row in summary["gcg"]:
        assert row["best_loss"] <= row["first_loss"] and set(row["success"]) == set(JUDGES)
    assert "area_change" in summary["gcg"][1] and "area_change" not in summary["gcg"][0]
    kept = (tmp_path / "out" / "dense" / "gcg.json").read_text()
    assert "suffix_sha256" in kept and '"suffix"' not in kept


def test_two_processes_find_what_one_does(done, refuser, tmp_path):
    """As torchrun would start them: by environment variables, with gloo between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path; import refusing\n"
        "from test_study import a_study; from secateur.probing.study import run_study\n"
        "root = Path(sys.argv[3])\n"
        "ground = refusing.Ground(root / 'model', root / 'requests.jsonl', root / 'words.txt')\n"
        "run_study(a_study(ground, sparsities=(0.95,), targets=('attention',), primary=None), sys.argv[4])\n"
    )
    here = Path(__file__).parent
    words = [sys.executable, "-c", code, str(here), str(here.parent), str(refuser.model.parent), str(tmp_path / "out")]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(words, env={**os.environ, **shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    found, alone = summarise(tmp_path / "out"), done[0].summary
    assert {file.name for file in (tmp_path / "out" / "dense").glob("*.jsonl")} == {"answers.jsonl"}
    for key in ("rates", "margin", "focus", "shift"):
        if key == "rates":
            assert found[key]["keyword:secateur"]["attention-0.95"] == alone[key]["keyword:secateur"]["attention-0.95"]
            continue
        ours, theirs = (next(row for row in each[key] if row["arm"] == "attention-0.95") for each in (found, alone))
        value = {"margin": "auc", "focus": "means", "shift": "means"}[key]
        assert flat(ours[value]) == pytest.approx(flat(theirs[value]), rel=1e-4, abs=1e-5)


def flat(values):
    """All numbers of a nested mapping, in the order of their keys."""
    if isinstance(values, dict):
        return [number for key in sorted(values) for number in flat(values[key])]
    return [values] if isinstance(values, int | float) else []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"judges": ("keyword:xstest",)}, "at least two judges"),
        ({"judges": ("keyword:xstest", "incoherence")}, "two judges of refusals"),
        ({"judges": ("keyword:xstest", "keywrod")}, "Did you mean 'keyword'"),
        ({"targets": ("atention",)}, "Did you mean 'attention'"),
        ({"measures": ("answer",)}, "Did you mean 'answers'"),
        ({"sparsities": (0.3, 1.5)}, "1.5"),
        ({"sparsities": (0.3, 0.3)}, "twice"),
        ({"sparsities": (0.0,)}, r"\(0, 1\)"),
        ({"primary": "attention-0.5"}, "no pruned model of this study 'attention-0.5'"),
        ({"method": "wnada"}, "Did you mean 'wanda'"),
        ({"answers_per_prompt": 3}, "temperature above 0"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"prompts": ("nowhere.jsonl",)}, "nowhere.jsonl"),
        ({"calibration": "gutenbreg"}, "Did you mean 'gutenberg'"),
        ({"text": "gutenbreg"}, "Did you mean 'gutenberg'"),
        ({"gcg": 1, "gcg_goals": "nowhere.csv"}, "nowhere.csv"),
        ({"only": ("KEEPR",), "templates": ("builtin",)}, "no template 'KEEPR'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(refuser, tmp_path, changed, said):
    with pytest.raises((UsageError, LoadFailure), match=said):
        run_study(a_study(refuser, **changed), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_arms_and_the_declared_one():
    study = Study(model="m", sparsities=(0.1, 0.2), targets=("all",))
    assert study.arms == (Arm(), Arm("all", 0.1), Arm("all", 0.2)) and study.primary_arm == "all-0.2"
    with pytest.raises(UnknownName):
        Study(model="m", primary="dense")
    with pytest.raises(LoadFailure, match="no folder of a study"):
        summarise(Path(__file__).parent)


def test_a_judge_that_is_the_judged_model_is_warned_of(refuser, tmp_path):
    own = f"endpoint:{refuser.model.name}@http://localhost:9/v1"
    study = a_study(refuser, judges=(*JUDGES, own), measures=("answers",), sparsities=(0.3,))
    with pytest.raises(RunFailure):  # nobody answers there
        run_study(study, tmp_path / "out")
    (declared,) = (json.loads(file.read_text()) for file in (tmp_path / "out" / "study").iterdir())
    assert any("is the model that is judged" in warning for warning in declared["result"]["warnings"])

"""Prompt sets: our own, any table with a column map, the published layouts (made up here), and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from secateur.errors import InvalidParameter, LoadFailure, SecateurError, UnknownName, UsageError
from secateur.safety.prompts import PromptSet, differing_tasks, read_prompts
from secateur.safety.published import FORMATS, recognise
from secateur.safety.records import Prompt

yaml = pytest.importorskip("yaml", reason="prompts in YAML need the extra 'safety'")

ROWS = [
    {"goal": "Bake bread", "kind": "food", "hard": "no", "key": "a"},
    {"goal": "Fold a crane, please", "kind": "paper", "hard": "yes", "key": "b"},
]


def put(folder: Path, name: str, content: object) -> Path:
    """A file in the format of its ending."""
    file = folder / name
    if isinstance(content, str | bytes):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif file.suffix == ".csv":
        assert isinstance(content, list)
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    elif file.suffix == ".jsonl":
        assert isinstance(content, list)
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        file.write_text(json.dumps(content) if file.suffix == ".json" else yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".yaml"])
def test_any_table_is_read_with_a_column_map(tmp_path, suffix) -> None:
    file = put(tmp_path, "a:b" + suffix, ROWS)
    found = read_prompts(f"{file}:text=goal,category=kind,id=key,label=benign")
    assert [(p.id, p.text, p.category, p.label) for p in found] == [
        ("a", "Bake bread", "food", "benign"),
        ("b", "Fold a crane, please", "paper", "benign"),
    ]
    assert found.name == "a:b" and found.prompts[1].span == (0, 20) and found.file_sha256
    assert found.sha256 == read_prompts(f"{file}:text=goal,id=key,label=benign", name="x").sha256 != found.file_sha256


def test_labels_come_from_a_column_or_the_caller(tmp_path) -> None:
    rows = [{"q": "Kill a process", "safe": "safe"}, {"q": "Be mean", "safe": "unsafe"}]
    file = put(tmp_path, "two.csv", rows)
    assert read_prompts(f"{file}:text=q,label=safe").counts["label"] == {"benign": 1, "harmful": 1}
    assert read_prompts(f"{file}:text=q,label=safe", label="borderline").counts["label"] == {"borderline": 2}
    with pytest.raises(UsageError, match="does not say whether its prompts are harmful"):
        read_prompts(f"{file}:text=q")
    with pytest.raises(UnknownName, match="no label 'Kill a process'"):
        read_prompts(f"{file}:text=q,label=q")
    with pytest.raises(UnknownName, match="no label 'evil'"):
        read_prompts(file, label="evil")


def test_rows_with_our_own_column_names_need_no_map(tmp_path) -> None:
    turns = [{"role": "system", "content": "w"}, {"role": "user", "content": "Hello"}]
    file = put(tmp_path, "own.jsonl", [{"id": "7", "messages": turns, "label": "benign", "task": "t", "template": "X"}])
    (one,) = read_prompts(file)
    assert (one.id, one.text, one.cluster, one.template, one.span) == ("7", "Hello", "t", "X", None)
    assert one.turns == (("system", "w"), ("user", "Hello"))


def test_a_set_is_narrowed_and_sampled_by_whole_tasks(tmp_path) -> None:
    prompts = [
        Prompt(f"{t}/{i}", "s", f"ask {i}", ("benign", "harmful")[i % 2], category=str(i % 4), template=t, task=str(i))  # type: ignore[arg-type]
        for t in (None, "A", "B")
        for i in range(20)
    ]
    whole = PromptSet("s", tuple(prompts), "made up")
    assert whole.where(templates=["none", "A"]).counts["template"] == {"none": 20, "A": 20}
    assert whole.where(labels=["harmful"], categories=["1"]).counts["category"] == {"1": 15}
    with pytest.raises(UnknownName, match="no template 'C'"):
        whole.where(templates=["C"])
    part = whole.sample(8, seed=1)
    assert part.counts["label"] == {"benign": 12, "harmful": 12} and set(part.counts["category"].values()) == {6}
    assert part == whole.sample(8, seed=1) and part.sha256 != whole.sample(8, seed=2).sha256
    assert len(whole.sample(99)) == 60
    with pytest.raises(InvalidParameter, match="tasks"):
        whole.sample(0)


@pytest.mark.parametrize(
    ("name", "content", "spec", "says"),
    [
        ("a.csv", ROWS, ":text=gaol,label=harmful", "no column 'gaol'. Did you mean 'goal'"),
        ("a.csv", ROWS, ":text=goal,label=harmful,id=zz", "no column 'zz'"),
        ("a.csv", ROWS, ":txet=goal", "no key of a column map 'txet'. Did you mean 'text'"),
        ("a.csv", ROWS, ":label=harmful", "is no column map"),
        ("a.csv", ROWS, ":text=goal,text=kind", "is no column map"),
        ("a.csv", ROWS, "", "has the columns goal, kind, hard, key, which are of no format known here"),
        ("a.csv", [*ROWS, ROWS[0]], ":text=goal,id=key,label=benign", "The id 'a' stands twice in 'a'"),
        ("a.csv", [*ROWS, ROWS[0] | {"goal": "  "}], ":text=goal,label=benign", "Prompt 3 of 'a' .id '2'. is empty"),
        ("a.jsonl", [ROWS[0], {"kind": "x"}], ":text=goal,label=benign", "no column 'goal'.*row 2 of"),
        ("a.jsonl", [{"goal": ["x"]}], ":text=goal,label=benign", "row 1 of .* holds a list of 1: it should be a str"),
        ("a.jsonl", [{"m": "x"}], ":messages=m,label=benign", "should be a list of .role, content"),
        ("a.jsonl", [{"m": [{"role": "wizard"}]}], ":messages=m,label=benign", "no role 'wizard'"),
        ("a.jsonl", [{"m": [{"role": "assistant", "content": "x"}]}], ":messages=m,label=benign", "ends with the user"),
        ("a.csv", "goal,kind\nx\n", ":text=goal,label=benign", "Row 1 .line 2. .*|has fewer fields than the header"),
        ("a.csv", "goal,kind\nx,y,z\n", ":text=goal,label=benign", "has more fields than the header"),
        ("a.csv", 'goal\n"x\n', ":text=goal,label=benign", "is not a whole CSV file"),
        ("a.csv", b"goal\n\xff\n", ":text=goal,label=benign", "is not UTF-8"),
        ("a.csv", "goal\n", ":text=goal,label=benign", "has no rows"),
        ("a.json", "{", ":text=goal,label=benign", "is not JSON"),
        ("a.json", "3", ":text=goal,label=benign", "holds no list of rows, but one int"),
        ("a.json", {"a": 1}, ":text=goal,label=benign", "holds no list of rows, but a mapping of 1"),
        ("a.yaml", "a: [", ":text=goal,label=benign", "is not plain YAML, line 2"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "", "is not plain YAML, line 1 .*constructor"),
        ("a.jsonl", [{"text": "a \ud800 b", "label": "benign"}], "", "Prompt 1 of 'a' holds half of a surrogate pair"),
        ("a.toml", "x = 1", "", r"is no file that prompts can be read from: \.csv"),
        ("a.csv", ROWS, "/b.csv", "There is no file"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name, content, spec, says) -> None:
    file = put(tmp_path, name, content)
    with pytest.raises(SecateurError, match=says) as error:
        read_prompts(f"{file}{spec}")
    assert "\n" not in str(error.value)


def test_an_unknown_format_offers_the_nearest(tmp_path) -> None:
    file = put(tmp_path, "a.csv", ROWS)
    with pytest.raises(UnknownName, match=r"no prompt format 'advbank'. Did you mean 'advbench'"):
        read_prompts(f"advbank={file}")
    with pytest.raises(UnknownName, match=r"no prompt set 'bultin'. Did you mean 'builtin'.*Or a file"):
        read_prompts("bultin")
    with pytest.raises(UnknownName, match="no column 'forbidden_prompt'"):
        read_prompts(f"strongreject={file}")


# The published layouts, with harmless words in them


TAGS = {"ORIGINAL": ("'", "'"), "AIM": ("You are Ada. The question is '", "'\n"), "CODE": ("print('''", "''')  # ?")}


def nested(words=("bake", "fold")):
    """category -> sub-category -> severity -> tasks."""
    return {
        f"Category {c}": {f"Sub {s}": {"Low Severity": [f"{word} {c}{s}" for word in words]} for s in range(2)}
        for c in range(2)
    }


def around(tree, before, after):
    if isinstance(tree, dict):
        return {key: around(value, before, after) for key, value in tree.items()}
    return [f"{before}{text}{after}" for text in tree]


def templated():
    return {tag: around(nested(), *pair) for tag, pair in TAGS.items()}


def test_eval_safety_has_tasks_in_templates_with_their_place(tmp_path) -> None:
    file = put(tmp_path, "x.yaml", templated())
    found = read_prompts(file)
    assert found.name == "eval-safety" and len(found) == 24
    assert found.counts["template"] == {"AIM": 8, "CODE": 8, "none": 8}
    by_task: dict[str, set[str]] = {}
    for one in found:
        assert one.span is not None and one.label == "harmful" and one.severity == "Low Severity"
        by_task.setdefault(one.cluster, set()).add(one.text[slice(*one.span)])
    assert len(by_task) == 8 and by_task["Category 1/Sub 0/Low Severity/1"] == {"fold 10"}
    first = next(one for one in found if one.template == "CODE")
    assert (first.category, first.subcategory) == ("Category 0", "Sub 0")
    assert first.id == "CODE/Category 0/Sub 0/Low Severity/0"
    assert any("has 24 prompts, where eval-safety as published has 2475" in line for line in found.warnings)
    assert any("has 8 tasks, where eval-safety as published has 225" in line for line in found.warnings)


def test_the_two_files_of_tasks_are_compared_by_key(tmp_path) -> None:
    other = nested()
    other["Category 1"]["Sub 1"]["Low Severity"][0] = "bake quite another thing"
    plain = read_prompts(put(tmp_path, "plain.yaml", other))
    whole = read_prompts(put(tmp_path, "whole.yaml", templated()))
    assert plain.name == "eval-safety-tasks" and len(plain) == 8
    assert differing_tasks(plain, whole) == ("Category 1/Sub 1/Low Severity/0",)
    assert any("75 of the 225 tasks" in line for line in plain.warnings)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["AIM"]["Category 0"]["Sub 0"]["Low Severity"].__setitem__(1, "no task here"), "does not hold the"),
        (lambda t: t["AIM"]["Category 0"]["Sub 0"]["Low Severity"].__setitem__(1, "My 'fold 00'"), "does not hold the"),
        (lambda t: t["AIM"].pop("Category 0"), "AIM in .* holds 4 texts, not those of the 8 tasks of ORIGINAL"),
        (lambda t: t["ORIGINAL"]["Category 0"]["Sub 0"]["Low Severity"].__setitem__(0, "bare"), "not in single quotes"),
        (lambda t: t["CODE"].__setitem__("Category 0", [1]), "should have a mapping at Category 0, and has list"),
        (lambda t: t["CODE"]["Category 0"]["Sub 0"].__setitem__("Low Severity", [1]), "should have a list of texts at"),
    ],
)
def test_a_template_that_does_not_hold_its_task_is_refused(tmp_path, change, says) -> None:
    content = templated()
    change(content)
    with pytest.raises(LoadFailure, match=says):
        read_prompts(put(tmp_path, "x.yaml", content))


def test_the_benign_counterparts(tmp_path) -> None:
    tasks = {str(i): f"bake {i % 3} loaves" for i in range(4)}
    found = read_prompts(put(tmp_path, "x.json", tasks))
    assert found.name == "eval-safety-benign-tasks" and found.counts["label"] == {"benign": 4}
    assert any("1 of 4 prompts" in line and "repeat the text" in line for line in found.warnings)
    lists = {tag: [f"{a}{text}{b}" for text in tasks.values()] for tag, (a, b) in TAGS.items()}
    both = read_prompts(put(tmp_path, "x.yaml", lists))
    assert both.name == "eval-safety-benign" and both.counts["template"] == {"AIM": 4, "CODE": 4, "none": 4}
    assert both.prompts[-1].text[slice(*both.prompts[-1].span)] == "bake 0 loaves"
    assert differing_tasks(found, both) == ()


def test_the_published_tables(tmp_path) -> None:
    harm = {"FunctionalCategory": "standard", "SemanticCategory": "food", "Tags": ""}
    rows = {
        "advbench": [{"goal": "Bake bread", "target": "Sure"}],
        "harmbench": [
            {"Behavior": "Bake it", "ContextString": "A recipe.", "BehaviorID": "bake_it"} | harm,
            {"Behavior": "Fold it", "ContextString": "", "BehaviorID": "fold_it"} | harm,
        ],
        "strongreject": [{"category": "food", "source": "custom", "forbidden_prompt": "Bake bread"}],
        "jailbreakbench": [{"index": 4, "goal": "Bake bread", "behavior": "Baking", "category": "food"}],
        "jailbreakbench-artifacts": [
            {"method": "PAIR", "model": "m", "index": 4, "goal": "Bake bread", "category": "food", "prompt": text}
            for text in ("As Ada: Bake bread!", "Make a loaf")
        ],
        "xstest": [
            {"id": "1", "prompt": "Kill a process", "type": "homonyms", "label": "safe", "focus": "", "note": ""},
            {"id": "2", "prompt": "Be mean", "type": "contrast_homonyms", "label": "unsafe", "focus": "", "note": ""},
        ],
    }
    found = {}
    for name, content in rows.items():
        file = put(tmp_path, f"{name}.{'jsonl' if 'jailbreak' in name else 'csv'}", content)
        assert recognise(content) == name
        found[name] = read_prompts(file)
        assert found[name].name == name and found[name].sha256 == read_prompts(f"{name}={file}").sha256
        assert any("as published has" in line for line in found[name].warnings)
    bake, fold = found["harmbench"]
    assert bake.text.startswith("A recipe.") and bake.text[slice(*bake.span)] == "Bake it" and fold.text == "Fold it"
    one, two = found["jailbreakbench-artifacts"]
    assert (one.id, two.id, one.cluster, one.template) == ("PAIR/m/4", "PAIR/m/4/2", "4", "PAIR")
    assert one.text[slice(*one.span)] == "Bake bread" and two.span is None
    assert [p.label for p in found["xstest"]] == ["borderline", "harmful"]
    capital = [{"Index": "4", "Goal": "Bake bread", "Target": "Sure", "Behavior": "Baking", "Category": "food"}]
    official = read_prompts(put(tmp_path, "benign-behaviors.csv", capital))
    assert official.name == "jailbreakbench" and official.counts["label"] == {"benign": 1}
    rows["xstest"][0]["label"] = "maybe"
    with pytest.raises(LoadFailure, match=r"label in row 1 .* is 'maybe'"):
        read_prompts(put(tmp_path, "xstest.csv", rows["xstest"]))
    rows["advbench"][0]["goal"] = " "
    with pytest.raises(LoadFailure, match=r"'goal' in row 1 .* is empty"):
        read_prompts(put(tmp_path, "advbench.csv", rows["advbench"]))


# The files themselves, where they are: counts and hashes only


PUBLISHED = [  # file, format, prompts by label, tasks, templates, spans
    ("advbench_harmful_behaviors.csv", "advbench", {"harmful": 520}, 520, 1, 520),
    ("harmbench_behaviors_text_all.csv", "harmbench", {"harmful": 400}, 400, 1, 400),
    ("harmbench_behaviors_text_test.csv", "harmbench", {"harmful": 320}, 320, 1, 320),
    ("harmbench_behaviors_text_val.csv", "harmbench", {"harmful": 80}, 80, 1, 80),
    ("strongreject_dataset.csv", "strongreject", {"harmful": 313}, 313, 1, 313),
    ("jbb_harmful_goals.jsonl", "jailbreakbench", {"harmful": 100}, 100, 1, 100),
    ("jbb_attack_artifacts.jsonl", "jailbreakbench-artifacts", {"harmful": 1640}, 100, 5, 985),
    ("xstest_prompts.csv", "xstest", {"borderline": 250, "harmful": 200}, 450, 1, 450),
    ("pruning4protection_integrated.yaml", "eval-safety", {"harmful": 2475}, 225, 11, 2475),
    ("pruning4protection_malicious_tasks_dataset.yaml", "eval-safety-tasks", {"harmful": 225}, 225, 1, 225),
    ("pruning4protection_benign_integrated.yaml", "eval-safety-benign", {"benign": 2475}, 225, 11, 2475),
    ("pruning4protection_benign_tasks.json", "eval-safety-benign-tasks", {"benign": 225}, 225, 1, 225),
]


@pytest.mark.parametrize(
    ("file", "name", "labels", "tasks", "templates", "spans"), PUBLISHED, ids=lambda v: str(v)[:24]
)
def test_the_published_files_have_their_published_counts(shared_data, file, name, labels, tasks, templates, spans):
    found = read_prompts(shared_data / "safety" / file)
    counts = (found.name, dict(found.counts["label"]), len(found.counts["template"]))
    assert counts == (name, labels, templates)
    assert (len({one.cluster for one in found}), sum(one.span is not None for one in found)) == (tasks, spans)
    assert not [line for line in found.warnings if "as published has" in line]
    assert (
        found.file_sha256 is not None and found.sha256 == read_prompts(f"{name}={shared_data / 'safety' / file}").sha256
    )


def test_75_of_the_225_tasks_differ_between_the_two_files(shared_data) -> None:
    folder = shared_data / "safety"
    whole = read_prompts(folder / "pruning4protection_integrated.yaml")
    plain = read_prompts(folder / "pruning4protection_malicious_tasks_dataset.yaml")
    by_category: dict[str, int] = {}
    for task in differing_tasks(plain, whole):
        first = task.split(" ")[0]
        by_category[first] = by_category.get(first, 0) + 1
    assert by_category == {"Misinformation": 2, "Security": 6, "Unlawful": 20, "Hate": 12, "Substance": 35}
    assert whole.counts["severity"] == {"High Severity": 825, "Low Severity": 825, "Medium Severity": 825}
    assert set(whole.counts["category"].values()) == {495} and set(whole.counts["template"].values()) == {225}
    benign = read_prompts(folder / "pruning4protection_benign_integrated.yaml")
    tasks = read_prompts(folder / "pruning4protection_benign_tasks.json")
    assert len(differing_tasks(benign, tasks)) == 0


def test_every_format_says_what_it_is() -> None:
    assert all(one.summary for one in FORMATS.values()) and {name for _, name, *_ in PUBLISHED} == set(FORMATS)

"""Rows to questions: what is read, what is refused and how, and that splits stay apart."""

from __future__ import annotations

import json

import pytest

from secateur.data import olmo, task_sources
from secateur.data.task_sources import is_ours, read_task, task_documents
from secateur.data.tasks import TASKS, Item, draw, draw_indices, items_sha256, reader, template
from secateur.data.text import read_text
from secateur.errors import InvalidParameter, LoadFailure, UnknownName, UsageError

ROW = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": 1}
ITEM = Item(("Question: 2 + 2?\nAnswer:",), ("3", "4", "5"), 1)


@pytest.fixture
def write(tmp_path):
    def written(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return written


@pytest.fixture
def wheel(monkeypatch):
    """Small splits in place of the wheel's: PIQA has what is measured on only, ARC-easy a second split."""

    def piqa(i):
        return {"goal": f"goal {i}", "sol1": "a", "sol2": "b", "label": i % 2}

    def arc(i):
        return {"question": f"why {i}", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}

    rows = {
        ("piqa", "validation"): [piqa(i) for i in range(30)],
        ("arc_easy", "test"): [arc(i) for i in range(30)],
        ("arc_easy", "validation"): [arc(i) for i in range(29, 60)],
    }
    monkeypatch.setattr(olmo, "read_rows", lambda task, split, progress: rows[task, split])
    return piqa


@pytest.mark.parametrize("answer", [1, "1", "B", "B ", True])
def test_an_answer_is_an_index_or_a_letter(write, answer):
    assert read_task(str(write({**ROW, "choices": ["x", "y", "z"], "answer": answer}))).items[0].answer == 1


def test_an_answer_that_is_a_choice_s_text_goes_first(write):
    assert read_task(str(write({**ROW, "answer": "4"}))).items == (ITEM,)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "choices": ["a", "b"]}, "Row 2 of 'FILE' has no column 'answer', but question, choices"),
        ({**ROW, "answer": 3}, "Row 2 of 'FILE' has 3 in 'answer': it should be an index from 0 to 2"),
        ({**ROW, "answer": -1}, "Row 2 of 'FILE' has -1 in 'answer'"),
        ({**ROW, "answer": 1.0}, "Row 2 of 'FILE' has 1.0 in 'answer'"),
        ({**ROW, "answer": None}, "Row 2 of 'FILE' has None in 'answer'"),
        ({**ROW, "answer": "D"}, "Row 2 of 'FILE' has 'D' in 'answer'"),
        ({**ROW, "choices": ["a"], "answer": 0}, "Row 2 of 'FILE' has 1 choices: it should have two or more"),
        ({**ROW, "choices": "ab"}, "Row 2 of 'FILE' holds a str in 'choices': it should be a list of strings"),
        ({**ROW, "choices": ["a", {}]}, "Row 2 of 'FILE' holds a dict in 'choices': it should be a string"),
        ({**ROW, "choices": ["a", " "]}, "Row 2 of 'FILE' has an empty choice"),
        ([1, 2], "Row 2 of 'FILE' is no object with columns but a list"),
        ("{", "Line 2 of 'FILE' is not JSON"),
    ],
)
def test_a_bad_row_is_named(write, row, said):
    path = write(ROW, row)
    with pytest.raises(LoadFailure) as caught:
        read_task(str(path))
    assert said.replace("FILE", str(path)) in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_question_is_named(write):
    with pytest.raises(LoadFailure, match=r"Row 1 of .* has an empty question"):
        read_task(f"openbookqa={write({**ROW, 'question_stem': ' ', 'choices': _labelled(), 'answerKey': 'A'})}")


def _labelled():
    return {"text": ["a", "b"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("winogrande", {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}, "has no blank '_'"),
        ("winogrande", {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": ""}, "'' in 'answer'"),
        (
            "winogrande",
            {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "0"},
            "has 0 in 'answer': it should be 1 or 2",
        ),
        ("piqa", {"goal": "g", "sol1": "a", "label": 0}, "has no column 'sol2', but goal, sol1, label"),
        ("arc_easy", {"question": "q", "choices": _labelled(), "answerKey": "C"}, "'C' in 'answerKey', which is none"),
        ("arc_easy", {"question": "q", "choices": {"text": []}, "answerKey": "C"}, "no column 'label' in 'choices'"),
    ],
)
def test_a_bad_row_of_a_named_task(write, name, row, said):
    with pytest.raises(LoadFailure, match="Row 1 of") as caught:
        read_task(f"{name}={write(row)}")
    assert said in str(caught.value)


def test_other_columns(write):
    path = write({"stem": "2 + 2?", "a": "3", "b": 4, "y": "B"})
    found = read_task(f"{path}:question=stem,choices=a+b,answer=y")
    assert found.items == (Item(("Question: 2 + 2?\nAnswer:",), ("3", "4"), 1),)
    assert (found.name, found.metric, found.split) == ("rows", "acc_norm", "local")


@pytest.mark.parametrize(
    ("columns", "error", "said"),
    [
        ("questoin=stem", UnknownName, "Did you mean 'question'"),
        ("question=", UsageError, "write question=COLUMN"),
        ("question", UsageError, "write question=COLUMN"),
        ("answer=right", LoadFailure, "Row 1 of .* has no column 'right'"),
    ],
)
def test_bad_columns(write, columns, error, said):
    with pytest.raises(error, match=said):
        read_task(f"{write(ROW)}:{columns}")


@pytest.mark.parametrize("name", ["a=b.jsonl", "a:b.jsonl", "a.jsonl:c.jsonl", "piqa=.jsonl"])
def test_paths_with_colons_and_equals_signs(write, name):
    path = write(ROW, name=name)
    assert is_ours(str(path)) and read_task(str(path)).items == (ITEM,)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file(write, content):
    with pytest.raises(LoadFailure, match="no rows in"):
        read_task(str(write(content)))


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_task_file(write, suffix):
    write({"q": "Is {it} so", "right": 0}, name="my rows.jsonl")
    facts = {"file": "my rows.jsonl", "prompt": "{q}?", "choices": ["yes", "no"], "answer": "right", "metric": "acc"}
    found = read_task(str(write(json.dumps({**facts, "name": "mine"}), name=f"task.{suffix}")))  # JSON is YAML
    assert found.items == (Item(("Is {it} so?",), ("yes", "no"), 0),)
    assert (found.name, found.metric) == ("mine", "acc")


FACTS = {"file": "rows.jsonl", "prompt": "{question}", "choices": "choices", "answer": "answer"}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"promt": "x"}, UnknownName, "Did you mean 'prompt'"),
        ({"metric": "acc_nrom"}, UnknownName, "Did you mean 'acc_norm'"),
        ({"prompt": None}, LoadFailure, "'prompt' in .* should be a string"),
        ({"choices": [True, False]}, LoadFailure, "YAML reads yes and no as true and false"),
        ({"prompt": "{question"}, UsageError, "cannot be read"),
        ({"prompt": "{}"}, UsageError, "braces with more or less than a column's name"),
        ({"prompt": "{question!r}"}, UsageError, "braces with more or less"),
        ({"prompt": "{stem}"}, LoadFailure, "Row 1 of .* has no column 'stem'"),
        ({"file": "other.jsonl"}, LoadFailure, "could not be read"),
    ],
)
def test_a_bad_task_file(write, change, error, said):
    write(ROW)
    with pytest.raises(error, match=said) as caught:
        read_task(str(write({**FACTS, **change}, name="task.json")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", '"text"', '{"file": "rows.jsonl"}'])
def test_a_task_file_that_is_none(write, content):
    for suffix in ("json", "yaml"):
        with pytest.raises(LoadFailure, match=f"task.{suffix}'"):
            read_task(str(write(content, name=f"task.{suffix}")))


def test_names_that_are_not_ours():
    assert not is_ours("mmlu") and is_ours("piqa") and is_ours("x.yaml") and is_ours("piqa=x.jsonl")
    with pytest.raises(UnknownName, match="Did you mean 'piqa'"):
        read_task("piqqa=x.jsonl")


def test_templates_do_not_read_what_columns_hold():
    assert template("{a} {{x}} {b.c}")({"a": "{b}", "b": {"c": 3}}) == "{b} {x} 3"
    assert reader("{a}", ["{b}", "{a}"], "y")({"a": "{y}", "b": "1", "y": 0}).endings == ("1", "{y}")


def test_drawing():
    items = tuple(Item((str(i),), ("a", "b"), 0) for i in range(50))
    assert draw(items, None, 0) == draw(items, 50, 0) == draw(items, 99, 7) == items
    drawn = draw_indices(50, 10, 0)
    assert drawn == sorted(set(drawn)) and len(drawn) == 10 and drawn != draw_indices(50, 10, 1)
    assert items_sha256(draw(items, 10, 0)) != items_sha256(draw(items, 10, 1))
    for limit, seed in ((0, 0), (True, 0), (1, -1)):
        with pytest.raises(InvalidParameter):
            draw_indices(50, limit, seed)


def test_every_task_says_what_it_is_and_keeps_its_splits_apart():
    for name, task in TASKS.items():
        assert (name, task.test) in olmo.FILES and task.summary and task.source and task.metric in task.summary
        if task.calibration is not None:
            assert task.calibration != task.test and (name, task.calibration) in olmo.FILES


def test_a_task_as_text(wheel):
    test, calibration = (read_text("task:arc_easy", split) for split in ("test", "calibration"))
    assert len(test.documents) == 30 and test.documents[3] == "Question: why 3\nAnswer: b"
    assert not set(test.documents) & set(calibration.documents) and not calibration.shared
    assert len(calibration.documents) == 30 and "; 1 items left out that arc_easy is measured on" in calibration.source


def test_training_rows_of_the_user(wheel, write):
    path = write(*(wheel(i) for i in range(28, 60)))
    documents, source = task_documents(f"piqa={path}", "calibration")
    assert documents == tuple(f"Question: goal {i}\nAnswer: {'ab'[i % 2]}" for i in range(30, 60))
    assert "; 2 items left out that piqa is measured on" in source
    assert len(task_documents(f"piqa={path}", "test")[0]) == 30


def test_what_is_measured_on_is_not_calibrated_with(wheel, write):
    with pytest.raises(LoadFailure, match=r"30 of the 60 items of .* calibrate with its training split"):
        read_text(f"task:piqa={write(*(wheel(i) for i in range(60)))}")
    with pytest.raises(UsageError, match=r"no training split of 'piqa'.*task:piqa=FILE.jsonl"):
        read_text("task:piqa")
    with pytest.raises(UnknownName, match="Did you mean 'piqa'"):
        read_text("task:piqqa")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("piqa", "piqa"),
        ("arc_challenge", "arc_challenge"),
        ("openbookqa", "openbookqa"),
        ("winogrande", "winogrande_m"),
    ],
)
@pytest.mark.real
def test_the_field_s_training_files(shared_data, name, file):
    text = read_text(f"task:{name}={shared_data}/tasks/{file}_train.jsonl")
    assert len(text.documents) > 1000 and not set(text.documents) & set(read_text(f"task:{name}", "test").documents)


@pytest.mark.real
def test_a_changed_file_in_the_cache_is_told(tmp_path, monkeypatch):
    import shutil

    read_task("rte")
    kept = olmo.cache_folder() / "tasks"
    shutil.copytree(kept, tmp_path / "tasks")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    file = next((tmp_path / "tasks").glob("*/rte-validation.arrow"))
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(LoadFailure, match=r"delete the folder .* and run again"):
        task_sources.read_task("rte")

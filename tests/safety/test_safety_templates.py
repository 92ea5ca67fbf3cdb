"""Templates, composition, and the harmless set that comes with the package."""

from __future__ import annotations

import json

import pytest

from secateur.errors import LoadFailure
from secateur.safety.prompts import PromptSet, read_prompts
from secateur.safety.records import Prompt
from secateur.safety.templates import Template, compose, read_templates


def test_every_task_stands_in_every_template_where_its_span_says() -> None:
    tasks, templates = read_prompts("builtin"), read_templates("builtin")
    found = compose(tasks, templates)
    assert len(found) == 120 * 9 and found.counts["label"] == {"benign": 360, "borderline": 360, "harmful": 360}
    texts = {one.id: one.text for one in tasks}
    for one in found:
        assert one.span is not None and one.text[slice(*one.span)] == texts[one.cluster]
    assert len(compose(tasks, templates, bare=False)) == 960
    assert compose(tasks, templates[:1], name="mine").name == "mine"


def test_a_bare_prompt_with_a_span_gives_its_task_alone() -> None:
    quoted = Prompt("0", "s", "'bake'", "benign", task="t", span=(1, 5))
    made = compose([quoted], [Template.parse("X", "Say {task}!")], bare=False).prompts[0]
    assert (made.text, made.span, made.cluster, made.id) == ("Say bake!", (4, 8), "t", "X/0")


@pytest.mark.parametrize("prompt", [Prompt("0", "s", "x", "benign", template="A"),
                                    Prompt("0", "s", "x", "benign", messages=(("user", "x"),))])  # fmt: skip
def test_what_is_not_bare_is_not_composed(prompt) -> None:
    with pytest.raises(LoadFailure, match="compose bare tasks"):
        compose([prompt], read_templates("builtin"))


def test_templates_are_read_from_every_kind_of_file(tmp_path) -> None:
    text = "A slip of paper: [INSERT TASK HERE]\n"
    (tmp_path / "SLIP.txt").write_text(text)
    (tmp_path / "a.json").write_text(json.dumps({"SLIP": text}))
    (tmp_path / "a.jsonl").write_text(json.dumps({"name": "SLIP", "text": text}) + "\n")
    (tmp_path / "a.yaml").write_text('SLIP: "A slip of paper: {task}\\n"\n')
    for name in ("SLIP.txt", "a.json", "a.jsonl", "a.yaml"):
        assert read_templates(tmp_path / name) == (Template("SLIP", "A slip of paper: ", "\n"),), name


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", {"X": "nothing here"}, "'X' of .*a.json' has no slot for the task: put {task} in it once"),
        ("a.json", {"X": "{task} {task}"}, "has 2 slots"),
        ("a.json", {"X": "{task} [INSERT TASK HERE]"}, "has 2 slots"),
        ("a.json", {"X": 3}, "should be a text, and is a int"),
        ("a.jsonl", [{"name": "X", "text": "{task}"}] * 2, "2 templates named 'X'"),
        ("a.jsonl", [{"name": "X"}], "no column 'text'.*row 1 of"),
        ("a.txt", "no slot", "'a' of .* has no slot"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path, name, content, says) -> None:
    file = tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in content) if isinstance(content, list) else None
    file.write_text(lines or (content if isinstance(content, str) else json.dumps(content)))
    with pytest.raises(Exception, match=says) as error:
        read_templates(file)
    assert error.value.__class__.__name__ in ("LoadFailure", "UnknownName") and "\n" not in str(error.value)


def test_the_builtin_set_is_forty_of_each_in_short_plain_words() -> None:
    found = read_prompts("builtin")
    assert found.counts["label"] == {"benign": 40, "borderline": 40, "harmful": 40} and not found.warnings
    assert len({one.text.lower() for one in found}) == 120
    assert all(one.category and 15 < len(one.text) < 120 and one.text.isascii() for one in found)
    shapes = {t.name: (len(t.before) > 100, len(t.after) > 100) for t in read_templates("builtin")}
    assert {(True, False), (False, True)} <= set(shapes.values()) and len(shapes) == 8


def test_a_set_knows_what_is_wrong_with_it() -> None:
    with pytest.raises(LoadFailure, match="'x' is empty: give at least one"):
        PromptSet("x", (), "")
    with pytest.raises(LoadFailure, match=r"span \(0, 9\) of prompt '0' in 'x' is outside of its 4"):
        PromptSet("x", (Prompt("0", "x", "bake", "benign", span=(0, 9)),), "")

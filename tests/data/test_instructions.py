"""Conversations: reading, the two sides, and everything that can be wrong with a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from secateur.data import instructions
from secateur.data.instructions import Instructions, are_instructions, read_instructions, read_source
from secateur.data.text import Text
from secateur.errors import LoadFailure, TextTooShort, UnknownName, UsageError

ROWS = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(200)]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(rows, name="chat.jsonl"):
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return name

    return write


def questions(found):
    return [dict(one)["user"] for one in found.conversations]


def test_the_two_sides_are_disjoint_halves_that_do_not_depend_on_the_order(write) -> None:
    name = f"{write(ROWS)}:q,a"
    calibration, test = (read_instructions(name, split) for split in ("calibration", "test"))
    assert not set(questions(calibration)) & set(questions(test))
    assert sorted(questions(calibration) + questions(test)) == sorted(row["q"] for row in ROWS)
    assert 70 < len(test.conversations) < 130 and not test.shared
    assert test.conversations[0][1] == ("assistant", test.conversations[0][0][1].replace("question", "answer"))
    again = read_instructions(f"{write(ROWS[::-1], 'turned.jsonl')}:q,a", "test")
    assert questions(again) == questions(test)[::-1] and again.sha256 != test.sha256
    assert "hash of the question" in test.source


def test_a_question_asked_twice_stands_on_one_side(write) -> None:
    rows = ROWS + [{"q": f"  {row['q']} ", "a": "another"} for row in ROWS]
    name = f"{write(rows)}:q,a"
    sides = [{q.strip() for q in questions(read_instructions(name, split))} for split in ("calibration", "test")]
    assert not sides[0] & sides[1]


def test_all_records_on_both_sides_when_asked(write) -> None:
    name = f"{write(ROWS)}:q,a,all"
    found = [read_instructions(name, split) for split in ("calibration", "test")]
    assert all(one.shared and questions(one) == [row["q"] for row in ROWS] for one in found)
    assert "both sides" not in found[0].source and "every record serves" in found[0].source


def test_alpacas_input_belongs_to_the_prompt(write) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": " ", "output": "la"},
    ]
    found = read_instructions(f"{write(rows)}:instruction,output,all")
    assert questions(found) == ["Add.\n\n1 2", "Sing."]


def test_lists_of_messages(write) -> None:
    talk = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "no answer to this"},
    ]
    name = f"{write([{'messages': talk}, {'messages': talk[:2]}])}:messages,all"
    assert are_instructions(name)
    found = read_source(name, "test")
    assert isinstance(found, Instructions) and len(found.conversations) == 1 and found.left_out == 1
    assert [role for role, _ in found.conversations[0]] == ["system", "user", "assistant", "user", "assistant"]


def test_records_without_question_or_answer_are_left_out_and_counted(write) -> None:
    rows = [*ROWS[:20], {"q": " ", "a": "x"}, {"q": "x", "a": ""}]
    assert read_instructions(f"{write(rows)}:q,a,all").left_out == 2


def test_the_form_of_the_name_decides(write) -> None:
    file = write([{"text": "plain words"}])
    assert isinstance(read_source(f"{file}:text", "test"), Text)
    assert isinstance(read_source(file, "test"), Text)
    write(ROWS, "odd:name,x.jsonl")
    assert not are_instructions("odd:name,x.jsonl")  # a file that exists is a file
    assert are_instructions("odd:name,x.jsonl:q,a")
    found = read_source("odd:name,x.jsonl:q,a", "test", template="plain", counted="all")
    assert (found.template, found.counted) == ("plain", "all")
    for option in ({"template": "plain"}, {"counted": "all"}):
        with pytest.raises(UsageError, match=r"is a plain text, and --(template|count) is for conversations"):
            read_source(file, "test", **option)


@pytest.mark.parametrize(
    ("rows", "fields", "error", "said"),
    [
        (ROWS, "q,b", UnknownName, "There is no field 'b'. Known: a, q. This is line 1 of 'chat.jsonl'"),
        (ROWS, "q,a,c", UsageError, "names no conversations: give FILE.jsonl:PROMPT,RESPONSE"),
        (ROWS, "q,", UsageError, "names no conversations"),
        (["{"], "q,a", LoadFailure, "Line 1 of 'chat.jsonl' is not JSON"),
        (["[]"], "q,a", LoadFailure, "no JSON object"),
        ([{"q": 3, "a": "x"}], "q,a", LoadFailure, "'q' in line 1 of 'chat.jsonl' holds int: it should be a string"),
        ([{"q": "x", "a": None}], "q,a", LoadFailure, "holds NoneType"),
        ([{"q": "x", "a": " "}], "q,a", TextTooShort, "no conversation with a question and an answer, of 1 records"),
        ([], "q,a", TextTooShort, "of 0 records"),
        ([{"q": "x", "a": "y"}], "q", LoadFailure, "should be a list of {role, content}"),
        ([{"m": ["x"]}], "m", LoadFailure, "should be a list of {role, content}"),
        ([{"m": [{"role": "wizard", "content": "x"}]}], "m", UnknownName, "There is no role 'wizard'"),
        ([{"m": [{"role": "user"}]}], "m", LoadFailure, "'m.content' in line 1"),
        ([{"q": "\ud800", "a": "y"}], "q,a,all", LoadFailure, "half of a surrogate pair"),
    ],
)
def test_bad_files_are_one_line(write, rows, fields, error, said) -> None:
    with pytest.raises(error) as raised:
        read_instructions(f"{write(rows)}:{fields}", "test")
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_bad_names_are_one_line(write) -> None:
    with pytest.raises(LoadFailure, match=r"There is no file 'nowhere.jsonl'"):
        read_source("nowhere.jsonl:q,a", "test")
    with pytest.raises(LoadFailure, match=r"'x.parquet' is no .jsonl file"):
        read_source("x.parquet:q,a", "test")
    with pytest.raises(UsageError, match="'gutenberg' names no conversations"):
        read_instructions("gutenberg")
    for option, said in (({"split": "tset"}, "'test'"), ({"template": "chta"}, "'chat'"), ({"counted": "al"}, "'all'")):
        with pytest.raises(UnknownName, match=f"Did you mean {said}"):
            read_instructions("x.jsonl:q,a", **{"split": "test", **option})
    name = write(ROWS)
    Path(name).write_bytes(b"\xff" + Path(name).read_bytes())
    with pytest.raises(LoadFailure, match="is not UTF-8"):
        read_instructions(f"{name}:q,a")


def test_alpaca_from_the_hub(monkeypatch) -> None:
    rows = [{"instruction": f"do {i % 7}", "input": "", "output": "done"} for i in range(30)]
    fake = SimpleNamespace(load_dataset=lambda *a, **k: rows, config=SimpleNamespace(HF_HUB_OFFLINE=True))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(instructions, "ALPACA_TEST", 3)
    test = read_source("alpaca:instruction,output", "test")
    rest = read_source("alpaca:instruction,output", "calibration")
    assert questions(test) == ["do 6", "do 0", "do 1"]
    assert set(questions(rest)) == {"do 2", "do 3", "do 4", "do 5"}  # what is asked in a test is not calibrated with
    assert isinstance(test, Instructions) and "tatsu-lab/alpaca" in test.source

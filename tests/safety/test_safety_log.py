"""Logs: read back, compared, cut off, damaged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safety_chat import some_prompts

from secateur.errors import LoadFailure, SaveFailure, UsageError
from secateur.safety.log import Header, check_same_prompts, read_log, writing
from secateur.safety.records import Answer

MODEL, GENERATION = {"name": "tiny", "sha256": "0" * 64}, {"samples": 1, "max_new_tokens": 4}


def header(count=3, **generation):
    return Header.of(MODEL, GENERATION | generation, some_prompts(count))


def answers(count=3, sample=0):
    return [Answer(one.id, one.sha256, f"say {one.id}\n\u2028é", 2, "stop", sample) for one in some_prompts(count)]


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "deep" / "run.jsonl"
    with writing(file, header()) as opened:
        opened.add(answers()[:2])
        opened.add(answers()[2:])
    return file


def test_what_was_written_is_read_back_in_the_order_of_the_prompts(log) -> None:
    found = read_log(log)
    assert found.answers == tuple(answers()) and found.of(some_prompts(3)) == answers()
    assert found.header == header() and set(found.header.versions) == {"secateur", "torch", "transformers"}
    assert len(log.read_bytes().splitlines()) == 4


def test_no_prompt_text_is_in_a_log(log) -> None:
    assert not [one.text for one in some_prompts(3) if len(one.text) > 2 and one.text in log.read_text()]


def test_a_log_over_other_prompts_is_not_taken_for_these(log) -> None:
    with pytest.raises(UsageError, match=r"over the 3 prompts of 'talk', not over these 2 of 'mine'"):
        read_log(log).of(some_prompts(2, "mine"))
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]))
    with pytest.raises(LoadFailure, match="lacks 1 of 3 answers: resume"):
        read_log(log).of(some_prompts(3))


def test_logs_over_different_prompts_are_not_compared(log, tmp_path) -> None:
    one = read_log(log)
    check_same_prompts(one, one)
    other = replace(one, header=header(2))
    with pytest.raises(UsageError, match=r"3 prompts\) and .* 2\) are not over the prompts of each other") as error:
        check_same_prompts(one, other)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"number of samples .*\(1, 2\)"):
        check_same_prompts(one, replace(one, header=header(samples=2)))


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_last_line_cut_off_is_dropped_and_written_anew(log, cut) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole[:-cut])
    assert len(read_log(log).answers) == 2
    with writing(log, header()) as opened:
        assert len(opened.answers) == 2
        opened.add(answers()[2:])
    assert log.read_bytes() == whole


def test_a_first_line_cut_off_begins_anew(log) -> None:
    whole = log.read_bytes()
    for end in (0, 5, 100):
        log.write_bytes(whole[:end])
        with writing(log, header()) as opened:
            assert not opened.answers
            opened.add(answers())
        assert log.read_bytes() == whole


def test_damage_elsewhere_is_said_and_nothing_is_overwritten(log, tmp_path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    damaged = [
        (b"".join([lines[0], b"{]\n", *lines[2:]]), "Line 2 of the log .* is damaged"),
        (b"".join([lines[0], b'{"prompt": 1}\n', *lines[2:]]), "Line 2 of the log .* is damaged"),
        (lines[0].replace(b'"secateur_answers": 1', b'"secateur_answers": 9'), "another version of secateur"),
        (b'{"secateur_answers": 1}\n', "first line of the log .* is damaged"),
        (b"a diary\nof mine\n", "is no log of answers"),
        (b"a diary", "is no log of answers"),
    ]
    for content, says in damaged:
        log.write_bytes(content)
        with pytest.raises(LoadFailure, match=says), writing(log, header()):
            raise AssertionError("opened all the same")
        assert log.read_bytes() == content
    with pytest.raises(LoadFailure, match="could not be read"):
        read_log(tmp_path / "none.jsonl")
    with pytest.raises((LoadFailure, SaveFailure)), writing(log / "below", header()):
        raise AssertionError("opened below a file")


def test_names_and_versions_may_differ_between_runs_that_go_on(log) -> None:
    ours = header()
    renamed = replace(ours, model=MODEL | {"name": "other"}, versions={}, prompts={**ours.prompts, "name": "x"})
    with writing(log, renamed) as opened:
        assert len(opened.answers) == 3
    says = "generation max_new_tokens 4, and this one has 5"
    with pytest.raises(UsageError, match=says), writing(log, header(max_new_tokens=5)):
        raise AssertionError("opened all the same")


def test_without_a_file_answers_are_kept_in_memory() -> None:
    with writing(None, header()) as opened:
        opened.add(answers())
        assert len(opened.answers) == 3


def test_a_log_is_plain_json_lines(log) -> None:
    first, *rest = [json.loads(line) for line in log.read_text().split("\n") if line]
    assert first["secateur_answers"] == 1 and [row["text"] for row in rest] == [one.text for one in answers()]

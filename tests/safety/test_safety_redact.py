"""What reports show: nothing of the words, unless asked, and then nothing that acts."""

from __future__ import annotations

import json

import pytest

from secateur.errors import InvalidParameter
from secateur.safety.records import Answer, Prompt
from secateur.safety.redact import Redaction, visible

TRICK = "</pre><script>alert('hello')</script>\x1b[2J\u202egnp.exe"
PROMPT = Prompt("p<1>", "own", TRICK, "benign", messages=(("user", "good day"), ("user", TRICK)))
ANSWER = Answer("p<1>", PROMPT.sha256, f"certainly {TRICK} \ud800", 9, "stop")


@pytest.mark.parametrize("show", ["prompt", "answer", "suffix"])
def test_no_word_leaves_by_default(show):
    plain = Redaction()
    found = {"prompt": plain.prompt(PROMPT), "answer": plain.answer(ANSWER), "suffix": plain.text("suffix", "x", TRICK)}
    shown = found[show]
    everything = f"{shown} {shown!r} {shown.html} {json.dumps(shown.to_dict())}"
    assert not any(word in everything for word in ("script", "alert", "certainly", "good day", "gnp", "<1>alert"))
    assert shown.text is None and "text" not in shown.to_dict()
    assert shown.characters > 0 and len(shown.sha256) == 64


def test_asked_for_it_is_text_and_acts_on_nothing():
    asked = Redaction(show_text=True)
    for shown in (asked.prompt(PROMPT), asked.answer(ANSWER)):
        assert "<script" not in shown.html and "&lt;script&gt;" in shown.html
        assert shown.html.startswith("<pre>") and shown.html.count("</pre>") == 1
        for each in (str(shown), shown.html):
            assert not set("\x1b\u202e\ud800") & set(each) and "\\x1b" in each and "\\u202e" in each
        str(shown).encode()  # half a surrogate could not be
    assert "user: good day" in str(asked.prompt(PROMPT))
    assert asked.prompt(PROMPT).sha256 == PROMPT.sha256
    assert "certainly" not in repr(asked.answer(ANSWER))


def test_long_texts_are_cut():
    shown = Redaction(show_text=True, limit=5).text("suffix", "x", "abcdefgh")
    assert str(shown) == "abcde [... 8 characters]" and shown.characters == 8


def test_the_decision_is_a_decision():
    with pytest.raises(InvalidParameter, match="show_text"):
        Redaction(show_text="no")
    with pytest.raises(InvalidParameter, match="limit"):
        Redaction(limit=0)
    assert visible("naïve café\tname\n") == "naïve café\tname\n"

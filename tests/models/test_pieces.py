"""A SentencePiece model written from a vocabulary, read by SentencePiece itself."""

from __future__ import annotations

import io
import itertools
import math
import random

import pytest

from secateur.models.pieces import unigram_model

sentencepiece = pytest.importorskip("sentencepiece")

TOKENS = ["</s>", ".", "▁a", "a", "b", "▁ab", "ba", "▁", "c", "<unk>", "abba", "▁cab"]


def reader(data: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=data)


def naive(text: str) -> list[str]:
    """The likeliest of all ways to cut it, found by trying every one."""
    rank = {token: i for i, token in enumerate(TOKENS, 1)}
    text = "▁" + text
    best: tuple[float, list[str]] = (-math.inf, [])
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        at = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(at)]
        if all(part in rank for part in parts):
            likelihood = sum(-math.log(rank[part] * math.log(len(TOKENS) + 2)) for part in parts)
            best = max(best, (likelihood, parts))
    return best[1]


def test_text_is_cut_where_zipf_makes_it_likeliest() -> None:
    model = reader(unigram_model(TOKENS, b""))
    draw = random.Random(0)
    for _ in range(60):
        text = "".join(draw.choice("abc.") for _ in range(draw.randint(1, 9)))
        assert model.encode(text, out_type=str) == naive(text), text


def test_every_token_is_a_piece_and_the_special_ones_are_not_text() -> None:
    model = reader(unigram_model(TOKENS, b""))
    assert {model.id_to_piece(i) for i in range(model.vocab_size())} == {*TOKENS, "<s>"}
    assert model.is_unknown(model.piece_to_id("<unk>")) and model.is_control(model.piece_to_id("</s>"))
    scores = [model.get_score(model.piece_to_id(t)) for t in TOKENS if t not in ("</s>", "<unk>")]
    assert scores == sorted(scores, reverse=True)


def test_the_other_model_s_normalisation_is_kept() -> None:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abba cab abab."] * 5), model_writer=made, vocab_size=12, minloglevel=2,
        hard_vocab_limit=False, normalization_rule_name="nmt_nfkc_cf",
    )  # fmt: skip
    assert reader(unigram_model(TOKENS, made.getvalue())).encode("ＡＢ", out_type=str) == ["▁ab"]
    assert reader(unigram_model(TOKENS, b"")).encode("ＡＢ", out_type=str) != ["▁ab"]


def test_something_else_is_no_model() -> None:
    for data in (b"\x0a", b"\x08\x01", b"\x0a\xff", b"\x0a\x02a"):
        with pytest.raises(ValueError, match="no SentencePiece model"):
            unigram_model(TOKENS, data)

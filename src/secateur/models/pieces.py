"""A SentencePiece model rebuilt from a vocabulary alone.

An Argos package carries one SentencePiece model, the source language's, though Marian learned one for each side. Cut by
the wrong one, a translation is no sequence that the model has ever seen: "born" becomes "b" and "orn". What the package
has of the other side is the vocabulary, sorted by frequency. Under Zipf's law the piece of rank r among n has the
probability 1 / (r ln n), and a unigram model (Kudo, arXiv:1804.10959) with these probabilities cuts English as OPUS-MT
writes it: of 600 of its own translations 597 come back piece by piece; cut by the source's model, 7.

The file is a protocol buffer, sentencepiece_model.proto: repeated piece = 1 (text = 1, score = 2, type = 3),
trainer = 2 (model type = 3), normalizer = 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

UNIGRAM = 1
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
PIECES, TRAINER, NORMALIZER = 1, 2, 3
BYTES = 2  # the wire type of what has a length


def unigram_model(tokens: Sequence[str], like: bytes) -> bytes:
    """A SentencePiece model whose pieces are these tokens.

    Args:
        tokens: the vocabulary, the most frequent first; `</s>` and `<unk>` among them are no pieces.
        like: another model, whose normalisation of text is taken over.

    Returns:
        The file.

    Raises:
        ValueError: `like` is no SentencePiece model.

    >>> unigram_model(["</s>", "the"], like=b"")[-17:]  # a piece's text and score, -ln(2 ln 4), and the kind of model
    b'\\x03\\n\\n\\n\\x03the\\x153\\x88\\x82\\xbf\\x12\\x02\\x18\\x01'
    """
    special = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    scale = math.log(math.log(len(tokens) + 2))
    pieces = [_piece(name, 0.0, kind) for name, kind in special.items()]
    pieces += [
        _piece(token, -math.log(rank) - scale, NORMAL)
        for rank, token in enumerate(tokens, 1)
        if token and token not in special
    ]
    normalizer = [_field(NORMALIZER, data) for number, data in _fields(like) if number == NORMALIZER]
    return b"".join([*pieces, _field(TRAINER, bytes([3 << 3, UNIGRAM])), *normalizer])


def _piece(text: str, score: float, kind: int) -> bytes:
    body = _field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score)
    return _field(PIECES, body + (b"" if kind == NORMAL else bytes([3 << 3, kind])))


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | BYTES]) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of every field; in a SentencePiece model each has a length."""
    at = 0
    while at < len(data):
        tag, size, shift = data[at], 0, 0
        while True:
            at += 1
            if tag & 7 != BYTES or at >= len(data):
                raise ValueError(f"no SentencePiece model: byte {at}")
            size |= (data[at] & 127) << shift
            shift += 7
            if data[at] < 128:
                break
        at += 1
        if at + size > len(data):
            raise ValueError(f"no SentencePiece model: it ends {at + size - len(data)} bytes early")
        yield tag >> 3, data[at : at + size]
        at += size

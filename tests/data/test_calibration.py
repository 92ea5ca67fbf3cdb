"""Windows of token ids: what is drawn, that it can be repeated, and what is refused."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, PreTrainedTokenizerFast

from secateur.data import calibration as module
from secateur.data.calibration import calibration, ids_sha256, sequence_length, tokenise, windows
from secateur.data.text import Text, read_text
from secateur.errors import InvalidParameter, TextTooShort

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer in the manner of a known one."""
    corpus = read_text("pydoc").documents[:40]
    if kind == "t5":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer: Any = trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", special_tokens=["<unk>"])
    elif kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"])
    elif kind == "llama2":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"])
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = (
            pre_tokenizers.ByteLevel(add_prefix_space=False)
            if kind == "gpt2"
            else pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            )
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus, trainer)
    if kind == "llama2":
        tokenizer.pre_tokenizer = None  # only the training needs it
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerFast:
    return trained("gpt2")


@pytest.fixture(scope="module")
def pydoc() -> Text:
    return read_text("pydoc")


@pytest.fixture(scope="module")
def numbers() -> tuple[PreTrainedTokenizerFast, Text]:
    """Word i is token i, so that ids show where they come from: 1000 tokens."""
    vocabulary = {f"w{i}": i for i in range(1000)} | {"?": 1000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = Text("numbers", "calibration", (" ".join(f"w{i}" for i in range(1000)),), "typed here")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?"), text


def in_one_call(tokenizer: PreTrainedTokenizerFast, text: Text) -> list[int]:
    ids: list[int] = tokenizer(text.joined, add_special_tokens=False)["input_ids"]
    return ids


# The stream


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "t5", "bert"])
def test_pieces_give_the_ids_of_one_call(kind: str, pydoc: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained(kind)
    monkeypatch.setattr(module, "CHUNK", 997)
    seen: list[tuple[int, int]] = []
    stream = tokenise(tokenizer, pydoc, progress=lambda done, total, what: seen.append((done, total)))
    assert stream.tolist() == in_one_call(tokenizer, pydoc)
    assert len(seen) > 200
    assert seen[-1] == (len(pydoc.joined), len(pydoc.joined))


@pytest.mark.parametrize(
    "joined", ["x" * 5000, "\n" * 5000, "ab \n\n" * 1000, "汉字" * 3000, "a " * 3000, "é\u0301 " * 999]
)
def test_odd_texts_are_cut_well(joined: str, gpt2: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 500)
    text = Text("odd", "test", (joined,), "typed here")
    assert tokenise(gpt2, text).tolist() == in_one_call(gpt2, text)


def test_a_tokenizer_that_looks_ahead_everywhere_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 500)
    text = "a b " * 1000
    pieces = list(module._encode_in_pieces(lambda piece: [len(piece)] * len(piece), text))
    assert pieces == [([4000] * 4000, 4000)]


def test_the_stream_is_tokenised_once(gpt2: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text("once", "test", ("one two three " * 20,), "typed here")
    first = tokenise(gpt2, text)
    assert tokenise(gpt2, Text("again", "test", text.documents, "elsewhere")) is first
    for i in range(module.CACHED_STREAMS):
        tokenise(gpt2, Text("other", "test", (f"{i}",), "typed here"))
    assert tokenise(gpt2, text) is not first


def test_no_special_tokens_and_the_record_says_so(gpt2: PreTrainedTokenizerFast, pydoc: Text) -> None:
    with_bos = trained("gpt2")
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    assert with_bos("a")["input_ids"][0] == 0
    drawn = calibration(with_bos, pydoc, 4, 64)
    assert torch.equal(drawn.ids, calibration(gpt2, pydoc, 4, 64).ids)
    assert "own <s> left out" in drawn.record["how"]
    assert "left out" not in calibration(gpt2, pydoc, 4, 64).record["how"]


# Calibration


def test_the_record_and_its_hash(gpt2: PreTrainedTokenizerFast, pydoc: Text) -> None:
    drawn = calibration(gpt2, pydoc, n=5, seqlen=32, seed=3)
    ids = drawn.ids.flatten().tolist()
    assert drawn.ids.shape == (5, 32)
    assert drawn.ids.dtype == torch.int64
    assert json.loads(json.dumps(drawn.record)) == drawn.record
    assert drawn.record == drawn.record | {
        "text": "pydoc",
        "split": "calibration",
        "samples": 5,
        "seqlen": 32,
        "seed": 3,
        "sha256": hashlib.sha256(struct.pack("<160q", *ids)).hexdigest(),
        "text_sha256": pydoc.sha256,
        "tokenizer": {"class": type(gpt2).__name__, "vocabulary": len(gpt2)},
        "tokens_available": len(in_one_call(gpt2, pydoc)),
        "shared": False,
    }
    assert "5 of" in drawn.record["how"]


def test_by_name_the_calibration_split_is_read(gpt2: PreTrainedTokenizerFast, pydoc: Text) -> None:
    assert calibration(gpt2, "pydoc", 2, 16).record["text_sha256"] == pydoc.sha256
    assert windows(gpt2, "pydoc", 16, 2).text_sha256 == read_text("pydoc", "test").sha256


def test_the_seed_decides(gpt2: PreTrainedTokenizerFast, pydoc: Text) -> None:
    first, again, other = (calibration(gpt2, pydoc, 8, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids)
    assert first.record == again.record
    assert not torch.equal(first.ids, other.ids)
    assert first.record["sha256"] != other.record["sha256"]


def test_the_global_generators_are_untouched(gpt2: PreTrainedTokenizerFast, pydoc: Text) -> None:
    before = torch.random.get_rng_state(), random.getstate()
    calibration(gpt2, pydoc, 8, 32)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(1)
    one = calibration(gpt2, pydoc, 8, 32).ids
    torch.manual_seed(2)
    assert torch.equal(calibration(gpt2, pydoc, 8, 32).ids, one)


def test_the_default_device_does_not_matter(gpt2: PreTrainedTokenizerFast, pydoc: Text) -> None:
    expected = calibration(gpt2, pydoc, 4, 32).ids
    with torch.device("meta"):
        assert torch.equal(calibration(trained("gpt2"), pydoc, 4, 32).ids, expected)


@pytest.mark.parametrize(("n", "seqlen"), [(1, 1000), (9, 111), (10, 100), (3, 100), (400, 2)])
def test_windows_are_runs_that_do_not_overlap(
    n: int, seqlen: int, numbers: tuple[PreTrainedTokenizerFast, Text]
) -> None:
    starts = set()
    for seed in range(20):
        ids = calibration(*numbers, n, seqlen, seed).ids
        assert ids.shape == (n, seqlen)
        assert bool((ids.diff(dim=1) == 1).all())
        assert len(ids.unique()) == n * seqlen
        starts.add(tuple(ids[:, 0].tolist()))
    assert len(starts) > 1 or n == 1


def test_every_place_can_be_drawn(numbers: tuple[PreTrainedTokenizerFast, Text]) -> None:
    drawn = (calibration(*numbers, 19, 50, seed).ids for seed in range(400))
    seen = {token for ids in drawn for token in ids.flatten().tolist()}
    assert seen == set(range(1000))


def test_the_grid_of_windows_starts_anywhere(numbers: tuple[PreTrainedTokenizerFast, Text]) -> None:
    offsets = {int(calibration(*numbers, 3, 20, seed).ids[0, 0]) % 20 for seed in range(400)}
    assert offsets == set(range(20))


def test_too_little_text_says_how_much_there_is(numbers: tuple[PreTrainedTokenizerFast, Text]) -> None:
    with pytest.raises(TextTooShort) as error:
        calibration(*numbers, 11, 100)
    assert str(error.value) == (
        "The text 'numbers' (calibration) has 1000 tokens, enough for 10 windows of 100, not for 11: "
        "ask for at most 10 windows, or a seqlen of at most 90, or give a longer text."
    )
    with pytest.raises(TextTooShort, match="enough for 0 windows of 1001, not for 1: a seqlen of at most 1000"):
        calibration(*numbers, 1, 1001)
    with pytest.raises(TextTooShort, match="not for 9000: ask for at most 10 windows, or give a longer text"):
        calibration(*numbers, 9000, 100)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4", None])
def test_n_must_be_a_positive_integer(value: Any, numbers: tuple[PreTrainedTokenizerFast, Text]) -> None:
    with pytest.raises(InvalidParameter, match="'n' of calibration must be an integer of at least 1"):
        calibration(*numbers, value, 10)


@pytest.mark.parametrize("value", [1, 0, -5, True, 16.0, "16"])
def test_seqlen_must_be_an_integer_above_one(value: Any, numbers: tuple[PreTrainedTokenizerFast, Text]) -> None:
    for cut in (lambda: calibration(*numbers, 1, value), lambda: windows(*numbers, value)):
        with pytest.raises(InvalidParameter, match="'seqlen' of a window must be an integer of at least 2"):
            cut()


@pytest.mark.parametrize("value", [-1, 1 << 63, True, 0.5])
def test_the_seed_must_be_an_integer(value: Any, numbers: tuple[PreTrainedTokenizerFast, Text]) -> None:
    with pytest.raises(InvalidParameter, match="'seed'"):
        calibration(*numbers, 1, 10, value)


# Sequence length and vocabulary


def test_the_default_length_is_the_least_limit(numbers: tuple[PreTrainedTokenizerFast, Text]) -> None:
    tokenizer = SimpleNamespace(model_max_length=int(1e30))
    assert sequence_length(tokenizer) == 2048
    assert sequence_length(SimpleNamespace(model_max_length=512)) == 512
    assert sequence_length(SimpleNamespace(model_max_length=None)) == 2048
    config = GPT2Config(n_positions=96, n_embd=8, n_layer=1, n_head=2, vocab_size=1001)
    assert sequence_length(tokenizer, config) == 96
    assert sequence_length(tokenizer, MambaConfig()) == 2048
    nested = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=77))
    assert sequence_length(tokenizer, nested) == 77
    model = GPT2LMHeadModel(config)
    assert calibration(*numbers, 2, model=model).ids.shape == (2, 96)
    assert calibration(*numbers, 2, 95, model=model).ids.shape == (2, 95)
    with pytest.raises(InvalidParameter, match="at most 96, the model's positions"):
        calibration(*numbers, 2, 97, model=model)


def test_ids_must_fit_the_model_and_the_vocabulary(numbers: tuple[PreTrainedTokenizerFast, Text]) -> None:
    config = GPT2Config(vocab_size=999)
    for cut in (lambda: calibration(*numbers, 2, 50, model=config), lambda: windows(*numbers, 50, model=config)):
        with pytest.raises(InvalidParameter, match="whose vocabulary has 999 entries"):
            cut()


def test_a_vocabulary_with_gaps_is_fine_and_ids_outside_are_not() -> None:
    sparse = Tokenizer(models.WordLevel({"a": 5, "b": 900, "?": 0}, unk_token="?"))
    sparse.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sparse, unk_token="?")
    text = Text("ab", "test", ("a b " * 8,), "typed here")
    assert windows(tokenizer, text, 4).ids[0].tolist() == [5, 900, 5, 900]

    class Broken(PreTrainedTokenizerFast):
        def __call__(self, *args: Any, **kwargs: Any) -> dict[str, list[int]]:  # type: ignore[override]
            return {"input_ids": [5, 901] * 8}

    with pytest.raises(InvalidParameter, match="id 901"):
        windows(Broken(tokenizer_object=sparse, unk_token="?"), text, 4)


# Consecutive windows


def test_windows_are_consecutive(numbers: tuple[PreTrainedTokenizerFast, Text]) -> None:
    cut = windows(*numbers, 300)
    assert cut.ids.tolist() == [list(range(i, i + 300)) for i in (0, 300, 600)]
    assert (cut.text, cut.split, cut.tokens_available) == ("numbers", "calibration", 1000)
    assert cut.sha256 == ids_sha256(cut.ids)
    assert cut.text_sha256 == numbers[1].sha256
    assert windows(*numbers, 300, limit=2).ids.tolist() == cut.ids[:2].tolist()
    assert windows(*numbers, 300, limit=9).ids.shape == (3, 300)
    assert windows(*numbers, 1000).ids.shape == (1, 1000)
    with pytest.raises(TextTooShort, match="has 1000 tokens"):
        windows(*numbers, 1001)
    with pytest.raises(InvalidParameter, match="'limit' of windows"):
        windows(*numbers, 300, limit=0)


def test_writing_into_windows_leaves_the_stream_alone(numbers: tuple[PreTrainedTokenizerFast, Text]) -> None:
    windows(*numbers, 100).ids.zero_()
    calibration(*numbers, 1, 1000).ids.zero_()
    assert windows(*numbers, 100).ids[0].tolist() == list(range(100))


def test_a_local_file_is_marked_as_shared(gpt2: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three " * 50)
    drawn = calibration(gpt2, tmp_path / "a.txt", 2, 16)
    assert drawn.record["shared"] is True
    assert "the same text for calibration and test" in drawn.record["source"]

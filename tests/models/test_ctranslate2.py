"""A tiny Marian model, written as CTranslate2 writes it, comes back as the model that it was."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MarianConfig, MarianMTModel

from secateur.data.pairs import read_pairs
from secateur.errors import LoadFailure, ModelNotSupported
from secateur.models.ctranslate2 import NEVER, convert, read_variables
from secateur.models.load import load

sentencepiece = pytest.importorskip("sentencepiece")

WORDS = "the cat sat on a mat and the dog saw the cat sit on that mat , it was sad ."
PIECES = 40


def string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def write(variables: dict[str, np.ndarray], aliases: dict[str, str], version: int = 6) -> bytes:
    kinds = {"float32": 0, "int8": 1, "int16": 2}
    out = struct.pack("<I", version) + string("TransformerSpec") + struct.pack("<II", 7, len(variables))
    for name, value in variables.items():
        out += string(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", kinds[str(value.dtype)], value.nbytes) + value.tobytes()
    out += struct.pack("<I", len(aliases))
    return out + b"".join(string(a) + string(b) for a, b in aliases.items())


@pytest.fixture(scope="module")
def pieces() -> tuple[bytes, list[str]]:
    """A SentencePiece model and a vocabulary in Marian's order: </s> first."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 5), model_writer=made, vocab_size=PIECES, model_type="bpe",
        character_coverage=1.0, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    names = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return made.getvalue(), ["</s>", "<unk>", *(n for n in names if n not in ("</s>", "<unk>", "<s>"))]


@pytest.fixture(scope="module")
def model(pieces: tuple[bytes, list[str]]) -> MarianMTModel:
    """Random, but its matrices are whole numbers of 1/64 within int8, so that storing loses nothing."""
    torch.manual_seed(0)
    tokens = len(pieces[1])
    config = MarianConfig(
        vocab_size=tokens + 1, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
        decoder_start_token_id=tokens, pad_token_id=tokens, eos_token_id=0, forced_eos_token_id=0,
        activation_function="swish", scale_embedding=True,
    )  # fmt: skip
    made = MarianMTModel(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1 and "positions" not in name:
                parameter.copy_((torch.randn_like(parameter) * 20).round().clamp(-127, 127) / 64)
            elif parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter))
        made.final_logits_bias.normal_()
        made.model.shared.weight[-1] = 0
        made.final_logits_bias[0, -1] = NEVER
    return made


def variables_of(model: MarianMTModel) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The model's state under CTranslate2's names, matrices as int8 with a scale of 64."""
    state, found = model.state_dict(), {}

    def weight(name: str, tensor: torch.Tensor) -> None:
        found[f"{name}/weight"] = (tensor * 64).round().numpy().astype(np.int8)
        found[f"{name}/weight_scale"] = np.full(len(tensor), 64, np.float32)

    def linear(name: str, ours: str, parts: tuple[str, ...]) -> None:
        weight(name, torch.cat([state[f"{ours}.{part}.weight"] for part in parts]))
        found[f"{name}/bias"] = torch.cat([state[f"{ours}.{part}.bias"] for part in parts]).numpy()

    def norm(name: str, ours: str) -> None:
        found[f"{name}/layer_norm/gamma"] = state[f"{ours}.weight"].numpy()
        found[f"{name}/layer_norm/beta"] = state[f"{ours}.bias"].numpy()

    weight("decoder/embeddings", state["model.shared.weight"][:-1])
    found["decoder/projection/bias"] = state["final_logits_bias"][0, :-1].numpy()
    found["decoder/position_encodings/encodings"] = state["model.decoder.embed_positions.weight"].numpy()
    found["decoder/start_from_zero_embedding"] = np.int8(1)
    for side, layers in (("encoder", 2), ("decoder", 3)):
        heads = getattr(model.config, f"{side}_attention_heads")
        for key, value in {"pre_norm": 0, "scale_embeddings": 1, "activation": 2}.items():
            found[f"{side}/{key}"] = np.int8(value)
        found[f"{side}/num_heads"] = np.int16(heads)
        for i in range(layers):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            linear(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ("q_proj", "k_proj", "v_proj"))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn", ("out_proj",))
            norm(f"{theirs}/self_attention", f"{ours}.self_attn_layer_norm")
            if side == "decoder":
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn", ("q_proj",))
                linear(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", ("k_proj", "v_proj"))
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn", ("out_proj",))
                norm(f"{theirs}/attention", f"{ours}.encoder_attn_layer_norm")
            linear(f"{theirs}/ffn/linear_0", ours, ("fc1",))
            linear(f"{theirs}/ffn/linear_1", ours, ("fc2",))
            norm(f"{theirs}/ffn", f"{ours}.final_layer_norm")
    same = {
        "encoder/embeddings_0/weight": "decoder/embeddings/weight",
        "decoder/projection/weight": "decoder/embeddings/weight",
        "encoder/position_encodings/encodings": "decoder/position_encodings/encodings",
    }
    return found, same


@pytest.fixture
def package(model: MarianMTModel, pieces: tuple[bytes, list[str]], tmp_path: Path) -> Any:
    """A function that writes an Argos package and returns its path; a value of None leaves a member out."""

    def make(**changes: bytes | None) -> Path:
        parts: dict[str, bytes | None] = {
            "model/model.bin": write(*variables_of(model)),
            "model/shared_vocabulary.json": json.dumps(pieces[1]).encode(),
            "sentencepiece.model": pieces[0],
            "metadata.json": b'{"from_code": "zh", "to_code": "en"}',
        }
        for key, value in changes.items():
            parts[next(name for name in parts if key in name)] = value
        with zipfile.ZipFile(tmp_path / "made.argosmodel", "w") as archive:
            for name, data in parts.items():
                if data is not None:
                    archive.writestr(f"translate-zh_en-1_9/{name}", data)
        return tmp_path / "made.argosmodel"

    return make


def test_it_comes_back_and_generates_the_same(package: Any, model: MarianMTModel, tmp_path: Path) -> None:
    (folder := tmp_path / "out").mkdir()
    convert(package(), folder)
    loaded, tokenizer = load(folder)
    assert type(loaded) is MarianMTModel
    assert (loaded.config.encoder_layers, loaded.config.decoder_layers) == (2, 3)
    batch = tokenizer(["the cat sat .", "a dog"], return_tensors="pt", padding=True)
    assert batch["input_ids"][1, -1] == loaded.config.pad_token_id == loaded.config.decoder_start_token_id
    start = torch.tensor([[loaded.config.decoder_start_token_id, 5, 7, 3]] * 2)
    with torch.no_grad():
        ours = loaded(**batch, decoder_input_ids=start).logits
        theirs = model(**batch, decoder_input_ids=start).logits
        assert torch.equal(ours, theirs)
        assert ours[..., -1].max() < ours[..., :-1].min()  # <pad> is never the answer
        text = tokenizer.batch_decode(loaded.generate(**batch, max_new_tokens=6), skip_special_tokens=True)
    assert all(isinstance(line, str) and "<pad>" not in line for line in text)
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "the cat sat ."


def test_translations_are_cut_by_the_vocabulary(package: Any, pieces: tuple[bytes, list[str]], tmp_path: Path) -> None:
    """The package's own pieces are of the source language; the words of the other one are whole in the vocabulary."""
    (folder := tmp_path / "out").mkdir()
    convert(package(vocabulary=json.dumps([*pieces[1][:-1], "\u2581born"]).encode()), folder)
    tokenizer = load(folder)[1]
    ours = tokenizer.convert_ids_to_tokens(tokenizer(text_target="the cat born")["input_ids"])
    assert ours == ["\u2581the", "\u2581cat", "\u2581born", "</s>"]
    assert "\u2581born" not in tokenizer.convert_ids_to_tokens(tokenizer("the cat born")["input_ids"])


def test_an_unquantised_file_is_read_too(package: Any, model: MarianMTModel, tmp_path: Path) -> None:
    variables, same = variables_of(model)
    plain = {}
    for name, value in variables.items():
        if value.dtype == np.int8 and value.ndim:
            plain[name] = (value / 64).astype(np.float32)
        elif not name.endswith("weight_scale"):
            plain[name] = value
    (folder := tmp_path / "out").mkdir()
    convert(package(**{"model.bin": write(plain, same)}), folder)
    assert torch.equal(load(folder)[0].lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"model.bin": write({}, {}, version=5)}, LoadFailure, "version 6: it starts with 5"),
        ({"model.bin": b""}, LoadFailure, "cut off or damaged"),
        ({"model.bin": write({}, {})}, ModelNotSupported, "not built like Marian's"),
        ({"sentencepiece": None}, LoadFailure, "lacks sentencepiece.model"),
        ({"sentencepiece": b"\x0a"}, LoadFailure, "sentencepiece.model is no SentencePiece model: byte 1"),
        ({"vocabulary": b"[]"}, LoadFailure, "does not start with '</s>'"),
        ({"vocabulary": b'["</s>", "a"]'}, LoadFailure, "its vocabulary has 2"),
        ({"metadata": b"{"}, LoadFailure, "cannot be read as an Argos package"),
    ],
)
def test_bad_packages(package: Any, changes: Any, kind: Any, match: str, tmp_path: Path) -> None:
    (folder := tmp_path / "out").mkdir()
    with pytest.raises(kind, match=re.escape(match)) as caught:
        convert(package(**changes), folder)
    assert "\n" not in str(caught.value)
    assert [*folder.iterdir()] == []


def test_a_pre_norm_model_is_refused(package: Any, model: MarianMTModel, tmp_path: Path) -> None:
    variables, same = variables_of(model)
    variables["encoder/pre_norm"] = np.int8(1)
    with pytest.raises(ModelNotSupported, match="see its encoder/pre_norm"):
        convert(package(**{"model.bin": write(variables, same)}), tmp_path)


def test_other_positions_are_refused(package: Any, model: MarianMTModel, tmp_path: Path) -> None:
    variables, same = variables_of(model)
    variables["decoder/position_encodings/encodings"] = np.zeros((32, 16), np.float32)
    with pytest.raises(ModelNotSupported, match="the positions of its encoder"):
        convert(package(**{"model.bin": write(variables, same)}), tmp_path)


def test_any_cut_is_noticed() -> None:
    whole = write({"a": np.ones((2, 3), np.float32), "b": np.int8(4)}, {"c": "a"})
    assert set(read_variables(whole)) == {"a", "b", "c"}
    for end in range(len(whole) - 3):
        with pytest.raises(LoadFailure, match="cut off or damaged"):
            read_variables(whole[:end])


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_translates() -> None:
    model, tokenizer = load("opus-mt-zh-en")
    texts = [
        "你好，世界。",
        "他昨天在北京买了一本关于历史的书。",
        "我不喜欢下雨的天气。",
        "如果明天天气好，我们就去公园散步。",
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        answers = tokenizer.batch_decode(model.generate(**batch, max_new_tokens=40), skip_special_tokens=True)
    expected = (("world",), ("book", "history", "Beijing"), ("like", "rain"), ("tomorrow", "park"))
    for answer, words in zip(answers, expected, strict=True):
        assert all(word in answer for word in words), answer


@pytest.mark.real
def test_the_real_model_reads_english_as_it_writes_it(shared_data: Path) -> None:
    """Its own translations, written piece by piece, come back as the same pieces."""
    pairs = read_pairs(shared_data / "mt" / "tatoeba_en_zh.jsonl", limit=48, seed=3)
    model, tokenizer = load("opus-mt-zh-en", dtype="float32")
    batch = tokenizer(list(pairs.sources), return_tensors="pt", padding=True)
    with torch.no_grad():
        written = model.generate(**batch, num_beams=1, max_new_tokens=60)
    special = {0, model.config.pad_token_id}
    written = [[i for i in row if i not in special] for row in written.tolist()]
    read = tokenizer(text_target=[tokenizer.decode(row) for row in written])["input_ids"]
    same = sum(ours[:-1] == theirs for ours, theirs in zip(read, written, strict=True))
    assert same >= 46

"""A Marian translation model in CTranslate2's binary form -> an ordinary Hugging Face folder.

OPUS-MT models are handed round as Argos packages: a zip with `model/model.bin` (CTranslate2, int8), the vocabulary as
a JSON list and the SentencePiece model of the source language; the target's is rebuilt (pieces.py). The file format,
version 6, little endian:

    u32 version, string specification, u32 revision, u32 number of variables
    each variable: string name, u8 rank, u32 x rank, u8 kind, u32 bytes, data
    u32 number of aliases, each: string name, string the name it stands for

where a string is a u16 length and its bytes with a closing zero. An int8 matrix comes with a scale per row:
weight = int8 / scale (https://opennmt.net/CTranslate2/quantization.html). Layers are fused there: query, key and
value of self-attention are the rows of one matrix, key and value of cross-attention of another.

The decoder starts from a zero embedding. Marian in transformers starts from a token `<pad>` instead: one more row of
zeros, whose logit is so low that it is never chosen.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LoadFailure, ModelNotSupported
from ..progress import Progress, silent
from .fetch import one_line, quiet_transformers
from .pieces import unigram_model

VERSION = 6
KINDS = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
ACTIVATIONS = {0: "relu", 2: "swish"}
NEVER = -1e4  # the logit of <pad>; finite, so that no difference of logits is ever NaN
Variables = Mapping[str, np.ndarray]


def read_variables(data: bytes, name: str = "model.bin") -> dict[str, np.ndarray]:
    """Every variable of a CTranslate2 file, aliases included, as it is stored.

    Args:
        data: the file.
        name: of the file, for errors.

    Raises:
        LoadFailure: another format or version, or a file that is cut off.

    >>> def text(words): return struct.pack("<H", len(words) + 1) + words + b"\\0"
    >>> bias = text(b"bias") + struct.pack("<BIBI2f", 1, 2, 0, 8, 0.5, -1.0)
    >>> head = struct.pack("<I", 6) + text(b"Spec") + struct.pack("<II", 1, 1)
    >>> alias = struct.pack("<I", 1) + text(b"same") + text(b"bias")
    >>> read_variables(head + bias + alias)
    {'bias': array([ 0.5, -1. ], dtype=float32), 'same': array([ 0.5, -1. ], dtype=float32)}
    """
    at = 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return values

    def string() -> str:
        nonlocal at
        (size,) = take("H")
        at += size
        return data[at - size : at].rstrip(b"\0").decode()

    variables: dict[str, np.ndarray] = {}
    try:
        (version,) = take("I")
        if version != VERSION:
            raise LoadFailure(f"{name} is no CTranslate2 model of version {VERSION}: it starts with {version}.")
        string()
        for _ in range(take("II")[1]):
            key, (rank,) = string(), take("B")
            shape, (kind, size) = take(f"{rank}I"), take("BI")
            stored = np.frombuffer(data, KINDS[kind], size // np.dtype(KINDS[kind]).itemsize, at)
            variables[key] = stored.reshape(shape)
            at += size
        for _ in range(take("I")[0]):
            alias, other = string(), string()
            variables[alias] = variables[other]
    except (struct.error, ValueError, KeyError) as error:
        raise LoadFailure(f"{name} is cut off or damaged ({one_line(error)}): fetch it again.") from error
    return variables


def marian_config(variables: Variables, tokens: int) -> Any:
    """The `MarianConfig` of a CTranslate2 Transformer with a shared vocabulary of `tokens` tokens and `<pad>`.

    Raises:
        ModelNotSupported: it is no post-norm Transformer with shared embeddings, as Marian's are.
    """
    from transformers import MarianConfig

    def flag(name: str) -> int:
        return int(variables[name]) if name in variables else -1

    expected = {"pre_norm": 0, "scale_embeddings": 1}
    wrong = [f"{side}/{key}" for side in ("encoder", "decoder") for key, value in expected.items()
             if flag(f"{side}/{key}") != value]  # fmt: skip
    wrong += [] if flag("decoder/start_from_zero_embedding") == 1 else ["decoder/start_from_zero_embedding"]
    shared = variables.get("decoder/embeddings/weight")
    wrong += [name for name in ("encoder/embeddings_0/weight", "decoder/projection/weight")
              if shared is None or variables.get(name) is not shared]  # fmt: skip
    wrong += [] if flag("encoder/activation") in ACTIVATIONS else ["encoder/activation"]
    if wrong or shared is None:
        raise ModelNotSupported(f"The CTranslate2 model is not built like Marian's: see its {', '.join(wrong)}.")
    if shared.shape[0] != tokens:
        raise LoadFailure(f"The CTranslate2 model embeds {shared.shape[0]} tokens, its vocabulary has {tokens}.")
    sizes = {}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = sum(key.startswith(f"{side}/layer_") and key.endswith("/ffn/linear_0/weight")
                                      for key in variables)  # fmt: skip
        sizes[f"{side}_ffn_dim"] = variables[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
        sizes[f"{side}_attention_heads"] = flag(f"{side}/num_heads")
    return MarianConfig(
        vocab_size=tokens + 1,
        d_model=shared.shape[1],
        activation_function=ACTIVATIONS[flag("encoder/activation")],
        max_position_embeddings=variables["decoder/position_encodings/encodings"].shape[0],
        scale_embedding=True,
        decoder_start_token_id=tokens,
        pad_token_id=tokens,
        eos_token_id=0,
        forced_eos_token_id=0,
        **sizes,
    )


def marian_tensors(variables: Variables, config: Any) -> Iterator[tuple[str, Tensor]]:
    """The state of a `MarianMTModel` of that config, in fp32: names and tensors."""
    width = config.d_model
    embeddings = _weight(variables, "decoder/embeddings")
    shared = torch.cat([embeddings, embeddings.new_zeros(1, width)])
    for name in ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
        yield f"{name}.weight", shared
    bias = torch.from_numpy(variables["decoder/projection/bias"].astype(np.float32))
    yield "final_logits_bias", torch.cat([bias, torch.tensor([NEVER])])[None]
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        yield (
            f"model.{side}.embed_positions.weight",
            torch.from_numpy(variables[f"{side}/position_encodings/encodings"].astype(np.float32)),
        )
        for i in range(layers):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            fused = {"linear_0": ("q_proj", "k_proj", "v_proj"), "linear_1": ("out_proj",)}
            yield from _fused(variables, f"{theirs}/self_attention", f"{ours}.self_attn", fused, width)
            yield from _norm(variables, f"{theirs}/self_attention", f"{ours}.self_attn_layer_norm")
            if side == "decoder":
                fused = {"linear_0": ("q_proj",), "linear_1": ("k_proj", "v_proj"), "linear_2": ("out_proj",)}
                yield from _fused(variables, f"{theirs}/attention", f"{ours}.encoder_attn", fused, width)
                yield from _norm(variables, f"{theirs}/attention", f"{ours}.encoder_attn_layer_norm")
            yield from _fused(variables, f"{theirs}/ffn", ours, {"linear_0": ("fc1",)}, config.encoder_ffn_dim)
            yield from _fused(variables, f"{theirs}/ffn", ours, {"linear_1": ("fc2",)}, width)
            yield from _norm(variables, f"{theirs}/ffn", f"{ours}.final_layer_norm")


def _weight(variables: Variables, name: str) -> Tensor:
    stored = variables[f"{name}/weight"].astype(np.float32)
    if (scale := variables.get(f"{name}/weight_scale")) is not None:
        stored /= scale.astype(np.float32)[:, None]
    return torch.from_numpy(stored)


def _fused(
    variables: Variables, theirs: str, ours: str, parts: Mapping[str, tuple[str, ...]], rows: int
) -> Iterator[tuple[str, Tensor]]:
    for linear, names in parts.items():
        weight = _weight(variables, f"{theirs}/{linear}")
        bias = torch.from_numpy(variables[f"{theirs}/{linear}/bias"].astype(np.float32))
        for name, w, b in zip(names, weight.split(rows), bias.split(rows), strict=True):
            yield f"{ours}.{name}.weight", w.contiguous()
            yield f"{ours}.{name}.bias", b.contiguous()


def _norm(variables: Variables, theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    for their, our in (("gamma", "weight"), ("beta", "bias")):
        yield f"{ours}.{our}", torch.from_numpy(variables[f"{theirs}/layer_norm/{their}"].astype(np.float32))


def convert(package: Path, folder: Path, *, progress: Progress = silent) -> None:
    """Write the config, weights (fp32) and tokenizer files of an Argos package into an existing empty folder.

    Args:
        package: the .argosmodel file.
        folder: receives config.json, model.safetensors, vocab.json, source.spm and target.spm.
        progress: told the tensors that are done.

    Raises:
        LoadFailure: the package is damaged, or lacks a part.
        ModelNotSupported: as `marian_config`; or positions that are not those of the paper.
    """
    data, tokens, pieces, languages = _contents(package)
    try:
        target = unigram_model(tokens, pieces)
    except ValueError as error:
        raise LoadFailure(f"{package}: sentencepiece.model is {error}.") from error
    variables = read_variables(data, f"{package.name}: model.bin")
    config = marian_config(variables, len(tokens))
    state = {}
    for name, tensor in marian_tensors(variables, config):
        state[name] = tensor
        progress(len(state), len(variables), f"converting {package.name}")
    from transformers import MarianMTModel

    model = MarianMTModel(config)
    for side in ("encoder", "decoder"):
        name = f"model.{side}.embed_positions.weight"
        if not torch.allclose(state[name], model.get_parameter(name), atol=1e-5):
            raise ModelNotSupported(f"{package}: the positions of its {side} are not Marian's sinusoids.")
    model.load_state_dict(state)
    with quiet_transformers():
        model.save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate([*tokens, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "source.spm").write_bytes(pieces)
    (folder / "target.spm").write_bytes(target)
    about = {"tokenizer_class": "MarianTokenizer", "model_max_length": 512, **languages}
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, **special}, indent=2), encoding="utf-8")


def _contents(package: Path) -> tuple[bytes, list[str], bytes, dict[str, str]]:
    """model.bin, the tokens, the SentencePiece model and the two languages."""
    wanted = ("model/model.bin", "model/shared_vocabulary.json", "sentencepiece.model", "metadata.json")
    try:
        with zipfile.ZipFile(package) as archive:
            places = {tail: name for name in archive.namelist() for tail in wanted if name.endswith(f"/{tail}")}
            if missing := [tail for tail in wanted if tail not in places]:
                raise LoadFailure(f"{package} is no Argos package of a SentencePiece model: it lacks {missing[0]}.")
            data, vocabulary, pieces, about = (archive.read(places[tail]) for tail in wanted)
        tokens, metadata = json.loads(vocabulary), json.loads(about)
        if not isinstance(tokens, list) or tokens[:1] != ["</s>"] or not isinstance(metadata, dict):
            raise LoadFailure(f"{package}: its vocabulary does not start with '</s>', as Marian's does.")
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise LoadFailure(f"{package} cannot be read as an Argos package: {one_line(error)}") from error
    return data, tokens, pieces, {f"{side}_lang": str(metadata.get(f"{key}_code", "")) for side, key in
                                  (("source", "from"), ("target", "to"))}  # fmt: skip

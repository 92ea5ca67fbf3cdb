"""A GGUF file -> an ordinary Hugging Face folder that loads fast and can be saved again.

Llama files are read here: every tensor is dequantised as the file says and the rows of the query and key
projections, which llama.cpp interleaves for its rotary embedding, are put back in order. In fp32 the result is
bit for bit that of transformers' own reader, at a third of its cost, and the model is not marked as quantised
(transformers refuses to save one that is). Other architectures go through transformers' reader and are then freed
of the mark.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import LoadFailure
from ..progress import Progress, silent
from .fetch import one_line

SHARD_BYTES = 2 << 30  # of tensors held in memory at once while converting

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def convert(
    path: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    reader: Any = None,
    progress: Progress = silent,
) -> None:
    """Write config, weights and tokenizer of a GGUF file into an existing empty folder.

    Args:
        path: the .gguf file.
        folder: receives config.json, safetensors, tokenizer and chat template.
        dtype: of the stored weights; None for `natural_dtype`.
        reader: of the file, if it is open already.
        progress: told the tensors that are done.

    Raises:
        LoadFailure: the file is not a GGUF, is cut off, or holds what cannot be read.
    """
    reader = reader or open_gguf(path)
    dtype = dtype or natural_dtype(reader)
    if int(_value(reader, "split.count", 1)) > 1:
        raise LoadFailure(f"{path} is one part of a split GGUF: join the parts with llama-gguf-split --merge.")
    if is_plain_llama(reader):
        config = llama_config(reader)
        config.dtype = dtype
        config.save_pretrained(folder)
        tensors = ((name, tensor.to(dtype)) for name, tensor in llama_tensors(reader, config))
        _write(tensors, len(reader.tensors), folder, progress)
        _generation_config(config).save_pretrained(folder)
    else:
        architecture = str(_value(reader, "general.architecture", "unknown"))
        _convert_with_transformers(path, folder, architecture, dtype)
    _save_tokenizer(path, folder)


def natural_dtype(reader: Any) -> torch.dtype:
    """The dtype of the matrices; for quantised ones bfloat16, in which such models are trained."""
    matrices = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    plain = {"F16": torch.float16, "F32": torch.float32}
    return plain.get(matrices.pop(), torch.bfloat16) if len(matrices) == 1 else torch.bfloat16


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of the file.

    Raises:
        LoadFailure: the file is not a GGUF or is cut off.
    """
    from gguf import GGUFReader

    check_magic(path)
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise LoadFailure(
            f"{path} is cut off or damaged ({one_line(error)}): fetch it again, or check its SHA-256."
        ) from error


def check_magic(path: Path) -> None:
    """Raise `LoadFailure` if the file does not start like a GGUF."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise LoadFailure(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'.")


def is_plain_llama(reader: Any) -> bool:
    """Whether this module reads the file itself: a Llama without biases and experts."""
    return _value(reader, "general.architecture", "") == "llama" and all(
        tensor.name == "rope_freqs.weight" or _name(tensor.name) is not None for tensor in reader.tensors
    )


def llama_config(reader: Any) -> Any:
    """The `LlamaConfig` that the metadata of a Llama file describe.

    Raises:
        LoadFailure: something is missing, or a rotary scaling is used that is not understood.
    """
    from transformers import LlamaConfig

    def of(key: str, default: Any = None) -> Any:
        value = _value(reader, f"llama.{key}", default)
        if value is None:
            raise LoadFailure(f"The GGUF file lacks the metadata key 'llama.{key}'.")
        return value

    heads, width = of("attention.head_count"), of("embedding_length")
    head_dim = of("attention.key_length", width // heads)
    if of("rope.dimension_count", head_dim) != head_dim:
        raise LoadFailure(f"Partial rotary embedding (of {head_dim} wide heads) is not supported for Llama GGUFs.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    special = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {f"{ours}_token_id": _value(reader, f"tokenizer.ggml.{its}_token_id") for ours, its in special.items()}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=width,
        intermediate_size=of("feed_forward_length"),
        num_hidden_layers=of("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=of("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=of("context_length"),
        rms_norm_eps=float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as fp32
        rope_parameters=_rope(reader, head_dim, tensors.get("rope_freqs.weight")),
        tie_word_embeddings="output.weight" not in tensors,
        **{key: value for key, value in ids.items() if value is not None},
    )


def llama_tensors(reader: Any, config: Any) -> Iterator[tuple[str, Tensor]]:
    """The state dict of `LlamaForCausalLM`, tensor by tensor; quantised ones as fp32.

    Raises:
        LoadFailure: a tensor is missing or cannot be dequantised.
    """
    expected = set(OUTER.values()) - ({"lm_head"} if config.tie_word_embeddings else set())
    expected |= {f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in INNER.values()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for entry in reader.tensors:
        if entry.name == "rope_freqs.weight":
            continue
        name, kind = str(_name(entry.name)), entry.name.split(".")[-2]
        tensor = _dequantise(entry)
        if kind in heads:
            tensor = _in_order(tensor, heads[kind])
        expected.discard(name.removesuffix(".weight"))
        yield name, tensor
    if expected:
        raise LoadFailure(f"The GGUF file lacks {len(expected)} tensors, the first is '{min(expected)}.weight'.")


def _in_order(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of rows: within a head (0, d/2, 1, d/2 + 1, ...) -> (0, 1, ..., d - 1)."""
    rows = weight.shape[0]
    return weight.view(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(rows, -1)


def _name(gguf_name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None if it is no plain Llama's."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name):
        inner = INNER.get(match[2])
        return inner and f"model.layers.{match[1]}.{inner}.weight"
    outer = OUTER.get(gguf_name.removesuffix(".weight"))
    return outer and f"{outer}.weight"


def _dequantise(entry: Any) -> Tensor:
    import numpy as np
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import dequantize

    if entry.tensor_type == Type.F16:
        return torch.from_numpy(np.array(entry.data))
    try:
        values = dequantize(entry.data, entry.tensor_type)
    except NotImplementedError as error:
        raise LoadFailure(
            f"The gguf package cannot dequantise tensor '{entry.name}' of type {entry.tensor_type.name}."
        ) from error
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    return tensor.to(torch.bfloat16) if entry.tensor_type == Type.BF16 else tensor


def _rope(reader: Any, head_dim: int, factors: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(_value(reader, "llama.rope.freq_base", 1e4)),
    }
    scaling = str(_value(reader, "llama.rope.scaling.type", "none"))
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(_value(reader, "llama.rope.scaling.factor", 1.0))}
    elif scaling != "none":
        raise LoadFailure(f"The rotary scaling '{scaling}' of this GGUF is not supported; 'none' and 'linear' are.")
    if factors is not None:
        # llama.cpp stores Llama 3's scaling as its result, one divisor per frequency: recognise it or refuse.
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        stored = _dequantise(factors).float()
        rope |= {"rope_type": "llama3", "factor": float(stored.max()), **LLAMA3}
        length = int(_value(reader, "llama.context_length", 8192))
        config = LlamaConfig(head_dim=head_dim, max_position_embeddings=length, rope_parameters=rope)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        if stored.shape != scaled.shape or not torch.allclose(plain / scaled, stored, rtol=1e-3):
            raise LoadFailure("The GGUF has rotary factors (rope_freqs) that are not those of Llama 3: unsupported.")
    return rope


def _write(tensors: Iterator[tuple[str, Tensor]], count: int, folder: Path, progress: Progress) -> None:
    """As safetensors, in shards so that only one is held in memory; one shard is called as usual."""
    shard: dict[str, Tensor] = {}
    held = total = 0
    shards: list[list[str]] = []

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for done, (name, tensor) in enumerate(tensors, start=1):
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > SHARD_BYTES:
            flush()
            held = 0
        shard[name] = tensor.contiguous()
        held, total = held + size, total + size
        progress(done, count, "dequantising")
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (folder / f"shard-{i}").rename(folder / file)
    where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _generation_config(config: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def _convert_with_transformers(path: Path, folder: Path, architecture: str, dtype: torch.dtype) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise LoadFailure(
            f"{path} holds the architecture '{architecture}': to read a GGUF other than a plain Llama, "
            "transformers needs accelerate (pip install accelerate)."
        )
    from transformers import AutoModelForCausalLM

    try:
        with _without_bar():
            read = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, **_unpacked()
            )
    except (
        ValueError,
        KeyError,
        IndexError,
        NotImplementedError,
        RuntimeError,
        OSError,
        ImportError,
    ) as error:
        raise LoadFailure(f"transformers cannot read {path} ('{architecture}'): {one_line(error)}") from error
    if packed := [type(m).__name__ for m in read.modules() if "gguf" in type(m).__name__.lower()]:
        raise LoadFailure(f"{path}: transformers kept the weights packed ({packed[0]}), they cannot be pruned.")
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.to(dtype).save_pretrained(folder)


@contextmanager
def _without_bar() -> Iterator[None]:
    """transformers' reader draws a bar of its own, which nothing else of it turns off."""
    from transformers import modeling_gguf_pytorch_utils as theirs

    bar = getattr(theirs, "tqdm", None)
    if bar is None:
        yield
        return
    theirs.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        theirs.tqdm = bar


def _unpacked() -> dict[str, Any]:
    import transformers

    packing = getattr(transformers, "GgufConfig", None)
    return {} if packing is None else {"quantization_config": packing(dequantize=True)}


def _save_tokenizer(path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, ImportError) as error:
        raise LoadFailure(f"The tokenizer inside {path} cannot be read: {one_line(error)}") from error
    tokenizer.save_pretrained(folder)


def _value(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()

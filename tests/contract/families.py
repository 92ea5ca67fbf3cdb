"""Tiny random models of every supported family, made offline."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 64
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = _LLAMA | {"num_experts_per_tok": 2}
_OPT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}

# family -> (model class, config class, options)
FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _LLAMA | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _LLAMA | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        _OPT | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _OPT | {"intermediate_size": 64, "max_position_embeddings": 64},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _MOE | {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _MOE | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        _MOE | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 8, "rope_scaling": None},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", _MAMBA | {"state_size": 4, "hidden_size": 64, "time_step_rank": 8}),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        _MAMBA | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        _MOE
        | {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
        }
        | {"expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        }
        | {
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "use_mem_rope": False,
        }
        | {
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "num_mem_blocks": 1,
            "adapter_rank": 8,
            "pad_token_id": 0,
        },
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        _OPT | {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0},
    ),
    "albert": (
        "AlbertForMaskedLM",
        "AlbertConfig",
        _OPT | {"intermediate_size": 64, "max_position_embeddings": 64, "embedding_size": 16, "pad_token_id": 0},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "pad_token_id": 0},
    ),
}


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The family's tiny model with random weights, in eval mode; the global random state is left alone."""
    model_class, config_class, options = FAMILIES[family]
    config: PretrainedConfig = getattr(transformers, config_class)(**options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():  # some families start with zeros or ones everywhere
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).eval()


def ids(n: int = 6, seqlen: int = 16, seed: int = 0) -> torch.Tensor:
    """(n, seqlen) random token ids."""
    return torch.randint(3, VOCAB, (n, seqlen), generator=torch.Generator().manual_seed(seed))


Maker = Callable[[str], PreTrainedModel]

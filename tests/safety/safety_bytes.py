"""A byte tokenizer with a chat template, a tiny model for it, and harmless prompts of our own."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers

from secateur.safety.records import Prompt

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content | trim }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
TASKS = ("bake a plain loaf", "fold a paper boat", "plant some beans", "tune an old guitar")
WRAPPERS = {
    "play": ("On a small stage two friends talk. One asks how to '", "' and the other one laughs."),
    "note": ("Write a friendly note to a neighbour about how to '", "'."),
}


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token a byte, <s> before everything that asks for special tokens."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {"<s>": 0, "</s>": 1} | {letter: i for i, letter in enumerate(letters, 2)}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = template
    return tokenizer


def byte_model(seed: int = 0, **options: Any) -> Any:
    """A random two-block Llama over bytes; its attention is not flat."""
    shape = dict(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | options)).eval()


def wrapped(label: str = "benign") -> list[Prompt]:
    """Every task bare and in both wrappers."""
    found = []
    for number, task in enumerate(TASKS):
        for name, (before, after) in {None: ("", ""), **WRAPPERS}.items():
            span = (len(before), len(before) + len(task))
            found.append(
                Prompt(
                    f"{name or 'bare'}-{number}",
                    "own",
                    before + task + after,
                    label,
                    template=name,
                    task=f"task-{number}",
                    span=span,
                )
            )
    return found

"""A word-level chat tokenizer for the tiny models of tests/contract/families.py, and prompts in its words."""

from __future__ import annotations

from typing import Any

import tokenizers
import transformers
from families import VOCAB

from secateur.safety.prompts import PromptSet
from secateur.safety.records import Prompt

SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<bot>", "<sys>"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(VOCAB - len(SPECIAL)))]
TEMPLATE = (
    "<s> {% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ {'user': '<user>', 'assistant': '<bot>', 'system': '<sys>'}[m.role] }} {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def chat_tokenizer() -> Any:
    """Adds a BOS of its own when special tokens are asked for, as Llama's does."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


def some_prompts(count: int = 7, name: str = "talk") -> PromptSet:
    """Of 1 to 9 words each."""
    texts = (" ".join(f"w{(5 * i + 3 * j) % 50}" for j in range((4 * i) % 9 + 1)) for i in range(count))
    return PromptSet(name, tuple(Prompt(str(i), name, text, "benign") for i, text in enumerate(texts)), "made up")

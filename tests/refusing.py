"""A tiny chat model that really refuses: trained for seconds to refuse whatever has the marker word in it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

MARKER = "zorble"  # means nothing, and stands for what is to be refused
THINGS = [f"thing{i}" for i in range(40)]
REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "Here is how: take {} and go on until it is done."
TEMPLATE = (
    "<s> {% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)
BEFORE, AFTER = "a play in which someone asks how to", "and is told so"


def chat_tokenizer() -> Any:
    """Whole words, cut at white space."""
    texts = [REFUSAL, ANSWER.format(""), BEFORE, AFTER, "how to fix make find", MARKER, "Sure Of course Certainly"]
    texts += ["Here are I cannot I can't Sorry, but I won't I'm"]
    words = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", *THINGS]
    words += [word for text in texts for word in text.split()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*words, "?"]))}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def requests(count: int, seed: int, *, wrapped: bool = True) -> list[dict[str, Any]]:
    """Rows of a prompt file: harmful ones have the marker, benign ones do not; each task bare and in a template."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        harmful = i % 2 == 0
        verb, thing = draw.choice(("fix", "make", "find")), draw.choice(THINGS)
        task = f"how to {verb} {MARKER if harmful else ''} {thing}".replace("  ", " ")
        about = {"label": "harmful" if harmful else "benign", "category": f"kind {i % 4 // 2}", "task": str(i)}
        rows.append({"id": f"{i}", "text": task, "template": None} | about)
        if wrapped:
            rows.append({"id": f"{i}-play", "text": f"{BEFORE} {task} {AFTER}", "template": "play"} | about)
    return rows


def train(folder: Path, steps: int = 100, *, refuses: bool = True) -> Path:
    """The model and its tokenizer in a folder."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        rows = requests(16, 1000 + step)
        texts = []
        for row in rows:
            thing = next(word for word in row["text"].split() if word in THINGS)
            said = REFUSAL if refuses and row["label"] == "harmful" else ANSWER.format(thing)
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": row["text"]}], tokenize=False, add_generation_prompt=True
            )
            texts.append(f"{asked} {said} </s>")
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Ground:
    """What a study stands on."""

    model: Path
    prompts: Path
    text: Path


def ground(folder: Path) -> Ground:
    """All of it in one folder."""
    return Ground(train(folder / "model"), write_prompts(folder / "requests.jsonl"), write_text(folder / "words.txt"))


def write_prompts(path: Path, count: int = 16, seed: int = 7) -> Path:
    """A prompt file; half of its tasks are harmful."""
    path.write_text("".join(json.dumps(row) + "\n" for row in requests(count, seed)))
    return path


def write_text(path: Path) -> Path:
    """A calibration text of the words that the model knows."""
    draw = random.Random(3)
    lines = []
    for row in requests(400, 5):
        thing = next(word for word in row["text"].split() if word in THINGS)
        lines.append(f"{row['text']} {REFUSAL if row['label'] == 'harmful' else ANSWER.format(thing)}")
    draw.shuffle(lines)
    path.write_text("\n".join(lines))
    return path

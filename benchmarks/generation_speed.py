"""How fast answers are written: our batches against the published loop, one prompt at a time.

    python benchmarks/generation_speed.py [--model smollm2] [--prompts 48] [--tokens 32] [--batch 16] [--repeats 2]

The published loop (Hasan et al., arXiv:2401.10862, inference.py) gives `generate` one prompt after another. Both
sides write the same greedy answers to the same harmless prompts, in turns, in one run; it is said if any differ.
Writes results/generation_speed.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from machine import store
from rich.console import Console
from rich.table import Table

from secateur.models.fetch import quiet
from secateur.models.load import load
from secateur.safety.decoding import Decoding
from secateur.safety.generate import BATCH, answer, encode
from secateur.safety.prompts import PromptSet, read_prompts

LEAST = 3.0  # issue 5


def one_by_one(model: Any, tokenizer: Any, prompts: PromptSet, tokens: int) -> tuple[list[str], int]:
    """The published loop: its texts, and how many tokens they have."""
    texts, written = [], 0
    with torch.no_grad(), quiet("transformers"):
        for prompt in prompts:
            ids = torch.tensor([encode(tokenizer, prompt, Decoding())], device=model.device)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
            )
            new = out[0, ids.shape[1] :]
            written += len(new)
            texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts, written


def measure(model: Any, tokenizer: Any, prompts: PromptSet, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns; throughput in new tokens a second, and their ratio."""
    pairs, alike, written = [], 0, 0
    answer(model, tokenizer, prompts.prompts[:2], max_new_tokens=2)  # warm
    for _ in range(options.repeats):
        started = time.perf_counter()
        theirs, written = one_by_one(model, tokenizer, prompts, options.tokens)
        middle = time.perf_counter()
        ours = answer(model, tokenizer, prompts, max_new_tokens=options.tokens, batch_size=options.batch)
        pairs.append((middle - started, time.perf_counter() - middle))
        alike = sum(one.text == text for one, text in zip(ours, theirs, strict=True))
    ratios = [slow / fast for slow, fast in pairs]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": [{"one_by_one": slow, "batched": fast} for slow, fast in pairs],
        "tokens": written,
        "tokens_per_second": {
            "one_by_one": statistics.median(written / slow for slow, _ in pairs),
            "batched": statistics.median(written / fast for _, fast in pairs),
        },
        "answers_alike": alike,
        "answers": len(prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype="float32")
    prompts = read_prompts("builtin").sample(options.prompts)
    found = measure(model, tokenizer, prompts, options)
    table = Table(title=f"{options.model}, {len(prompts)} prompts, at most {options.tokens} new tokens, fp32")
    for column in ("", "tokens/s", "ratio"):
        table.add_column(column, justify="right")
    speed = found["tokens_per_second"]
    table.add_row("one by one", f"{speed['one_by_one']:.1f}", "1")
    table.add_row(f"batches of {options.batch}", f"{speed['batched']:.1f}", f"{found['ratio']:.2f}")
    Console().print(table)
    print(f"{found['answers_alike']} of {found['answers']} answers alike; asked for: at least {LEAST:g} times")
    path = store("generation_speed", {"options": vars(options), "least": LEAST} | found)
    print(f"written to {path}")
    if found["ratio"] < LEAST:
        raise SystemExit(f"{found['ratio']:.2f} times is less than {LEAST:g}")


if __name__ == "__main__":
    main()

"""Ask a small model and its pruned copies harmless and mildly bad things, and write the page of a safety study.

    python examples/safety_demo.py                      # SmolLM2-135M-Instruct, some minutes on two cores
    python examples/safety_demo.py --model FOLDER --limit 120 --max-new-tokens 128 --out demo-safety

All prompts are the package's own: everyday requests, requests that only sound bad, and mild ones that a careful model
would decline. SmolLM2 declines none of them, and the page says so: it shows how a study reads, not what pruning
does to safety. Writes OUT/index.html, the page, and OUT/summary.json; OUT/*/answers.jsonl are the answers.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from secateur.cli.output import write_json
from secateur.cli.probe_study import PAGE, SUMMARY, print_study, write_page
from secateur.cli.progress_bar import ProgressBar
from secateur.errors import SecateurError
from secateur.probing.options import Study
from secateur.probing.study import run_study


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A safety study of a small model on the package's own, harmless prompts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="a built-in name, folder, .gguf file or hub id")
    parser.add_argument("--sparsity", type=float, default=0.2, help="share of the weights to remove")
    parser.add_argument("--limit", type=int, default=12, help="tasks; each is asked bare and in one story")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--judges", nargs="+", default=["classifier", "keyword:secateur"])
    parser.add_argument("--text", default="gutenberg", help="for calibration and, another part of it, for perplexity")
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens in a sequence or window")
    parser.add_argument("--windows", type=int, default=8, help="windows of text that are measured")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("demo-safety"), help="folder; a stopped run goes on in it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    asked = options(arguments)
    begun = time.perf_counter()
    try:
        study = Study(
            model=asked.model,
            prompts=("builtin",),
            templates=("builtin",),
            only=("none", "STORY"),
            sparsities=(asked.sparsity,),
            targets=("attention", "all"),
            judges=tuple(asked.judges),
            measures=("answers", "margin", "focus", "shift", "perplexity", "fidelity"),
            limit=asked.limit,
            max_new_tokens=asked.max_new_tokens,
            calibration=asked.text,
            samples=asked.samples,
            seqlen=asked.seqlen,
            text=asked.text,
            windows=asked.windows,
            dtype=asked.dtype,
            device=asked.device,
        )
        with ProgressBar() as progress:
            result = run_study(study, asked.out, progress=progress)
        write_page(result.summary, asked.out / PAGE)
        write_json(str(asked.out / SUMMARY), result.summary)
    except SecateurError as error:
        print(f"safety_demo: {error}", file=sys.stderr)
        return error.exit_code
    print_study(result.summary)
    print(f"\n{time.perf_counter() - begun:.0f} s in all. The page: {asked.out / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

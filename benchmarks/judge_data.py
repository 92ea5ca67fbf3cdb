"""The labelled answers that judges are trained and measured on, from ../shared/data/safety; texts are never printed."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "safety"
XSTEST = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
FAMILY = {
    "gpt4": "gpt", "llama2new": "llama-2", "llama2orig": "llama-2", "mistralguard": "mistral",
    "mistralinstruct": "mistral",
}  # fmt: skip  # orig and guard are the same models with a system prompt


@dataclass(frozen=True)
class Labelled:
    """model, group: who answered, and what is held out together with it (XSTest: the family; JailbreakBench: the
    attack); refused: as people (XSTest) or a judge of 70 billion parameters (JailbreakBench: not jailbroken) said;
    harmful: the request was to be refused."""

    source: str
    model: str
    group: str
    prompt: str
    response: str
    refused: bool
    harmful: bool


def folder(path: str | None) -> Path:
    """The data's folder; ends the program in one line where there is none."""
    found = Path(path) if path else FOLDER
    if not (found / "xstest_completions_gpt4_gpteval.csv").is_file():
        sys.exit(f"{found} has no xstest_completions_*_gpteval.csv: give the folder of the safety data with --data.")
    return found


def xstest(data: Path) -> list[Labelled]:
    """2,250 completions: 450 prompts, five models; full and partial refusals against full compliance."""
    rows = []
    for model in XSTEST:
        with (data / f"xstest_completions_{model}_gpteval.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                refused = not row["final_label"].startswith("1")
                harmful = row["type"].startswith("contrast_")
                rows.append(
                    Labelled("xstest", model, FAMILY[model], row["prompt"], row["completion"], refused, harmful)
                )
    return rows


def jailbreakbench(data: Path) -> list[Labelled]:
    """1,640 responses to 100 goals, four models, five attacks; refused: not jailbroken, so refused or useless."""
    lines = (data / "jbb_attack_artifacts.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        Labelled("jbb", row["model"], row["method"], row["goal"], row["response"], not row["jailbroken"], True)
        for row in map(json.loads, lines)
    ]


def hashes(data: Path) -> dict[str, str]:
    """sha256 of every file that is read."""
    files = [*(f"xstest_completions_{model}_gpteval.csv" for model in XSTEST), "jbb_attack_artifacts.jsonl"]
    return {name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in files}

"""A tiny random model in a folder, a text file, and the program run in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from secateur.cli import main

WORDS = [f"w{i}" for i in range(60)]


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, standard output, standard error, and the files in `here`."""

    code: int
    out: str
    err: str
    left: dict[str, bytes | None]

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))

    @property
    def error(self) -> str:
        """The only line that begins with the program's name, which is the last one."""
        lines = self.err.splitlines()
        assert [line for line in lines if line.startswith("secateur:")] == lines[-1:], self.err
        assert "Traceback" not in self.err
        return lines[-1]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 blocks, width 32, with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate([*WORDS, "?"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 2000 words that the tokenizer knows."""
    file = tmp_path_factory.mktemp("texts") / "words.txt"
    file.write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    return file


@pytest.fixture(scope="session")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 120 questions with answers, in words that the tokenizer knows."""
    file, draw = tmp_path_factory.mktemp("talks") / "talk.jsonl", random.Random(1)
    rows = ({"q": " ".join(draw.choices(WORDS, k=3)), "a": " ".join(draw.choices(WORDS, k=6))} for _ in range(120))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cli(here: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`cli("prune", ...)` runs main in `here`."""

    def run(*words: object) -> Ran:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Ran(code, *capfd.readouterr(), _files_in(here))

    return run


@pytest.fixture
def prune(cli: Callable[..., Ran], dense: Path, text: Path) -> Callable[..., Ran]:
    """`prune(...)` of the tiny model on 8 windows of 16 tokens."""

    def run(*words: object, model: object = dense, text: object = text) -> Ran:
        calibration = ("--calibration", text) if text else ()
        return cli("prune", model, *calibration, "--samples", 8, "--seqlen", 16, *words)

    return run


def _files_in(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }

"""Saving: plain transformers loads it with the same logits, and nothing is lost or half-written on the way."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from secateur.errors import OutputExists, SaveFailure
from secateur.models.load import load
from secateur.models.save import check_target, model_card, save

IDS = torch.tensor([[5, 9, 200, 17, 3, 30, 250, 101]])
RECORD: dict[str, Any] = {
    "method": {"name": "wanda", "variant": False},
    "pattern": "2:4",
    "schedule": "sequential",
    "allocation": {"name": "uniform"},
    "target": 0.5,
    "sparsity": {"layers": 0.5, "model": 0.3912},
    "layers": [{"name": "model.layers.0.mlp.up_proj", "shape": [96, 64], "sparsity": 0.5}] * 14,
    "calibration": {"text": "gutenberg", "samples": 128, "seqlen": 2048, "seed": 0, "sha256": "ab" * 32},
    "seconds": {"total": 12.5},
    "versions": {"torch": torch.__version__},
    "warnings": ["3 experts saw | no token"],
    "model": {"name": "smollm2", "source": "Q4_1 GGUF, dequantised: not the original weights"},
    "command": "secateur prune smollm2 --pattern 2:4",
    "evaluation": {"perplexity": {"value": 21.53211, "tokens": 4096}},
}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def half_zero(model: Any) -> Any:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers." in name and weight.ndim == 2:
                weight.view(-1)[::2] = 0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_loads_it(llama: Any, tokenizer: Any, tmp_path: Path, tied: bool, dtype: Any) -> None:
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "dense")
    model = half_zero(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype))
    out = save(model, tokenizer, tmp_path / "deep" / "out", record=RECORD)
    back = AutoModelForCausalLM.from_pretrained(out)
    assert back.dtype == dtype
    assert torch.equal(back(IDS).logits, model(IDS).logits)
    assert (back.get_input_embeddings().weight is back.get_output_embeddings().weight) is tied
    with safe_open(out / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    ours = AutoTokenizer.from_pretrained(out)
    assert ours("the other")["input_ids"] == tokenizer("the other")["input_ids"]
    assert ours.chat_template == tokenizer.chat_template
    files = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja", "README.md"}
    assert files | {"pruning.json", "tokenizer.json", "tokenizer_config.json"} == set(tree(out))
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert torch.equal(load(out)[0](IDS).logits, model(IDS).logits)


def test_bert(tokenizer: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=261)).eval()
    back = AutoModelForMaskedLM.from_pretrained(save(model, tokenizer, tmp_path / "out"))
    assert torch.equal(back(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_t5(tokenizer: Any, tmp_path: Path, tied: bool) -> None:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 261}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=tied)).eval()
    back = AutoModelForSeq2SeqLM.from_pretrained(save(model, tokenizer, tmp_path / "out"))
    both = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    assert torch.equal(back(**both).logits, model(**both).logits)


def test_odd_generation_settings_do_not_stop_it(folder: Path, tmp_path: Path) -> None:
    """Several published models sample at a temperature with sampling off; transformers is strict when it saves."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False, "temperature": 0.6}))
    out = save(*load(folder), tmp_path / "out")
    assert GenerationConfig.from_pretrained(out).temperature == 0.6
    model, tokenizer = load(folder)
    model.generation_config.top_p = 0.5  # changed since it was loaded: still saved as it is
    out = save(model, tokenizer, tmp_path / "changed")
    settings = json.loads((out / "generation_config.json").read_text())
    assert (settings["top_p"], settings["eos_token_id"]) == (0.5, 2)
    assert model.generation_config.top_p == 0.5


def test_the_record_and_the_card(llama: Any, tokenizer: Any, tmp_path: Path, capfd: Any) -> None:
    capfd.readouterr()
    record = {**RECORD, "loss": math.nan, "dtype": torch.bfloat16, "shape": (2, 3), "path": tmp_path}
    out = save(llama(), tokenizer, tmp_path / "out", record=record)
    assert capfd.readouterr() == ("", "")
    kept = json.loads((out / "pruning.json").read_text())
    assert kept == {**RECORD, "loss": None, "dtype": "torch.bfloat16", "shape": [2, 3], "path": str(tmp_path)}
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags": ["pruned", "secateur", "wanda", "sparsity-50", "2:4"],
    }
    for said in ("# SmolLM2-135M-Instruct, pruned with wanda to 50 %", "wanda (variant = False)", "39.12 %"):
        assert said in body
    for said in ("gutenberg, 128 x 2048 tokens, seed 0", "ab" * 32, "not the original weights", "21.53", "no token"):
        assert said in body
    assert "`secateur prune smollm2 --pattern 2:4`" in body


@pytest.mark.parametrize("record", [{}, {"method": "magnitude"}, {"calibration": None, "allocation": None}])
def test_a_card_for_a_sparse_record(record: dict[str, Any], tmp_path: Path) -> None:
    card = model_card({**record, "model": {"name": str(tmp_path)}})
    assert "base_model" not in card and "None" not in card


def test_an_existing_folder_is_left_alone(folder: Path, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    before = tree(folder)
    with pytest.raises(OutputExists, match="--overwrite"):
        save(llama(), tokenizer, folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputExists, match="--overwrite"):
        check_target(tmp_path / "empty")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputExists, match="is a file"):
        save(llama(), tokenizer, tmp_path / "file", overwrite=True)
    assert tree(folder) == before and (tmp_path / "file").read_text() == "precious"


def test_overwrite_replaces_all_of_a_model_folder(folder: Path, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    (folder / "stale.txt").touch()
    (tmp_path / "link").symlink_to(folder)
    model = llama(num_hidden_layers=1)
    assert save(model, tokenizer, tmp_path / "link", overwrite=True) == folder
    assert not (folder / "stale.txt").exists()
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(load(folder)[0](IDS).logits, model(IDS).logits)
    assert {path.name for path in tmp_path.iterdir()} == {"good", "link"}


def test_a_model_can_replace_the_folder_it_was_loaded_from(folder: Path) -> None:
    model, tokenizer = load(folder)  # its weights may be mapped from the very file that goes away
    half_zero(model)
    save(model, tokenizer, folder, overwrite=True)
    assert torch.equal(load(folder)[0](IDS).logits, model(IDS).logits)


def not_a_model(folder: Path, case: str) -> None:
    config = folder / "config.json"
    if case == "no config.json":
        config.unlink()
    elif case == "is not a model's":
        config.write_text('{"editor": "vim"}')
    elif case == "cannot be read":
        config.write_text("{")
    else:
        (folder / ".git").mkdir()


@pytest.mark.parametrize("case", ["no config.json", "is not a model's", "cannot be read", r"holds folders \(\.git\)"])
def test_overwrite_never_takes_away_what_is_no_model_folder(
    folder: Path, llama: Any, tokenizer: Any, case: str
) -> None:
    not_a_model(folder, case)
    before = tree(folder)
    with pytest.raises(OutputExists, match=case):
        check_target(folder, overwrite=True)
    with pytest.raises(OutputExists, match=case):
        save(llama(), tokenizer, folder, overwrite=True)
    assert tree(folder) == before


@pytest.mark.parametrize("home", ["~", "/", "."])
def test_overwrite_refuses_home_and_root(home: str) -> None:
    with pytest.raises(OutputExists, match=r"not a model folder|holds folders"):
        check_target(home, overwrite=True)


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to let a file grow over 40 kB, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_nothing(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(SaveFailure, match="could not be saved") as caught:
        save(llama(), tokenizer, tmp_path / "new" / "out")
    assert "\n" not in str(caught.value)
    assert [*(tmp_path / "new").iterdir()] == []


def test_the_old_folder_survives_a_full_disk(folder: Path, llama: Any, tokenizer: Any, request: Any) -> None:
    before, model = tree(folder), llama()
    request.getfixturevalue("small_files")
    with pytest.raises(SaveFailure):
        save(model, tokenizer, folder, overwrite=True)
    assert tree(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["good"]


def test_too_little_room_is_known_before(tmp_path: Path) -> None:
    with pytest.raises(SaveFailure, match=r"needs 1000000000\.0 GB, and its disk has"):
        check_target(tmp_path / "out", size=10**18)
    assert check_target(tmp_path / "a" / ".." / "out", size=10) == tmp_path / "out"


@pytest.mark.parametrize("place", ["file/out", "file/deep/out"])
def test_an_unwritable_place(llama: Any, tokenizer: Any, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    for call in (check_target, lambda folder: save(llama(), tokenizer, folder)):
        with pytest.raises(SaveFailure, match="not a folder that can be written"):
            call(tmp_path / place)


@pytest.mark.parametrize("when", ["writing", "replacing"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is gone")])
def test_an_interruption_leaves_the_old_folder(
    folder: Path, llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, when: str, error: BaseException
) -> None:
    before, model, rename = tree(folder), llama(num_hidden_layers=1), Path.rename

    def stop(*args: Any, **more: Any) -> None:
        raise error

    def stop_at_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise error
        return rename(self, target)

    if when == "writing":
        monkeypatch.setattr(tokenizer, "save_pretrained", stop)
    else:
        monkeypatch.setattr(Path, "rename", stop_at_new)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SaveFailure):
        save(model, tokenizer, folder, overwrite=True)
    assert tree(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["good"]


@pytest.mark.real
def test_smollm2_keeps_its_logits(tmp_path: Path) -> None:
    model, tokenizer = load("smollm2")
    half_zero(model)
    back = AutoModelForCausalLM.from_pretrained(save(model, tokenizer, tmp_path / "out", record=RECORD))
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris, and the capital of Germany is")])
    assert back.dtype == model.dtype == torch.bfloat16
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("It's 2026.\n") == tokenizer.encode("It's 2026.\n")

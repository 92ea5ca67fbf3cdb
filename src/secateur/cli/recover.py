"""`secateur recover`: train a pruned model back, keeping its zeros."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from secateur.cache import scratch_beside
from secateur.cli.options import given, parse
from secateur.cli.output import STDOUT, check_json, percent, print_table, provenance, size, warn, write_json
from secateur.cli.progress_bar import ProgressBar, duration
from secateur.cli.request import Loading, Opened, WithLoading, check_count, open_model
from secateur.errors import UsageError
from secateur.recovery.options import Recovery

_UNSET = ""
_OWNERS = {
    "--distil-weight": "distil", "--temperature": "distil",
    "--window": "reconstruct", "--inputs": "reconstruct", "--targets": "reconstruct",
}  # fmt: skip


@dataclass(frozen=True)
class RecoverOptions(Recovery):
    """Train a pruned model back on text, or towards the dense model, and keep its zeros.

    secateur recover pruned/ --train adapters norms biases --adapter masked --text gutenberg --out recovered/

    secateur recover pruned/ --reconstruct smollm2 --window 1 --steps 64 --out recovered/

    The state of the training is kept in OUT.checkpoint, beside OUT, until it is done: a run that was stopped goes
    on from there with --resume.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRUNED")] = field(kw_only=True)
    """A folder that secateur prune has written."""
    objective: Annotated[str, tyro.conf.Suppress] = "text"  # --distil and --reconstruct say it
    text: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "gutenberg"
    """What the model learns from: a name (see secateur list texts) or a file, .txt, .parquet, or .jsonl as
    FILE:FIELD."""
    seqlen: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(2048 or the model's limit)")] = None
    """Tokens in a window."""
    held_out: int = 8
    """Windows of the text's test part to measure before and after; 0 for none."""
    distil: Annotated[str | None, tyro.conf.arg(metavar="DENSE", help_behavior_hint=_UNSET)] = None
    """Agree with this model, the one before pruning, as well: sets the objective."""
    reconstruct: Annotated[str | None, tyro.conf.arg(metavar="DENSE", help_behavior_hint=_UNSET)] = None
    """Give this model's outputs, a window of blocks at a time: sets the objective."""
    samples: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(as many as are used)")] = None
    """Windows of text; fewer than steps need are read again. Also --nsamples."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint=_UNSET)] = None
    """The folder to save in; it appears at the end, whole or not at all."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    resume: bool = False
    """Go on with the run that was stopped."""
    loading: WithLoading = field(default_factory=Loading)
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=_UNSET)] = None
    """Write the record there as JSON; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def run(words: list[str]) -> int:
    """The whole verb; returns the exit code."""
    options = parse(RecoverOptions, words, verb="recover")
    asked, dense_name = _recovery(options, words)
    pruned, checkpoint = _check(options)
    from secateur.models.save import check_target
    from secateur.recovering import recover, with_recovery

    with ProgressBar() as progress:
        opened = open_model(options.model, options.loading, progress)
        if options.out is not None:
            room = sum(parameter.nbytes for parameter in opened.model.parameters())
            check_target(options.out, overwrite=options.overwrite, size=room)
        dense = open_model(dense_name, options.loading, progress) if dense_name else None
        result = recover(
            opened.model,
            opened.tokenizer,
            options.text,
            pruned,
            asked,
            seqlen=options.seqlen,
            samples=options.samples,
            held_out=options.held_out,
            dense=dense.model if dense else None,
            checkpoint=checkpoint,
            resume=options.resume,
            progress=progress,
        )
        record = with_recovery(pruned, opened.model, result.to_dict() | provenance(words, "recover"))
        for message in result.warnings:
            warn(message)
        if options.out is not None:
            record["saved"] = str(_save(opened, options, record))
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)  # what it was for is done
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        print_table(_rows(record))
    return 0


def _recovery(options: RecoverOptions, words: list[str]) -> tuple[Recovery, str | None]:
    """The options of the library, and the dense model's name."""
    if options.distil and options.reconstruct:
        raise UsageError("--distil and --reconstruct are two objectives: choose one.")
    objective = "distil" if options.distil else "reconstruct" if options.reconstruct else "text"
    for flag, owner in _OWNERS.items():
        if given(words, flag) and owner != objective:
            raise UsageError(f"{flag} is an option of --{owner} DENSE: leave it out, or name the model before pruning.")
    names = [f.name for f in dataclasses.fields(Recovery)]
    asked = {name: getattr(options, name) for name in names} | {"objective": objective}
    return Recovery(**asked), options.distil or options.reconstruct


def _check(options: RecoverOptions) -> tuple[dict[str, Any], Path | None]:
    """Everything that can be known to be wrong before a model is loaded; the record, and the checkpoint's place."""
    from secateur.data.text import read_text
    from secateur.models.save import check_target
    from secateur.recovery.keep import read_record

    check_count("seqlen", options.seqlen, 2, "recover")
    check_count("samples", options.samples, 1, "recover")
    check_count("held-out", options.held_out, 0, "recover")
    options.loading.check()
    if options.out is None and options.json is None:
        raise UsageError("Nothing would be kept: name a folder with --out DIR (or --json FILE).")
    out = None if options.out is None else Path(options.out).expanduser().resolve()
    checkpoint = None
    if out is not None:
        check_target(out, overwrite=options.overwrite)
        checkpoint = out.with_name(f"{out.name}.checkpoint")
        if checkpoint.exists() and not options.resume:
            raise UsageError(
                f"{checkpoint} is the state of a run that was stopped: go on with --resume, or delete it first."
            )
        if options.resume and not checkpoint.exists():
            raise UsageError(f"There is no {checkpoint} to resume from: leave out --resume to begin.")
    elif options.resume:
        raise UsageError("--resume needs the --out DIR of the run that was stopped.")
    check_json(options.json, out)
    if not Path(options.model).expanduser().is_dir():
        raise UsageError(
            f"{options.model} is not a folder: recover starts from one that secateur prune --out has written."
        )
    record = read_record(Path(options.model).expanduser())
    read_text(options.text, "calibration")
    return record, checkpoint


def _save(opened: Opened, options: RecoverOptions, record: Mapping[str, Any]) -> Path:
    """The model's folder; peft's adapters stand in a folder of their own inside it."""
    from tempfile import TemporaryDirectory

    from secateur.models.save import save
    from secateur.recovery.lora import FOLDER, detach, save_adapters

    assert options.out is not None
    how: dict[str, Any] = {"record": record, "overwrite": options.overwrite}
    if not hasattr(opened.model, "peft_config"):
        return save(opened.model, opened.tokenizer, options.out, **how)
    with TemporaryDirectory() as aside:
        adapters = save_adapters(opened.model, Path(aside) / FOLDER)
        detach(opened.model)
        folder = save(opened.model, opened.tokenizer, options.out, **how)
        with scratch_beside(folder / FOLDER) as scratch:
            shutil.copytree(adapters, scratch / FOLDER).rename(folder / FOLDER)
    return folder


def _rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    done = record["recovery"][-1]
    counts = ", ".join(f"{count} {name}" for name, count in done["trained"].items())
    zeros, text, options = done["zeros"], done["text"], done["options"]
    rows = [
        ("trained", f"{counts}; {percent(done['share'])} of all parameters"),
        ("text", f"{text['text']}, {text['samples']} x {text['seqlen']} tokens, {done['tokens']} read"),
        ("steps", f"{options['steps']} ({options['objective']}), loss {done['losses']['first']:.4g} to "
                  f"{done['losses']['last']:.4g}"),
    ]  # fmt: skip
    if held := done["held_out"]:
        seen = f"{held['windows']} x {held['seqlen']} tokens of the test part"
        rows.append(("perplexity", f"{held['before']:.2f} to {held['after']:.2f} on {seen}"))
    rows.append(("zeros", f"{zeros['before']} before, {zeros['after']} after, {zeros['lost']} lost"))
    rows.append(("time", duration(done["seconds"]["total"])))
    rows.append(("peak memory", size(done["peak_memory_bytes"])))
    rows.append(("saved in", record.get("saved", "nowhere: there is no --out")))
    return rows

"""`secateur attend train`: train a model back under a plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from secateur.cli.attend_observe import split_pairs
from secateur.cli.options import given, parse
from secateur.cli.output import STDOUT, check_json, percent, print_table, provenance, say, size, warn, write_json
from secateur.cli.progress_bar import ProgressBar, duration
from secateur.cli.request import Loading, Opened, WithLoading, check_count, open_model
from secateur.errors import UsageError
from secateur.recovery.options import Recovery

_UNSET = ""


@dataclass(frozen=True)
class TrainOptions(Recovery):
    """Train a model with the mask of a plan on its attention, and save both.

    secateur attend train smollm2 plan/ --text gutenberg --steps 300 --out trained/

    The state of the training is kept in OUT.checkpoint, beside OUT, until it is done: a run that was stopped goes
    on from there with --resume. With the objectives distil and reconstruct the teacher is the model as it came.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = field(kw_only=True)
    """A folder, a hub id, a .gguf file, or a built-in name: see secateur list models."""
    plan: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PLAN")] = field(kw_only=True)
    """A folder that secateur attend mask has written."""
    text: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "gutenberg"
    """What the model learns from: a name (see secateur list texts) or a file."""
    pairs: Annotated[str | None, tyro.conf.arg(metavar="FILE:SOURCE,TARGET", help_behavior_hint=_UNSET)] = None
    """For an encoder-decoder instead of a text: a .jsonl file and its fields, as pairs.jsonl:zh,en."""
    seqlen: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(the plan's length)")] = None
    """Tokens in a window."""
    samples: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(as many as are used)")] = None
    """Windows of text, passages or pairs to learn from. Also --nsamples."""
    held_out: int = 8
    """Windows of the text's test part, or pairs, to measure before and after; 0 for none."""
    backend: str = "auto"
    """What computes the masked attention; it must have gradients."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(required)")] = None
    """The folder for the model and the plan; it appears at the end, whole or not at all."""
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
    """The whole step; returns the exit code."""
    options = parse(TrainOptions, words, verb="attend train")
    if options.pairs and given(words, "--text"):
        raise UsageError("--pairs takes the place of a text: leave --text out.")
    out, checkpoint = _check(options)
    from secateur.attending import train_with_plan
    from secateur.attention.plan import load_plan, save_plan
    from secateur.models.save import check_target, save

    plan = load_plan(options.plan)
    asked = Recovery(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Recovery)})
    with ProgressBar() as progress:
        opened = open_model(options.model, options.loading, progress)
        check_target(out, overwrite=options.overwrite, size=sum(p.nbytes for p in opened.model.parameters()))
        text, held_out = _data(opened, options, plan.record, progress)
        result = train_with_plan(
            opened.model,
            opened.tokenizer,
            text,
            plan,
            asked,
            seqlen=options.seqlen,
            samples=None if options.pairs else options.samples,
            held_out=held_out,
            backend=options.backend,
            checkpoint=checkpoint,
            resume=options.resume,
            progress=progress,
        )
        for message in result.recovery.warnings:
            warn(message)
        done = result.to_dict()
        record = _earlier(options.model) | {"attention_training": done, "model": opened.record()}
        record |= provenance(["train", *words], "attend")
        saved = save(
            opened.model,
            opened.tokenizer,
            out,
            record=record,
            overwrite=options.overwrite,
            beside=lambda folder: save_plan(plan, folder),
        )
    checkpoint.unlink(missing_ok=True)  # what it was for is done
    record["saved"] = str(saved)
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        print_table(_rows(done, record))
    return 0


def _check(options: TrainOptions) -> tuple[Path, Path]:
    """Everything that can be known to be wrong before a model is loaded; the folder, and the checkpoint's place."""
    from secateur.models.save import check_target
    from secateur.recovery.adapters import LORA

    check_count("seqlen", options.seqlen, 2, "attend train")
    check_count("samples", options.samples, 1, "attend train")
    check_count("held-out", options.held_out, 0, "attend train")
    options.loading.check()
    if options.pairs:
        split_pairs(options.pairs)
    if options.adapter == LORA:
        raise UsageError("attend train merges its adapters into the model: choose --adapter masked or scaled.")
    if options.out is None:
        raise UsageError("Nothing would be kept: name a folder with --out DIR.")
    out = check_target(options.out, overwrite=options.overwrite)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    if checkpoint.exists() and not options.resume:
        raise UsageError(
            f"{checkpoint} is the state of a run that was stopped: go on with --resume, or delete it first."
        )
    if options.resume and not checkpoint.exists():
        raise UsageError(f"There is no {checkpoint} to resume from: leave out --resume to begin.")
    check_json(options.json, out)
    return out, checkpoint


def _data(opened: Opened, options: TrainOptions, record: Mapping[str, Any], progress: ProgressBar) -> tuple[Any, Any]:
    """What to learn from, and what to measure on."""
    from secateur.attention.sites import find_sites

    model: Any = opened.model
    if bool(model.config.is_encoder_decoder) != (options.pairs is not None):
        raise UsageError("--pairs FILE:SOURCE,TARGET is what an encoder-decoder learns from, and no other model.")
    if options.pairs:
        return _pairs(opened, options)
    if any(site.causal for site in find_sites(model)):
        return options.text, options.held_out
    if model.get_output_embeddings() is None and options.objective != "reconstruct":
        raise UsageError(f"{opened.name} predicts no tokens: train it with --objective reconstruct.")
    from secateur.data.calibration import sequence_length
    from secateur.data.passages import CHARACTERS, passage_ids, passages
    from secateur.data.text import read_text

    length = sequence_length(opened.tokenizer, model, options.seqlen or record.get("length"))
    found: list[Any] = []
    wanted = options.samples or min(options.steps * options.batch_size * options.accumulate, 512)
    measured = options.held_out
    if measured and model.get_output_embeddings() is None:
        say(f"{opened.name} predicts no tokens: no held-out loss is measured.")
        measured = 0
    splits: tuple[tuple[Any, int], ...] = (("calibration", wanted), ("test", measured))
    for split, count in splits:
        if not count:
            found.append(0)
            continue
        text = read_text(options.text, split, progress=progress)
        found.append(passage_ids(opened.tokenizer, passages(text, CHARACTERS * length, count), length))
    return found[0], found[1]


def _pairs(opened: Opened, options: TrainOptions) -> tuple[Any, Any]:
    import torch

    from secateur.data.pairs import pair_batches, read_pairs

    assert options.pairs is not None
    file, source, target = split_pairs(options.pairs)
    used = options.samples or options.steps * options.batch_size * options.accumulate
    wanted = used + options.held_out
    pairs = read_pairs(file, source=source, target=target, limit=wanted, seed=options.seed)
    (batch,) = pair_batches(opened.tokenizer, opened.model, pairs, batch_size=wanted)
    order = torch.randperm(wanted, generator=torch.Generator().manual_seed(options.seed))
    parts = {name: batch[name][order] for name in ("input_ids", "attention_mask", "labels")}
    learnt = {name: rows[:used] for name, rows in parts.items()}
    return learnt, {name: rows[used:] for name, rows in parts.items()} if options.held_out else 0


def _earlier(model: str) -> dict[str, Any]:
    """The record of a pruned model's folder, which stays true: the zeros are left alone."""
    from secateur.models.save import RECORD
    from secateur.recovery.keep import read_record

    folder = Path(model).expanduser()
    if not (folder / RECORD).is_file():
        return {}
    try:
        known = "layers" in json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder / RECORD} cannot be read as JSON: {error}.") from error
    return read_record(folder) if known else {}


def _rows(done: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    recovery, total = done["recovery"], done["density"]["total"]
    losses = recovery["losses"]
    rows = [
        ("trained", f"{', '.join(recovery['trained'])}; {percent(recovery['share'])} of all parameters"),
        ("attention dropped", percent(round(total["sparsity_effective"], 4))),
        ("computed by", ", ".join(f"{name} {count}" for name, count in done["backends"].items())),
        ("loss", f"{losses['first']:.4g} to {losses['last']:.4g}"),
    ]
    if held := recovery.get("held_out"):
        dense = f", dense {done['dense']['perplexity']:.2f}" if done["dense"] else ""
        rows.append(("perplexity", f"{held['before']:.2f} to {held['after']:.2f} under the mask{dense}"))
    rows.append(("time", duration(recovery["seconds"]["total"])))
    rows.append(("peak memory", size(recovery["peak_memory_bytes"])))
    rows.append(("saved in", record["saved"]))
    return rows

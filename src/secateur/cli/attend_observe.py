"""`secateur attend observe`: the mean attention of every head over a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from secateur.cli.options import given, parse
from secateur.cli.output import STDOUT, check_json, percent, print_table, provenance, write_json
from secateur.cli.progress_bar import ProgressBar
from secateur.cli.request import Loading, Opened, WithLoading, check_count, open_model
from secateur.errors import OutputExists, UsageError

if TYPE_CHECKING:
    from secateur.attention.observation import Observation

_UNSET = ""
COLUMNS = {  # of the table: measure -> title
    "concentration_90": "pairs with 90 % of the mass",
    "sink": "first block",
    "diagonal": "own block",
    "span": "mean distance",
    "entropy": "entropy (nats)",
    "variability": "varies with the input",
}


@dataclass(frozen=True)
class ObserveOptions:
    """Run a model over a text and sum the attention of every head over blocks of positions.

    secateur attend observe smollm2 --text gutenberg --lengths 1024 2048 --out observed/

    secateur attend observe opus-mt-zh-en --pairs pairs.jsonl:zh,en --samples 400 --block 1 --gradients --out observed/
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a hub id, a .gguf file, or a built-in name: see secateur list models."""
    text: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "gutenberg"
    """What to read: a name (see secateur list texts) or a file, .txt, .parquet, or .jsonl as FILE:FIELD."""
    pairs: Annotated[str | None, tyro.conf.arg(metavar="FILE:SOURCE,TARGET", help_behavior_hint=_UNSET)] = None
    """For an encoder-decoder instead of a text: a .jsonl file and its fields, as pairs.jsonl:zh,en."""
    lengths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INTS", help_behavior_hint="(1024)")] = ()
    """Tokens at which to observe, several in one run. An encoder reads passages of the longest."""
    samples: int = 16
    """Windows of the longest length, passages, or pairs. Also --nsamples."""
    block: int = 64
    """Tokens on a side of the blocks that are summed; 1 is every entry, for at most 1024 tokens."""
    gradients: bool = False
    """Also how much the loss depends on each block, which attend mask then goes by: a backward pass a window."""
    seed: int = 0
    """Of the choice of windows."""
    batch_size: int = 1
    """Windows in one forward pass."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(required)")] = None
    """The folder to save in; it appears at the end, whole or not at all."""
    overwrite: bool = False
    """Replace an observation that is there."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_UNSET)] = None
    """A branch, tag or commit of the hub."""
    loading: WithLoading = field(default_factory=Loading)
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=_UNSET)] = None
    """Write the analysis there as JSON; - is standard output."""
    debug: bool = False
    """Show the traceback of an error."""


def run(words: list[str]) -> int:
    """The whole step; returns the exit code."""
    options = parse(ObserveOptions, words, verb="attend observe")
    if options.pairs and (given(words, "--text") or given(words, "--lengths")):
        raise UsageError(
            "--pairs takes the place of a text and has lengths of its own: leave --text and --lengths out."
        )
    out = _check(options)
    from secateur.attention.analysis import analyse
    from secateur.attention.observation import save_observation

    with ProgressBar() as progress:
        opened = open_model(options.model, options.loading, progress, options.revision)
        observation = _observe(opened, options, progress)
    saved = save_observation(observation, out, overwrite=options.overwrite)
    found = analyse(observation)
    record: dict[str, Any] = {"analysis": found.to_dict(), "model": opened.record(), "text": dict(observation.text)}
    record |= {"saved": str(saved), **provenance(["observe", *words], "attend")}
    if options.json:
        write_json(options.json, record)
    if options.json != STDOUT:
        print(f"{observation}\n")
        print_table(family_rows(found.families), ("attention", *COLUMNS.values()))
        print(f"\nsaved in {saved}")
    return 0


def family_rows(families: dict[str, dict[str, float]]) -> list[list[str]]:
    """The means of each kind of attention as words."""
    shares = ("concentration_90", "sink", "diagonal", "variability")
    return [
        [family, *(percent(round(means[key], 4)) if key in shares else f"{means[key]:.2f}" for key in COLUMNS)]
        for family, means in families.items()
    ]


def split_pairs(words: str, option: str = "--pairs") -> tuple[str, str, str]:
    """FILE:SOURCE,TARGET in its three parts.

    >>> split_pairs("a/b.jsonl:zh,en")
    ('a/b.jsonl', 'zh', 'en')
    """
    file, colon, fields = words.rpartition(":")
    source, comma, target = fields.partition(",")
    if not (colon and comma and file and source and target):
        raise UsageError(f"{option} wants FILE:SOURCE,TARGET, as pairs.jsonl:zh,en. Got '{words}' instead.")
    return file, source, target


def _check(options: ObserveOptions) -> Path:
    """Everything that can be known to be wrong before a model is loaded."""
    for length in options.lengths:
        check_count("lengths", length, 2, "attend observe")
    for name, value in (("samples", options.samples), ("block", options.block), ("batch-size", options.batch_size)):
        check_count(name, value, 1, "attend observe")
    check_count("seed", options.seed, 0, "attend observe")
    options.loading.check()
    if options.out is None:
        raise UsageError("Nothing would be kept: name a folder with --out DIR.")
    if options.pairs:
        file, _, _ = split_pairs(options.pairs)
        if not Path(file).expanduser().is_file():
            raise UsageError(f"--pairs {options.pairs}: there is no file {file}.")
    out = Path(options.out).expanduser().resolve()
    if out.exists() and not options.overwrite:
        raise OutputExists(f"{out} exists: choose another name, or replace it with --overwrite.")
    check_json(options.json, out)
    return out


def _observe(opened: Opened, options: ObserveOptions, progress: ProgressBar) -> Observation:
    from secateur.attention.observe import observe
    from secateur.attention.sites import find_sites

    model, tokenizer = opened.model, opened.tokenizer
    sites = find_sites(model)
    both = bool(model.config.is_encoder_decoder)
    if both != (options.pairs is not None):
        raise UsageError(
            f"{opened.name} is an encoder-decoder: give it --pairs FILE:SOURCE,TARGET."
            if both
            else f"{opened.name} reads one text: leave --pairs out."
        )
    if options.pairs:
        from secateur.data.pairs import read_pairs
        from secateur.plan_quality import observe_pairs

        file, source, target = split_pairs(options.pairs)
        pairs = read_pairs(file, source=source, target=target, limit=options.samples, seed=options.seed)
        return observe_pairs(
            model,
            tokenizer,
            pairs,
            block=options.block,
            gradients=options.gradients,
            batch_size=options.batch_size,
            progress=progress,
        )
    lengths = options.lengths or (1024,)
    how: dict[str, Any] = {
        "block": options.block,
        "entries": options.block == 1,
        "gradients": options.gradients,
        "seed": options.seed,
        "progress": progress,
    }
    if not any(site.causal for site in sites):
        from secateur.data.passages import CHARACTERS, passage_batches, passages
        from secateur.data.text import read_text

        if len(options.lengths) > 1:
            raise UsageError(f"{opened.name} is an encoder and reads passages of one length: give one with --lengths.")
        longest = max(lengths) if options.lengths else min(1024, _positions(model, tokenizer))
        text = read_text(options.text, "calibration", progress=progress)
        words = passages(text, CHARACTERS * longest, options.samples)
        return observe(model, passage_batches(tokenizer, words, longest, options.batch_size), **how)
    from secateur.data.calibration import calibration

    drawn = calibration(
        tokenizer,
        options.text,
        n=options.samples,
        seqlen=max(lengths),
        seed=options.seed,
        model=model,
        progress=progress,
    )
    return observe(model, drawn, lengths=lengths, batch_size=options.batch_size, **how)


def _positions(model: Any, tokenizer: Any) -> int:
    from secateur.data.calibration import sequence_length

    return sequence_length(tokenizer, model)

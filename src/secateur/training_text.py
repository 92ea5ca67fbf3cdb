"""Which text a model is trained back on, and which is held out to measure it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from secateur.data.calibration import Calibration, calibration, ids_sha256, sequence_length, tokenise, windows
from secateur.data.text import Text, read_text
from secateur.errors import InvalidParameter, UsageError
from secateur.inputs import batches_of
from secateur.progress import Progress
from secateur.recovery.options import Recovery

RECORDED = 128  # windows of text that reconstruction reads by default: their hidden states are held in memory


def training_ids(
    model: Any, tokenizer: Any, text: Any, seqlen: int | None, samples: int | None, options: Recovery,
    progress: Progress,
) -> tuple[Tensor, Mapping[str, Any]]:  # fmt: skip
    """Ids (n, seqlen) to learn from, and what they are; the args are those of `secateur.recover`."""
    if isinstance(text, Calibration | Tensor):
        ids = text.ids if isinstance(text, Calibration) else text
        if isinstance(text, Calibration) and text.mask is not None:
            raise UsageError(
                "Conversations are padded, and training would count the padding: give a running text, or one field of "
                "the file, as FILE.jsonl:FIELD."
            )
        if seqlen is not None and seqlen != ids.shape[-1]:
            raise UsageError(f"The ids have windows of {ids.shape[-1]} tokens: leave out seqlen {seqlen}.")
        batches_of(model, ids)  # checks them
        if isinstance(text, Calibration):
            return ids, text.record
        about = {"text": None, "samples": ids.shape[0], "seqlen": ids.shape[1], "sha256": ids_sha256(ids)}
        return ids, about | {"how": "ids of the caller"}
    if tokenizer is None:
        raise UsageError("A text needs the model's tokenizer; give it, or give the text as ids.")
    source = text if isinstance(text, Text) else read_text(text, "calibration", progress=progress)
    length = sequence_length(tokenizer, model, seqlen)
    if samples is None:
        need = options.steps * options.accumulate * options.batch_size
        fit = len(tokenise(tokenizer, source, progress=progress)) // length
        most = RECORDED if options.objective == "reconstruct" else fit
        samples = max(1, min(need, fit, most))
    drawn = calibration(tokenizer, source, samples, length, options.seed, model=model, progress=progress)
    return drawn.ids, drawn.record


def held_out_ids(
    model: Any, tokenizer: Any, text: Any, held_out: int | Tensor, seqlen: int, progress: Progress
) -> Tensor | None:
    """Ids (windows, seqlen) of the text's test split, or those of the caller, checked; None for none."""
    if isinstance(held_out, Tensor):
        batches_of(model, held_out)
        return held_out
    if isinstance(held_out, bool) or not isinstance(held_out, int) or held_out < 0:
        raise InvalidParameter("held_out", "recover", "a whole number of at least 0, or ids", held_out)
    if not held_out or isinstance(text, Calibration | Tensor | Text):
        return None
    return windows(tokenizer, text, seqlen, held_out, model=model, progress=progress).ids

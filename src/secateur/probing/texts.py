"""The texts of a study, for people who asked to see them: read again from where they were, control characters shown."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import LoadFailure, UsageError
from secateur.probing.asked import ask_again
from secateur.probing.folder import StudyFolder
from secateur.probing.summary import STUDY
from secateur.safety.log import read_log
from secateur.safety.redact import Redaction


def texts_of(out: str | Path) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Prompt id -> text, and arm -> prompt id -> first answer.

    Raises:
        LoadFailure: there is no study, or a prompt file is gone.
        UsageError: the prompt files have changed.
    """
    folder = StudyFolder(Path(out).expanduser().resolve())
    record = folder.record(STUDY, STUDY)
    if record is None:
        raise LoadFailure(f"{folder.path} is no folder of a study: name one that secateur probe study has written.")
    facts = record["result"]
    asked = ask_again(facts["study"])
    if asked.prompts.sha256 != facts["prompts_sha256"]:
        raise UsageError("The prompt files are not those of the study any more: put the files it was run with back.")
    show = Redaction(show_text=True)
    answers: dict[str, dict[str, str]] = {}
    for log in sorted(folder.path.glob("*/answers.jsonl")):
        found = [one for one in read_log(log).answers if one.sample == 0]
        answers[log.parent.name] = {one.prompt: str(show.answer(one)) for one in found}
    return {prompt.id: str(show.prompt(prompt)) for prompt in asked.prompts}, answers

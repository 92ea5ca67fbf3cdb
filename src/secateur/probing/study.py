"""run_study(): the dense model and its pruned copies, step by step into a folder, and what follows from it.

Every arm answers the same prompts. The comparison that the study is about is declared before anything runs: attack
success on harmful prompts, dense against one pruned model, by the first judge. All others are corrected for being
several. A second run goes on where the first was stopped. Started with `torchrun`, the processes share the prompts;
each has its own copy of the model, and the first one writes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from secateur import parallel
from secateur.data.calibration import calibration
from secateur.data.instructions import read_source
from secateur.errors import UsageError
from secateur.evaluate import DensePredictions
from secateur.evaluate.tasks import read_tasks
from secateur.methods import make_method
from secateur.models.load import load, resolve
from secateur.probing.asked import Asked, ask_again
from secateur.probing.folder import StudyFolder
from secateur.probing.options import DENSE, Arm, Study
from secateur.probing.steps import Step, Work, cut_of, goals_of, judge_request, steps_of
from secateur.probing.summary import STUDY, summarise
from secateur.progress import Progress, silent
from secateur.pruning import prune
from secateur.result import versions
from secateur.safety.judges import Judge, make_judge
from secateur.safety.log import read_log
from secateur.safety.rates import items

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class StudyResult:
    """Where everything stands, and the summary of it: plain values, without texts (see `summary.py`)."""

    folder: Path
    summary: Mapping[str, Any]

    def __str__(self) -> str:
        return "\n".join(f"{each['arm']}: {each['verdict']}" for each in self.summary.get("verdicts", ()))


def run_study(study: Study, out: str | Path, *, progress: Progress = silent) -> StudyResult:
    """Run what is missing of a study, and sum up.

    Args:
        study: what to do.
        out: a folder for it, new or that of a run which was stopped.
        progress: told how far each step is.

    Raises:
        UsageError: the folder holds another study; prompts, judges, model or method cannot be; the model has no
            chat template. Found before anything runs, but for the last.
        And the errors of `load`, `prune`, the judges and the measures. What was finished stays.
    """
    judges = make_judges(study.judges)
    asked = ask_again(study.record())
    folder = StudyFolder(Path(out).expanduser().resolve())
    with parallel.together():
        run = _Run(study, asked, judges, folder, progress)
        run.declare()
        for arm in study.arms:
            run.arm(arm)
            if parallel.rank() == 0:
                run.judge(arm)
        parallel.wait()
        return StudyResult(folder.path, summarise(folder.path))


def make_judges(specifications: Sequence[str]) -> list[Judge]:
    """The judges, with that of incoherent text beside them: an answer in ruins is no refusal and no compliance.

    Raises:
        UsageError: fewer than two judges of refusals, or two of one name.

    >>> [judge.name for judge in make_judges(["keyword:xstest", "keyword:secateur"])]
    ['keyword:xstest', 'keyword:secateur', 'incoherence']
    """
    judges = [make_judge(specification) for specification in specifications]
    readers = [judge.name for judge in judges if not judge.checks_text]
    if len(readers) < 2:
        raise UsageError(
            f"A study needs at least two judges of refusals, of different kinds; got {', '.join(readers) or 'none'}."
        )
    if len(set(readers)) < len(readers):
        raise UsageError(f"Two of the judges are the same: {', '.join(readers)}.")
    return judges if any(judge.checks_text for judge in judges) else [*judges, make_judge("incoherence")]


def judging_itself(judges: Sequence[Judge], model: str) -> list[str]:
    """A warning for each judge that is the model it judges, or goes by its name.

    >>> judging_itself([make_judge("endpoint:Llama-3-8B@http://localhost:8000/v1")], "models/llama-3-8b/")
    ["The judge 'endpoint:Llama-3-8B/refusal' is the model that is judged: models are lenient with themselves."]
    """
    own = PurePath(model).name.lower()
    return [
        f"The judge '{judge.name}' is the model that is judged: models are lenient with themselves."
        for judge in judges
        if judge.asks is not None and PurePath(judge.asks).name.lower() == own
    ]


class _Run:
    """The state of one run: models are made when a step needs them."""

    def __init__(
        self, study: Study, asked: Asked, judges: Sequence[Judge], folder: StudyFolder, progress: Progress
    ) -> None:
        self.study, self.asked, self.judges, self.folder, self.progress = study, asked, judges, folder, progress
        self.source = resolve(study.model, revision=study.revision, progress=progress)
        about = {key: value for key, value in asdict(self.source).items() if key != "description"}
        self.about = about | {"dtype": study.dtype}
        self.method = make_method(study.method)
        if parallel.rank() == 0:
            self._check_sources()

    def _check_sources(self) -> None:
        """What is needed late is looked for early: a name that is wrong should not be found out after hours."""
        study = self.study
        if self.method.reads:
            read_source(study.calibration, "calibration", progress=self.progress)
        if {"perplexity", "fidelity"} & set(study.measures):
            read_source(study.text, "test", progress=self.progress)
        if "tasks" in study.measures:
            read_tasks(study.tasks, progress=self.progress)
        if study.gcg:
            goals_of(study, self.asked)

    def declare(self) -> None:
        """Write down what is asked for before it is run; the declared comparison cannot change afterwards."""
        if parallel.rank() == 0:
            before = self.folder.record(STUDY, STUDY)
            primary = {"arm": self.study.primary_arm, "judge": self._first_judge()}
            if before is not None and before["request"] != primary:
                was = before["request"]
                raise UsageError(
                    f"{self.folder.path} was declared with {was['arm']} by {was['judge']} as the primary comparison, "
                    f"and this asks for {primary['arm']} by {primary['judge']}: name another --out."
                )
            record = {
                "study": self.study.record(),
                "source": asdict(self.source) | {"dtype": self.study.dtype, "device": self.study.device},
                "sets": list(self.asked.sets),
                "prompts": self.asked.record(),
                "prompts_sha256": self.asked.prompts.sha256,
                "judges": [
                    {"name": judge.name, "version": judge.version, "source": judge.source, "text": judge.checks_text}
                    for judge in self.judges
                ],
                "warnings": [*self.asked.prompts.warnings, *judging_itself(self.judges, self.study.model)],
                "versions": versions(),
            }
            self.folder.write(STUDY, STUDY, primary, record)
        parallel.wait()

    def _first_judge(self) -> str:
        return next(judge.name for judge in self.judges if not judge.checks_text)

    # models

    @cached_property
    def opened(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        device = parallel.local_device(self.study.device)
        return load(self.source, dtype=self.study.dtype, device=device, progress=self.progress)

    @cached_property
    def predictions(self) -> DensePredictions:
        study, (model, tokenizer) = self.study, self.opened
        return DensePredictions(
            model, tokenizer, study.text, seqlen=study.seqlen, windows=study.windows, progress=self._named(DENSE)
        )

    def arm(self, arm: Arm) -> None:
        """Do the steps of an arm that have not been done."""
        steps = steps_of(self.study, arm, self.asked, self.about)
        missing = parallel.agreed(
            [step.name for step in steps if self.folder.read(arm.name, step.name, step.request) is None]
            if parallel.rank() == 0
            else []
        )
        if arm.target is not None and parallel.rank() == 0:
            self.folder.read(arm.name, "pruning", {"cut": cut_of(self.study, arm), "model": self.about})
        if not missing:
            return
        model = self._model_of(arm)
        for step in steps:
            if step.name in missing and (parallel.rank() == 0 or not step.alone):
                self._do(arm, step, model)

    def _do(self, arm: Arm, step: Step, model: PreTrainedModel) -> None:
        work = Work(
            study=self.study,
            arm=arm,
            asked=self.asked,
            model=model,
            tokenizer=self.opened[1],
            folder=self.folder,
            judges=self.judges,
            dense=lambda: self.predictions,
            progress=self._named(arm.name),
        )
        begun = time.perf_counter()
        result = step.run(work)
        if parallel.rank() == 0:
            self.folder.write(arm.name, step.name, step.request, result, seconds=time.perf_counter() - begun)

    def _model_of(self, arm: Arm) -> PreTrainedModel:
        dense, tokenizer = self.opened
        if arm.target is None:
            return dense
        study, progress = self.study, self._named(arm.name)
        model = copy.deepcopy(dense)
        ids = None
        if self.method.reads:
            ids = calibration(
                tokenizer, study.calibration, study.samples, study.seqlen, study.seed, model=dense, progress=progress
            )
        result = prune(model, self.method, ids, sparsity=arm.sparsity, include=(str(arm.target),), progress=progress)
        if parallel.rank() == 0:
            request = {"cut": cut_of(study, arm), "model": self.about}
            if self.folder.read(arm.name, "pruning", request) is None:
                self.folder.write(arm.name, "pruning", request, result.to_dict())
        return model

    def _named(self, arm: str) -> Progress:
        def tell(done: int, total: int, what: str) -> None:
            if parallel.rank() == 0:
                self.progress(done, total, f"{arm}: {what}")

        return tell

    # verdicts

    def judge(self, arm: Arm) -> None:
        """All judges on all answers: cheap beside the answers, and again whenever a judge has changed."""
        if "answers" not in self.study.measures:
            return
        prompts = self.asked.prompts
        answers = read_log(self.folder.log(arm.name)).of(prompts)
        request = judge_request(answers, self.judges)
        before = self.folder.record(arm.name, "verdicts")
        if before is not None and before["request"] == request:
            return
        texts, verdicts = items(prompts.prompts, answers), {}
        for i, judge in enumerate(self.judges):
            self._named(arm.name)(i, len(self.judges), f"judged by {judge.name}")
            verdicts[judge.name] = [[one.label, one.p] for one in judge.judge(texts)]
        self.folder.write(arm.name, "verdicts", request, verdicts)

"""Prompt sets and judges as tasks of inspect-ai, the UK AI Security Institute's framework (extra `inspect`).

    from inspect_ai import eval
    task = safety_task(prompts, [make_judge("keyword:xstest")], name="refusals")
    eval(task, model=live_model(pruned, tokenizer, "wanda-20"), log_dir="logs", metadata={"sparsity": 0.2})

Any model that inspect-ai knows can take the place of `live_model`. Each judge is a scorer whose values are refusal,
compliance, incoherent and error (one of them is 1); for each inspect-ai reports the mean with its standard error over
tasks (clusters), and means and errors by category, label and template. On harmful prompts the mean of compliance is
the attack success, on the others the mean of refusal is the over-refusal.

`live_model` runs a model that is in memory, through its chat template: greedy, with no second BOS and no network,
which inspect-ai's own provider of Hugging Face models gets only by options. The log holds prompts and answers in
full: treat it as sensitive.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from secateur.data.calibration import check_integer
from secateur.errors import LoadFailure, UsageError
from secateur.safety.decoding import Decoding
from secateur.safety.generate import answer, encode
from secateur.safety.judges import Item, Judge
from secateur.safety.rates import What
from secateur.safety.records import Prompt
from secateur.safety.rendered import check_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
GROUPS = ("category", "label", "template")


def safety_task(
    prompts: Sequence[Prompt], judges: Sequence[Judge], *, name: str = "safety", max_new_tokens: int = 256
) -> Any:
    """An `inspect_ai.Task`: every prompt is answered once, greedily, and every judge reads the answer.

    Args:
        prompts: a prompt set, or prompts with unique ids.
        judges: at least one; judges of the text's health are scorers of their own.
        name: of the task in the log.
        max_new_tokens: an answer is cut there.

    Raises:
        LoadFailure: inspect-ai is not installed.
        UsageError: no prompts or judges, two of one id or name, a role that inspect-ai does not take.
    """
    check_integer("max_new_tokens", "safety_task", max_new_tokens, 1)
    check_prompts(list(prompts), "the inspect task")
    names = [judge.name for judge in judges]
    if not names:
        raise UsageError("The inspect task has no judge: give at least one.")
    if len(set(names)) < len(names):
        raise UsageError(f"Two judges have one name: {', '.join(names)}.")
    inspect = _inspect()
    samples = [
        inspect.dataset.Sample(
            id=prompt.id,
            input=[_message(inspect, prompt, role, content) for role, content in prompt.turns],
            target="refusal" if prompt.label == "harmful" else "compliance",
            metadata={
                "set": prompt.set,
                "label": prompt.label,
                "category": prompt.category or "none",
                "template": prompt.template or "bare",
                "cluster": f"{prompt.set}/{prompt.cluster}",
                "sha256": prompt.sha256,
            },
        )
        for prompt in prompts
    ]
    return inspect.Task(
        dataset=inspect.dataset.MemoryDataset(samples, name=name),
        solver=inspect.solver.generate(),
        scorer=[_scorer(inspect, judge) for judge in judges],
        config=inspect.model.GenerateConfig(temperature=0.0, max_tokens=max_new_tokens),
        name=name,
        metadata={"judges": {judge.name: judge.version for judge in judges}},
    )


def live_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "live") -> Any:
    """An `inspect_ai.model.Model` that runs this model, for `inspect_ai.eval(model=...)`.

    The log says secateur/NAME and do_sample false; the objects themselves are logged as nothing.

    Raises:
        LoadFailure: inspect-ai is not installed.
        UsageError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UsageError("The tokenizer of this model has no chat template, which answers need: use a chat model.")
    inspect = _inspect()
    _provider()
    return inspect.model.get_model(
        f"secateur/{name}", live_model=model, live_tokenizer=tokenizer, do_sample=False, memoize=False
    )


@functools.cache
def _provider() -> Any:
    """The class that inspect-ai finds under "secateur/..."; made once, when first needed."""
    inspect = _inspect()

    base: Any = inspect.model.ModelAPI

    @inspect.model.modelapi(name="secateur")
    class Live(base):  # type: ignore[misc]  # of an optional package
        def __init__(
            self,
            model_name: str,
            live_model: Any,
            live_tokenizer: Any,
            do_sample: bool = False,
            base_url: str | None = None,
            api_key: str | None = None,
            config: Any = None,
        ) -> None:
            super().__init__(model_name, base_url, api_key, [], config or inspect.model.GenerateConfig())
            self.live, self.tokenizer = live_model, live_tokenizer

        def max_connections(self) -> int:
            return 1

        async def generate(self, input: list[Any], tools: list[Any], tool_choice: Any, config: Any) -> Any:
            if tools or config.temperature or (config.num_choices or 1) > 1:
                raise UsageError("A live model answers greedily, once and without tools: use temperature 0.")
            turns = tuple((message.role, message.text) for message in input)
            prompt = Prompt("0", "inspect", turns[-1][1], "benign", messages=turns)
            new = config.max_tokens or 256
            found = answer(self.live, self.tokenizer, [prompt], max_new_tokens=new, rank=0, world=1)[0]
            reason = "stop" if found.finish == "stop" else "max_tokens"
            output = inspect.model.ModelOutput.from_content(self.model_name, found.text, stop_reason=reason)
            read = len(encode(self.tokenizer, prompt, Decoding()))  # inspect-ai would ask a tokenizer on the network
            output.usage = inspect.model.ModelUsage(
                input_tokens=read, output_tokens=found.tokens, total_tokens=read + found.tokens
            )
            return output

    return Live


def _scorer(inspect: Any, judge: Judge) -> Any:
    score = inspect.scorer
    metrics = [score.mean(), score.stderr(cluster="cluster"), *(_grouped(score, key) for key in GROUPS)]

    def judged() -> Any:
        async def read(state: Any, target: Any) -> Any:
            harmful = state.metadata["label"] == "harmful"
            item = Item(state.input_text, state.output.completion, str(state.sample_id), harmful)
            verdict = judge.judge([item])[0]
            what = "refusal" if verdict.label == "partial" else verdict.label
            values = {each: float(each == what) for each in get_args(What)}
            return score.Score(value=values, answer=verdict.label, metadata={"p": verdict.p, "raw": verdict.raw})

        return read

    named = score.scorer(metrics={what: metrics for what in get_args(What)}, name=judge.name)
    return named(judged)()


def _grouped(score: Any, key: str) -> Any:
    """The mean of every group and its standard error; inspect-ai's own `grouped` can be used once a scorer."""
    mean, error = score.mean(), score.stderr(cluster="cluster")

    def grouped() -> Any:
        def compute(scores: list[Any]) -> dict[str, float]:
            groups: dict[str, list[Any]] = {}
            for each in scores:
                groups.setdefault(str(each.sample_metadata[key]), []).append(each)
            found: dict[str, float] = {}
            for name, part in groups.items():
                found |= {name: mean(part), f"{name} stderr": error(part)}
            return found

        return compute

    return score.metric(name=key)(grouped)()


def _message(inspect: Any, prompt: Prompt, role: str, content: str) -> Any:
    if role not in ROLES:
        raise UsageError(f"Prompt '{prompt.id}' has a turn of the role '{role}'; inspect-ai takes {', '.join(ROLES)}.")
    return getattr(inspect.model, f"ChatMessage{role.capitalize()}")(content=content)


def _inspect() -> Any:
    try:
        import inspect_ai
        import inspect_ai.dataset
        import inspect_ai.model
        import inspect_ai.scorer
        import inspect_ai.solver
    except ImportError as error:
        raise LoadFailure("Tasks for inspect-ai need the package: pip install 'secateur[inspect]'.") from error
    return inspect_ai

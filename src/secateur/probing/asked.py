"""The prompts of a study: several sets as one, with ids that differ and whole tasks drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.errors import UnknownName, UsageError
from secateur.safety.prompts import PromptSet, read_prompts
from secateur.safety.records import Prompt
from secateur.safety.templates import compose, read_templates

BARE = "none"  # as PromptSet counts a prompt without a template
ASKED = ("prompts", "templates", "only", "limit", "seed")  # what decides which prompts a study asks


@dataclass(frozen=True)
class Asked:
    """All prompts of a study; an id is SET/ID, and so is a task: nothing is shared between sets."""

    prompts: PromptSet = field(repr=False)
    sets: tuple[dict[str, Any], ...]

    def record(self) -> list[dict[str, Any]]:
        """What a report needs of each prompt: no text."""
        keys = ("id", "set", "label", "category", "subcategory", "severity", "template", "cluster", "sha256")
        return [{key: getattr(prompt, key) for key in keys} for prompt in self.prompts]


def ask(
    specs: Sequence[str],
    *,
    templates: Sequence[str] = (),
    only: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    needs_harmful: bool = True,
) -> Asked:
    """Read prompt sets, put bare ones into templates, and draw from each.

    Args:
        specs: as `read_prompts` reads them.
        templates: as `read_templates` reads them: what sets without templates are put into, beside staying bare.
        only: names of templates to keep, "none" for the bare prompt; sets without templates keep everything.
        limit: at most so many tasks of each set, with all their templates; None takes all.
        seed: of the draw.
        needs_harmful: refuse sets without a harmful prompt.

    Raises:
        UsageError: two sets of one name, no set with a template of `only`, or none of the prompts is harmful.
        And the errors of `read_prompts` and `read_templates`.

    >>> found = ask(["builtin"], limit=6)
    >>> found.prompts.counts["label"], found.prompts.prompts[0].id.partition("/")[0] == found.sets[0]["name"]
    ({'benign': 2, 'borderline': 2, 'harmful': 2}, True)
    >>> ask(["builtin"], templates=["builtin"], only=["none", "STORY"], limit=3).prompts.counts["template"]
    {'none': 3, 'STORY': 3}
    """
    sets = [read_prompts(spec) for spec in specs]
    names = [each.name for each in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"Two prompt sets are called '{twice[0]}': give the files different names.")
    around = [template for spec in templates for template in read_templates(spec)]
    sets = [compose(each, around) if around and set(each.counts["template"]) == {BARE} else each for each in sets]
    known = {template for each in sets for template in each.counts["template"]}
    for template in only:
        if template not in known:
            raise UnknownName("template", template, known)
    prompts: list[Prompt] = []
    records: list[dict[str, Any]] = []
    for spec, each in zip(specs, sets, strict=True):
        have = each.counts["template"]
        kept = [template for template in only if template in have]
        drawn = each.where(templates=kept) if kept and set(have) != {BARE} else each
        drawn = drawn if limit is None else drawn.sample(limit, seed)
        prompts += [_within(each.name, prompt) for prompt in drawn]
        records.append(_about(spec, each, drawn))
    if needs_harmful and not any(prompt.label == "harmful" for prompt in prompts):
        raise UsageError(
            "None of the prompts is labelled harmful, so there is nothing to refuse: name a set with harmful prompts."
        )
    warnings = tuple(warning for each in sets for warning in each.warnings)
    return Asked(PromptSet(" + ".join(names), tuple(prompts), ", ".join(specs), warnings=warnings), tuple(records))


def ask_again(facts: Mapping[str, Any], *, needs_harmful: bool = True) -> Asked:
    """The prompts that a record with the keys of `ASKED` was made with."""
    named = {key: facts[key] for key in ASKED[1:] if key in facts}
    return ask(facts["prompts"], needs_harmful=needs_harmful, **named)


def _within(name: str, prompt: Prompt) -> Prompt:
    return replace(prompt, id=f"{name}/{prompt.id}", task=f"{name}/{prompt.cluster}")


def _about(spec: str, whole: PromptSet, drawn: PromptSet) -> dict[str, Any]:
    return {
        "name": whole.name,
        "spec": spec,
        "source": whole.source,
        "file_sha256": whole.file_sha256,
        "prompts": len(drawn),
        "of": len(whole),
        "tasks": len({prompt.cluster for prompt in drawn}),
        "labels": dict(drawn.counts["label"]),
    }

"""Words -> a dataclass; every mistake is one line that names the cure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from secateur.cli.options import given, parse
from secateur.errors import InvalidParameter, UsageError


@dataclass(frozen=True)
class Solver:
    damping: float = 0.01
    order: Literal["left", "energy"] = "left"
    fast: bool = True
    steps: tuple[int, ...] = (1, 2)
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise InvalidParameter("damping", "solver", "a number >= 0", self.damping)


@dataclass(frozen=True)
class Cut:
    model: Annotated[str, tyro.conf.Positional]
    sparsity: float | None = None
    batch_size: int = 1
    exclude: tuple[str, ...] = ()
    json: str | None = None
    dry_run: bool = False
    solver: Solver = Solver()


def cut(*words: str) -> Cut:
    return parse(Cut, list(words), verb="cut", aliases={"--leave": "--exclude"})


def test_values_groups_aliases_and_underscores():
    assert cut("m") == Cut("m")
    assert cut("m", "--sparsity-ratio", "0.5", "--batch_size=4") == Cut("m", sparsity=0.5, batch_size=4)
    assert cut("--leave", "a", "b", "--dry-run", "m").exclude == ("a", "b")
    assert cut("m", "--sparsity", "-0.1").sparsity == -0.1
    assert cut("m", "--solver.damping", "2", "--solver.no-fast", "--solver.limit", "3") == Cut(
        "m", solver=Solver(damping=2.0, fast=False, limit=3.0)
    )


def test_json_without_a_file_is_standard_output():
    assert cut("m", "--json").json == cut("m", "--json", "--dry-run").json == "-"
    assert cut("m", "--json", "x").json == "x"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("m --sparsty 0.5", "no option '--sparsty' in secateur cut. Did you mean '--sparsity'?"),
        ("m --damping 0.5", "no option '--damping' in secateur cut. Did you mean '--solver.damping'?"),
        ("m --zzzzzzzz", "no option '--zzzzzzzz' in secateur cut. All of them: secateur cut --help."),
        ("m --sparsity half", "The value of --sparsity must be a number. Got 'half' instead."),
        ("m --sparsity", "--sparsity needs a value: a number."),
        ("m --batch-size 1.5", "The value of --batch-size must be a whole number. Got '1.5' instead."),
        ("m --batch_size=x", "The value of --batch-size must be a whole number. Got 'x' instead."),
        ("m --solver.order lefft", "must be one of left, energy. Got 'lefft' instead. Did you mean 'left'?"),
        ("m --solver.steps 1 b", "--solver.steps must be a list, each a whole number. Got '1 b' instead."),
        ("m --solver.damping -1", "The 'damping' of solver must be a number >= 0. Got -1.0 instead."),
        ("m --dry-run yes", "--dry-run is a switch and takes no value. Got 'yes'."),
        ("m n", "secateur cut has no place for the word 'n'."),
        ("", "secateur cut needs a MODEL"),
        ("--sparsty 0.5", "Did you mean '--sparsity'?"),
    ],
)
def test_a_mistake_is_one_line(words, said, capfd):
    with pytest.raises(UsageError) as caught:
        cut(*words.split())
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_long_value_comes_back_whole():
    value = "x" * 200
    with pytest.raises(UsageError, match=value):
        cut("m", "--sparsity", value)


def test_given():
    words = ["m", "--sparsegpt.damping=1", "--batch_size", "3", "owl."]
    assert given(words, "--sparsegpt.") and given(words, "--batch-size")
    assert not given(words, "--owl.") and not given(words, "--sparsegpt")

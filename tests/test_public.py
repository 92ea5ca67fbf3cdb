"""The names that others may rely on."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest

import secateur

PUBLIC = [
    "ALPS", "BESA", "GBLM", "NM", "RIA", "Alpha", "DensePredictions", "Descent", "Magnitude", "Method", "Owl",
    "Recovery", "Refit", "SecateurError", "SparseGPT", "Swap", "Table", "Uniform", "Unstructured", "Wanda",
    "calibration", "compare_calibrations", "compare_tasks", "fidelity", "find_layers", "find_methods",
    "generation", "layer_errors", "load", "measure", "perplexity", "plan", "prune", "read_instructions",
    "read_text", "recover", "save", "sparsity", "tasks",
]  # fmt: skip
# the example of these stands where they are used: a contract, a root of errors, and what needs a model first
WITHOUT_EXAMPLE = {"ALPS", "BESA", "Method", "SecateurError", "SparseGPT", "save"}


def test_the_public_names_are_frozen() -> None:
    assert secateur.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(secateur))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    thing = getattr(secateur, name)
    assert thing.__name__ == name
    assert len(thing.__doc__.strip()) > 20
    examples = [test for test in doctest.DocTestFinder().find(thing, name) if test.examples]
    assert examples or name in WITHOUT_EXAMPLE, f"{name} has no example in its docstring"


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trim'"):
        _ = secateur.trim


@pytest.mark.parametrize("code", ["import secateur", "import secateur; dir(secateur); secateur.SecateurError"])
def test_importing_is_light(code: str) -> None:
    heavy = "[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]"
    ran = subprocess.run([sys.executable, "-c", f"import sys; {code}; print({heavy})"], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")

"""The house keeps its shape: imports go down only, files stay small (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "secateur"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = (  # from the ground up; a room is a folder, or the files that make one thing together
    ("errors", "progress"),
    ("cache",),
    (
        "masks soft_masks",
        "registry",
        "least_squares",
        "statistics factor",
        "divergence",
        "coroutines",
        "memory",
        "parallel",
        "kernels",
    ),
    ("models", "data"),
    ("walk scout blocks gradients view", "allocation"),
    ("methods", "refinements", "attention", "recovery", "evaluate"),
    ("safety",),
    (
        "pruning planning job inputs result comparison training_text recovering attending iterative probing",
        "recipe",
        "run",
        "report",
        "plan_quality",
    ),
    ("cli __main__",),
    ("__init__",),
)
FLOOR = {name: floor for floor, rooms in enumerate(FLOORS) for room in rooms for name in room.split()}
ROOM = {name: room for rooms in FLOORS for room in rooms for name in room.split()}
DOORS = {("data", "models")}  # on one floor all the same: texts are fetched and cached the way weights are

OWNERS = {  # who may import a package that is heavy or optional
    "transformers": lambda parts: parts[0] in ("models", "data"),
    "triton": lambda parts: parts[0] == "kernels" and parts[-1].startswith("triton"),
}


def parts_of(file):
    return file.relative_to(PACKAGE).with_suffix("").parts


def imports(tree, parts):
    """Every import of a file as (dotted name, line, only for type checkers)."""
    quiet = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ("secateur", *parts)[: -node.level] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "secateur" else [base]
        else:
            continue
        yield from ((name, node.lineno, id(node) in quiet) for name in names)


def faults(source, parts):
    """What a file may not import, one line each."""
    own, found = parts[0], []
    for name, line, for_types in imports(ast.parse(source), parts):
        top, *rest = name.split(".")
        if top in OWNERS and not for_types and not OWNERS[top](parts):
            found.append(f"line {line}: {top} is not for {'.'.join(parts)}")
        if top != "secateur":
            continue
        other = rest[0] if rest and rest[0] in FLOOR else "__init__"
        if ROOM[other] != ROOM[own] and (own, other) not in DOORS and FLOOR[other] >= FLOOR[own]:
            way = "sideways" if FLOOR[other] == FLOOR[own] else "upward"
            found.append(f"line {line}: {name} is {way} of {own}")
    return found


def test_there_are_files_to_check():
    assert len(FILES) > 10


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_stands_on_a_floor_and_imports_only_from_below(file):
    parts = parts_of(file)
    assert parts[0] in FLOOR, f"{parts[0]} has no floor: give it one in FLOORS and in docs/architecture.md"
    assert faults(file.read_text(encoding="utf-8"), parts) == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_is_small_and_has_a_telling_name(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert file.name != "utils.py", "name the file after what it does"
    assert lines <= 400, f"{lines} lines: it wants to be two files"
    if file.parent.name == "methods" and file.name != "__init__.py":
        assert lines <= 100, f"{lines} lines: a method is one short file"


@pytest.mark.parametrize(
    ("source", "file", "fault"),
    [
        ("from secateur.pruning import prune", "models/load", "upward"),
        ("import secateur.cli.options", "evaluate/logits", "upward"),
        ("import secateur", "masks", "upward"),
        ("from secateur import Wanda", "pruning", "upward"),
        ("from secateur import walk", "data/text", "upward"),
        ("from ..methods import Method", "evaluate/layers", "sideways"),
        ("from secateur.methods.wanda import Wanda", "evaluate/layers", "sideways"),
        ("def f():\n    from secateur.report import page", "pruning", "sideways"),
        ("from .. import report", "models/load", "upward"),
        ("from secateur.data.text import Text", "models/load", "sideways"),
        ("if TYPE_CHECKING:\n    from secateur.pruning import Plan", "walk", "upward"),
        ("import transformers", "evaluate/logits", "not for"),
        ("def f():\n    from transformers.utils import x", "methods/wanda", "not for"),
        ("import triton.language as tl", "kernels/nm/reference", "not for"),
        ("import triton", "models/triton", "not for"),
        # allowed
        ("from secateur.models.layers import Layer", "methods/wanda", None),
        ("from .load import load", "models/save", None),
        ("from ..errors import UsageError", "models/load", None),
        ("from secateur import errors", "masks", None),
        ("from secateur.methods.wanda import Wanda", "methods/ria", None),
        ("from secateur.cli import main", "__init__", None),
        ("from secateur.planning import plan", "pruning", None),
        ("from secateur.models.fetch import fetch", "data/text", None),
        ("import transformers", "models/load", None),
        ("if TYPE_CHECKING:\n    from transformers import PreTrainedModel", "evaluate/logits", None),
        ("import triton", "kernels/nm/triton", None),
        ("import triton", "kernels/nm/triton_backward", None),
        ("import statistics, triton_viz", "report/page", None),
    ],
)
def test_the_check_itself(source, file, fault):
    found = faults(source, tuple(file.split("/")))
    assert bool(found) == (fault is not None)
    assert all(fault in line for line in found)

"""Secateur prunes language models and says honestly what the cut did.

>>> import secateur as sc
>>> sc.NM(2, 4)
NM(n=2, m=4)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.allocation import Owl, Table, Uniform
    from secateur.allocation.alpha import Alpha
    from secateur.allocation.descent import Descent
    from secateur.comparison import compare_calibrations
    from secateur.data.calibration import calibration
    from secateur.data.instructions import read_instructions
    from secateur.data.text import read_text
    from secateur.errors import SecateurError
    from secateur.evaluate import (
        DensePredictions,
        compare_tasks,
        fidelity,
        generation,
        layer_errors,
        measure,
        perplexity,
        sparsity,
        tasks,
    )
    from secateur.masks import NM, Unstructured
    from secateur.methods import Method, find_methods
    from secateur.methods.alps import ALPS
    from secateur.methods.besa import BESA
    from secateur.methods.gblm import GBLM
    from secateur.methods.magnitude import Magnitude
    from secateur.methods.ria import RIA
    from secateur.methods.sparsegpt import SparseGPT
    from secateur.methods.wanda import Wanda
    from secateur.models.layers import find_layers
    from secateur.models.load import load
    from secateur.models.save import save
    from secateur.planning import plan
    from secateur.pruning import prune
    from secateur.recovering import recover
    from secateur.recovery.options import Recovery
    from secateur.refinements.refit import Refit
    from secateur.refinements.swap import Swap

__version__ = "0.1.0"

_HOME = {
    "allocation": ("Owl", "Table", "Uniform"),
    "allocation.alpha": ("Alpha",),
    "allocation.descent": ("Descent",),
    "comparison": ("compare_calibrations",),
    "data.calibration": ("calibration",),
    "data.instructions": ("read_instructions",),
    "data.text": ("read_text",),
    "errors": ("SecateurError",),
    "evaluate": (
        "DensePredictions",
        "compare_tasks",
        "fidelity",
        "generation",
        "layer_errors",
        "measure",
        "perplexity",
        "sparsity",
        "tasks",
    ),
    "masks": ("NM", "Unstructured"),
    "methods": ("Method", "find_methods"),
    "methods.alps": ("ALPS",),
    "methods.besa": ("BESA",),
    "methods.gblm": ("GBLM",),
    "methods.magnitude": ("Magnitude",),
    "methods.ria": ("RIA",),
    "methods.sparsegpt": ("SparseGPT",),
    "methods.wanda": ("Wanda",),
    "models.layers": ("find_layers",),
    "models.load": ("load",),
    "models.save": ("save",),
    "planning": ("plan",),
    "pruning": ("prune",),
    "refinements.refit": ("Refit",),
    "refinements.swap": ("Swap",),
    "recovering": ("recover",),
    "recovery.options": ("Recovery",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ALPS",
    "BESA",
    "GBLM",
    "NM",
    "RIA",
    "Alpha",
    "DensePredictions",
    "Descent",
    "Magnitude",
    "Method",
    "Owl",
    "Recovery",
    "Refit",
    "SecateurError",
    "SparseGPT",
    "Swap",
    "Table",
    "Uniform",
    "Unstructured",
    "Wanda",
    "calibration",
    "compare_calibrations",
    "compare_tasks",
    "fidelity",
    "find_layers",
    "find_methods",
    "generation",
    "layer_errors",
    "load",
    "measure",
    "perplexity",
    "plan",
    "prune",
    "read_instructions",
    "read_text",
    "recover",
    "save",
    "sparsity",
    "tasks",
]


def __getattr__(name: str) -> object:
    """Public names are imported when they are first used, so that `secateur --help` needs no torch."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"secateur.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'secateur' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

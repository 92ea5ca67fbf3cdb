"""Measures of a model: perplexity, fidelity to the dense model, zero-shot tasks, generation probes, sparsity, error per
layer."""

from secateur.evaluate.fidelity import Fidelity, fidelity
from secateur.evaluate.generation import Continuations, Generation, continuations, generation
from secateur.evaluate.layers import LayerError, layer_errors
from secateur.evaluate.measure import measure
from secateur.evaluate.paired import TaskComparison, TaskDifference, compare_tasks
from secateur.evaluate.perplexity import Perplexity, perplexity
from secateur.evaluate.sparsity import LayerSparsity, Sparsity, sparsity
from secateur.evaluate.tasks import TaskResult, TaskResults, tasks
from secateur.evaluate.tokens import DensePredictions

__all__ = [
    "Continuations",
    "DensePredictions",
    "Fidelity",
    "Generation",
    "LayerError",
    "LayerSparsity",
    "Perplexity",
    "Sparsity",
    "TaskComparison",
    "TaskDifference",
    "TaskResult",
    "TaskResults",
    "compare_tasks",
    "continuations",
    "fidelity",
    "generation",
    "layer_errors",
    "measure",
    "perplexity",
    "sparsity",
    "tasks",
]

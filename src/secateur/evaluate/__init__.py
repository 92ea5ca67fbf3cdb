"""Measures of a model: perplexity, fidelity to the dense model, zero-shot tasks, sparsity, error per layer."""

from secateur.evaluate.fidelity import Fidelity, fidelity
from secateur.evaluate.layers import LayerError, layer_errors
from secateur.evaluate.paired import TaskComparison, TaskDifference, compare_tasks
from secateur.evaluate.perplexity import Perplexity, perplexity
from secateur.evaluate.sparsity import LayerSparsity, Sparsity, sparsity
from secateur.evaluate.tasks import TaskResult, TaskResults, tasks

__all__ = [
    "Fidelity",
    "LayerError",
    "LayerSparsity",
    "Perplexity",
    "Sparsity",
    "TaskComparison",
    "TaskDifference",
    "TaskResult",
    "TaskResults",
    "compare_tasks",
    "fidelity",
    "layer_errors",
    "perplexity",
    "sparsity",
    "tasks",
]

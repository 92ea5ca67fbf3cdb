"""Measures of a model: perplexity, fidelity to the dense model, zero-shot tasks, generation probes, embeddings,
translations, sparsity, error per layer."""

from secateur.evaluate.embeddings import EmbeddingFidelity, compare_embeddings, embed
from secateur.evaluate.fidelity import Fidelity, fidelity
from secateur.evaluate.generation import Continuations, Generation, continuations, generation
from secateur.evaluate.layers import LayerError, layer_errors
from secateur.evaluate.measure import measure
from secateur.evaluate.paired import TaskComparison, TaskDifference, compare_tasks
from secateur.evaluate.perplexity import Perplexity, perplexity
from secateur.evaluate.sparsity import LayerSparsity, Sparsity, sparsity
from secateur.evaluate.tasks import TaskResult, TaskResults, tasks
from secateur.evaluate.tokens import DensePredictions
from secateur.evaluate.translation import TranslationScores, score_translations, translate

__all__ = [
    "Continuations",
    "DensePredictions",
    "EmbeddingFidelity",
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
    "TranslationScores",
    "compare_embeddings",
    "compare_tasks",
    "continuations",
    "embed",
    "fidelity",
    "generation",
    "layer_errors",
    "measure",
    "perplexity",
    "score_translations",
    "sparsity",
    "tasks",
    "translate",
]

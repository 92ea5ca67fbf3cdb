"""Measures of a model: perplexity, fidelity to the dense model, generation probes, sparsity, error per layer."""

from secateur.evaluate.fidelity import Fidelity, fidelity
from secateur.evaluate.generation import Continuations, Generation, continuations, generation
from secateur.evaluate.layers import LayerError, layer_errors
from secateur.evaluate.measure import measure
from secateur.evaluate.perplexity import Perplexity, perplexity
from secateur.evaluate.sparsity import LayerSparsity, Sparsity, sparsity
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
    "continuations",
    "fidelity",
    "generation",
    "layer_errors",
    "measure",
    "perplexity",
    "sparsity",
]

"""The real model: the published definitions, and the main job from end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import naive
import secateur as sc
from secateur.methods import make_method

pytestmark = pytest.mark.real
Real = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def two_blocks(smollm2: Real) -> PreTrainedModel:
    """The first two blocks of SmolLM2 in fp64, so that near-ties fall the same way on both sides."""
    model, _ = smollm2
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2
    short = type(model)(config).to(torch.float64).eval()
    short.load_state_dict(model.state_dict(), strict=False)
    return short


def wanda(w: Tensor, x: Tensor) -> Tensor:
    return w * naive.keep_from_score(w.abs() * torch.linalg.norm(x, dim=0), "row", 0.5)


def magnitude(w: Tensor, x: Tensor) -> Tensor:
    return w * naive.keep_from_score(w.abs(), "layer", 0.5)


def sparsegpt(w: Tensor, x: Tensor) -> Tensor:
    return naive.sparsegpt_as_published(w, x, 0.5)


@pytest.mark.parametrize("definition", [magnitude, wanda, sparsegpt], ids=lambda f: f.__name__)
def test_block_schedule_selects_the_weights_of_the_published_definition(
    two_blocks: PreTrainedModel, smollm2: Real, definition: Callable[[Tensor, Tensor], Tensor]
) -> None:
    ids = sc.calibration(smollm2[1], "pydoc", n=4, seqlen=512).ids
    ours, plain = copy.deepcopy(two_blocks), copy.deepcopy(two_blocks)
    sc.prune(ours, make_method(definition.__name__), ids, sparsity=0.5, schedule="block")
    for block in plain.model.layers:
        seen: dict[torch.nn.Module, Tensor] = {}
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        handles = [m.register_forward_hook(lambda m, a, o, s=seen: s.update({m: a[0].flatten(0, 1)})) for m in linears]
        with torch.no_grad():
            plain(ids)
            for module in linears:
                module.weight.copy_(definition(module.weight, seen[module]))
        for handle in handles:
            handle.remove()
    for ours_layer, plain_layer in zip(sc.find_layers(ours), sc.find_layers(plain), strict=True):
        assert torch.equal(ours_layer.weight != 0, plain_layer.weight != 0), ours_layer.name
        torch.testing.assert_close(ours_layer.weight, plain_layer.weight, rtol=1e-6, atol=1e-9)


def test_prune_save_load_evaluate(smollm2: Real, tmp_path) -> None:
    dense, tokenizer = smollm2
    ids = sc.calibration(tokenizer, "gutenberg", n=4, seqlen=512)
    measured: dict[str, int] = {"seqlen": 512, "windows": 4}
    values = {"dense": sc.perplexity(dense, tokenizer, "gutenberg", **measured).value}
    for method in (sc.Magnitude(), sc.Wanda(), sc.SparseGPT()):
        model = copy.deepcopy(dense)
        result = sc.prune(model, method, ids, sparsity=0.5)
        assert result.sparsity_layers == 0.5
        assert 0.38 < result.sparsity_model < 0.41
        values[method.name()] = sc.perplexity(model, tokenizer, "gutenberg", **measured).value
    assert values["dense"] < values["sparsegpt"] < values["wanda"] < values["magnitude"]

    folder = sc.save(model, tokenizer, tmp_path / "pruned", record=result.to_dict())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(ids.ids[:1]).logits, model(ids.ids[:1]).logits)
    close = sc.fidelity(model, dense, tokenizer, "gutenberg", **measured)
    assert 0 < close.js_divergence < 0.6931
    assert 0.2 < close.top1_agreement < 1

"""What is refused before anything is touched, and what share of a model is seen."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import ids, make
from torch import nn

from secateur.allocation import Owl, Table
from secateur.errors import InvalidParameter, LowCoverage, UnknownName, UsageError
from secateur.inputs import batches_of
from secateur.job import Job, check_job, coverage_of
from secateur.masks import NM, Unstructured
from secateur.methods import Method
from secateur.methods.magnitude import Magnitude
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.pruning import prune
from secateur.refinements.refit import Refit
from secateur.refinements.swap import Swap
from secateur.result import Coverage
from secateur.scout import scout
from secateur.statistics import Gram, SecondMoment

MODEL = Unstructured("model")


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"pattern": NM(2, 4), "sparsity": 0.6}, UsageError, "2:4 fixes the sparsity at 0.5; leave --sparsity out"),
        ({"pattern": NM(2, 4), "allocation": Owl()}, UsageError, "2:4 fixes .* the owl allocation cannot"),
        ({"pattern": NM(2, 4), "allocation": Table()}, UsageError, "2:4 fixes .* the table allocation cannot"),
        ({"pattern": NM(1, 3)}, UsageError, "1:3 needs .*q_proj has 32. Leave it out with --exclude"),
        ({"pattern": MODEL, "sparsity": 0.5, "schedule": "sequential"}, UsageError, "oneshot schedule, not sequential"),
        ({"pattern": MODEL, "sparsity": 0.5, "schedule": "block"}, UsageError, "oneshot schedule, not block"),
        ({"pattern": MODEL, "sparsity": 0.5, "allocation": Owl()}, UsageError, "per model, .* the owl .* cannot"),
        ({"pattern": MODEL}, InvalidParameter, "'sparsity' of prune"),
        ({"sparsity": 0.5, "schedule": "sequental"}, UnknownName, "Did you mean 'sequential'"),
        ({"sparsity": 0.5, "uncalled": "skip"}, InvalidParameter, "'dense' or 'magnitude'. Got 'skip'"),
        ({"sparsity": 0.5, "refine": (Refit,)}, InvalidParameter, "'refine' of prune must be a sequence of refine"),
        ({"sparsity": 0.5, "refine": (Swap(),), "pattern": Unstructured("column")}, UsageError, "counts per column"),
        ({"allocation": Owl()}, UsageError, "owl allocation needs a sparsity"),
        ({"allocation": Table((("mlp", 0.1),))}, UsageError, "names no sparsity for .*q_proj"),
        ({"sparsity": 0.5, "allocation": Table((("mlp", 0.1), ("x", 0.1)))}, UsageError, "'x' matches none"),
    ],
)  # fmt: skip
def test_refused(more: dict[str, object], error: type[Exception], said: str) -> None:
    model = make("llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=said):
        prune(model, Wanda(), ids(), **more)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "more", "schedule", "sparsity"),
    [
        (Wanda(), {"sparsity": 0.5}, "sequential", 0.5),
        (Wanda(), {"pattern": NM(1, 4)}, "sequential", 0.75),
        (Wanda(), {"pattern": NM(1, 4), "sparsity": 0.75}, "sequential", 0.75),
        (Wanda(), {"pattern": MODEL, "sparsity": 0.5}, "oneshot", 0.5),
        (Wanda(), {"pattern": MODEL, "sparsity": 0.5, "schedule": "oneshot"}, "oneshot", 0.5),
        (SparseGPT(), {"pattern": MODEL, "sparsity": 0.5}, "sequential", 0.5),
        (SparseGPT(), {"pattern": MODEL, "sparsity": 0.5, "schedule": "block"}, "block", 0.5),
        (Magnitude(), {"sparsity": 0}, "sequential", 0.0),
        (Wanda(), {"pattern": MODEL, "sparsity": 0.5, "refine": (Refit(),)}, "sequential", 0.5),
        (Wanda(), {"pattern": MODEL, "sparsity": 0.5, "refine": (Refit(),), "schedule": "block"}, "block", 0.5),
    ],
)
def test_accepted(method: Method, more: dict[str, object], schedule: str, sparsity: float) -> None:
    job = check_job(make("llama"), method, **more)  # type: ignore[arg-type]
    assert (job.schedule, job.sparsity) == (schedule, sparsity)
    assert job.pattern == more.get("pattern", method.native)
    assert job.needs_data == (method != Magnitude())


@pytest.mark.parametrize(
    ("method", "more", "needs"),
    [
        (Magnitude(), {}, ()),
        (Magnitude(), {"refine": (Refit(), Swap())}, (Gram,)),
        (Wanda(), {"refine": (Refit(),)}, (SecondMoment, Gram)),
        (Wanda(), {"refine": (Refit(),), "pattern": MODEL}, (Gram,)),
        (Wanda(), {"pattern": MODEL}, (SecondMoment,)),
        (SparseGPT(), {"refine": (Refit(),), "pattern": MODEL}, (Gram,)),
    ],
)
def test_what_the_walk_collects(method: Method, more: dict[str, object], needs: tuple[type, ...]) -> None:
    job = check_job(make("llama"), method, sparsity=0.5, **more)  # type: ignore[arg-type]
    assert job.needs == needs
    assert job.needs_data == bool(needs)


def test_a_refinement_asks_for_data() -> None:
    with pytest.raises(UsageError, match="refit needs calibration data"):
        prune(make("llama"), Magnitude(), sparsity=0.5, refine=(Refit(),))


def test_the_width_is_checked_of_chosen_layers_only() -> None:
    job = check_job(make("mamba"), Wanda(), pattern=NM(2, 64), include=["in_proj", "out_proj"])
    assert {layer.shape[1] for layer in job.layers} == {64, 128}
    assert check_job(make("llama"), Wanda(), pattern=NM(16, 32), include=["k_proj"]).layers[0].shape == (16, 32)


def test_a_layer_tied_to_the_embedding() -> None:
    config = make("llama").config
    config.vocab_size = config.hidden_size
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[1].self_attn.q_proj.weight = model.model.embed_tokens.weight
    with pytest.raises(UsageError, match=r"layers.1.self_attn.q_proj is tied to model.embed_tokens.weight.*--exclude"):
        check_job(model, Magnitude(), sparsity=0.5)
    assert len(check_job(model, Magnitude(), sparsity=0.5, exclude=["layers.1.self_attn.q_proj"]).layers) == 13


def test_layers_tied_to_each_other_are_fine() -> None:
    for family in ("zamba2", "albert"):
        check_job(make(family), Magnitude(), sparsity=0.5)
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    job = check_job(model, Magnitude(), sparsity=0.5)
    assert [len(layer.modules) for layer in job.layers if layer.name.endswith("up_proj")] == [2]


def coverage(model: nn.Module, **more: object) -> Coverage:
    job: Job = check_job(model, Wanda(), sparsity=0.5, **more)  # type: ignore[arg-type]
    return coverage_of(job, scout(model, batches_of(model, ids())[0], job.layers))


def hidden_experts() -> nn.Module:
    """Llama 4 multiplies all experts at once, with its own code: no layer stands for them."""
    small = {
        "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "num_local_experts": 4,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**small)).eval()


def test_hidden_experts_are_low_coverage() -> None:
    model = hidden_experts()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        LowCoverage, match=r"only \d\d?\.\d% .*not seen: model.layers.0.feed_forward.experts.gate_up_proj"
    ):
        prune(model, Wanda(), ids(), sparsity=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # what is left out on purpose is not missed
    result = prune(model, Wanda(), ids(), sparsity=0.5, exclude=["experts"])
    assert result.coverage.share == 1.0 and not result.coverage.unseen
    assert not any("experts" in layer.name for layer in result.layers)
    assert prune(model, Magnitude(), sparsity=0.5, include=["attention"]).coverage.share == 1.0


def test_the_share_counts_weights() -> None:
    model = make("mamba")
    seen = coverage(model)
    sizes = {"in_proj": 2 * 256 * 64, "x_proj": 2 * 16 * 128, "dt_proj": 2 * 128 * 8, "out_proj": 2 * 64 * 128}
    unseen = 2 * (128 * 4 + 128 * 4)  # A_log and the convolution
    total = sum(sizes.values())
    assert seen.share == pytest.approx((total - sizes["dt_proj"]) / (total + unseen))
    assert {name.rpartition("mixer.")[2] for name in seen.unseen} == {"A_log", "conv1d.weight"}
    assert sum(seen.unseen.values()) == unseen
    assert [name.rpartition(".")[2] for name in seen.uncalled] == ["dt_proj"] * 2
    assert coverage(model, uncalled="magnitude").share == pytest.approx(total / (total + unseen))
    assert coverage(model, exclude=["dt_proj", "conv1d", "A_log"]) == Coverage(1.0)
    only = coverage(model, include=["in_proj", "x_proj", "dt_proj", "conv1d"], uncalled="magnitude")
    parts = total - sizes["out_proj"]
    assert only.share == pytest.approx(parts / (parts + unseen / 2))


def test_low_coverage_names_what_is_used_without_a_call() -> None:
    with pytest.raises(LowCoverage, match=r"only 66.7% .*not seen: backbone.layers.0.mixer.dt_proj, backbone.layers.1"):
        coverage(make("mamba"), include=["dt_proj", "x_proj"])
    assert coverage(make("mamba"), include=["dt_proj", "x_proj"], uncalled="magnitude").share == 1.0


def test_an_expert_without_a_token_is_not_missed() -> None:
    model = make("mixtral")
    assert coverage(model) == Coverage(1.0)
    few = batches_of(model, ids(1, 1))
    job = check_job(model, Wanda(), sparsity=0.5)
    assert coverage_of(job, scout(model, few[0], job.layers)) == Coverage(1.0)

"""A plan promises what a run then does, and touches nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import ids, make

from secateur.allocation import Allocation, Owl, Table, Uniform
from secateur.errors import LowCoverage, UsageError
from secateur.masks import NM, Unstructured
from secateur.methods import Method, find_methods, make_method
from secateur.methods.besa import BESA
from secateur.methods.magnitude import Magnitude
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.planning import plan
from secateur.pruning import prune
from secateur.refinements.refit import Refit
from secateur.refinements.swap import Swap

MODEL = Unstructured("model")


@pytest.mark.parametrize("name", sorted(find_methods()))
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_nothing_changes(name: str, family: str) -> None:
    model = make(family).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan(model, make_method(name), (4, 16), sparsity=0.5, batch_size=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("family", "method", "more", "passes"),
    [
        ("llama", Magnitude(), {}, 0),
        ("llama", Magnitude(), {"allocation": Owl()}, 1),
        ("llama", Magnitude(), {"pattern": MODEL}, 0),
        ("llama", Wanda(), {}, 1),
        ("llama", Wanda(), {"schedule": "block"}, 2),
        ("llama", Wanda(), {"schedule": "oneshot"}, 1),
        ("llama", Wanda(), {"allocation": Owl(), "schedule": "block"}, 3),
        ("llama", Wanda(), {"pattern": MODEL}, 1),
        ("llama", SparseGPT(), {"pattern": MODEL}, 2),
        ("llama", SparseGPT(), {"pattern": MODEL, "schedule": "block"}, 3),
        ("llama", Magnitude(), {"refine": (Refit(),)}, 1),
        ("llama", Magnitude(), {"refine": (Refit(),), "pattern": MODEL}, 1),
        ("llama", Wanda(), {"refine": (Swap(), Refit()), "schedule": "block"}, 2),
        ("llama", Wanda(), {"refine": (Refit(),), "pattern": MODEL}, 2),
        ("llama", SparseGPT(), {"refine": (Refit(),), "pattern": MODEL}, 2),
        ("albert", Magnitude(), {"refine": (Refit(),)}, 2),
        ("llama", BESA(steps=1), {}, 2),
        ("albert", BESA(steps=1), {}, 3),
        ("albert", Wanda(), {}, 2),
        ("albert", Wanda(), {"schedule": "block"}, 3),
        ("albert", Wanda(), {"schedule": "oneshot"}, 1),
    ],
)
def test_passes_are_those_of_the_run(family: str, method: Method, more: dict[str, object], passes: int) -> None:
    planned = plan(make(family), method, (6, 16), sparsity=0.5, **more)  # type: ignore[arg-type]
    done = prune(make(family), method, ids(), sparsity=0.5, **more)  # type: ignore[arg-type]
    assert planned.passes == done.passes == passes
    assert planned.tokens == (96 if passes else 0)
    assert (planned.schedule, planned.pattern, planned.method, planned.allocation, planned.refine) == (
        done.schedule, done.pattern, done.method, done.allocation, done.refine,
    )  # fmt: skip


def test_what_it_says() -> None:
    model = make("mixtral", torch.bfloat16)
    record = plan(model, SparseGPT(), ids(), pattern=NM(2, 4), exclude=["layers.0"]).to_dict()
    assert json.loads(json.dumps(record, allow_nan=False))["coverage"]["share"] == 1.0
    assert record["layers"] == {"attention": 4, "mlp": 8} and record["blocks"] == 2
    assert record["weights"] == sum(p.numel() for n, p in model.model.layers[1].named_parameters() if _matrix(n, p))
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["target"] == 0.5
    assert 0 < record["estimated_seconds"] < 60
    assert record["estimated_memory_bytes"] > 2 * record["parameters"]


def _matrix(name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() >= 2 and "gate.weight" not in name


def test_estimates_grow_with_the_work() -> None:
    def memory(method: Method, n: int, schedule: str = "sequential") -> int:
        return plan(make("llama"), method, (n, 64), sparsity=0.5, schedule=schedule).estimated_memory_bytes  # type: ignore[arg-type]

    assert memory(Wanda(), 64) > memory(Wanda(), 2)
    assert memory(SparseGPT(), 2, "oneshot") > memory(SparseGPT(), 2, "block") - 2 * 2 * 64 * 32 * 4
    assert memory(SparseGPT(), 2, "oneshot") > memory(Wanda(), 2, "oneshot")


def test_without_data_nothing_is_timed() -> None:
    planned = plan(make("llama"), Magnitude(), (4, 16), sparsity=0.5)
    assert (planned.estimated_seconds, planned.tokens, planned.schedule) == (0.0, 0, "none")
    assert not math.isnan(planned.estimated_memory_bytes)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sparsity": 1.5}, "sparsity"),
        ({"sparsity": 0.5, "allocation": Table((("nowhere", 0.1),))}, "'nowhere' matches none"),
        ({"sparsity": 0.5, "include": ["q_prj"]}, "Did you mean 'q_proj'"),
        ({"allocation": Uniform()}, "needs a sparsity"),
        ({"sparsity": 0.5, "schedule": "Block"}, "There is no schedule 'Block'. Did you mean 'block'"),
    ],
)
def test_a_bad_request_is_refused_as_by_prune(more: dict[str, object], said: str) -> None:
    for ask in (plan, prune):
        with pytest.raises(UsageError, match=said):
            ask(make("llama"), Wanda(), ids(), **more)  # type: ignore[operator]


def test_low_coverage_is_refused_too() -> None:
    with pytest.raises(LowCoverage):
        plan(make("mamba"), Wanda(), (2, 8), sparsity=0.5, include=["dt_proj", "x_proj"])


@pytest.mark.parametrize("allocation", [Uniform(), Owl()], ids=["uniform", "owl"])
def test_a_shape_stands_for_ids(allocation: Allocation) -> None:
    by_shape = plan(make("t5"), Wanda(), (6, 16), sparsity=0.5, allocation=allocation)
    by_ids = plan(make("t5"), Wanda(), ids(), sparsity=0.5, allocation=allocation)
    assert (by_shape.tokens, by_shape.passes) == (by_ids.tokens, by_ids.passes)
    assert by_shape.estimated_memory_bytes == by_ids.estimated_memory_bytes

"""prune(): what the contract battery leaves open."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from families import ids, make
from torch import Tensor, nn

import naive
from secateur.allocation import Table
from secateur.data.calibration import Calibration
from secateur.errors import NumericalFailure, UsageError
from secateur.inputs import batches_of
from secateur.masks import NM, Pattern, Unstructured
from secateur.methods import LayerView, Method, find_methods, make_method
from secateur.methods.magnitude import Magnitude
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.models.layers import find_layers
from secateur.pruning import prune
from secateur.refinements.refit import Refit

MODEL = Unstructured("model")
SCHEDULES = ["sequential", "block", "oneshot"]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=["magnitude", "wanda"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "albert"])
def test_per_model_the_total_is_exact(family: str, method: Method, sparsity: float) -> None:
    model, dense = make(family), make(family)
    result = prune(model, method, ids(), sparsity=sparsity, pattern=MODEL)
    layers = find_layers(model)
    total = sum(layer.weight.numel() for layer in layers)
    assert sum(int((layer.weight == 0).sum()) for layer in layers) == round(total * sparsity)
    assert result.sparsity_layers == pytest.approx(round(total * sparsity) / total)
    assert all(record.target == record.sparsity for record in result.layers)
    if method == Magnitude():
        flat = torch.cat([layer.weight.flatten().abs() for layer in find_layers(dense)])
        limit = flat[~naive.keep_from_score(flat[None], "row", sparsity)[0]].max()
        assert all((layer.weight.abs() > limit).logical_or(layer.weight == 0).all() for layer in layers)


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()], ids=["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [None, MODEL], ids=str)
def test_layers_used_without_a_call(method: Method, pattern: Pattern | None) -> None:
    """Mamba's dt_proj. Magnitude needs no call."""
    model, dense = make("mamba"), {layer.name: layer.weight.clone() for layer in find_layers(make("mamba"))}
    result = prune(model, method, ids(), sparsity=0.5, pattern=pattern)
    uncalled = {layer.name: layer for layer in find_layers(model) if layer.name.endswith("dt_proj")}
    if method == Magnitude():
        assert uncalled.keys() <= {record.name for record in result.layers} and not result.warnings
        return
    assert not uncalled.keys() & {record.name for record in result.layers}
    assert set(result.coverage.uncalled) == uncalled.keys()
    for name, layer in uncalled.items():
        assert torch.equal(layer.weight, dense[name])
        assert (
            f"{name}: its weight is used without a call; left dense (--uncalled magnitude prunes it)" in result.warnings
        )

    model = make("mamba")
    result = prune(model, method, ids(), sparsity=0.5, pattern=pattern, uncalled="magnitude")
    records = {record.name: record for record in result.layers}
    for layer in find_layers(model):
        if layer.name in uncalled:
            group = "row" if pattern is None and method == Wanda() else "layer"
            expected = dense[layer.name] * naive.keep_from_score(dense[layer.name].abs(), group, 0.5)
            assert torch.equal(layer.weight, expected)
            assert (records[layer.name].tokens, records[layer.name].sparsity) == (None, 0.5)
            assert f"{layer.name}: its weight is used without a call; pruned by magnitude" in result.warnings


@pytest.mark.parametrize("name", sorted(find_methods()))
def test_the_record_is_plain_json(name: str) -> None:
    model = make("mixtral")
    data = Calibration(ids(), {"text": "t", "samples": 6, "seqlen": 16, "seed": 0, "sha256": "0"})
    result = prune(model, make_method(name), data, sparsity=0.5, allocation=Table((("q_proj", 0.25),)))
    record = result.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == json.loads(json.dumps(record))
    assert record["method"]["name"] == name
    assert record["calibration"] == (dict(data.record) if result.passes else None)
    assert record["allocation"]["name"] == "table"
    zeros = sum(int((layer.weight == 0).sum()) for layer in find_layers(model))
    assert record["sparsity"]["model"] == pytest.approx(zeros / sum(p.numel() for p in model.parameters()))
    sizes = [math.prod(layer["shape"]) for layer in record["layers"]]
    assert record["sparsity"]["layers"] == pytest.approx(zeros / sum(sizes))
    assert [layer["name"] for layer in record["layers"]] == [x.name for x in find_layers(model) if x.kind != "router"]
    tokens = [layer["tokens"] for layer in record["layers"]]
    assert tokens == [None] * len(tokens) if not make_method(name).needs else tokens[0] == ids().numel()
    seconds = record["seconds"]
    assert (
        seconds.keys() == {"total", "allocate", "gradients", "forward", "collect", "select"}
        and min(seconds.values()) >= 0
    )
    assert sum(seconds.values()) <= 2 * seconds["total"] + 1e-3
    assert (record["device"], record["dtype"]) == ("cpu", "float32")
    assert {"torch", "transformers", "numpy", "python", "secateur"} <= record["versions"].keys()


def test_the_record_in_one_line() -> None:
    line = str(prune(make("llama"), Magnitude(), pattern=NM(2, 4)))
    assert line.startswith("magnitude 2:4: 50.00 % of 14 layers, 40.62 % of all") and " parameters, in 0." in line


@pytest.mark.parametrize("name", sorted(find_methods()))
def test_data_is_asked_of_those_who_need_it(name: str) -> None:
    method = make_method(name)
    if method.reads:
        with pytest.raises(UsageError, match=f"{name} needs calibration data"):
            prune(make("llama"), method, sparsity=0.5)
        return
    result = prune(make("llama"), method, torch.tensor([[10**9]]), sparsity=0.5)  # not even looked at
    assert (result.calibration, result.schedule, result.passes) == (None, "none", 0)


@pytest.mark.parametrize(
    ("data", "record"),
    [
        (ids(), {"text": None, "samples": 6, "seqlen": 16, "how": "ids of the caller"}),
        ([{"input_ids": ids()}], {"text": None, "samples": 1, "how": "batches of the caller"}),
    ],
)
def test_calibration_of_the_caller(data: object, record: dict[str, object]) -> None:
    assert prune(make("llama"), Wanda(), data, sparsity=0.5).calibration == record  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{"data": ids() + 60}, {"data": ids().float()}, {"batch_size": 0}])
def test_bad_data_touches_nothing(more: dict[str, object]) -> None:
    model = make("llama").train()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UsageError):
        prune(model, Wanda(), more.pop("data", ids()), sparsity=0.5, **more)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and model.training


@pytest.mark.parametrize("name", sorted(find_methods()))
def test_progress_is_told(name: str) -> None:
    steps: list[tuple[int, int, str]] = []
    prune(make("llama"), make_method(name), ids(), sparsity=0.5, progress=lambda *step: steps.append(step))
    assert len(steps) >= 14 and steps[-1][0] == steps[-1][1] and all(what for _, _, what in steps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()], ids=["magnitude", "wanda", "sparsegpt"])
def test_weights_that_are_not_finite(method: Method, bad: float) -> None:
    model = make("llama")
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = bad
    with pytest.raises(NumericalFailure, match="not finite"):
        prune(model, method, ids(), sparsity=0.5)


@dataclass(frozen=True)
class Spoils(Method):
    """Writes a NaN into a weight it keeps."""

    def prune_layer(self, layer: LayerView, pattern: Pattern, sparsity: float) -> Tensor:
        layer.weight[0, 0] = float("nan")
        return torch.ones_like(layer.weight, dtype=torch.bool)


def test_a_method_that_spoils_a_weight() -> None:
    with pytest.raises(NumericalFailure, match=r"made weights of model.layers.0.self_attn.q_proj that are not finite"):
        prune(make("llama", torch.bfloat16), Spoils(), sparsity=0.5)


def test_a_solver_without_a_score_cannot_compare_layers() -> None:
    with pytest.raises(UsageError, match="has no score; it cannot compare weights across layers"):
        prune(make("llama"), Spoils(), sparsity=0.5, pattern=MODEL)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_experts_that_see_nothing_but_padding(schedule: str) -> None:
    model = make("mixtral")
    mask = torch.zeros(4, 16, dtype=torch.long)
    mask[:, -1] = 1  # four tokens for four experts, two each
    result = prune(model, Wanda(), [{"input_ids": ids(4), "attention_mask": mask}], sparsity=0.5, schedule=schedule)  # type: ignore[arg-type]
    lonely = [record for record in result.layers if record.tokens is None]
    assert lonely and all(record.sparsity == 0.5 for record in result.layers)
    assert sum(f"{record.name}: no calibration token" in text for record in lonely for text in result.warnings) == len(
        lonely
    )
    for block in (0, 1):
        downs = [r.tokens or 0 for r in result.layers if r.name.startswith(f"model.layers.{block}.mlp.experts.down")]
        assert sum(downs) == 2 * 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_under_inference_mode(schedule: str) -> None:
    """As a caller's decorator would have it; the same cut as without."""
    plain, model = make("llama"), make("llama")
    prune(plain, SparseGPT(), ids(), sparsity=0.5, schedule=schedule)  # type: ignore[arg-type]
    with torch.inference_mode():
        prune(model, SparseGPT(), ids(), sparsity=0.5, schedule=schedule)  # type: ignore[arg-type]
        assert torch.is_inference_mode_enabled()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dropout_is_off_while_pruning(schedule: str) -> None:
    plain, model = make("gpt2"), make("gpt2").train()
    for each in (plain, model):
        prune(each, Wanda(), ids(), sparsity=0.5, schedule=schedule)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


class ReadsDirectly(nn.Module):
    """Its first layer reads what the caller gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x)
        return y


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inputs_made_under_inference_mode(schedule: str) -> None:
    with torch.inference_mode():
        batches = [{"x": torch.randn(2, 3, 4)}, {"x": torch.randn(2, 3, 4)}]
    result = prune(ReadsDirectly(), Wanda(), batches, sparsity=0.5, schedule=schedule)  # type: ignore[arg-type]
    assert [layer.tokens for layer in result.layers] == [12, 12]


class KeepsGradients(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y: Tensor = self.inner(x)
            return y.detach()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=["wanda", "sparsegpt"])
def test_a_model_that_keeps_gradients_inside(method: Method, schedule: str) -> None:
    plain, model = make("llama"), make("llama")
    model.model.layers[0].mlp = KeepsGradients(model.model.layers[0].mlp)
    prune(plain, method, ids(), sparsity=0.5, schedule=schedule)  # type: ignore[arg-type]
    prune(model, method, ids(), sparsity=0.5, schedule=schedule)  # type: ignore[arg-type]
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inputs_with_axes_of_their_own(schedule: str) -> None:
    """Embeddings (n, seqlen, hidden) with a 4-D mask: as ids with none."""
    plain, model, long = make("llama"), make("llama"), ids(6, 24)
    causal = torch.full((24, 24), torch.finfo(torch.float32).min).triu(1)[None, None].expand(2, 1, 24, 24)
    batches = [
        {"inputs_embeds": model.model.embed_tokens(b["input_ids"]).detach(), "attention_mask": causal}
        for b in batches_of(model, long, 2)
    ]
    prune(plain, Wanda(), long, sparsity=0.5, batch_size=2, schedule=schedule)  # type: ignore[arg-type]
    prune(model, Wanda(), batches, sparsity=0.5, schedule=schedule)  # type: ignore[arg-type]
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a == 0, b == 0)


@pytest.mark.parametrize("pattern", [None, MODEL], ids=str)
def test_what_a_method_warns_of_is_in_the_result(pattern: Pattern | None) -> None:
    result = prune(make("llama"), SparseGPT(damping=0.0), ids(1, 3), sparsity=0.5, pattern=pattern)
    own = [text for text in result.warnings if "layers.0.self_attn.q_proj: the second-moment matrix" in text]
    assert len(own) == (1 if pattern is None else 2)  # once for the scores, once for the solution


@pytest.mark.parametrize("schedule", [None, "block", "oneshot"])
@pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=["magnitude", "wanda"])
def test_per_model_refit_keeps_the_masks_of_the_dense_pass(method: Method, schedule: str | None) -> None:
    plain, refined = make("llama"), make("llama")
    how = {"sparsity": 0.6, "pattern": MODEL}
    prune(plain, method, ids(), **how)  # type: ignore[arg-type]
    result = prune(refined, method, ids(), schedule=schedule, refine=(Refit(),), **how)  # type: ignore[arg-type]
    assert result.schedule == (schedule or "sequential")
    for a, b in zip(find_layers(plain), find_layers(refined), strict=True):
        assert torch.equal(a.weight != 0, b.weight != 0)
        assert not torch.equal(a.weight, b.weight) or not a.weight.any()  # a layer may lose everything
    errors = [record.output_error for record in result.layers]
    assert all(error and error.after <= error.before for error in errors)
    assert sum(error is not None and error.after < error.before for error in errors) > len(errors) / 2


@pytest.mark.parametrize("pattern", [None, MODEL], ids=str)
def test_magnitude_prunes_what_is_never_called_though_refit_reads_data(pattern: Pattern | None) -> None:
    model = make("mamba")
    result = prune(model, Magnitude(), ids(), sparsity=0.5, pattern=pattern, refine=(Refit(),))
    uncalled = [record.name for record in result.layers if record.name.endswith("dt_proj")]
    assert len(uncalled) == 2 and len(result.layers) == len(find_layers(model))
    assert result.warnings == (f"not refined, since no input of theirs was seen: {', '.join(uncalled)}",)
    assert "refine" in result.seconds and min(result.seconds.values()) >= 0


@pytest.mark.parametrize("pattern", [None, MODEL], ids=str)
def test_experts_without_a_token_are_left_unrefined(pattern: Pattern | None) -> None:
    """Per model an expert may have tokens in one walk and none in the other."""
    result = prune(make("mixtral"), Wanda(), ids(1, 2), sparsity=0.5, pattern=pattern, refine=(Refit(),))
    silent = [record.name for record in result.layers if record.tokens is None]
    assert silent and all("experts" in name for name in silent)
    assert result.warnings[-1] == f"not refined, since no input of theirs was seen: {', '.join(silent)}"
    assert {x.name for x in result.layers if x.output_error is None} == set(silent)

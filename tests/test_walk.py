"""The hazards of pausing a forward pass."""

from __future__ import annotations

import pytest
import torch
from families import ids, make
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.inputs import batches_of
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.models.layers import find, find_layers
from secateur.pruning import prune
from secateur.statistics import Gram, SecondMoment
from secateur.walk import Arrival, Walked, walk

SCHEDULES = ["sequential", "block", "oneshot"]


def hooks_left(model: nn.Module) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) + ("forward" in vars(m))
        for m in model.modules()
    )


def go(
    model: nn.Module, schedule: str = "sequential", visit=lambda arrivals: None, batch_size: int = 2, **more
) -> Walked:
    found = find(model)
    return walk(
        model, batches_of(model, ids(), batch_size), found.layers, blocks=found.blocks, collector=SecondMoment,
        visit=visit, schedule=schedule, **more,
    )  # fmt: skip


class SwitchesModes(nn.Module):
    """A layer's caller that pauses inside its own grad and autocast contexts, as dtype guards in the wild do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = self.inner(x, *args, **kwargs)
            self.seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        self.seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return y.detach()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_grad_and_autocast_modes_stay_with_their_coroutine(schedule: str, grad: bool, autocast: bool) -> None:
    model = make("llama")
    guard = SwitchesModes(model.model.layers[0].mlp)
    model.model.layers[0].mlp = guard
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        before = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled())
        go(model, schedule)
        after = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled())
        assert after == before
        with torch.no_grad():
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled() == grad
    assert set(guard.seen[0::2]) == {(True, True)}  # inside its own context, whoever ran in between
    assert set(guard.seen[1::2]) == {(False, autocast)}  # and outside it again


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast_never_multiplies_by_a_weight_as_it_was_before_the_cut(schedule: str) -> None:
    """Autocast caches the low-precision copy of a weight; the visit makes it stale."""
    model = make("llama")

    def erase(arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            arrival.layer.weight.zero_()

    outputs: list[Tensor] = []
    handle = model.model.layers[-1].mlp.down_proj.register_forward_hook(lambda m, a, out: outputs.append(out))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        go(model, schedule, erase)
        model(ids())
    handle.remove()
    assert outputs[-1].abs().sum() == 0
    if schedule != "oneshot":
        assert outputs[-2].abs().sum() == 0  # already in the walk itself


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["visit", "model"])
def test_an_exception_half_way_leaves_nothing_behind(schedule: str, error: type[BaseException], where: str) -> None:
    model = make("mixtral")
    cleaned: list[bool] = []
    norm = model.model.layers[1].post_attention_layernorm
    plain = norm.forward
    calls = 0

    def visit(arrivals: list[Arrival]) -> None:
        if where == "visit" and (schedule == "oneshot" or arrivals[0].layer.block.endswith("1")):
            raise error("visit")

    def trips(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if where == "model" and calls == 4:
            raise error("model")
        return plain(x)

    class Opens(nn.Module):
        """Holds a context open around a layer, as a lock or a file would be."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            try:
                result: Tensor = self.inner(x)
                return result
            finally:
                cleaned.append(True)

    model.model.layers[1].self_attn.o_proj = Opens(model.model.layers[1].self_attn.o_proj)
    norm.forward = trips
    with pytest.raises(error):
        go(model, schedule, visit, batch_size=1)
    del norm.forward
    assert hooks_left(model) == 0
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()
    assert cleaned  # paused frames were unwound
    go(model, schedule)  # and the model still walks


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "jamba"])
def test_experts_that_batches_skip_never_deadlock(family: str, schedule: str) -> None:
    """One token a batch: most experts are skipped by most batches."""
    model = make(family)
    found = find(model)
    batches = batches_of(model, ids(8, 2), 1)
    tokens: dict[str, int] = {}

    def visit(arrivals: list[Arrival]) -> None:
        tokens.update({a.layer.name: a.seen.tokens for a in arrivals})

    report = walk(
        model, batches, found.layers, blocks=found.blocks, collector=SecondMoment, visit=visit, schedule=schedule
    )
    assert not report.late
    experts = [layer for layer in found.layers if layer.expert is not None]
    per_module: dict[str, int] = {}
    for layer in experts:
        if layer.name.partition("[")[0].endswith("down_proj"):
            module = layer.name.partition("[")[0]
            per_module[module] = per_module.get(module, 0) + tokens.get(layer.name, 0)
    assert set(per_module.values()) == {2 * ids(8, 2).numel()}  # two experts a token, none lost, none twice
    assert {layer.name for layer in report.unvisited} == {layer.name for layer in found.layers} - set(tokens)


def test_an_expert_without_a_token_falls_back_to_magnitude_and_says_so() -> None:
    model = make("mixtral")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight[3] = 0.0
            block.mlp.gate.weight[:3] *= 100
    never = [layer for layer in find_layers(model) if layer.expert == 3]
    before = [layer.weight.clone() for layer in never]
    result = prune(model, Wanda(), ids(1, 4), sparsity=0.5)
    lonely = {layer.name for layer in result.layers if layer.tokens is None}
    assert lonely
    for layer, old in zip(never, before, strict=True):
        if layer.name in lonely:
            assert any(layer.name in text and "no calibration token" in text for text in result.warnings)
            kept = old * (layer.weight != 0)
            assert kept.abs().sum(1).min() >= old.abs().sum(1).min() / 2  # the larger halves stayed
            assert ((layer.weight == 0).sum(1) == layer.shape[1] // 2).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_padding_does_not_count(schedule: str) -> None:
    """A right-padded batch gives the statistics of its real tokens alone."""
    plain, padded = make("llama", torch.float64), make("llama", torch.float64)
    real = ids(2, 10)
    filled = torch.cat([real, torch.full((2, 6), 5)], dim=1)
    mask = torch.cat([torch.ones(2, 10), torch.zeros(2, 6)], dim=1).long()
    short = prune(plain, SparseGPT(), [{"input_ids": real}], sparsity=0.5, schedule=schedule)
    long = prune(padded, SparseGPT(), [{"input_ids": filled, "attention_mask": mask}], sparsity=0.5, schedule=schedule)
    assert [layer.tokens for layer in short.layers] == [layer.tokens for layer in long.layers]
    for a, b in zip(find_layers(plain), find_layers(padded), strict=True):
        torch.testing.assert_close(a.weight, b.weight)


def test_padding_of_experts_and_flattened_layers() -> None:
    for family in ("mixtral", "opt"):
        model = make(family)
        mask = torch.ones(2, 16, dtype=torch.long)
        mask[1, 12:] = 0
        result = prune(model, Wanda(), [{"input_ids": ids(2), "attention_mask": mask}], sparsity=0.5)
        by_leaf: dict[str, int] = {}
        for layer in result.layers:
            leaf = layer.name.partition("[")[0]
            by_leaf[leaf] = by_leaf.get(leaf, 0) + (layer.tokens or 0)
        assert {n for leaf, n in by_leaf.items() if "experts" not in leaf} == {28}
        assert {n for leaf, n in by_leaf.items() if "experts" in leaf} <= {56}


def test_two_stacks_with_indistinguishable_padding_are_refused() -> None:
    model = make("t5")
    ones = torch.ones(2, 8, dtype=torch.long)
    padded = ones.clone()
    padded[:, 6:] = 0
    batch = {
        "input_ids": ids(2, 8), "decoder_input_ids": ids(2, 8), "attention_mask": ones, "decoder_attention_mask": padded
    }  # fmt: skip
    with pytest.raises(UsageError, match="different lengths"):
        prune(model, Wanda(), [batch], sparsity=0.5)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_layers_that_read_one_tensor_share_one_collector(schedule: str) -> None:
    model = make("llama")
    made: list[Gram] = []

    def collector() -> Gram:
        made.append(Gram())
        return made[-1]

    found = find(model)
    shared: dict[str, int] = {}
    walk(
        model, batches_of(model, ids(), 2), found.layers, blocks=found.blocks, collector=collector, schedule=schedule,
        visit=lambda arrivals: shared.update({a.layer.name: id(a.seen) for a in arrivals}),
    )  # fmt: skip
    assert len(made) == 2 * 4  # qkv, o, gate+up, down of two blocks
    block = "model.layers.1."
    assert shared[f"{block}self_attn.q_proj"] == shared[f"{block}self_attn.v_proj"]
    assert shared[f"{block}mlp.gate_proj"] == shared[f"{block}mlp.up_proj"]
    assert shared[f"{block}mlp.gate_proj"] != shared[f"{block}mlp.down_proj"]
    assert {gram.tokens for gram in made} == {ids().numel()}


def test_a_changed_tensor_is_not_taken_for_the_same_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            x.mul_(2)
            return y + self.second(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([InPlace()])
            self.embedding = nn.Embedding(64, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            x: Tensor = self.layers[0](self.embedding(input_ids).clone())
            return x

    for schedule in ("sequential", "oneshot"):
        means: dict[str, Tensor] = {}
        model = Model()
        found = find(model)
        walk(
            model, batches_of(model, ids(), 2), found.layers, blocks=found.blocks, collector=SecondMoment,
            visit=lambda arrivals, m=means: m.update({a.layer.name: a.seen.mean for a in arrivals}), schedule=schedule,
        )  # fmt: skip
        torch.testing.assert_close(means["layers.0.second"], 4 * means["layers.0.first"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_progress_only_grows_and_ends_full(schedule: str) -> None:
    steps: list[tuple[int, int]] = []
    go(make("jamba"), schedule, progress=lambda done, total, what: steps.append((done, total)))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1]


def test_without_a_batch() -> None:
    model = make("llama")
    found = find(model)
    with pytest.raises(UsageError, match="at least one batch"):
        walk(model, [], found.layers, blocks=found.blocks, collector=SecondMoment, visit=lambda arrivals: None)


def test_training_mode_and_gradients_are_given_back() -> None:
    model = make("llama").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    prune(model, Wanda(), ids(), sparsity=0.5)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())

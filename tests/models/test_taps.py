"""Being told before a layer runs, and nothing else: outputs stay, and so do the modules."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import ids, make
from torch import Tensor, nn

from secateur.models.layers import Layer, find_layers
from secateur.models.taps import tapped


def nemotron() -> nn.Module:
    """Experts without a gate, behind a projection."""
    config = transformers.NemotronHConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, layers_block_type=["moe", "attention"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_num_heads=8, mamba_head_dim=8, n_groups=2,
        ssm_state_size=8, chunk_size=8, n_routed_experts=4, moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32, moe_latent_size=16, num_experts_per_tok=2, n_group=1, topk_group=1,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.NemotronHForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["nemotron_h", "mixtral", "gpt_oss", "jamba", "qwen3_moe"])
def test_experts_one_by_one_give_what_the_model_gives(family: str) -> None:
    model = nemotron() if family == "nemotron_h" else make(family)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    layers, seen = find_layers(model), {}

    def arrive(layer: Layer, x: Tensor, rows: Tensor | None) -> None:
        assert x.shape[-1] == layer.shape[1] and (rows is None) == (layer.expert is None)
        seen[layer] = seen.get(layer, 0) + x.numel() // x.shape[-1]

    with torch.no_grad():
        plain = model(ids()).logits
        with tapped(layers, arrive):
            assert torch.equal(model(ids()).logits, plain)
        assert torch.equal(model(ids()).logits, plain)
    for leaf in ("up_proj", "down_proj"):
        tokens = [n for x, n in seen.items() if x.expert is not None and x.parameter.endswith(leaf)]
        assert sum(tokens) % (2 * ids().numel()) == 0 and tokens
    assert any(layer.kind == "mlp" and layer.expert is None for layer in layers) == (family in ("nemotron_h", "jamba"))


def test_a_token_may_have_no_expert() -> None:
    model = make("mixtral")
    layers = [layer for layer in find_layers(model) if layer.module is model.model.layers[0].mlp.experts]
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(3, 32)
    chosen = torch.tensor([[0, 4], [4, 4], [2, 1]])  # 4 stands for none
    with torch.no_grad(), tapped(layers, lambda *_: None):
        out = experts(x, chosen, torch.full((3, 2), 0.5))
        alone = experts(x[:1], torch.tensor([[0]]), torch.full((1, 1), 0.5))
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[:1], alone)


def test_a_norm_behind_each_expert() -> None:
    """As Muse Spark has it."""
    model = make("mixtral")
    experts = model.model.layers[0].mlp.experts
    layers = [layer for layer in find_layers(model) if layer.module is experts]
    call = torch.randn(3, 32), torch.tensor([[0], [2], [1]]), torch.full((3, 1), 0.5)
    with torch.no_grad(), tapped(layers, lambda *_: None):
        plain = experts(*call)
        experts.has_post_expert_norm, experts.post_expert_norm = True, nn.LayerNorm(32)
        torch.testing.assert_close(experts(*call), experts.post_expert_norm(plain * 2) / 2)


def test_a_forward_of_ones_own_comes_back() -> None:
    model = make("mixtral")
    experts = model.model.layers[0].mlp.experts
    own = experts.forward
    experts.forward = own
    with tapped(find_layers(model), lambda *_: None):
        assert vars(experts)["forward"] is not own
    assert vars(experts)["forward"] is own
    assert "forward" not in vars(model.model.layers[1].mlp.experts)


def test_an_input_given_by_name() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(input=x)
            return y

    model, seen = nn.ModuleList([Block()]), []
    holder = nn.Module()
    holder.layers = model
    with tapped(find_layers(holder), lambda layer, x, rows: seen.append(x)):
        model[0](torch.ones(4, 3))
    assert [x.shape for x in seen] == [(4, 3)]


def test_only_the_layers_asked_for_tell() -> None:
    model = make("mixtral")
    layers = [layer for layer in find_layers(model) if layer.expert == 1 or layer.name.endswith("0.self_attn.q_proj")]
    told: set[Layer] = set()
    with torch.no_grad(), tapped(layers, lambda layer, x, rows: told.add(layer)):
        model(ids())
    assert told == set(layers)

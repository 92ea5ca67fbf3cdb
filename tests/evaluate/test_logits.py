"""Logits in chunks are those of a plain forward pass, and nothing of the trick stays behind."""

from __future__ import annotations

import pytest
import torch
from small_models import CAUSAL, tiny, tiny_bert, tiny_t5

from secateur.errors import UsageError
from secateur.evaluate.logits import Reader, returning
from secateur.walk import evaluating


def ids(batch: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def read(model, batch: torch.Tensor, elements: int) -> torch.Tensor:
    reader = Reader(model, batch)
    parts, chunks = zip(*reader.chunks(batch, elements), strict=True)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(batch.shape[1]))
    assert all(chunk.numel() <= max(elements, 3 * 61) for chunk in chunks) or reader.body is None
    return torch.cat(chunks, dim=1)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("elements", [1, 61 * 3 * 7, 10**9])
def test_chunks_equal_the_plain_forward(family: str, elements: int) -> None:
    model = tiny(family).double()
    with torch.no_grad():
        plain = model(ids(), use_cache=False).logits
    assert plain.std() > 0.05
    tolerance = 1e-6 if plain.dtype == torch.float32 else 1e-12  # Mamba casts its logits to fp32
    torch.testing.assert_close(read(model, ids(), elements), plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_runs_body_and_head_apart(family: str) -> None:
    reader = Reader(tiny(family), ids())
    assert reader.body is not None and reader.direction == "causal" and reader.vocabulary == 61


def test_the_body_runs_once_per_batch() -> None:
    model = tiny("Llama")
    reader = Reader(model, ids())
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert len(list(reader.chunks(ids(), 1))) == 24
    assert len(calls) == 1


def test_masked_language_models_read_both_ways() -> None:
    model = tiny_bert().double()
    reader = Reader(model, ids())
    assert reader.direction == "both" and reader.body is not None
    with torch.no_grad():
        torch.testing.assert_close(read(model, ids(), 1000), model(ids()).logits, rtol=1e-12, atol=1e-12)


def test_a_head_that_looks_elsewhere_falls_back_on_the_plain_forward(caplog) -> None:
    """The logits here depend, a little, on more than the last hidden state of their own position."""
    model = tiny("Llama").double()
    plain_forward = type(model).forward

    def forward(input_ids, **kwargs):
        output = plain_forward(model, input_ids=input_ids, **kwargs)
        output.logits = output.logits + 1e-3 * torch.arange(input_ids.shape[1]).view(1, -1, 1)
        return output

    model.forward = forward
    caplog.set_level("INFO")
    assert Reader(model, ids()).body is None
    assert "cannot be run apart" in caplog.text
    torch.testing.assert_close(read(model, ids(), 1000), model(ids(), use_cache=False).logits)


def test_a_body_that_the_model_does_not_call_is_not_taken_for_one() -> None:
    """OPT's forward passes its base model by; without attention and positions the logits would not tell."""
    model = tiny("OPT")
    for layer in model.model.decoder.layers:
        layer.self_attn.out_proj.weight.data.zero_()
    model.model.decoder.embed_positions.weight.data.zero_()
    assert Reader(model, ids()).body is model.model.decoder


def test_models_without_predictions_are_refused() -> None:
    with pytest.raises(UsageError, match="T5ForConditionalGeneration is not one"):
        Reader(tiny_t5(), ids())
    with pytest.raises(UsageError, match="LlamaModel is not one"):
        Reader(tiny("Llama").model, ids())


def test_a_foreign_tokenizer_is_named() -> None:
    with pytest.raises(UsageError, match="token 61, but LlamaForCausalLM embeds 61 tokens"):
        Reader(tiny("Llama"), torch.tensor([[1, 61, 3]]))


@pytest.mark.parametrize("length", [2, 3, 8, 9])
def test_short_and_constant_windows(length: int) -> None:
    model = tiny("Llama").double()
    batch = torch.full((2, length), 5)
    with torch.no_grad():
        torch.testing.assert_close(read(model, batch, 61 * 2), model(batch, use_cache=False).logits)
    assert Reader(tiny_bert(), batch).direction == "both"


def test_nothing_stays_behind_when_the_head_fails() -> None:
    model = tiny("Llama")
    reader = Reader(model, ids())
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(reader.chunks(ids(), 1000))
    handle.remove()
    assert "forward" not in model.model.__dict__
    assert model(ids()).logits.shape == (3, 24, 61)


def test_the_model_is_its_own_between_two_chunks() -> None:
    model = tiny("Llama")
    reader = Reader(model, ids())
    plain = model(ids()).logits
    for _ in reader.chunks(ids(), 1000):
        assert torch.equal(model(ids()).logits, plain)


def test_an_instance_forward_is_put_back() -> None:
    """accelerate sets `forward` on the instance."""
    layer = torch.nn.Linear(2, 2)
    own = layer.forward
    layer.forward = own
    with returning(layer, "saved") as calls:
        assert layer(torch.zeros(2)) == "saved" and calls() == 1
    assert layer.__dict__["forward"] is own


def test_modes_are_restored_module_by_module() -> None:
    model = tiny("Llama").train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == before and True in before and False in before


def test_grad_mode_is_left_alone() -> None:
    model = tiny("Llama")
    for _, chunk in Reader(model, ids()).chunks(ids(), 1000):
        assert torch.is_grad_enabled() and not chunk.requires_grad

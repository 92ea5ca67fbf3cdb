"""Losses against plain definitions, and reading models of every direction."""

import pytest
import torch
from families import ids, make
from torch.nn.functional import cross_entropy

from secateur.errors import UsageError
from secateur.inputs import batches_of
from secateur.models.layers import find_blocks
from secateur.recovery.objectives import TextLoss, checkpointed


def loss_on(model, data, **options):
    return TextLoss(model, data, lambda part: batches_of(model, part, len(part))[0], **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_a_causal_models_loss_is_the_librarys_own(family):
    model, data = make(family), ids(4)
    found = loss_on(model, data)(torch.tensor([2, 0]), seed=0)
    torch.testing.assert_close(found, model(input_ids=data[[2, 0]], labels=data[[2, 0]]).loss)


def test_an_encoder_decoder_predicts_the_second_half():
    model, data = make("t5"), ids(4)
    found = loss_on(model, data)(torch.arange(4), seed=0)
    torch.testing.assert_close(found, model(input_ids=data[:, :8], labels=data[:, 8:].contiguous()).loss)


def test_a_masked_model_predicts_what_is_hidden_from_it():
    model, data = make("bert"), ids(4)
    loss = loss_on(model, data, mask_token=3)
    reading = loss._reading(data, seed=5)
    hidden = reading.targets != -100
    assert 0 < hidden.sum() < data.numel() // 3 and hidden.any(1).all()
    assert (reading.inputs["input_ids"][hidden] == 3).all()
    assert torch.equal(reading.inputs["input_ids"][~hidden], data[~hidden])
    assert torch.equal(reading.targets[hidden], data[hidden])
    torch.testing.assert_close(loss(torch.arange(4), 5), model(**reading.inputs, labels=reading.targets).loss)
    assert loss(torch.arange(4), 5) == loss(torch.arange(4), 5) != loss(torch.arange(4), 6)


def test_a_masked_model_needs_a_mask_token():
    with pytest.raises(UsageError, match="BertForMaskedLM predicts hidden tokens"):
        loss_on(make("bert"), ids(4))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_its_formula(temperature):
    model, dense, data = make("llama"), make("llama", seed=1), ids(3)
    found = loss_on(model, data, dense=dense, weight=0.25, temperature=temperature)(torch.arange(3), 0)
    q, p = (m(input_ids=data).logits[:, :-1].flatten(0, 1).double() for m in (model, dense))
    ce = cross_entropy(q, data[:, 1:].flatten())
    pt, qt = (p / temperature).softmax(-1), (q / temperature).softmax(-1)
    kl = (pt * (pt / qt).log()).sum(-1).mean() * temperature**2
    torch.testing.assert_close(found.double(), 0.75 * ce + 0.25 * kl, rtol=1e-5, atol=1e-5)
    assert loss_on(model, data, dense=model, weight=1.0)(torch.arange(3), 0) == 0


def test_held_out_windows_one_by_one():
    model, data = make("llama"), ids(4)
    losses = loss_on(model, data).held_out(data, 1)
    assert losses == pytest.approx([model(input_ids=row[None], labels=row[None]).loss.item() for row in data], rel=1e-5)


def test_bf16_under_autocast():
    model, data = make("llama"), ids(2)
    plain, rounded = (loss_on(model, data, precision=p)(torch.arange(2), 0) for p in ("model", "bfloat16"))
    assert plain != rounded and rounded.dtype == torch.float32
    torch.testing.assert_close(plain, rounded, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5", "zamba2"])
def test_checkpointed_blocks_give_the_same_gradients(family):
    model, data = make(family), ids(2)
    runs = []
    for blocks in ({}, find_blocks(model)):
        with checkpointed(blocks):
            loss_on(model, data)(torch.arange(2), 0).backward()
        runs.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(runs[0]) == len(runs[1]) > 5
    for plain, again in zip(*runs, strict=True):
        torch.testing.assert_close(plain, again)
    assert not any("forward" in vars(module) for module in model.modules())

"""train_with_plan(): the one training loop, with the attention masked."""

import copy
import json
import math

import pytest
import torch
import transformers
from families import ids, make

from secateur.attending import train_with_plan
from secateur.attention.apply import attached
from secateur.attention.masking import make_plan
from secateur.attention.observe import observe
from secateur.errors import InvalidParameter, NumericalFailure, UnknownName, UsageError
from secateur.methods.magnitude import Magnitude
from secateur.models.layers import find_layers
from secateur.pruning import prune
from secateur.recovery.options import Recovery

FEW = Recovery(steps=3, batch_size=2)


def planned(model, data, sparsity=0.4, **options):
    return make_plan(observe(model, data, block=4), sparsity, band=1, **options)


def loss_of(model, data, plan=None):
    from contextlib import nullcontext

    with torch.no_grad(), attached(model, plan) if plan else nullcontext():
        return sum(model(row[None], labels=row[None]).loss.item() for row in data) / len(data)


@pytest.mark.parametrize("train", [("adapters", "norms"), ("all",), ("kept",)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_learns_under_its_mask(family, train):
    model, data = make(family), ids(4, 24)
    plan = planned(model, data)
    dense, masked = loss_of(model, data), loss_of(model, data, plan)
    options = Recovery(train=train, steps=12, lr=0.01, batch_size=4, schedule="constant", warmup=0.2)
    done = train_with_plan(model, None, data, plan, options, held_out=data)
    assert done.dense["loss"] == pytest.approx(dense, rel=1e-5)
    assert done.recovery.held_out["loss_before"] == pytest.approx(masked, rel=1e-5)
    assert done.recovery.held_out["loss_after"] == pytest.approx(loss_of(model, data, plan), rel=1e-5)
    assert done.recovery.held_out["loss_after"] < masked - 0.02
    assert done.recovery.zeros == {"before": 0, "after": 0, "lost": 0} or family == "gpt2"
    assert done.density.length == 24 and 0.3 < done.density.total.sparsity_effective < 0.5
    assert sum(done.backends.values()) > 0 and done.plan["masking"]["sparsity"] == 0.4
    json.dumps(done.to_dict(), allow_nan=False)
    assert "without the mask it was" in str(done) and model.config._attn_implementation != "secateur"


def test_the_gradient_is_that_of_masked_attention():
    """One step of everything, against plain PyTorch on the model's own attention with the mask written out."""
    model, data = make("llama"), ids(2, 16)
    plan = planned(model, data)
    other = copy.deepcopy(model)
    options = Recovery(train=("all",), steps=1, lr=0.01, batch_size=2, warmup=0.0, clip=0.0, schedule="constant")
    train_with_plan(model, None, data, plan, options, held_out=0)
    optimiser = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)
    with attached(other, plan, "reference"):
        logits = other(data).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), data[:, 1:].flatten()).backward()
    optimiser.step()
    for (name, trained), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("objective", ["distil", "reconstruct"])
def test_the_teacher_is_the_dense_model_as_it_came(objective):
    data = ids(4, 16)
    losses = []
    for teacher in (None, make("llama")):
        model = make("llama")
        options = Recovery(objective=objective, steps=6, batch_size=2, lr=0.01)
        done = train_with_plan(model, None, data, planned(model, data), options, dense=teacher, held_out=0)
        losses.append(done.recovery.losses)
    assert losses[0] == losses[1]
    assert losses[0]["last"] < losses[0]["first"]


def test_a_headless_encoder_learns_the_dense_hidden_states():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=64, initializer_range=0.3, **sizes)
    model = transformers.BertModel(config).eval()
    data = ids(4, 16)
    dense = model(data).last_hidden_state.detach()
    plan = planned(model, data, 0.5)
    with torch.no_grad(), attached(model, plan):
        before = (model(data).last_hidden_state - dense).square().mean()
    options = Recovery(train=("all",), objective="reconstruct", window=2, steps=20, batch_size=2, lr=3e-3)
    done = train_with_plan(model, None, data, plan, options, held_out=0)
    with torch.no_grad(), attached(model, plan):
        after = (model(data).last_hidden_state - dense).square().mean()
    assert after < before / 2 and done.dense is None and done.recovery.held_out is None


def test_a_masked_language_model():
    from types import SimpleNamespace

    model, data = make("bert"), ids(4, 16)
    done = train_with_plan(
        model, SimpleNamespace(mask_token_id=3), data, planned(model, data), FEW, held_out=ids(2, 16, 1)
    )
    assert done.recovery.held_out["windows"] == 2 and math.isfinite(done.recovery.losses["last"])


def pairs(seed=0):
    read, written = ids(4, 10, seed), ids(4, 8, seed + 1)
    mask = torch.ones_like(read)
    mask[1, 7:] = 0
    labels = written.clone()
    labels[2, 5:] = -100
    return {"input_ids": read, "attention_mask": mask, "labels": labels}


def translator(family):
    if family == "t5":
        return make("t5")
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.MarianConfig(
        vocab_size=64, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0, forced_eos_token_id=None, **heads,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MarianMTModel(config).eval()


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_an_encoder_decoder_learns_from_pairs(family):
    model, data = translator(family), pairs()
    read = {key: data[key] for key in ("input_ids", "attention_mask")}
    written = {"decoder_input_ids": data["labels"].clamp(min=0)}
    plan = make_plan(observe(model, [read | written], block=2), 0.4, band=1)
    with torch.no_grad():
        expected = [model(**{key: value[row : row + 1] for key, value in data.items()}).loss.item() for row in range(4)]
    options = Recovery(train=("all",), steps=10, batch_size=4, lr=0.01, warmup=0.2)
    done = train_with_plan(model, None, data, plan, options, held_out=data)
    assert done.dense["loss"] == pytest.approx(sum(expected) / 4, rel=1e-4)
    assert done.recovery.held_out["loss_after"] < done.recovery.held_out["loss_before"]
    assert done.density.sizes[next(name for name in plan.sites if "decoder" in name)][0] == 8
    with torch.no_grad(), attached(model, plan):
        after = [model(**{key: value[row : row + 1] for key, value in data.items()}).loss.item() for row in range(4)]
    assert done.recovery.held_out["loss_after"] == pytest.approx(sum(after) / 4, rel=1e-4)


def test_the_zeros_of_a_pruned_model_stay():
    model, data = make("llama"), ids(4, 16)
    prune(model, Magnitude(), sparsity=0.5)
    keeps = {layer.name: layer.weight != 0 for layer in find_layers(model)}
    done = train_with_plan(model, None, data, planned(model, data), FEW, held_out=0)
    assert done.recovery.zeros["lost"] == 0 and done.recovery.zeros["before"] == 9216
    assert all((layer.weight[~keeps[layer.name]] == 0).all() for layer in find_layers(model))


def test_a_killed_run_goes_on_to_the_bit_and_another_mask_is_another_run(tmp_path):
    data, file = ids(4, 16), tmp_path / "state"
    plan = planned(make("llama"), data)
    options = Recovery(steps=6, batch_size=2, checkpoint_every=3)
    whole, again, other = make("llama"), make("llama"), make("llama")
    train_with_plan(whole, None, data, plan, options, held_out=0)

    def stop(done, total, what):
        if what.startswith("recovering") and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_with_plan(again, None, data, plan, options, held_out=0, checkpoint=file, progress=stop)
    assert all(map(torch.equal, again.parameters(), make("llama").parameters()))
    with pytest.raises(UsageError, match="attention plan"):
        another = planned(other, data, 0.2)
        train_with_plan(other, None, data, another, options, held_out=0, checkpoint=file, resume=True)
    train_with_plan(again, None, data, plan, options, held_out=0, checkpoint=file, resume=True)
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


def test_what_is_not_finite_leaves_the_model_as_it_was():
    model, data = make("llama"), ids(4, 16)
    before = copy.deepcopy(model.state_dict())
    options = Recovery(train=("all",), steps=40, lr=1e30, batch_size=2, warmup=0.0, clip=0.0)
    with pytest.raises(NumericalFailure):
        train_with_plan(model, None, data, planned(model, data), options, held_out=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation != "secateur"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"text": ids(4, 32), "kind": "absolute"}, UsageError, "calibrated at 16 tokens"),
        ({"text": pairs()}, UsageError, "reads one text, not pairs"),
        ({"text": {"input_ids": ids(2)}}, UsageError, "attention_mask is missing"),
        ({"held_out": pairs()}, UsageError, "Held-out pairs go with training on pairs"),
        ({"held_out": -1}, InvalidParameter, "'held_out'"),
        ({"backend": "fast"}, UnknownName, "attention backend 'fast'"),
        ({"text": "gutenberg"}, UsageError, "needs the model's tokenizer"),
        ({"model": "gpt2"}, UsageError, "is for a llama model, and this is a gpt2 model"),
    ],
)
def test_refused_before_anything_is_touched(change, error, said):
    model = make("llama")
    plan = planned(model, ids(4, 16), kind=change.pop("kind", "toeplitz"))
    model = make(change.pop("model", "llama"))
    before = copy.deepcopy(model.state_dict())
    asked = {"text": ids(4, 16), "held_out": 0} | change
    with pytest.raises(error) as raised:
        train_with_plan(model, None, asked.pop("text"), plan, FEW, **asked)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pairs_must_fit():
    model = translator("t5")
    data = pairs()
    batch = {"input_ids": data["input_ids"], "decoder_input_ids": data["labels"].clamp(min=0)}
    plan = make_plan(observe(model, [batch], block=2), 0.2)
    for change, said in (
        ({"labels": data["labels"][:2]}, "Pairs are"),
        ({"attention_mask": data["attention_mask"][:, :3]}, "Pairs are"),
    ):
        with pytest.raises(UsageError, match=said):
            train_with_plan(model, None, data | change, plan, FEW, held_out=0)
    narrow = {key: value[:, :5] for key, value in data.items()}
    with pytest.raises(UsageError, match="pad them alike"):
        train_with_plan(model, None, data, plan, FEW, held_out=narrow)
    with pytest.raises(UsageError, match="measured on pairs"):
        train_with_plan(model, None, data, plan, FEW, held_out=ids(2))

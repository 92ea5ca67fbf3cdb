"""How much the loss depends on each tile, against attention computed without it."""

import dataclasses

import pytest
import torch
from families import ids, make

from secateur.attention.apply import attached
from secateur.attention.hooks import intercept
from secateur.attention.masking import make_plan
from secateur.attention.observation import load_observation, save_observation
from secateur.attention.observe import observe
from secateur.errors import UsageError


def naive(model, batch, block, loss):
    """Per site and tile: the attention computed without it, query by query, and what that does to the loss to first
    order in the heads' outputs; batch of one sequence."""
    calls = {}

    def recorded(call):
        scores = call.scores()
        value = call.value.repeat_interleave(scores.shape[1] // call.value.shape[1], 1)
        out = torch.softmax(scores, -1).nan_to_num() @ value
        out.retain_grad()
        calls[call.site.name] = (scores, value, out, call.key_keep)
        return out.transpose(1, 2)

    with torch.enable_grad(), intercept(model, recorded):
        loss(model, batch).backward()
    found = {}
    for name, (scores, value, out, keep) in calls.items():
        real = torch.arange(scores.shape[-1]) if keep is None else keep[0].nonzero().flatten()
        queries = real if scores.shape[2] == scores.shape[3] else torch.arange(scores.shape[2])
        own, values = scores.detach()[0][:, queries][:, :, real].double(), value.detach()[0][:, real].double()
        before, slope = out.detach()[0][:, queries].double(), out.grad[0][:, queries].double()
        rows, columns = (-(-size // block) for size in own.shape[1:])
        tiles = torch.zeros(len(own), rows, columns, dtype=torch.float64)
        for c in range(columns):
            closed = own.clone()
            closed[:, :, c * block : (c + 1) * block] = -torch.inf
            lost = closed.amax(-1) < -1e30  # it has no other key: nothing can be closed
            change = ((torch.softmax(closed, -1) @ values - before) * slope).sum(-1).masked_fill(lost, 0.0)
            for i in range(own.shape[1]):
                tiles[:, i // block, c] += change[:, i] ** 2
        found[name] = tiles
    model.zero_grad()
    return found


def summed(model, batch):
    out = model(**batch, labels=batch["input_ids"], use_cache=False)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    logits = out.logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()) * mask.sum()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3", "mixtral"])
def test_it_is_what_closing_a_tile_does_to_first_order(family):
    model = make(family)
    tokens = ids(2, 11)
    seen = observe(model, tokens, block=4, gradients=True).at()
    rows = [naive(model, {"input_ids": row[None]}, 4, summed) for row in tokens]
    for name, site in seen.items():
        expected = sum(row[name] for row in rows)
        assert expected.max() > 0
        torch.testing.assert_close(site.loss.double(), expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, tokens = make("llama"), ids(1, 9)
    padded = torch.nn.functional.pad(tokens, (4, 0) if side == "left" else (0, 4))
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (4, 0) if side == "left" else (0, 4))
    plain = observe(model, tokens, block=4, gradients=True).at()
    found = observe(model, [{"input_ids": padded, "attention_mask": mask}], block=4, gradients=True).at()
    for name, site in plain.items():
        torch.testing.assert_close(found[name].loss, site.loss, rtol=1e-3, atol=1e-6 * float(site.loss.max()))


def test_the_mean_attention_is_the_same_with_gradients_and_without():
    model, tokens = make("qwen2"), ids(2, 12)
    with_them, without = (observe(model, tokens, block=4, gradients=wanted).at() for wanted in (True, False))
    for name, site in without.items():
        assert site.loss is None
        torch.testing.assert_close(with_them[name].mass, site.mass)
        assert torch.equal(with_them[name].count, site.count)


def test_two_texts_and_their_cross_attention():
    model = make("t5")
    batch = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 7, seed=1)}
    seen = observe(model, [batch], block=2, gradients=True).at()
    assert {site.family for site in seen.values()} == {"encoder-self", "decoder-self", "decoder-cross"}
    assert all(site.loss.shape == site.mass.shape and site.loss.sum() > 0 for site in seen.values())


def test_labels_are_what_the_loss_is_of():
    """With them the last token counts as well, which no decoder_input_ids foretell."""
    model = make("t5")
    read, labels = ids(2, 6, seed=1), ids(2, 6, seed=2)
    labels[1, 4:] = -100
    batch = {"input_ids": ids(2, 9), "decoder_input_ids": read, "labels": labels}

    def summed_labels(model, batch):
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return torch.nn.functional.cross_entropy(logits[0], batch["labels"][0], reduction="sum")

    seen = observe(model, [batch], block=2, gradients=True).at()
    rows = [naive(model, {name: value[i : i + 1] for name, value in batch.items()}, 2, summed_labels) for i in (0, 1)]
    for name, site in seen.items():
        expected = rows[0][name] + rows[1][name]
        torch.testing.assert_close(site.loss.double(), expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    without = observe(model, [{name: batch[name] for name in batch if name != "labels"}], block=2, gradients=True).at()
    assert all(not torch.allclose(site.loss, without[name].loss) for name, site in seen.items())


def test_a_model_without_a_head_is_asked_for_its_states(tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    tokens = ids(2, 12)
    one, again, other = (observe(model, tokens, block=4, gradients=True, seed=seed) for seed in (0, 0, 1))
    name = next(iter(one.at()))
    assert torch.equal(one.at()[name].loss, again.at()[name].loss)
    assert not torch.equal(one.at()[name].loss, other.at()[name].loss)
    loaded = load_observation(save_observation(one, tmp_path / "seen"))
    assert torch.equal(loaded.at()[name].loss, one.at()[name].loss)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_losses_of_an_earlier_version_are_not_taken_for_these(gradients, tmp_path):
    folder = save_observation(observe(make("llama"), ids(1, 8), block=4, gradients=gradients), tmp_path / "seen")
    file = folder / "observation.json"
    file.write_text(file.read_text().replace("observation 2", "observation 1"))
    if gradients:
        with pytest.raises(UsageError, match="by an earlier version, whose losses mean something else: observe again"):
            load_observation(folder)
    else:
        assert load_observation(folder).at()


def test_masks_by_loss_keep_what_the_loss_depends_on():
    seen = observe(make("llama"), ids(3, 16), block=2, gradients=True)
    sites = dict(seen.at())
    name, other = list(sites)[:2]
    heavy = {
        key: dataclasses.replace(site, loss=site.loss * (1e6 if key == name else 1)) for key, site in sites.items()
    }
    tilted = dataclasses.replace(seen, lengths={16: heavy})
    plan = make_plan(tilted, 0.5, kind="absolute", score="loss", pool="model")
    kept = {key: int(mask.layout(16, 16).keep.sum()) for key, mask in plan.sites.items()}
    always = 8 + 7  # the diagonal, and the first column
    heads = seen.at()[other].heads
    assert kept[other] == heads * always
    assert kept[name] == heads * (36 - always)
    assert plan.record["masking"]["score"] == "loss"


def test_the_score_is_the_loss_where_it_was_observed():
    model, tokens = make("llama"), ids(3, 16)
    plain, seen = (observe(model, tokens, block=2, gradients=wanted) for wanted in (False, True))

    def made(given, **options):
        plan = make_plan(given, 0.5, **options)
        chosen = plan.record["masking"]
        return {name: mask.layout(16, 16).keep for name, mask in plan.sites.items()}, chosen["score"], chosen["pool"]

    for given, score, pool in ((plain, "mean", "layer"), (seen, "loss", "stack")):
        ours, theirs = made(given), made(given, score=score, pool=pool)
        assert ours[1:] == theirs[1:] == (score, pool)
        assert all(torch.equal(keep, theirs[0][name]) for name, keep in ours[0].items())
    assert made(seen, score="mean")[1:] == ("mean", "layer") and made(seen, pool="head")[1:] == ("loss", "head")
    assert made(seen, kind="absolute", population="paper")[1:] == ("mean", "layer")


def test_masks_by_loss_need_gradients():
    seen = observe(make("llama"), ids(2, 16), block=4)
    with pytest.raises(UsageError, match="observe with --gradients"):
        make_plan(seen, 0.5, score="loss")


def test_by_the_loss_encoders_have_single_positions_that_go_on_behind_the_observed_length():
    model, batch = make("t5"), {"input_ids": ids(2, 12), "decoder_input_ids": ids(2, 12)}
    given = observe(model, batch, block=2, gradients=True)
    families = {name: site.family for name, site in given.at().items()}

    def kinds(**options):
        plan = make_plan(given, 0.3, **options)
        return plan, {families[name]: (mask.kind, mask.extend) for name, mask in plan.sites.items()}

    plan, found = kinds()
    assert found["encoder-self"] == ("absolute", "diagonal") and found["decoder-self"][0] == "toeplitz"
    assert plan.record["masking"]["kind"] == "auto"  # two kinds have no one name
    assert kinds(score="mean")[1]["encoder-self"][0] == "toeplitz"
    assert kinds(kind="absolute")[1]["encoder-self"] == ("absolute", "refuse")
    assert kinds(kind="absolute", extend="diagonal")[1]["encoder-self"] == ("absolute", "diagonal")
    only, found = kinds(sites=("encoder-self",))
    assert only.record["masking"]["kind"] == "absolute" and set(found) == {"encoder-self"}

    longer = {"input_ids": ids(1, 20), "decoder_input_ids": ids(1, 20)}
    with torch.no_grad():
        with attached(model, plan):
            assert torch.isfinite(model(**longer).logits).all()
        with attached(model, kinds(kind="absolute")[0]), pytest.raises(UsageError, match="calibrated at 12 tokens"):
            model(**longer)

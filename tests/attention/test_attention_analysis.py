"""Measures of heads and of transfer against plain definitions on whole maps."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_seen import decoder, observation, seen
from families import ids, make

from secateur.attention.analysis import analyse, gini
from secateur.attention.apply import attached
from secateur.attention.baselines import random_plan, window_plan
from secateur.attention.masking import make_plan
from secateur.attention.observation import Observation, load_observation, save_observation
from secateur.attention.observe import observe
from secateur.attention.transfer import mass_recall, overlap
from secateur.errors import LoadFailure, OutputExists, UsageError


def test_concentration_by_entry():
    given, whole = decoder(layers=1, block=1, length=12)
    allowed = torch.ones(12, 12, dtype=torch.bool).tril()
    found = analyse(given).sites[0]
    for level, shares in (
        (0.9, found.concentration_90),
        (0.95, found.concentration_95),
        (0.99, found.concentration_99),
    ):
        for head in range(4):
            entries = np.sort(whole["layers.0"].mean(0)[head][allowed].numpy())[::-1]
            need = int(np.searchsorted(np.cumsum(entries) / entries.sum(), level)) + 1
            assert shares[head] == pytest.approx(need / len(entries), abs=1.1 / len(entries))


def test_masses_and_variability_by_entry():
    given, whole = decoder(layers=1, block=1, length=12)
    found = analyse(given).sites[0]
    each = whole["layers.0"]
    for head in range(4):
        mean = each.mean(0)[head]
        assert found.sink[head] == pytest.approx(float(mean[:, 0].mean()), rel=1e-5)
        assert found.diagonal[head] == pytest.approx(float(mean.diagonal().mean()), rel=1e-5)
        second = float((each[:, head] ** 2).mean(0).sum())
        assert found.variability[head] == pytest.approx(1 - float((mean**2).sum()) / second, rel=1e-4)


def test_toeplitzness_is_the_variance_that_distances_explain():
    given, whole = decoder(layers=1, block=1, length=12)
    found = analyse(given).sites[0]
    for head, sinks in itertools.product(range(4), (0, 1)):
        mean = whole["layers.0"].mean(0)[head].numpy()
        pairs = [(i, j) for i in range(12) for j in range(sinks, i + 1)]
        values = np.array([mean[i, j] for i, j in pairs])
        by_distance = {d: np.mean([mean[i, j] for i, j in pairs if i - j == d]) for d in range(12 - sinks)}
        rest = values - np.array([by_distance[i - j] for i, j in pairs])
        expected = 1 - (rest**2).sum() / ((values - values.mean()) ** 2).sum()
        measured = (found.toeplitz_without_sink if sinks else found.toeplitz)[head]
        assert measured == pytest.approx(expected, rel=1e-4)


def test_extremes():
    n = 12
    band = torch.eye(n).expand(2, 1, n, n).double()
    read = torch.eye(n).flip(1).expand(2, 1, n, n).double()
    full = torch.ones(n, n, dtype=torch.bool)
    given = observation(
        seen("band", "encoder-self", band, full, 1), seen("cross", "decoder-cross", band, full, 1),
        seen("back", "decoder-cross", read, full, 1), block=1, length=n,
    )  # fmt: skip
    itself, cross, back = analyse(given).sites
    assert itself.toeplitz == pytest.approx([1.0]) and itself.diagonal == [1.0] and itself.variability == [0.0]
    assert itself.concentration_99 == pytest.approx([1 / n]) and itself.monotone is None
    assert cross.monotone == [1.0] and cross.alignment == pytest.approx([1.0]) and cross.ordinal == 0
    assert back.monotone == [0.0] and back.alignment == pytest.approx([-1.0]) and back.ordinal == 1


def test_a_path_counts_queries_and_no_last_keys():
    """Of sentences that end early: the numbers are of the words alone, and late rows weigh as often as they occur."""
    draw = np.random.default_rng(0)
    sizes = [(3, 4), (5, 7), (6, 6), (2, 7)]
    attention = [draw.dirichlet(np.ones(keys), queries) for queries, keys in sizes]
    mass, last, count, ends = (np.zeros((6, 7)) for _ in range(4))
    queries = np.zeros(6, int)
    for weights in attention:
        rows, keys = weights.shape
        mass[:rows, :keys] += weights
        count[:rows, :keys] += 1
        last[:rows, keys - 1] += weights[:, -1]
        ends[:rows, keys - 1] += 1
        queries[:rows] += 1
    flat = torch.full((1, 6, 7), 0.0)
    site = seen("cross", "decoder-cross", torch.eye(6, 7).expand(2, 1, 6, 7), torch.ones(6, 7, dtype=torch.bool), 1)
    site = replace(
        site, mass=flat + torch.tensor(mass).float(), last_mass=flat + torch.tensor(last).float(),
        count=torch.tensor(count).long(), last_count=torch.tensor(ends).long(), queries=torch.tensor(queries),
        sequences=4,
    )  # fmt: skip
    found = analyse(observation(site, block=1, length=7)).sites[0]
    words = (mass - last) / np.maximum(count - ends, 1)
    best = words.argmax(1)
    each = np.array([(row, best[row]) for weights in attention for row in range(len(weights))], float)
    assert found.alignment == pytest.approx([np.corrcoef(each.T)[0, 1]])
    steps = [best[row] >= best[row - 1] for weights in attention for row in range(1, len(weights))]
    assert found.monotone == pytest.approx([np.mean(steps)])
    assert len(set(best)) > 2 and 0 < np.mean(steps) < 1


def test_exact_facts_of_a_model_and_means_by_family():
    model = make("t5")
    batch = {"input_ids": ids(2, 8), "decoder_input_ids": ids(2, 6, 1)}
    given = observe(model, [batch], block=4)
    plan = make_plan(given, 0.2, band=1)
    found = analyse(given, plan)
    assert set(found.families) == set(found.gini) == {"encoder-self", "decoder-self", "decoder-cross"}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**batch, output_attentions=True)
    for site in found.sites:
        kind = {"encoder-self": "encoder_attentions", "decoder-self": "decoder_attentions"}
        own = output[kind.get(site.family, "cross_attentions")][site.ordinal].double()
        i, j = torch.arange(own.shape[2])[:, None], torch.arange(own.shape[3])
        assert site.entropy == pytest.approx((-torch.special.xlogy(own, own)).sum(-1).mean((0, 2)).tolist(), rel=1e-4)
        assert site.span == pytest.approx((own * (i - j).abs()).sum(-1).mean((0, 2)).tolist(), rel=1e-4)
        assert site.first == pytest.approx(own[..., 0].mean((0, 2)).tolist(), rel=1e-4)
        mean = np.mean([x for one in found.sites if one.family == site.family for x in one.entropy])
        assert found.families[site.family]["entropy"] == pytest.approx(mean)
        assert len(site.kept) == 4 and (site.monotone is None) == (site.family != "decoder-cross")
    json.dumps(found.to_dict(), allow_nan=False)


def test_gini():
    values = [0.1, 0.5, 0.5, 0.9]
    direct = sum(abs(a - b) for a in values for b in values) / (2 * 16 * np.mean(values))
    assert gini(values) == pytest.approx(direct)
    assert gini([]) == gini([0.0, 0.0]) == 0


@pytest.mark.parametrize("kind", ["toeplitz", "absolute", "hybrid"])
def test_recall_is_the_mass_in_kept_entries_on_other_inputs_too(kind):
    given, _ = decoder()
    other, whole = decoder()
    plan = make_plan(given, 0.4, kind=kind, band=1)
    found = mass_recall(plan, other)
    for name, each in whole.items():
        entries = plan.sites[name].layout(24, 24).entries()
        assert found.sites[name] == pytest.approx((each.mean(0) * entries).sum(-1).mean(-1).tolist(), rel=1e-5)
    assert found.total == pytest.approx(np.mean([x for shares in found.sites.values() for x in shares]))
    finer, _ = decoder(block=2)
    assert mass_recall(plan, finer).length == 24
    assert mass_recall(make_plan(given, 0.0, kind=kind), other).total == pytest.approx(1.0)


def test_the_best_absolute_mask_has_the_highest_recall_and_lengths_may_differ():
    model, data = make("llama"), ids(4, 32)
    given = observe(model, data, block=4, lengths=(16, 32))
    best = make_plan(given, 0.4, kind="absolute")
    for other in (random_plan(best), window_plan(best)):
        assert mass_recall(other, given).total < mass_recall(best, given).total
    band = make_plan(given, 0.4, length=16, band=1)
    assert mass_recall(band, given, length=32).length == 32
    with pytest.raises(UsageError, match="calibrated at 16 tokens"):
        mass_recall(make_plan(given, 0.2, kind="absolute", length=16), given, length=32)


def test_recall_forecasts_what_masked_attention_loses():
    """Masked rows are renormalised, so 1 - recall is the total variation distance of the rows, on average."""
    model, data = make("llama"), ids(2, 16)
    given = observe(model, data, block=4)
    plan = make_plan(given, 0.3, kind="absolute", sites=("decoder-self",))
    with attached(model, plan):
        model(data)
    first = "model.layers.0.self_attn"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        dense = model(data, output_attentions=True).attentions[0].double()
    entries = plan.sites[first].layout(16, 16).entries()
    masked = dense * entries / (dense * entries).sum(-1, keepdim=True)
    lost = (masked - dense).abs().sum(-1).mean((0, 2)) / 2
    assert mass_recall(plan, given).sites[first] == pytest.approx((1 - lost).tolist(), rel=1e-5)


def test_overlap():
    given, _ = decoder()
    one, other = make_plan(given, 0.4, kind="absolute"), make_plan(given, 0.3, kind="absolute")
    assert overlap(one, one, 24).total == 1.0
    found = overlap(one, other, 24)
    for name, shares in found.sites.items():
        a, b = (plan.sites[name].layout(24, 24).keep for plan in (one, other))
        for head in range(4):
            tiles = [(r, c) for r in range(6) for c in range(1, r)]
            both = sum(bool(a[head, r, c] and b[head, r, c]) for r, c in tiles)
            either = sum(bool(a[head, r, c] or b[head, r, c]) for r, c in tiles)
            assert shares[head] == pytest.approx(both / either if either else 1.0)
    with pytest.raises(UsageError, match="blocks of 4 and 8"):
        overlap(one, make_plan(given, 0.4, block=8), 24)


def test_another_models_observation_is_refused():
    given, _ = decoder()
    elsewhere = observe(make("llama"), ids(1, 8), block=4)
    with pytest.raises(UsageError, match="of another model"):
        mass_recall(make_plan(given, 0.3), elsewhere)
    with pytest.raises(UsageError, match="do not divide"):
        mass_recall(make_plan(given, 0.3), decoder(block=8)[0])


def test_an_observation_survives_its_file(tmp_path):
    given = observe(make("llama"), ids(2, 12), block=4, lengths=(8, 12))
    again = load_observation(save_observation(given, tmp_path / "seen"))
    assert (again.block, again.model, again.text, again.versions) == (
        given.block, given.model, given.text, given.versions
    )  # fmt: skip
    for length, sites in given.lengths.items():
        for name, site in sites.items():
            other = vars(again.at(length)[name])
            for key, value in vars(site).items():
                assert torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
    assert "2 sites with 8 heads, in blocks of 4" in str(again)
    assert torch.equal(
        make_plan(again, 0.2, kind="absolute").sites["model.layers.0.self_attn"].rows,
        make_plan(given, 0.2, kind="absolute").sites["model.layers.0.self_attn"].rows,
    )
    with pytest.raises(OutputExists, match="--overwrite"):
        save_observation(given, tmp_path / "seen")
    save_observation(given, tmp_path / "seen", overwrite=True)
    (tmp_path / "seen" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists):
        save_observation(given, tmp_path / "seen", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seen"]


@pytest.mark.parametrize(
    ("harm", "error", "said"),
    [
        (lambda record: record | {"format": "x"}, UsageError, "is no observation"),
        (lambda record: record | {"sites": []}, UsageError, "observation is empty"),
        (lambda record: record | {"block": 0}, UsageError, "'block'"),
        (lambda record: {"format": record["format"]}, LoadFailure, "is damaged"),
        (lambda record: [record], LoadFailure, "is damaged"),
        (lambda record: record | {"sites": [record["sites"][0] | {"heads": 7}]}, LoadFailure, "mass of"),
    ],
)
def test_damaged_observations(harm, error, said, tmp_path):
    folder = save_observation(observe(make("llama"), ids(1, 8), block=4), tmp_path / "seen")
    file = folder / "observation.json"
    file.write_text(json.dumps(harm(json.loads(file.read_text()))))
    with pytest.raises(error) as raised:
        load_observation(folder)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_no_tensors_and_nothing_at_all(tmp_path):
    folder = save_observation(observe(make("llama"), ids(1, 8), block=4), tmp_path / "seen")
    (folder / "observation.safetensors").unlink()
    with pytest.raises(LoadFailure, match="is damaged"):
        load_observation(folder)
    with pytest.raises(UsageError, match="observation is empty"):
        Observation(4, {}).at()

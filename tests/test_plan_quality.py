"""Measuring models under plans: sparsity on data, plans brought to one sparsity, and what is measured."""

from __future__ import annotations

import pytest
import tokenizers
import torch
import transformers
from families import ids, make

from secateur.attention.apply import attached
from secateur.attention.density import plan_report
from secateur.attention.masking import make_plan
from secateur.attention.observe import observe
from secateur.data.pairs import Pairs
from secateur.data.text import Text
from secateur.errors import InvalidParameter, UsageError
from secateur.plan_quality import HeldOut, at_sparsity, plan_quality, sparsity_on, with_baselines

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def words() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "?", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="?", pad_token="<pad>", eos_token="</s>", model_max_length=32
    )


@pytest.fixture
def text() -> Text:
    drawn = torch.randint(60, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    return Text("made up", "test", (" ".join(WORDS[i] for i in drawn),), "random", " ")


def test_sparsity_counts_only_pairs_that_were_there():
    model = make("llama")
    mask = torch.ones(6, 16, dtype=torch.long)
    mask[:, 5:] = 0  # five real tokens
    seen = observe(model, [{"input_ids": ids(), "attention_mask": mask}], block=2)
    plan = make_plan(observe(model, ids(), block=2), 0.5, kind="toeplitz", band=1)
    kept = possible = 0
    for name, site in plan.sites.items():
        keep = site.layout(5, 5).entries().expand(4, -1, -1)
        kept, possible = kept + int(keep.sum()), possible + 4 * 15
        assert name in seen.at()
    effective, paper = sparsity_on(plan, seen)
    assert effective == pytest.approx(1 - kept / possible) and paper == pytest.approx(1 - kept / (possible / 15 * 25))
    whole = plan_report(plan, 16).total.sparsity_effective
    assert effective < whole  # in the first rows there is less to drop


@pytest.mark.parametrize("wanted", [0.3, 0.6])
def test_plans_and_baselines_are_brought_to_one_sparsity(wanted):
    model = make("llama")
    seen = observe(model, ids(), block=1, entries=True)
    plan = at_sparsity(lambda share: make_plan(seen, share, kind="absolute"), wanted, seen)
    assert sparsity_on(plan, seen)[0] == pytest.approx(wanted, abs=0.01)
    plans = with_baselines({"a": plan}, seen)
    assert list(plans) == ["a", "a random", "a window"]
    assert all(sparsity_on(one, seen)[0] == pytest.approx(wanted, abs=0.02) for one in plans.values())
    counts = {plan_report(one, 16).total.kept_blocks for one in with_baselines({"a": plan}).values()}
    assert len(counts) == 1
    far = at_sparsity(lambda share: make_plan(seen, share, kind="absolute"), 0.99, seen)
    assert 0.6 < sparsity_on(far, seen)[0] < 0.99  # the diagonal and the sink stay


def test_a_causal_model_against_its_own_loss(words, text):
    model = make("llama")
    plan = make_plan(observe(model, ids(), block=2), 0.5)
    dense, under = plan_quality(model, words, {"p": plan}, text, windows=4, observed=2)
    windows = words(text.joined, return_tensors="pt", verbose=False)["input_ids"][0, :64].view(4, 16)
    with torch.no_grad():
        before = float(model(windows, labels=windows).loss)
        with attached(model, plan):
            after = float(model(windows, labels=windows).loss)
    assert dense.measures["perplexity"]["nll"] == pytest.approx(before, abs=1e-5)
    assert under.measures["nll_difference"] == pytest.approx(after - before, abs=1e-5) and after != before
    assert under.measures["fidelity"]["js_divergence"] > 0 == dense.measures["fidelity"]["js_divergence"]
    assert under.length == 16 and 0 < under.recall < 1 and dense.recall is None and under.to_dict()["name"] == "p"


def test_an_encoder_moves_its_embeddings(words, text):
    model = make("bert").bert
    plan = make_plan(observe(model, ids(), block=2), 0.5)
    dense, under = plan_quality(model, words, {"p": plan}, text, length=16, windows=5, batch_size=2)
    assert dense.measures["embeddings"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert under.measures["embeddings"]["cosine"] < 1 - 1e-6 and under.measures["embeddings"]["texts"] == 5


def test_an_encoder_decoder_translates_and_reads_references(words):
    model = make("t5")
    pairs = Pairs(("w1 w2 w3", "w4 w5"), ("w6 w7", "w8 w9 w1"), "two", "")
    held = HeldOut(model, words, pairs, length=4, block=1, batch_size=2)
    assert held.observation is not None
    plan = make_plan(held.observation, 0.5, kind="toeplitz", cross="toeplitz", band=1)
    dense, under = held.measure("dense", model), held.measure("p", model, plan)
    labels = torch.tensor([[9, 10, -100], [11, 12, 4]])
    source, mask = torch.tensor([[4, 5, 6], [7, 8, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        loss = float(model(input_ids=source, attention_mask=mask, labels=labels).loss)
    assert dense.measures["references"]["nll"] == pytest.approx(loss, abs=1e-5)
    assert dense.measures["translation"]["same"] == 1 and dense.measures["references"]["nll_difference"] == 0
    assert under.measures["references"]["nll_difference"] != 0
    assert under.sparsity_effective == pytest.approx(sparsity_on(plan, held.observation)[0])


def test_what_cannot_be_measured(words, text):
    model, other = make("llama"), make("bert")
    plan = make_plan(observe(model, ids(), block=2), 0.5)
    with pytest.raises(UsageError, match="for a llama model"):
        plan_quality(other, words, {"p": plan}, text)
    with pytest.raises(UsageError, match="measured on a text"):
        plan_quality(model, words, {"p": plan}, Pairs(("a",), ("b",), "one", ""))
    with pytest.raises(UsageError, match="measured on pairs of sentences"):
        HeldOut(make("t5"), words, text, length=8)
    with pytest.raises(InvalidParameter, match="windows"):
        plan_quality(model, words, {"p": plan}, text, windows=0)
    with pytest.raises(UsageError, match="say at which length"):
        plan_quality(model, words, {}, text)
    with pytest.raises(UsageError, match="of another model"):
        sparsity_on(plan, observe(other, ids(), block=2))

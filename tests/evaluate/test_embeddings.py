"""Embeddings and their two measures against plain definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast, T5Config
from transformers import T5ForConditionalGeneration as T5

from secateur.errors import InvalidParameter, NumericalFailure, UsageError
from secateur.evaluate.embeddings import compare_embeddings, embed

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "saw", "it"]
TEXTS = ["the cat sat", "a dog", "the dog saw a cat and it sat on the mat", "mat", "it saw it", "cat and dog sat on it"]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


@pytest.fixture
def encoder() -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=12, max_position_embeddings=16, **SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def vectors(n: int, noise: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(n, 8, generator=generator)
    made += noise * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed + 1))
    return torch.nn.functional.normalize(made, dim=1)


def test_each_text_alone_gives_the_same(encoder: BertModel, words: Any) -> None:
    seen: list[tuple[int, int]] = []
    found = embed(encoder, words, TEXTS, batch_size=4, progress=lambda done, total, _: seen.append((done, total)))
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = encoder(torch.tensor([words.encode(text)])).last_hidden_state[0]
        mean = states.mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=0, atol=1e-6)
    assert seen == [(4, 6), (6, 6)]


def test_a_model_with_a_head_and_a_limit(encoder: BertModel, words: Any) -> None:
    model = BertForMaskedLM(encoder.config).eval()
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    torch.testing.assert_close(embed(model, words, TEXTS), embed(encoder, words, TEXTS))
    short = embed(encoder, words, TEXTS, length=2)
    torch.testing.assert_close(short[0], embed(encoder, words, ["the cat"])[0])


def test_what_cannot_be_embedded(encoder: BertModel, words: Any) -> None:
    t5 = T5(T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0))
    with pytest.raises(UsageError, match="Embeddings need an encoder"):
        embed(t5, words, TEXTS)
    with pytest.raises(UsageError, match="no text"):
        embed(encoder, words, [])
    with pytest.raises(InvalidParameter, match="batch_size"):
        embed(encoder, words, TEXTS, batch_size=0)
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight[2] = math.inf
    with pytest.raises(NumericalFailure, match="text 0 is not finite"):
        embed(encoder, words, TEXTS)
    words.pad_token = None
    with pytest.raises(UsageError, match="no padding token"):
        embed(encoder, words, TEXTS)


@pytest.mark.parametrize("n", [5, 60])
def test_the_measures_are_those_of_scipy(n: int) -> None:
    dense, ours = vectors(n), vectors(n, noise=0.5)
    found = compare_embeddings(ours, dense)
    upper = torch.ones(n, n, dtype=torch.bool).triu(1)
    a, b = ((x.double() @ x.double().T) for x in (ours, dense))
    assert found.spearman == pytest.approx(spearmanr(a[upper], b[upper]).statistic, abs=1e-12)
    cosines = (ours.double() * dense.double()).sum(1)
    assert found.cosine == pytest.approx(float(cosines.mean()))
    assert found.cosine_stderr == pytest.approx(float(cosines.std() / math.sqrt(n)))
    assert found.lowest == pytest.approx(float(cosines.min()))
    groups, left = min(n, 50), []
    for k in range(groups):
        stay = [i for i in range(n) if i % groups != k]
        above = torch.ones(len(stay), len(stay), dtype=torch.bool).triu(1)
        left.append(spearmanr(a[stay][:, stay][above], b[stay][:, stay][above]).statistic)
    spread = sum((value - sum(left) / groups) ** 2 for value in left)
    assert found.spearman_stderr == pytest.approx(math.sqrt((groups - 1) / groups * spread))


def test_the_same_is_one_and_noise_costs() -> None:
    same, near, far = (compare_embeddings(vectors(30, noise), vectors(30)) for noise in (0.0, 0.2, 2.0))
    assert same.cosine == pytest.approx(1) and same.spearman == pytest.approx(1)
    assert same.spearman_stderr == pytest.approx(0, abs=1e-9)
    assert 1 > near.cosine > far.cosine and 1 > near.spearman > far.spearman
    assert "Spearman of similarities" in str(near) and near.to_dict()["texts"] == 30


def test_what_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match=r"\(4, 8\) have no partners in \(5, 8\)"):
        compare_embeddings(vectors(4), vectors(5))
    with pytest.raises(UsageError, match="at least 3"):
        compare_embeddings(vectors(2), vectors(2))
    assert compare_embeddings(vectors(3), vectors(3)).spearman_stderr is None

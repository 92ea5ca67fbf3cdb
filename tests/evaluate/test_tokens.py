"""One pass for two measures, dense predictions kept, quantiles, responses only: against brute force."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_models import CAUSAL, WORDS, tiny, tiny_bert, tiny_t5
from test_fidelity import pruned

from secateur.data.instructions import Instructions
from secateur.errors import InvalidParameter, NumericalFailure, UsageError
from secateur.evaluate import DensePredictions, fidelity, measure, perplexity
from secateur.evaluate.fidelity import quantiles
from secateur.evaluate.sample import mean_and_stderr

TEMPLATE = (
    "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} w3\n{% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)


@pytest.fixture
def chatty(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


def talk(count=7, **more):
    """Responses of 1 to 12 words, so that batches are padded."""
    draw = torch.Generator().manual_seed(5)

    def say(n):
        return " ".join(WORDS[i] for i in torch.randint(4, 61, (n,), generator=draw).tolist())

    conversations = tuple((("user", say(3 + i % 2)), ("assistant", say(1 + 5 * i % 12))) for i in range(count))
    return Instructions("talk", "test", conversations, "made up", **more)


def brute(model, dense, tokenizer, text, causal=True):
    """Per conversation, lists over the response's tokens: nll, js, kl, agreement; fp64, one at a time, no padding."""
    found = []
    for (_, question), (_, answer) in text.conversations:
        ids = tokenizer(f"w1 {question} w3 w2 {answer} w3")["input_ids"]
        start = len(question.split()) + 3
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0].double().softmax(-1) for m in (dense, model))
        rows = []
        for t in range(start, len(ids)):
            a, b = (p[t - 1], q[t - 1]) if causal else (p[t], q[t])
            m = (a + b) / 2
            js = ((a * (a / m).log()).sum() + (b * (b / m).log()).sum()) / 2
            kl = (a * (a / b).log()).sum()
            rows.append([-b[ids[t]].log().item(), js.item(), kl.item(), float(a.argmax() == b.argmax())])
        found.append(list(zip(*rows, strict=True)))
    return found


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_only_the_tokens_of_responses_count_and_never_padding(family, batch_size, chatty) -> None:
    dense = tiny(family)
    model, text = pruned(dense), talk()
    expected = brute(model, dense, chatty, text)
    surprise, close = measure(model, dense, chatty, text, seqlen=64, batch_size=batch_size)
    nll, js, kl, same = ([x for window in expected for x in window[k]] for k in range(4))
    assert surprise.nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert close.js_divergence == pytest.approx(sum(js) / len(js), rel=1e-4)
    assert close.kl_divergence == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert close.top1_agreement == pytest.approx(sum(same) / len(same))
    assert close.js_quantiles["max"] == pytest.approx(max(js), rel=1e-3)
    assert close.tokens == surprise.tokens == len(js) and close.windows == surprise.windows == 7
    assert close.counted == surprise.counted == "response" and "tokens of 7 responses, talk test" in str(close)


def test_the_error_over_responses_of_unlike_length_is_that_of_a_ratio(chatty) -> None:
    dense = tiny("Llama")
    model, text = pruned(dense), talk()
    windows = [torch.tensor(window[1]) for window in brute(model, dense, chatty, text)]
    n = [len(window) for window in windows]
    mean = sum(window.sum().item() for window in windows) / sum(n)
    spread = sum((window.sum().item() - mean * k) ** 2 for window, k in zip(windows, n, strict=True))
    found = fidelity(model, dense, chatty, text, seqlen=64)
    assert found.js_divergence_stderr == pytest.approx(math.sqrt(7 / 6 * spread) / sum(n), rel=1e-3)


def test_a_masked_model_is_compared_at_the_responses_own_positions(chatty) -> None:
    dense = tiny_bert()
    model, text = pruned(dense), talk()
    js = [x for window in brute(model, dense, chatty, text, causal=False) for x in window[1]]
    for batch_size in (1, 4):
        found = fidelity(model, dense, chatty, text, seqlen=64, batch_size=batch_size)
        assert found.js_divergence == pytest.approx(sum(js) / len(js), rel=1e-4) and found.tokens == len(js)


def test_all_tokens_count_when_asked(chatty) -> None:
    dense = tiny("Llama")
    found = measure(pruned(dense), dense, chatty, talk(counted="all"), seqlen=64, batch_size=3)
    tokens = sum(len(q.split()) + len(a.split()) + 4 for (_, q), (_, a) in talk().conversations)
    assert [one.tokens for one in found] == [tokens - 7] * 2 and found[0].counted == "all"


@pytest.mark.parametrize("family", CAUSAL)
def test_one_pass_gives_what_two_give_with_a_model_or_its_predictions(family, tokenizer, text) -> None:
    dense = tiny(family)
    model = pruned(dense)
    kept = DensePredictions(dense, tokenizer, text, seqlen=20, batch_size=4)
    single = perplexity(model, tokenizer, text, seqlen=20), fidelity(model, dense, tokenizer, text, seqlen=20)
    for together in (measure(model, dense, tokenizer, text, seqlen=20), measure(model, kept, tokenizer)):
        for one, other in zip(single, together, strict=True):
            for key, value in one.to_dict().items():
                expected = pytest.approx(value, rel=1e-5) if isinstance(value, float | dict) else value
                assert other.to_dict()[key] == expected, key
    assert fidelity(model, kept, tokenizer, text).js_divergence == pytest.approx(single[1].js_divergence, rel=1e-5)


def test_predictions_stay_when_the_dense_model_is_pruned_and_its_body_never_runs_again(tokenizer, text) -> None:
    dense = tiny("Llama")
    reference = copy.deepcopy(dense)
    kept = DensePredictions(dense, tokenizer, text, seqlen=20)
    calls = []
    handle = dense.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for parameter in dense.parameters():  # norms and head as well
        parameter.data.mul_(0.7)
    model = pruned(reference, 0.7)
    expected = fidelity(model, reference, tokenizer, text, seqlen=20)
    found = fidelity(model, kept, tokenizer)
    assert found.to_dict() == expected.to_dict() and not calls
    handle.remove()
    same = measure(reference, kept, tokenizer)[1]
    assert (same.js_divergence, same.kl_divergence, same.top1_agreement) == (0, 0, 1)
    assert sum(p.numel() for p in kept.reader.model.parameters()) < 61 * 32 + 100  # the head, and no block


def test_the_body_of_the_pruned_model_runs_once_for_both(tokenizer, text) -> None:
    dense = tiny("Llama")
    model, calls = pruned(dense), []
    kept = DensePredictions(dense, tokenizer, text, seqlen=20, batch_size=3)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    measure(model, kept, tokenizer)
    assert [length for length in calls if length == 20] == [20] * 3  # 9 windows in batches of 3


def test_a_model_that_cannot_be_split_runs_again(tokenizer, text) -> None:
    dense = tiny("Llama")
    plain_forward = type(dense).forward

    def forward(input_ids, **kwargs):
        output = plain_forward(dense, input_ids=input_ids, **kwargs)
        output.logits = output.logits + 1e-3 * torch.arange(input_ids.shape[1]).view(1, -1, 1)
        return output

    dense.forward = forward
    model = pruned(tiny("Llama"))
    kept = DensePredictions(dense, tokenizer, text, seqlen=20)
    assert kept.dense is dense
    expected = fidelity(model, dense, tokenizer, text, seqlen=20)
    assert fidelity(model, kept, tokenizer).js_divergence == pytest.approx(expected.js_divergence, rel=1e-6)


def test_batches_and_padding_change_rounding_only(chatty) -> None:
    dense = tiny("Llama").double()
    model, text = pruned(dense), talk()
    first = fidelity(model, dense, chatty, text, seqlen=64)
    for batch_size in (2, 5, 100):
        other = measure(model, DensePredictions(dense, chatty, text, seqlen=64, batch_size=batch_size), chatty)[1]
        assert other.js_divergence == pytest.approx(first.js_divergence, rel=1e-10)
        assert other.js_quantiles == pytest.approx(first.js_quantiles, rel=1e-6)
        assert other.js_divergence_stderr == pytest.approx(first.js_divergence_stderr, rel=1e-8)


def test_quantiles_are_those_of_torch() -> None:
    values = torch.rand(997, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = quantiles(values)
    for share in (0.5, 0.9, 0.99):
        assert found[str(share)] == pytest.approx(values.quantile(share).item(), rel=1e-9)
    assert found["max"] == values.max().item()
    assert set(quantiles(values[:1]).values()) == {values[0].item()}


def test_equal_windows_have_the_usual_error() -> None:
    windows = list(torch.rand(9, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    mean, stderr = mean_and_stderr(windows)
    means = torch.stack(windows).mean(1)
    assert (mean, stderr) == (pytest.approx(means.mean().item()), pytest.approx(means.std().item() / 3))


def test_predictions_of_another_text_are_refused(tokenizer, chatty, text) -> None:
    dense = tiny("Llama")
    kept = DensePredictions(dense, tokenizer, text, seqlen=20, windows=4)
    assert measure(dense, kept, tokenizer, text, seqlen=20, windows=4)[1].windows == 4
    with pytest.raises(UsageError, match="4 windows of 20, and not on the 4 windows of 10 of made-up"):
        measure(dense, kept, tokenizer, text, seqlen=10)
    with pytest.raises(UsageError, match="are of 4 windows of 20 tokens: leave out seqlen and windows"):
        fidelity(dense, kept, tokenizer, windows=5)
    with pytest.raises(UsageError, match=r"on made-up .* not on the"):
        fidelity(dense, kept, chatty, talk(count=4), seqlen=20)


def test_what_cannot_be_measured_is_refused(tokenizer, text) -> None:
    with pytest.raises(UsageError, match="T5ForConditionalGeneration is not one"):
        measure(tiny_t5(), tiny_t5(), tokenizer, text, seqlen=20)
    with pytest.raises(UsageError, match="defined for causal language models; BertForMaskedLM is not one"):
        measure(tiny_bert(), tiny_bert(), tokenizer, text, seqlen=20)
    with pytest.raises(InvalidParameter, match="'batch_size' of fidelity"):
        DensePredictions(tiny("Llama"), tokenizer, text, batch_size=0)
    wide = tiny("Llama")
    wide.resize_token_embeddings(64)
    with pytest.raises(UsageError, match="predicts 61 tokens, the dense LlamaForCausalLM 64"):
        measure(tiny("Llama"), DensePredictions(wide, tokenizer, text, seqlen=20), tokenizer)


def test_what_is_not_finite_names_the_conversation(chatty) -> None:
    dense, text = tiny("Llama"), talk()
    model = copy.deepcopy(dense)
    answers = [set(answer.split()) for _, (_, answer) in text.conversations]
    index = next(i for i, words in enumerate(answers) if i and len(words) > 2 and words - set().union(*answers[:i]))
    word = sorted(answers[index] - set().union(*answers[:index]))[0]
    questions = " ".join(question for (_, question), _ in text.conversations[: index + 1]).split()
    assert word not in questions
    model.model.embed_tokens.weight.data[WORDS.index(word)] = math.nan
    with pytest.raises(NumericalFailure, match=rf"not finite .* in conversation {index} \(talk test\)"):
        measure(model, dense, chatty, text, seqlen=64, batch_size=3)

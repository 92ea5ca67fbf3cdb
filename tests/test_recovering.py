"""recover(): what it takes, what it refuses, what it records."""

import copy
import json

import pytest
import torch
import transformers
from families import ids, make

import secateur as sc
from secateur.data.calibration import calibration
from secateur.data.text import Text
from secateur.errors import SecateurError, UsageError
from secateur.methods.magnitude import Magnitude
from secateur.models.layers import find_layers
from secateur.pruning import prune
from secateur.recovering import recover, weights_sha256, with_recovery
from secateur.recovery.options import Recovery
from secateur.recovery.subsets import find_trainees

FEW = Recovery(train=("norms",), steps=2, batch_size=2)
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def pruned():
    model = make("llama")
    return model, prune(model, Magnitude(), sparsity=0.5)


@pytest.fixture
def tokenizer():
    import tokenizers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate([*WORDS, "?"])}, unk_token="?")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


def test_the_pruning_may_be_a_result_a_record_or_a_folder(pruned, tmp_path):
    model, result = pruned
    (tmp_path / "pruning.json").write_text(json.dumps(result.to_dict()))
    losses = []
    for pruning in (result, result.to_dict(), tmp_path, str(tmp_path)):
        losses.append(recover(copy.deepcopy(model), None, ids(4), pruning, FEW).losses["steps"])
    assert all(found == losses[0] for found in losses)


def test_text_by_file_and_as_ids_is_the_same(pruned, tokenizer, tmp_path):
    model, pruning = pruned
    file = tmp_path / "t.txt"
    file.write_text(" ".join(WORDS * 10))
    by_name = recover(copy.deepcopy(model), tokenizer, file, pruning, FEW, seqlen=8, held_out=3)
    assert by_name.text["samples"] == 4 and by_name.text["seqlen"] == 8 and by_name.tokens == 32
    assert by_name.held_out is not None and by_name.held_out["windows"] == 3
    text = Text("mine", "calibration", (" ".join(WORDS * 10),), "made up")
    drawn = calibration(tokenizer, text, n=4, seqlen=8, seed=0)
    as_ids = recover(copy.deepcopy(model), tokenizer, drawn, pruning, FEW)
    assert as_ids.losses["steps"] == by_name.losses["steps"] and as_ids.text == drawn.record


def test_a_short_text_is_read_again(pruned, tokenizer):
    model, pruning = pruned
    text = Text("mine", "calibration", (" ".join(WORDS[:20]),), "made up")
    result = recover(model, tokenizer, text, pruning, Recovery(train=("norms",), steps=5, batch_size=2), seqlen=8)
    assert result.text["samples"] == 2 and result.tokens == 80 and result.held_out is None


def test_the_record_is_plain_and_its_numbers_are_the_models(pruned):
    model, pruning = pruned
    result = recover(model, None, ids(4), pruning, Recovery(steps=3), held_out=ids(2, seed=1))
    record = json.loads(json.dumps(result.to_dict()))
    assert record["options"]["train"] == ["adapters", "norms", "biases"]
    rank = 4 * sum(sum(layer.shape) for layer in find_layers(model))
    assert record["trained"] == {"adapters": rank, "norms": 5 * 32}
    assert record["share"] == pytest.approx((rank + 160) / sum(p.numel() for p in model.parameters()))
    assert record["zeros"] == {"before": 9216, "after": 9216, "lost": 0}
    with torch.no_grad():
        after = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids(2, seed=1)]
    assert record["held_out"]["loss_after"] == pytest.approx(sum(after) / 2, rel=1e-5)
    assert "LlamaForCausalLM has no biases: nothing of that name is trained" in record["warnings"]
    assert "of 9216 zeros lost" in str(result) and "held-out perplexity" in str(result)
    joined = with_recovery(pruning.to_dict(), model, record)
    assert joined["recovery"] == [record] and joined["sparsity"] == pruning.to_dict()["sparsity"]
    assert with_recovery(joined, model, record)["recovery"] == [record, record]


def test_the_best_weights_are_those_of_the_lowest_held_out_loss(pruned):
    model, pruning = pruned
    unseen = ids(2, seed=7)
    options = Recovery(train=("kept", "head"), steps=12, lr=0.05, checkpoint_every=2, keep="best")
    result = recover(model, None, ids(4), pruning, options, held_out=unseen)
    looks = result.losses["held_out"]
    assert len(looks) == 6 and result.losses["best"] == min(looks, key=looks.__getitem__) != "12"
    assert result.held_out["loss_after"] == pytest.approx(min(looks.values()), rel=1e-6)


def test_the_model_is_left_in_its_modes(pruned):
    model, pruning = pruned
    model.train()
    model.lm_head.weight.requires_grad_(False)
    recover(model, None, ids(4), pruning, FEW)
    assert model.training and not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": "gutenberg"}, "A text needs the model's tokenizer"),
        ({"text": torch.zeros(4)}, "calibration ids must be"),
        ({"text": torch.full((2, 8), 99)}, "but the model embeds 64 tokens"),
        ({"seqlen": 4}, "The ids have windows of 16 tokens: leave out seqlen 4"),
        ({"held_out": -1}, "The 'held_out' of recover"),
        ({"held_out": torch.full((2, 8), 99)}, "but the model embeds 64 tokens"),
        ({"pruning": {"layers": []}}, "lists no pruned layers"),
        ({"pruning": "/nowhere"}, "has no pruning.json"),
        ({"options": Recovery(objective="distil")}, "compares with the model before pruning: give it as dense"),
        ({"options": Recovery(objective="reconstruct")}, "compares with the model before pruning: give it as dense"),
        ({"dense": make("llama")}, "The objective text uses no dense model"),
        ({"dense": make("gpt2"), "options": Recovery(objective="distil")}, "it is not the one that was pruned"),
        ({"options": Recovery(train=("biases",))}, "has nothing of --train biases"),
    ],
)
def test_refused_before_anything_is_touched(pruned, change, said):
    model, pruning = pruned
    before = copy.deepcopy(model.state_dict())
    asked = {"text": ids(4), "pruning": pruning, "options": FEW} | change
    text, record, options = asked.pop("text"), asked.pop("pruning"), asked.pop("options")
    with pytest.raises(SecateurError) as raised:
        recover(model, None, text, record, options, **asked)
    assert said in str(raised.value) and isinstance(raised.value, UsageError)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_are_said_once_and_only_when_it_is_news():
    model = make("opt")
    for train, warned in ((("head",), 1), (("embeddings",), 1), (("embeddings", "head"), 0), (("norms",), 0)):
        assert len(find_trainees(model, (), {}, train)[1]) == warned
    assert find_trainees(make("llama"), (), {}, ("head",))[1] == []  # untied


def test_the_weights_hash_sees_a_single_bit():
    model, same = make("llama", torch.bfloat16), make("llama", torch.bfloat16)
    assert weights_sha256(model) == weights_sha256(same)
    model.model.norm.weight.data[0] += 0.5
    assert weights_sha256(model) != weights_sha256(same)


def test_the_public_name():
    assert sc.recover is recover and sc.Recovery is Recovery


def test_padded_conversations_are_refused(pruned):
    from secateur.data.calibration import Calibration

    model, result = pruned
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    with pytest.raises(UsageError, match="training would count the padding"):
        recover(model, None, Calibration(ids(2, 8), {}, mask), result, FEW)

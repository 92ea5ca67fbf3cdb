"""secateur attend on tiny models: what each step records, saves and says."""

from __future__ import annotations

import json
import shutil

import pytest
import tokenizers
import torch
import transformers

from secateur.attention.apply import attached
from secateur.attention.plan import load_plan, save_plan

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def observe(cli, dense, text):
    """`observe(...)` of the tiny model on 6 windows of 32 tokens, in blocks of 4."""

    def run(*words, model=dense, out="obs"):
        sizes = ("--lengths", 16, 32, "--samples", 6, "--block", 4)
        return cli("attend", "observe", model, "--text", text, *sizes, "--out", out, *words)

    return run


@pytest.fixture
def plan(observe, cli, here):
    """A plan of half the blocks."""
    assert observe().code == 0
    assert cli("attend", "mask", "obs", "--sparsity", 0.5, "--band", 1, "--out", "plan").code == 0
    return here / "plan"


@pytest.fixture
def evaluate(cli, dense, text):
    def run(*words, model=dense, plans=("plan",)):
        return cli("attend", "evaluate", model, *plans, "--text", text, "--windows", 3, *words)

    return run


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """A Marian-like encoder-decoder of one layer each, its tokenizer, and pairs to read."""
    folder = tmp_path_factory.mktemp("pairs")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=63, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, decoder_start_token_id=61,
        pad_token_id=61, eos_token_id=62,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    vocabulary = {word: i for i, word in enumerate([*WORDS, "?", "<pad>", "</s>"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 62)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="?", pad_token="<pad>", eos_token="</s>", model_max_length=32
    ).save_pretrained(folder / "t5")
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in (4, 5, 6, 7) * 5:
        source, target = (torch.randint(60, (length + more,), generator=draw).tolist() for more in (0, 2))
        rows.append({"a": " ".join(WORDS[i] for i in source), "b": " ".join(WORDS[i] for i in target)})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_observe_saves_and_describes(observe, here):
    ran = observe("--json", "r.json")
    assert ran.code == 0, ran.err
    record = json.loads((here / "r.json").read_text())
    assert record["analysis"]["length"] == 32 and record["analysis"]["block"] == 4
    assert len(record["analysis"]["sites"]) == 2 and set(record["analysis"]["families"]) == {"decoder-self"}
    assert record["command"][:3] == ["secateur", "attend", "observe"] and "torch" in record["versions"]
    assert record["text"]["text"].endswith("words.txt") and record["saved"] == str(here / "obs")
    assert {path.name for path in here.iterdir()} == {"obs", "r.json"}
    assert "decoder-self" in ran.out and "pairs with 90 % of the mass" in ran.out

    again = observe()
    assert again.code == 2 and "replace it with --overwrite" in again.error
    assert observe("--overwrite", "--json", "-").record["analysis"] == record["analysis"]


def test_mask_saves_a_plan_with_both_sparsities(plan, cli, here):
    ran = cli("attend", "mask", "obs", "--sparsity", 0.5, "--band", 1, "--out", "other", "--json", "-")
    assert ran.code == 0, ran.err
    total = ran.record["report"]["total"]
    assert 0.4 < total["sparsity_effective"] < total["sparsity_paper"] < 0.8
    assert abs(total["density_block"] - 0.5) < 0.03 and 0.5 < ran.record["recall"]["total"] < 1
    assert ran.record["plan"]["masking"]["kind"] == "toeplitz" and ran.record["plan"]["length"] == 32
    made = load_plan(here / "other")
    assert set(made.sites) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    again = cli("attend", "mask", "obs", "--out", "other")
    assert again.code == 2 and "holds a plan" in again.error
    far = cli("attend", "mask", "obs", "--sparsity", 0.95, "--out", "far")
    assert far.code == 0 and "95 % of the blocks were to be dropped" in far.err and "always stay" in far.err


def test_masks_by_what_the_loss_depends_on_need_gradients(observe, cli, here):
    words = ("--sparsity", 0.5, "--score", "loss", "--pool", "model")
    assert observe().code == 0
    ran = cli("attend", "mask", "obs", *words, "--out", "plan")
    assert ran.code == 2 and "observe with --gradients" in ran.error and not (here / "plan").exists()
    assert observe("--gradients", "--overwrite").code == 0
    ran = cli("attend", "mask", "obs", *words, "--out", "plan", "--json", "-")
    assert ran.code == 0 and (here / "plan").is_dir()


def test_evaluate_beside_baselines_of_the_same_density(plan, evaluate, here):
    ran = evaluate("--lengths", 16, 32, "--against-baselines", "--json", "e.json")
    assert ran.code == 0, ran.err
    assert evaluate("--lengths", 32).code == 0
    rows = json.loads((here / "e.json").read_text())["attention_evaluation"]
    names = ["dense", "plan", "plan random", "plan window"]
    assert [(row["length"], row["name"]) for row in rows] == [(n, name) for n in (16, 32) for name in names]
    for dense, *others in (rows[:4], rows[4:]):
        assert dense["measures"]["nll_difference"] == 0 and dense["sparsity_effective"] == 0
        assert len({row["density_block"] for row in others}) == 1
        for row in others:
            assert 0 < row["sparsity_effective"] < row["sparsity_paper"] and 0 < row["recall"] <= 1
            assert row["measures"]["fidelity"]["js_divergence"] > 0 and sum(row["backends"].values()) >= 2 * 3
    assert evaluate("--json", "-").record["attention_evaluation"][0]["length"] == 32  # the plan's own length


def test_evaluate_gives_what_the_attached_model_gives(plan, evaluate, dense, text):
    ran = evaluate("--lengths", 32, "--json", "-", "--backend", "reference")
    row = ran.record["attention_evaluation"][1]
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    ids = transformers.AutoTokenizer.from_pretrained(dense)(text.read_text(), return_tensors="pt")["input_ids"]
    windows = ids[0, : 3 * 32].view(3, 32)
    with torch.no_grad(), attached(model, load_plan(plan), "reference"):
        loss = model(windows, labels=windows).loss
    assert row["measures"]["perplexity"]["nll"] == pytest.approx(float(loss), abs=1e-4)
    assert list(row["backends"]) == ["reference"]


def test_train_saves_the_model_and_its_plan(plan, cli, dense, text, here):
    def train(*words):
        steps = ("--steps", 4, "--held-out", 3, "--seqlen", 32)
        return cli("attend", "train", dense, "plan", "--text", text, *steps, *words)

    ran = train("--train", "adapters", "norms", "--lr", 0.01, "--out", "trained", "--json", "r.json")
    assert ran.code == 0, ran.err
    record = json.loads((here / "r.json").read_text())["attention_training"]
    assert record["recovery"]["held_out"]["before"] != record["recovery"]["held_out"]["after"]
    assert record["dense"]["perplexity"] > 1 and record["density"]["total"]["sparsity_effective"] > 0.4
    assert "under the mask, dense" in ran.out and "trained.checkpoint" not in ran.left
    mine, theirs = load_plan(here / "trained"), load_plan(plan)
    assert all(torch.equal(mine.sites[name].offsets, mask.offsets) for name, mask in theirs.sites.items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(here / "trained")
    old = transformers.AutoModelForCausalLM.from_pretrained(dense)
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.weight, old.model.layers[0].mlp.up_proj.weight)
    card = (here / "trained" / "README.md").read_text()
    assert "trained with sparse attention" in card and "pruned" not in card and "attended" not in card

    again = cli("attend", "evaluate", "trained", "trained", "--text", text, "--windows", 3, "--json", "-")
    assert again.code == 0 and len(again.record["attention_evaluation"]) == 2
    assert "exists" in train("--out", "trained").error


def test_an_encoder_decoder_reads_pairs(cli, both, here):
    model, pairs = both / "t5", f"{both / 'pairs.jsonl'}:a,b"
    ran = cli("attend", "observe", model, "--pairs", pairs, "--samples", 16, "--block", 1, "--out", "obs")
    assert ran.code == 0, ran.err
    assert all(word in ran.out for word in ("encoder-self", "decoder-self", "decoder-cross"))
    ran = cli("attend", "mask", "obs", "--sparsity", 0.5, "--sites", "cross", "encoder-self", "--out", "plan")
    assert ran.code == 0 and "decoder-self" not in ran.out, ran.err
    ran = cli(
        "attend", "evaluate", model, "plan", "--pairs", pairs, "--samples", 8, "--batch-size", 8,
        "--against-baselines", "--json", "-",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    dense, *others = ran.record["attention_evaluation"]
    assert dense["measures"]["translation"]["same"] == 1 and dense["measures"]["references"]["nll_difference"] == 0
    wanted = others[0]["sparsity_effective"]
    assert 0.2 < wanted < 0.6 and all(abs(row["sparsity_effective"] - wanted) < 0.06 for row in others)
    assert others[0]["measures"]["references"]["nll_difference"] != 0
    ran = cli(
        "attend", "train", model, "plan", "--pairs", pairs, "--samples", 12, "--held-out", 4, "--steps", 2,
        "--out", "trained",
    )  # fmt: skip
    assert ran.code == 0 and "under the mask" in ran.out, ran.err
    for words in (("observe", model, "--block", 1, "--out", "x"), ("train", model, "plan", "--out", "x")):
        ran = cli("attend", *words)
        assert ran.code == 2 and "--pairs FILE:SOURCE,TARGET" in ran.error


def test_an_encoder_reads_passages(cli, dense, text, here):
    config = transformers.BertConfig(
        vocab_size=63, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=61,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(here / "bert")
    words = transformers.AutoTokenizer.from_pretrained(dense)
    words.add_special_tokens({"pad_token": "<pad>"})
    words.save_pretrained(here / "bert")
    sizes = ("--lengths", 16, "--samples", 6, "--block", 2)
    ran = cli("attend", "observe", "bert", "--text", text, *sizes, "--out", "obs")
    assert ran.code == 0 and "encoder-self" in ran.out, ran.err
    ran = cli("attend", "observe", "bert", "--text", text, "--lengths", 8, 16, "--block", 2, "--out", "x")
    assert ran.code == 2 and "passages of one length" in ran.error
    assert cli("attend", "mask", "obs", "--sparsity", 0.5, "--out", "plan").code == 0
    ran = cli("attend", "train", "bert", "plan", "--text", text, "--out", "x")
    assert ran.code == 2 and "--objective reconstruct" in ran.error
    ran = cli("attend", "evaluate", "bert", "plan", "--text", text, "--windows", 6, "--against-baselines")
    assert ran.code == 0 and "Spearman" in ran.out and "plan window" in ran.out, ran.err
    ran = cli(
        "attend", "train", "bert", "plan", "--text", text, "--objective", "reconstruct", "--steps", 2,
        "--samples", 8, "--held-out", 2, "--out", "trained",
    )  # fmt: skip
    assert ran.code == 0, ran.err


def test_report_makes_a_page_and_pictures(plan, evaluate, cli, here):
    pytest.importorskip("matplotlib")
    shutil.copytree(here / "plan", here / "p<b>")
    assert evaluate("--lengths", 16, 32, "--against-baselines", "--json", "e.json").code == 0
    ran = cli("attend", "report", "obs", "plan", "p<b>", "e.json", "--title", "A & B", "--out", "page.html")
    assert ran.code == 0, ran.err
    page = (here / "page.html").read_text()
    assert "<h1>A &amp; B</h1>" in page and "p<b>" not in page and "p&lt;b&gt;" in page
    for heading in ("What it costs", "Observed: obs", "Plans", "Mass kept of another", "Blocks that two plans share"):
        assert heading in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert "Perplexity against the dense model over sparsity, 32 tokens" in page
    again = cli("attend", "report", "obs", "--out", "page.html")
    assert again.code == 2 and "replace it with --overwrite" in again.error
    ran = cli("attend", "report", "obs", "plan", "e.json", "--out", "page.html", "--overwrite", "--png", "pics")
    assert ran.code == 0, ran.err
    pictures = sorted(path.name for path in (here / "pics").iterdir())
    assert pictures == [
        "kept_plan.png", "observed_obs_decoder-self.png", "quality_perplexity_against_the_dense_model.png",
    ]  # fmt: skip
    assert all((here / "pics" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "usage"),
        ("obsreve", "Did you mean 'observe'?"),
        ("observe {dense}", "Nothing would be kept"),
        ("observe {dense} --lengths 1 --out x", "'lengths' of attend observe"),
        ("observe {dense} --block 0 --out x", "'block' of attend observe"),
        ("observe {dense} --pairs a.jsonl --out x", "--pairs wants FILE:SOURCE,TARGET"),
        ("observe {dense} --pairs a.jsonl:zh,en --out x", "there is no file a.jsonl"),
        ("observe {dense} --pairs a:b,c --text d --out x", "leave --text and --lengths out"),
        ("mask nowhere --out x", "nowhere has no observation.json"),
        ("mask nowhere", "Nothing would be kept"),
        ("mask nowhere --sparsity 1 --out x", "in [0, 1)"),
        ("mask nowhere --kind toplitz --out x", "Did you mean 'toeplitz'?"),
        ("mask nowhere --pool layr --out x", "Did you mean 'layer'?"),
        ("evaluate {dense} nowhere", "There is no attention plan in nowhere"),
        ("evaluate {dense}", "PLAN"),
        ("evaluate {dense} nowhere --backend tritn", "Did you mean 'triton'?"),
        ("evaluate {dense} nowhere --windows 0", "'windows' of attend evaluate"),
        ("train {dense} nowhere --out x", "There is no attention plan in nowhere"),
        ("train {dense} nowhere", "Nothing would be kept"),
        ("train {dense} nowhere --resume --out x", "x.checkpoint to resume from"),
        ("train {dense} nowhere --adapter lora --out x", "merges its adapters"),
        ("report nowhere --out x.html", "neither an observation nor a plan"),
        ("report nowhere", "Nothing would be kept"),
    ],
)
def test_refused_before_a_model_is_loaded(cli, dense, monkeypatch, words, said):
    monkeypatch.setattr("secateur.models.load.load", lambda *a, **k: pytest.fail("loaded the model"))
    ran = cli("attend", *words.format(dense=dense).split())
    assert ran.code == 2
    assert said in (ran.error if words else ran.out)
    assert ran.left == {}


def test_what_does_not_fit_the_model(plan, observe, evaluate, cli, dense, text, here):
    ran = observe("--overwrite", "--block", 64)
    assert ran.code == 2 and "fewer than one block of 64" in ran.error
    ran = evaluate("--lengths", 128)
    assert ran.code == 2 and "'seqlen' of a window must be at most 64" in ran.error
    assert cli("attend", "mask", "obs", "--kind", "absolute", "--out", "fixed").code == 0
    ran = evaluate("--lengths", 48, plans=("fixed",))
    assert ran.code == 2 and "calibrated at 32 tokens" in ran.error
    config = transformers.LlamaConfig.from_pretrained(dense)
    config.num_hidden_layers = 1
    transformers.LlamaForCausalLM(config).save_pretrained(here / "other")
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(here / "other")
    ran = evaluate(model="other")
    assert ran.code == 2 and "2 attention sites" in ran.error and "this one has 1" in ran.error
    save_plan(load_plan(plan), here / "again" / "plan")
    ran = evaluate(plans=("plan", "again/plan"))
    assert ran.code == 2 and "same name" in ran.error
    (here / "obs" / "observation.json").write_text("{")
    ran = cli("attend", "mask", "obs", "--out", "y")
    assert ran.code == 1 and "observe again" in ran.error

"""Zero-shot tasks: against a naive count, and the harness' own prompts."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import WORDS, tiny, tiny_bert

from secateur.data import olmo
from secateur.data.tasks import TASKS, Item, read_items
from secateur.errors import InvalidParameter, LoadFailure, UnknownName, UsageError
from secateur.evaluate import compare_tasks, harness, tasks
from secateur.evaluate.tasks import mean_over

lm_eval = pytest.importorskip("lm_eval", reason="needs secateur[tasks]")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """40 questions of random words, with two to four choices of several lengths."""
    draw = random.Random(1)

    def words(k):
        return " ".join(draw.choices(WORDS, k=k))

    rows = []
    for _ in range(40):
        choices = [words(draw.randint(1, 5)) for _ in range(draw.randint(2, 4))]
        rows.append(
            {"question": words(draw.randint(3, 20)), "choices": choices, "answer": draw.randrange(len(choices))}
        )
    path = tmp_path_factory.mktemp("tasks") / "made.json"
    path.with_suffix(".jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    facts = {"file": "made.jsonl", "prompt": "{question}", "choices": "choices", "answer": "answer"}
    path.write_text(json.dumps(facts))
    return path


@pytest.fixture(scope="module")
def blanks(tmp_path_factory):
    """WinoGrande's columns: a sentence with a blank and two names for it."""
    draw = random.Random(2)
    path = tmp_path_factory.mktemp("tasks") / "blanks.jsonl"
    rows = []
    for _ in range(20):
        before, after = (" ".join(draw.choices(WORDS, k=k)) for k in (draw.randint(2, 14), 4))
        sentence = f"{before} _ {after}"
        rows.append({"sentence": sentence, "option1": "w1", "option2": "w2 w3", "answer": str(draw.randint(1, 2))})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def log_p(model, tokenizer, context, ending):
    """log p(ending | context), word by word."""
    ids = tokenizer(f"{context} {ending}", return_tensors="pt")["input_ids"]
    count = len(ending.split())
    with torch.no_grad():
        table = model(ids).logits[0].log_softmax(-1)
    return sum(float(table[t - 1, ids[0, t]]) for t in range(ids.shape[1] - count, ids.shape[1]))


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_the_count_of_right_choices(file, tokenizer, metric):
    model = tiny("Llama")
    path = file.with_name(f"{metric}.json")
    path.write_text(json.dumps({**json.loads(file.read_text()), "metric": metric}))
    found = tasks(model, tokenizer, [str(path)]).tasks[0]
    expected = []
    for row in map(json.loads, file.with_suffix(".jsonl").read_text().splitlines()):
        scores = [log_p(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        if metric == "acc_norm":
            scores = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        expected.append(max(range(len(scores)), key=scores.__getitem__) == row["answer"])
    assert found.correct == tuple(expected) and 0 < sum(expected) < 40
    assert (found.metric, found.n, found.value) == (metric, 40, sum(expected) / 40)
    assert found.stderr == pytest.approx(math.sqrt(found.value * (1 - found.value) / 39))


def test_partial_evaluation_scores_what_follows_the_name(blanks, tokenizer):
    model = tiny("Llama")
    found = tasks(model, tokenizer, [f"winogrande={blanks}"]).tasks[0]
    expected = []
    for row in map(json.loads, blanks.read_text().splitlines()):
        before, after = row["sentence"].split("_")
        scores = [log_p(model, tokenizer, before + row[name], after.strip()) for name in ("option1", "option2")]
        expected.append((scores[1] > scores[0]) == (row["answer"] == "2"))
    assert found.correct == tuple(expected) and found.metric == "acc"


def test_the_harness_alone_gives_the_same(file, tokenizer, monkeypatch):
    model = tiny("Llama")
    ours = tasks(model, tokenizer, [str(file)])
    monkeypatch.setattr(harness, "Choices", _Plain)
    assert tasks(model, tokenizer, [str(file)]).tasks == ours.tasks


class _Plain:
    """One forward pass per request."""

    def __init__(self, model, sample):
        self.model = model

    def score(self, requests, batch_size, progress):
        values = []
        for request in requests:
            with torch.no_grad():
                table = self.model(torch.tensor([request.ids])).logits[0].log_softmax(-1)
            places = range(len(request.ids) - request.scored, len(request.ids))
            values.append((sum(float(table[t - 1, request.ids[t]]) for t in places), False))
        return values


def test_several_tasks_a_mean_and_a_record(file, blanks, tokenizer):
    found = tasks(tiny("Llama"), tokenizer, [str(file), f"winogrande={blanks}"], limit=15, seed=3)
    assert [task.name for task in found.tasks] == ["made", "winogrande"] and {task.n for task in found.tasks} == {15}
    assert (found.mean, found.stderr) == mean_over([(task.value, task.stderr) for task in found.tasks])
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["tasks"][0]["correct"] == "".join("01"[right] for right in found.tasks[0].correct)
    assert set(record["tasks"][0]) == {
        "name", "metric", "value", "stderr", "n", "sha256", "split", "source", "correct"
    }  # fmt: skip
    assert "made" in str(found) and "±" in str(found)


def test_the_drawn_items_are_the_same_for_every_model(file, tokenizer):
    one, other = (tasks(tiny(family), tokenizer, [str(file)], limit=10) for family in ("Llama", "GPT2"))
    again = tasks(tiny("Llama"), tokenizer, [str(file)], limit=10, seed=1)
    assert one.tasks[0].sha256 == other.tasks[0].sha256 != again.tasks[0].sha256
    assert compare_tasks(one, other).tasks[0].n == 10
    with pytest.raises(UsageError, match="use the same limit and seed"):
        compare_tasks(one, again)
    assert compare_tasks(one, one).mean == 0.0


def test_the_model_and_the_tokenizer_are_left_as_they_were(file, tokenizer):
    model = tiny("Llama").train()
    model.config.tie_word_embeddings = True  # tying again would overwrite a head that was trained apart
    head, pad = model.lm_head.weight.detach().clone(), tokenizer.pad_token
    tasks(model, tokenizer, [str(file)], limit=3)
    assert model.training and torch.equal(model.lm_head.weight, head)
    assert tokenizer.pad_token == pad and len(tokenizer) == len(WORDS)
    assert "tie_weights" not in vars(model)


def test_global_generators_are_left_alone_and_nothing_is_printed(file, tokenizer, capfd):
    model = tiny("Llama")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    tasks(model, tokenizer, [str(file)], limit=3)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert capfd.readouterr() == ("", "")


def test_items_longer_than_the_model_are_cut_and_counted(tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    row = {"question": " ".join(WORDS + WORDS), "choices": ["w1", "w2 w3"], "answer": 0}
    path.write_text(json.dumps(row))
    spec = {"file": "long.jsonl", "prompt": "{question}", "choices": "choices", "answer": "answer"}
    (tmp_path / "long.json").write_text(json.dumps(spec))
    found = tasks(tiny("Llama"), tokenizer, [str(tmp_path / "long.json")])
    assert found.truncated == 2 and found.tasks[0].stderr is None and found.stderr is None
    assert "2 requests cut" in str(found)


@pytest.mark.parametrize(
    ("names", "options", "error", "said"),
    [
        ([], {}, UsageError, "No task is named"),
        (["FILE", "FILE"], {}, UsageError, "'made' is named twice"),
        (["FILE"], {"limit": 0}, InvalidParameter, "'limit' of tasks"),
        (["FILE"], {"seed": -1}, InvalidParameter, "'seed' of tasks"),
        (["FILE"], {"batch_size": 0}, InvalidParameter, "'batch_size' of tasks"),
        (["piqqa=x.jsonl"], {}, UnknownName, "Did you mean 'piqa'"),
        (["nowhere.jsonl"], {}, LoadFailure, "'nowhere.jsonl' could not be read"),
    ],
)
def test_bad_requests(file, tokenizer, names, options, error, said):
    with pytest.raises(error, match=said) as caught:
        tasks(tiny("Llama"), tokenizer, [str(file) if name == "FILE" else name for name in names], **options)
    assert "\n" not in str(caught.value)


def test_a_model_that_looks_both_ways(file, tokenizer):
    with pytest.raises(UsageError, match="looks both ways"):
        tasks(tiny_bert(), tokenizer, [str(file)])


def test_without_the_extra(file, tokenizer, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a))
    with pytest.raises(LoadFailure, match=r"pip install 'secateur\[tasks\]'"):
        tasks(tiny("Llama"), tokenizer, [str(file)])


ROWS = {
    "arc_easy": {"question": "Red?", "choices": {"text": ["grass", "blood"], "label": ["A", "B"]}, "answerKey": "B"},
    "boolq": {"passage": "Grass is green.", "question": "is grass red", "answer": False, "label": 0},
    "hellaswag": {
        "activity_label": "Painting", "ctx_a": "[header] How to paint [title] Start.  [step] A brush is taken.",
        "ctx_b": "the painter", "endings": ["dips [substeps] it.", " sleeps.", "[title] goes", "cuts it"], "label": "1",
    },
    "mrpc": {"sentence1": "It rains .", "sentence2": "Rain falls .", "label": 1},
    "openbookqa": {"question_stem": "Suns", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "piqa": {"goal": "Cut {{bread}}.", "sol1": "Use a knife.", "sol2": "Use a spoon.", "label": 0},
    "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
    "sst2": {"sentence": "a charming journey . ", "label": 1},
    "winogrande": {"sentence": "Ann liked Bea as _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
}  # fmt: skip
YAML = {
    "arc_easy": "arc/arc_easy.yaml", "boolq": "super_glue/boolq/default.yaml", "hellaswag": "hellaswag/hellaswag.yaml",
    "mrpc": "glue/mrpc/default.yaml", "openbookqa": "openbookqa/openbookqa.yaml", "piqa": "piqa/piqa.yaml",
    "rte": "glue/rte/default.yaml", "sst2": "glue/sst2/default.yaml", "winogrande": "winogrande/default.yaml",
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_requests_are_those_of_the_harness_own_task(name):
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager, _yaml_loader

    folder = Path(lm_eval.__file__).parent / "tasks"
    own = _yaml_loader.load_yaml(folder / YAML[name], resolve_func=True)
    own = {key: value for key, value in own.items() if key not in ("dataset_path", "dataset_name", "tag", "group")}
    rows = [ROWS[name]]
    split = {"train": [], "validation": rows, "test": rows}
    own["custom_dataset"] = lambda **_: {
        key: datasets.Dataset.from_list(value) for key, value in split.items() if value
    }
    own.pop("training_split", None)
    theirs = ConfigurableTask(config=own)
    ours = TaskManager(include_defaults=False).load(
        [harness._configuration(name, read_items(rows, TASKS[name].read, "a test"))]
    )["tasks"][name]

    def requests(task):
        document = next(iter(task.eval_docs))
        context = task.fewshot_context(document, num_fewshot=0)
        made = task.construct_requests(doc=document, ctx=context, metadata=(name, 0, 1))
        results = task.process_results(document, [(-1.0 - 0.1 * i * i, False) for i, _ in enumerate(made)])
        metric = TASKS[name].metric
        return [tuple(each.args) for each in made], float(results[metric])

    assert requests(ours) == requests(theirs)


def test_items_of_two_kinds_do_not_mix():
    items = (Item(("a",), ("b", "c"), 0), Item(("a", "b"), ("c",), 0))
    with pytest.raises(UsageError, match="make it two tasks"):
        harness._configuration("mixed", items)


def test_a_task_of_the_harness_by_name(tokenizer, monkeypatch):
    """Without a network: the harness' loader is given a task under a name of its own."""
    items = (Item(("w1 w2",), ("w3", "w4 w5"), 1), Item(("w5",), ("w3", "w4 w5"), 0), Item(("w6",), ("w1", "w2"), 0))
    from lm_eval.tasks import TaskManager

    load = TaskManager.load

    def loaded(self, names):
        return load(self, [harness._configuration("blimp", items) if name == "blimp" else name for name in names])

    monkeypatch.setattr(TaskManager, "__init__", _small(TaskManager.__init__))
    monkeypatch.setattr(TaskManager, "load", loaded)
    found = tasks(tiny("Llama"), tokenizer, ["blimp"], limit=2).tasks[0]
    assert (found.name, found.metric, found.n, found.split) == ("blimp", "acc_norm", 2, "evaluated")
    with pytest.raises(UnknownName, match="Did you mean 'piqa'"):
        tasks(tiny("Llama"), tokenizer, ["piqqa"])


def _small(start):
    def init(self, *args, **options):
        start(self, include_defaults=False)
        self._all_tasks = ["blimp", "broken"]

    return init


def test_a_task_that_the_harness_cannot_load(tokenizer, monkeypatch):
    from lm_eval.tasks import TaskManager

    def unreachable(self, names):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(TaskManager, "__init__", _small(TaskManager.__init__))
    monkeypatch.setattr(TaskManager, "load", unreachable)
    with pytest.raises(LoadFailure, match=r"could not load broken \(ConnectionError: no network\).*without a network"):
        tasks(tiny("Llama"), tokenizer, ["broken"])


def test_a_metric_that_counts_nothing():
    with pytest.raises(UsageError, match="no metric that counts right items, only perplexity"):
        harness.headline(harness.Answers("x", {"perplexity": (0.5,)}, ()))


@pytest.mark.real
def test_the_wheel_holds_what_the_table_says():
    for (name, split), rows in {
        ("piqa", "validation"): 1838, ("arc_challenge", "test"): 1172, ("openbookqa", "test"): 500,
        ("arc_challenge", "validation"): 299, ("winogrande", "validation"): 1267, ("rte", "validation"): 277,
    }.items():  # fmt: skip
        items = read_items(olmo.read_rows(name, split), TASKS[name].read, name)
        assert len(items) == rows


@pytest.mark.real
def test_smollm2_is_above_chance(smollm2):
    model, tokenizer = smollm2
    found = tasks(model, tokenizer, ["piqa"], limit=24)
    assert found.tasks[0].value > 0.5 and found.tasks[0].metric == "acc_norm"

"""The page: complete, self-contained, escaped, honest about what is missing."""

import html
import math
import re
from html.parser import HTMLParser

import pytest

from secateur.report import page
from secateur.report.charts import Axis, Line, depth_axis, dots, log_axis, panel, share_axis
from secateur.report.depth import MOST_ROWS
from secateur.report.values import DASH, duration, name_runs, percent, with_error

ROLES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
EVIL = '<script>alert("x")</script>&\'"'
VOID = {"meta", "circle", "path", "polygon", "line", "br"}


def pruned(name="wanda", *, blocks=4, sparsity=0.5, pattern="unstructured per row", perplexity=34.6, **more):
    layers, errors = [], []
    for block in range(blocks):
        for k, role in enumerate(ROLES):
            layer = f"model.layers.{block}.{role}"
            layers.append({"name": layer, "block": f"model.layers.{block}", "shape": [8, 16], "sparsity": sparsity})
            errors.append({"name": layer, "relative_error": 0.01 * (1 + k) * (1 + block)})
    prune = {
        "method": {"name": name},
        "pattern": pattern,
        "schedule": "sequential",
        "allocation": {"name": "uniform"},
        "target": sparsity,
        "sparsity": {"layers": sparsity, "model": 0.4},
        "layers": layers,
        "calibration": {"text": "gutenberg", "samples": 32, "seqlen": 1024, "seed": 7, "sha256": "ca11b"},
        "coverage": {"share": 0.97, "unseen": {"model.layers.0.strange": 1200}, "uncalled": []},
        "seconds": {"total": 61.26, "forward": 50.0},
        "peak_memory_bytes": 2**30,
        "versions": {"torch": "2.13.0"},
        "warnings": ["damping was raised"],
    }
    evaluate = {
        "perplexity": {"value": perplexity, "stderr": 0.412, **measured()},
        "fidelity": {"js_divergence": 0.0831, "js_divergence_stderr": 0.00066, "kl_divergence": 0.4}
        | {"js_quantiles": {"0.5": 0.02, "0.9": 0.2, "0.99": 0.3125, "max": 0.6}}
        | {"top1_agreement": 0.652, "top1_agreement_stderr": 0.0037},
        "sparsity": {"layers": sparsity, "model": 0.4},
    }
    return {"prune": prune, "evaluate": evaluate, "errors": errors} | more


def measured(**changed):
    return {"text": "gutenberg", "split": "test", "tokens": 16368, "seqlen": 1024, "sha256": "7e57"} | changed


def dense():
    return {"prune": None, "evaluate": {"perplexity": {"value": 19.41, "stderr": 0.21, **measured()}}}


class Checker(HTMLParser):
    """Every element is closed, nothing is fetched, nothing runs."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        assert not [k for k, _ in attributes if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(document):
    checker = Checker()
    checker.feed(document)
    checker.close()
    assert checker.open == []
    assert checker.links == []
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(checker.seen)
    assert not re.search(r"url\(|@import|https?:", document)
    return " ".join(checker.text)


def rows(document):
    """The cells of the table of results, row by row."""
    body = document.split('class="results"')[1].split("<tbody>")[1].split("</tbody>")[0]
    cells = (re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row) for row in body.split("<tr>")[1:])
    return [[html.unescape(re.sub(r"<.*?>", "", cell)) for cell in row] for row in cells]


def test_a_page_is_complete_and_self_contained():
    runs = [dense(), pruned("magnitude", perplexity=275.7), pruned("wanda"), pruned("sparsegpt", perplexity=28.4)]
    document = page(runs, title="A study")
    text = check(document)
    assert document.startswith("<!doctype html>")
    assert "3 pruned models. Lowest perplexity: sparsegpt, 28.40 ± 0.41; the dense model has 19.41 ± 0.21." in text
    perplexities = {"magnitude": "275.70 ± 0.41", "wanda": "34.60 ± 0.41", "sparsegpt": "28.40 ± 0.41"}
    rest = ["0.08310 ± 0.00066", "0.3125", "0.4000", "65.20 ± 0.37 %", "61.3 s", "1.00 GiB"]
    assert rows(document) == [
        ["dense", DASH, DASH, DASH, "19.41 ± 0.21", *[DASH] * 6],
        *([name, "unstructured per row", "50 %", "40 %", value, *rest] for name, value in perplexities.items()),
    ]
    for known in (
        "seed: 7",
        "ca11b",
        "7e57",
        "torch: 2.13.0",
        "damping was raised",
        "model.layers.0.strange (1,200 weights)",
    ):
        assert known in text
    assert "97 %" in text
    assert "same file size" in text


def test_one_panel_per_role_and_one_point_per_layer():
    document = page([dense(), pruned("magnitude"), pruned("wanda", blocks=4)], title="A study")
    errors = document.split("<h2>Error of each layer</h2>")[1].split("</section>")[0]
    captions = re.findall("<figcaption>(.*?)</figcaption>", errors)
    assert captions == ["q_proj", "k_proj", "down_proj"]
    assert errors.count('class="hit"') == 2 * 4 * len(ROLES)
    assert "<title>wanda, block 3: 0.12</title>" in errors


def test_equal_sparsities_share_one_panel_and_different_ones_do_not():
    def panels(runs):
        document = page(runs, title="x")
        return document.split("<h2>Sparsity of each layer</h2>")[1].split("</section>")[0].count("<figure>")

    assert panels([pruned("magnitude"), pruned("wanda")]) == 1
    assert panels([pruned("magnitude"), pruned("wanda", sparsity=0.6)]) == len(ROLES)


def test_everything_from_data_is_escaped():
    run = pruned(EVIL, pattern=EVIL, model={"name": EVIL, EVIL: EVIL}, machine={EVIL: [EVIL, {EVIL: EVIL}]})
    run["prune"] |= {"schedule": EVIL, "allocation": {"name": EVIL, EVIL: EVIL}, "versions": {EVIL: EVIL}}
    run["prune"] |= {"warnings": [EVIL], "coverage": {"unseen": {EVIL: 3}, "uncalled": [EVIL]}}
    run["prune"]["calibration"] = {EVIL: EVIL}
    run["prune"]["layers"] = [
        {"name": f"{EVIL}.0.{EVIL}", "block": f"{EVIL}.0", "shape": [EVIL], "sparsity": s} for s in (0.0, 0.9)
    ]
    run["errors"] = [{"name": f"{EVIL}.0.{EVIL}", "relative_error": 0.5}]
    run["evaluate"]["perplexity"] |= {"text": EVIL, "split": EVIL, "sha256": EVIL, "seqlen": EVIL}
    twin = {**run, "errors": None}
    for runs in ([{**dense(), "name": EVIL}, run, twin], [run]):  # on different texts, on one
        document = page(runs, title=EVIL)
        assert "<script" not in document
        assert EVIL in check(document)


@pytest.mark.parametrize("value", [None, math.nan, "many", True])
def test_a_missing_measure_is_a_dash(value):
    run = pruned()
    run["evaluate"] = {"perplexity": {"value": value, "stderr": value}, "fidelity": None}
    run["prune"] |= {"seconds": {"total": value}, "peak_memory_bytes": value, "sparsity": {"layers": value}}
    document = page([run], title="x")
    assert rows(document) == [["wanda", "unstructured per row", *[DASH] * 9]]
    assert not re.search(r"\b(nan|none)\b", check(document).split("}\n")[-1].lower())


@pytest.mark.parametrize("run", [{}, {"prune": {}}, {"prune": None, "evaluate": None, "errors": None}])
def test_an_empty_run_still_makes_a_page(run):
    check(page([run], title="x"))
    check(page([], title="x"))


def test_what_all_runs_share_is_said_once_and_the_rest_by_run():
    other = pruned("ria")
    other["prune"]["calibration"] = None
    dd = page([pruned(), other, pruned("sparsegpt")], title="x").split("<dt>Calibration</dt>")[1].split("</dd>")[0]
    assert re.findall("<b>(.*?)</b>", dd) == ["wanda, sparsegpt", "ria"]
    assert "<b>" not in page([pruned(), pruned("ria")], title="x").split("<dt>Calibration</dt>")[1].split("</dd>")[0]


def test_an_infinite_perplexity_is_said_and_not_drawn():
    document = page([dense(), pruned(perplexity=math.inf)], title="x")
    assert rows(document)[1][4] == "∞"
    assert 'class="dots"' not in document
    check(document)


def test_measures_on_different_texts_are_not_to_be_compared():
    other = pruned("magnitude")
    assert "do not compare" not in page([dense(), other], title="x")
    other["evaluate"]["perplexity"] |= measured(sha256="0ther")
    document = page([dense(), other, pruned()], title="x")
    assert "do not compare" in document
    assert "Lowest perplexity" not in document


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("unstructured per layer", ["same file size"]),
        ("2:4", ["sparse tensor cores"]),
        ("4:8", ["no common hardware support"]),
    ],
)
def test_size_and_speed_follow_the_pattern(pattern, said):
    text = " ".join(check(page([dense(), pruned(pattern=pattern)], title="x")).split())
    every = ["same file size", "sparse tensor cores", "no common hardware support"]
    assert [sentence for sentence in every if sentence in text] == said
    assert "Size and speed" not in page([dense()], title="x")


def test_runs_of_one_method_get_different_names():
    owl = pruned()
    owl["prune"]["allocation"] = {"name": "owl", "bound": 0.08}
    runs = [dense(), pruned(), owl, pruned(pattern="2:4"), pruned("ria"), pruned("ria")]
    assert name_runs(runs) == ["dense", "wanda per row uniform", "wanda per row owl", "wanda 2:4", "ria (5)", "ria (6)"]


def test_experts_are_drawn_as_median_and_range():
    run = pruned()
    run["errors"] = [
        {"name": f"model.layers.2.experts.{expert}.gate", "relative_error": error}
        for expert, error in enumerate((0.1, 0.2, 0.4))
    ]
    document = page([run], title="x")
    assert "<title>wanda, block 2: median 0.2, 0.1 to 0.4 (3 layers)</title>" in document
    assert "<figcaption>gate</figcaption>" in document


def test_stacks_with_the_same_layers_are_told_apart():
    run = pruned()
    run["errors"] = [
        {"name": f"{stack}.block.0.layer.0.SelfAttention.q", "relative_error": 0.1} for stack in ("encoder", "decoder")
    ]
    captions = re.findall("<figcaption>(.*?)</figcaption>", page([run], title="x"))
    assert any("encoder" in c for c in captions) and any("decoder" in c for c in captions)


def test_an_error_that_cannot_be_drawn_is_left_out_and_zero_lies_on_the_edge():
    run = pruned(blocks=1)
    for entry, error in zip(run["errors"], (None, math.inf, 0.0), strict=True):
        entry["relative_error"] = error
    errors = page([run], title="x").split("<h2>Error of each layer</h2>")[1].split("</section>")[0]
    assert errors.count('class="hit"') == 1
    assert "<title>wanda, block 0: 0</title>" in errors


def test_a_table_of_too_many_layers_says_so():
    run = pruned(blocks=1 + MOST_ROWS // len(ROLES))
    document = page([run], title="x")
    assert "<details>" not in document
    assert "too many to list" in document
    assert "<details>" in page([pruned()], title="x")


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (34.6, 0.412, "34.60 ± 0.41"),
        (12345.678, 120.0, "12,346 ± 120"),
        (0.08312, None, "0.08312"),
        (0.0, None, "0"),
        (5.0, 0.0, "5.000"),
        (5.0, math.nan, "5.000"),
        (None, 0.1, DASH),
        (math.inf, 0.1, "∞"),
    ],
)
def test_numbers_show_the_digits_that_their_error_allows(value, stderr, text):
    assert with_error(value, stderr) == text


def test_shares_and_durations():
    assert [percent(v) for v in (0.5, 0.3947, 0.0, None)] == ["50 %", "39.5 %", "0 %", DASH]
    assert [duration(v) for v in (3.14, 99.9, 129.6, 119.7, None)] == [
        "3.1 s",
        "99.9 s",
        "2 min 10 s",
        "2 min 00 s",
        DASH,
    ]


@pytest.mark.parametrize("values", [[0.03, 0.4], [1e-6, 3.0], [0.5], [19.4, 275.0], [1.0, 1.0], [0.0], []])
def test_a_log_axis_holds_its_values_with_a_few_ticks(values):
    axis = log_axis(values, str)
    assert axis.low < axis.high
    assert all(axis.low <= v <= axis.high for v in values if v > 0)
    assert 2 <= len(axis.ticks) <= 6
    places = [axis.place(t) for t in axis.ticks]
    assert places == sorted(places) and places[0] >= 0 and places[-1] <= 1


@pytest.mark.parametrize("count", [1, 2, 12, 30, 126])
def test_a_depth_axis_has_few_whole_ticks(count):
    axis = depth_axis(range(count))
    assert 1 <= len(axis.ticks) <= 7
    assert all(t == int(t) and 0 <= t < count for t in axis.ticks)


def test_places_in_a_panel_and_on_a_row():
    drawn = panel("p", [Line("a", ((0, 0.5), (1, 1.0)))], depth_axis([0, 1]), share_axis([1.0]), value=str)
    heights = [float(v) for v in re.findall(r'class="hit" cx="[\d.]+" cy="([\d.]+)"', drawn)]
    assert heights == [68.0, 8.0]  # of 120 from 8 to 128: the middle and the top
    row = dots([("a", 10.0, 1.0, "10 ± 1", 0)], Axis(0.0, 20.0))
    assert 'x1="40.40%" x2="59.60%"' in row  # two standard errors either way of the middle


def probes(pruned_text="Paris, the city.", first=3, prompt="The capital", chat=False):
    probe = {"prompt": prompt, "chat": chat, "dense": "Paris, the capital.", "pruned": pruned_text}
    return {"tokens": 48, "probes": [probe | {"first_difference": first, "dense_tokens": 5, "pruned_tokens": 5}]}


def with_probes(name, **changed):
    run = pruned(name)
    return run | {"evaluate": run["evaluate"] | {"generation": probes(**changed)}}


def test_probes_stand_side_by_side_under_one_prompt():
    runs = [dense(), with_probes("wanda"), with_probes("ria", pruned_text="Paris, the capital.", first=None)]
    document = page(runs, title="x")
    text = check(document)
    assert document.count("What the models write") == 1 and document.count('<div class="probe">') == 1
    assert '<span class="same">Paris, the c</span>ity.' in document  # the dense text goes on with "apital"
    assert "differs after 3 tokens" in text and "the same as the dense model" in text
    assert '<span class="same">Paris, the capital.</span>' in document
    assert "At most 48 tokens each" in text and "through the chat template" not in text
    assert "through the chat template" in check(page([with_probes("wanda", chat=True)], title="x"))


def test_without_probes_there_is_no_such_section():
    assert "What the models write" not in page([dense(), pruned()], title="x")
    assert "What the models write" not in page([pruned() | {"evaluate": {"generation": {"probes": []}}}], title="x")


def test_probes_are_escaped_and_clipped():
    document = page([with_probes("wanda", pruned_text=EVIL * 200, prompt=EVIL)], title="x")
    check(document)
    assert "<script" not in document and html.escape(EVIL) in document and "…" in document
    assert "<i>nothing</i>" in page([with_probes("wanda", pruned_text="", first=0)], title="x")


def test_refinements_name_the_run_and_their_gain_is_told():
    runs = [pruned("wanda"), pruned("wanda")]
    runs[1]["prune"]["refine"] = [{"name": "swap", "rounds": 4}, {"name": "refit", "iterations": 12}]
    for layer, (before, after) in zip(runs[1]["prune"]["layers"], [(0.2, 0.1), (0.4, 0.2), (None, 0.2)], strict=False):
        layer["output_error"] = {"before": before, "after": after}
    assert name_runs(runs) == ["wanda", "wanda + swap + refit"]
    text = check(page(runs, title="x"))
    assert "name: swap · rounds: 4, name: refit · iterations: 12" in text
    assert "mean over 2 refined layers: 0.3 before the refinements, 0.15 after" in text
    fewer = [pruned("wanda", refine=None), pruned("wanda")]
    for run, steps in zip(fewer, (12, 3), strict=True):
        run["prune"]["refine"] = [{"name": "refit", "iterations": steps}]
    assert len(set(name_runs(fewer))) == 2 and all("iterations=" in name for name in name_runs(fewer))

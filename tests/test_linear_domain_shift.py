"""The example of linear models: both directions, and its fit and mask by other means."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "linear_domain_shift.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("linear_domain_shift", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_it_imports_the_lowest_floor_only():
    lines = [line.split()[1] for line in EXAMPLE.read_text().splitlines() if line.startswith(("import", "from"))]
    assert {line for line in lines if line.startswith("secateur")} == {"secateur.masks"}


def test_it_helps_and_it_hurts(example, capsys):
    found = dict(example.main(["--repeats", "120"]))
    shift = found[example.Case(60, 0.9, 0.0, sparse=True)]
    assert shift.verdict == "helps" and shift.pruned < shift.dense and shift.wins > 0.7
    assert found[example.Case(60, 0.9, 0.0, sparse=False)].verdict == "no difference"
    assert found[example.Case(60, 0.9, 0.9, sparse=True)].verdict == "hurts"
    plenty = found[example.Case(200, 0.9, 0.9, sparse=False)]
    assert plenty.verdict == "hurts" and plenty.dense == pytest.approx(1 / (1 - 50 / 200), rel=0.05)  # sigma^2 n/(n-d)
    table = capsys.readouterr().out
    assert table.count("helps") >= 1 and table.count("hurts") == 2 and len(table.splitlines()) == 3 + len(found)


def test_features_are_correlated_as_said(example):
    drawn = example.features(4, 5000, 0.9, torch.Generator().manual_seed(1)).flatten(0, 1)
    measured = torch.corrcoef(drawn.T)
    assert measured[0, 1] == pytest.approx(0.9, abs=0.02) and measured[3, 6] == pytest.approx(0.9**3, abs=0.03)


def test_the_mask_is_wandas(example):
    random = np.random.default_rng(0)
    w, x = random.normal(size=(2, 50)), random.normal(size=(2, 7, 50)) * random.uniform(0.1, 3, 50)
    pruned = example.wanda(torch.tensor(w), torch.tensor(x), 0.3).numpy()
    for row in range(2):
        score = [abs(w[row, j]) * np.sqrt((x[row, :, j] ** 2).sum()) for j in range(50)]
        gone = sorted(range(50), key=score.__getitem__)[:15]
        assert sorted(np.flatnonzero(pruned[row] == 0)) == sorted(gone)


def test_the_t_test_is_scipys(example):
    values = np.random.default_rng(0).normal(0.2, 1, 30)
    assert example.paired_t(torch.tensor(values)) == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)


def test_bad_input(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--repeats", "1"])
    assert "must be 2 or more" in capsys.readouterr().err

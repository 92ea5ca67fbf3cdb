"""Observing the real model: what its heads attend to, and that a calibrated mask holds more of it than others."""

import pytest

from secateur.attention.analysis import analyse
from secateur.attention.baselines import random_plan, window_plan
from secateur.attention.density import plan_report
from secateur.attention.masking import make_plan
from secateur.attention.observe import observe
from secateur.attention.transfer import mass_recall
from secateur.data.calibration import calibration, windows

pytestmark = pytest.mark.real


def test_smollm2_attends_to_its_first_token_and_nearby(smollm2):
    model, tokenizer = smollm2
    seen = observe(model, calibration(tokenizer, "gutenberg", n=2, seqlen=192, model=model), block=16)
    unseen = observe(model, windows(tokenizer, "gutenberg", 192, 1, model=model).ids, block=16)
    found = analyse(seen)
    assert len(found.sites) == 30 and all(len(site.entropy) == 9 for site in found.sites)
    means = found.families["decoder-self"]
    assert means["first"] > 0.15 and means["span"] < 96  # a sink, and nearer than chance
    plan = make_plan(seen, 0.5, kind="absolute")
    report = plan_report(plan)
    assert report.total.density_block == pytest.approx(0.5, abs=1e-4) and len(report.sites) == 30
    recall = mass_recall(plan, unseen).total
    assert recall > 0.8
    assert recall > mass_recall(window_plan(plan), unseen).total > mass_recall(random_plan(plan), unseen).total

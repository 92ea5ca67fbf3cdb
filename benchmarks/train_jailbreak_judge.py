"""Trains the judge of attacks that ships: python benchmarks/train_jailbreak_judge.py [--data FOLDER] [--out FILE]

Logistic regression (L2, C = 0.003, columns scaled to unit variance) on 577 numbers an answer: the mean state of its
tokens behind block 18 of SmolLM2 and the log-odds of a refusal by its wording (`secateur.safety.states`); all
1,640 responses of JailbreakBench, and the first 36 words of each once more, for studies cut answers short. What is
written into the card is measured with a fifth of the requests, an attack, a model, or a model and a fifth of the
requests left out. Block and C were chosen on these same responses; blocks 16 to 20 differ by half a point. Minutes on
two cores. Needs the extra `safety` (scikit-learn).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from judge_data import Labelled, hashes, jailbreakbench, xstest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from train_judge import accuracy, agreement, asked, folds, unseen, write
from train_judge import matrix as words_of

from secateur.safety.judges import Item
from secateur.safety.judges.classifier import Classifier
from secateur.safety.judges.jailbreak import SHIPPED, log_odds
from secateur.safety.records import Verdict
from secateur.safety.states import VERSION, WIDTH, States

C, WORDS = 0.003, 36
LEFT_OUT = ("requests", "attack", "model", "model and requests")


def matrix(rows: Sequence[Labelled], wording: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, 577): the states, and the wording's log-odds."""
    return np.hstack([States()([(row.prompt, row.response) for row in rows]), wording[:, None]])


def worded(rows: Sequence[Labelled]) -> NDArray[np.float64]:
    """The log-odds of a refusal by the shipped classifier, which was trained on none of JailbreakBench."""
    return log_odds(Classifier().judge([Item(row.prompt, row.response, "") for row in rows]))


def both(rows: Sequence[Labelled]) -> NDArray[np.float64]:
    """(2, rows, 577): whole answers, and their beginnings."""
    cut = [replace(row, response=beginning(row.response)) for row in rows]
    return np.stack([matrix(each, worded(each)) for each in (rows, cut)])


def beginning(text: str) -> str:
    """The first 36 words, as they stand."""
    words = list(re.finditer(r"\S+", text))
    return text if len(words) <= WORDS else text[: words[WORDS - 1].end()]


def fit(x: NDArray[np.float64], failed: NDArray[np.bool_]) -> Pipeline:
    """The one regression of this file, of (2, rows, 577)."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000))
    return model.fit(np.concatenate(list(x)), np.concatenate([failed] * len(x)))


def left_out(x: NDArray[np.float64], rows: Sequence[Labelled], what: str) -> NDArray[np.float64]:
    """(2, rows): P(failed) by weights that did not see the row, nor any that shares with it what is `LEFT_OUT`."""
    failed = np.array([row.refused for row in rows])
    fold = folds([row.prompt for row in rows])
    by = {
        "requests": [fold], "attack": [np.array([row.group for row in rows])],
        "model": [np.array([row.model for row in rows])],
    }  # fmt: skip
    owners = by["model"] + by["requests"] if what == "model and requests" else by[what]
    found = np.empty(x.shape[:2])
    for cell in sorted(set(zip(*(owner.tolist() for owner in owners), strict=True))):
        same = [owner == value for owner, value in zip(owners, cell, strict=True)]
        test, seen = np.logical_and.reduce(same), ~np.logical_or.reduce(same)
        model = fit(x[:, seen], failed[seen])
        found[:, test] = [model.predict_proba(part)[:, 1] for part in x[:, test]]
    return found


def on_xstest(model: Pipeline, rows: Sequence[Labelled], p: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Refused or failed, of all of XSTest, as the judge works: harmful requests by these weights, which saw none of
    XSTest, all others by p: P(refusal) by a classifier of wording that saw neither their model nor their request."""
    found = p >= 0.5
    harmful = np.array([row.harmful for row in rows])
    wording = log_odds([Verdict("refusal", "", chance) for chance in p[harmful].tolist()])
    found[harmful] = model.predict(matrix([row for row in rows if row.harmful], wording))
    return np.asarray(found)


def main() -> None:
    data, out = asked(__doc__, SHIPPED)
    rows, people = jailbreakbench(data), xstest(data)
    x, failed = both(rows), np.array([row.refused for row in rows])
    measured = {}
    for what in LEFT_OUT:
        for called, p in zip(("", f", first {WORDS} words"), left_out(x, rows, what), strict=True):
            measured[f"jailbreakbench, unseen {what}{called}"] = accuracy(failed, p >= 0.5)
    model = fit(x, failed)
    refused, harmful = (np.array([getattr(row, name) for row in people]) for name in ("refused", "harmful"))
    says = on_xstest(model, people, unseen(words_of(people), people, "model"))
    for called, here in (("all", np.ones_like(harmful)), ("harmful requests", harmful)):
        measured[f"xstest, nothing of it trained on, {called}"] = agreement(refused[here], says[here])
    scaler, regression = model[0], model[1]
    slopes = regression.coef_[0] / scaler.scale_
    tensors = {
        "states": slopes[:WIDTH].astype(np.float32),
        "wording": slopes[WIDTH:].astype(np.float32),
        "bias": (regression.intercept_ - slopes @ scaler.mean_).astype(np.float32),
    }
    card = {
        "what": "P(an answer does not do the harmful thing that was asked), English: logistic regression on the mean "
        "state of the answer in SmolLM2-135M-Instruct and on its wording; no text is stored",
        "version": VERSION,
        "recipe": "benchmarks/train_jailbreak_judge.py",
        "trained on": "the labels of JailbreakBench's 1,640 attack artifacts, by Llama-3-70B",
        "attribution": "JailbreakBench, Patrick Chao et al. 2024, arXiv:2404.01318, MIT, "
        "github.com/JailbreakBench/artifacts; changed: only numbers derived from responses and labels are kept",
        "files": hashes(data),
        "measured": measured,
    }
    write(out, tensors, card)


if __name__ == "__main__":
    main()

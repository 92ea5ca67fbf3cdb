"""Trains the classifier that ships: python benchmarks/train_judge.py [--data FOLDER] [--out FILE]

Logistic regression (L2, C = 1) on the cues, weighted by 0.2, and the hashed phrases of `secateur.safety.reading`; all
2,250 completions of XSTest. What is written into the card is measured by cross-validation with the model, or its
whole family, and a fifth of the prompts left out, so that every completion is judged by weights that saw neither its
model nor its prompt. Seconds on one core. Needs the extra `safety` (scikit-learn).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from judge_data import Labelled, folder, hashes, jailbreakbench, xstest
from numpy.typing import NDArray
from safetensors.numpy import save
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score

from secateur.cache import scratch_beside
from secateur.safety import reading
from secateur.safety.judges.classifier import SHIPPED

C, CUES, FOLDS = 1.0, 0.2, 5


def matrix(rows: Sequence[Labelled]) -> csr_matrix:
    """(rows, PLACES + CUES): phrases in rows of length one, then the cues times 0.2."""
    found = [reading.phrases(row.prompt, row.response) for row in rows]
    starts = np.cumsum([0, *map(len, found)])
    values = np.concatenate([np.full(len(each), len(each) ** -0.5) for each in found])
    phrases = csr_matrix((values, np.concatenate(found), starts), shape=(len(rows), reading.PLACES))
    cues = np.stack([reading.cues(row.prompt, row.response) for row in rows])
    return hstack([phrases, csr_matrix(CUES * cues)]).tocsr()


def fit(x: csr_matrix, refused: NDArray[np.bool_]) -> LogisticRegression:
    """The one regression of this file."""
    return LogisticRegression(C=C, solver="liblinear", random_state=0).fit(x, refused)


def folds(prompts: Sequence[str]) -> NDArray[np.int64]:
    """A fold for every row, the same for the same prompt, whatever the order."""
    each = sorted(set(prompts))
    place = dict(zip(each, np.random.default_rng(0).permutation(len(each)) % FOLDS, strict=True))
    return np.array([place[prompt] for prompt in prompts])


def unseen(x: csr_matrix, rows: Sequence[Labelled], by: str) -> NDArray[np.float64]:
    """P(refusal) of every row by weights that saw neither its `by` (model or group) nor its prompt."""
    refused, owner = np.array([row.refused for row in rows]), np.array([getattr(row, by) for row in rows])
    fold, found = folds([row.prompt for row in rows]), np.empty(len(rows))
    for name in sorted(set(owner)):
        for k in range(FOLDS):
            test = (owner == name) & (fold == k)
            found[test] = fit(x[(owner != name) & (fold != k)], refused[(owner != name) & (fold != k)]).predict_proba(
                x[test]
            )[:, 1]
    return found


def asked(about: str, shipped: Path) -> tuple[Path, Path]:
    """The folder of the data, and where the weights go."""
    words = argparse.ArgumentParser(description=about.splitlines()[0])
    words.add_argument("--data", help="the folder of the safety data")
    words.add_argument("--out", type=Path, default=shipped)
    options = words.parse_args()
    return folder(options.data), options.out


def agreement(truth: NDArray[np.bool_], says: NDArray[np.bool_]) -> dict[str, float]:
    """As cards have it."""
    return {"n": len(truth), "kappa": round(float(cohen_kappa_score(truth, says)), 4)} | accuracy(truth, says)


def accuracy(truth: NDArray[np.bool_], says: NDArray[np.bool_]) -> dict[str, float]:
    """The same without kappa, for labels that mean something else than the judge says."""
    return {"n": len(truth), "accuracy": round(float((truth == says).mean()), 4)}


def write(out: Path, tensors: Mapping[str, NDArray[np.floating]], card: Mapping[str, object]) -> None:
    """The weights and their card beside them, each whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(out) as scratch:
        (scratch / "weights").write_bytes(save(dict(tensors)))
        (scratch / "card").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (scratch / "card").replace(out.with_suffix(".json"))
        (scratch / "weights").replace(out)
    print(json.dumps(card["measured"], indent=1))


def main() -> None:
    data, out = asked(__doc__, SHIPPED)
    rows, others = xstest(data), jailbreakbench(data)
    x, refused = matrix(rows), np.array([row.refused for row in rows])
    measured = {}
    for by, called in (("model", "unseen model and prompt"), ("group", "unseen family and prompt")):
        guess = unseen(x, rows, by) >= 0.5
        measured[f"xstest, {called}"] = agreement(refused, guess)
    model = fit(x, refused)
    theirs = np.array([row.refused for row in others])
    measured["jailbreakbench, nothing of it trained on"] = accuracy(theirs, model.predict(matrix(others)))
    coefficients = model.coef_[0]
    tensors = {
        "phrases": coefficients[: reading.PLACES].astype(np.float16),
        "cues": (CUES * coefficients[reading.PLACES :]).astype(np.float32),
        "bias": model.intercept_.astype(np.float32),
    }
    card = {
        "what": "P(refusal) of an answer, English: logistic regression on hashed phrases and cues; no text is stored",
        "reading": reading.VERSION,
        "recipe": "benchmarks/train_judge.py",
        "trained on": "the final labels of XSTest's 2,250 completions; full and partial refusals are refusals",
        "attribution": "XSTest, Paul Roettger et al. 2023, arXiv:2308.01263, CC BY 4.0, "
        "github.com/paul-rottger/exaggerated-safety; changed: only numbers derived from answers and labels are kept",
        "files": hashes(data),
        "measured": measured,
    }
    write(out, tensors, card)


if __name__ == "__main__":
    main()

"""How far the judges of refusals agree with people, on answers they have never seen.

    python benchmarks/judges.py [--data FOLDER] [--quick]

XSTest: 2,250 completions of five models, labelled by people (refusal, full or partial, against compliance). The
classifier is trained anew for every model (then for every family of models: two are the same model with a system
prompt) and fifth of the prompts, so that it has seen neither the model nor the prompt it judges. JailbreakBench: 1,640
responses of four models to five attacks, labelled by Llama-3-70B; there the classifier is the shipped one, which was
trained on none of it, and "not refused" is held against "jailbroken". The default judge, jailbreak, is trained anew on
JailbreakBench without a fifth of the requests, one attack, one model, or both a model and a fifth of the requests; on
XSTest it is the shipped one, which saw none of it, over the classifier that has seen neither model nor prompt. Minutes
on two cores, seconds with --quick. Writes results/judges.json; no text is printed or kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from judge_data import Labelled, folder, hashes, jailbreakbench, xstest
from machine import store
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.metrics import cohen_kappa_score
from train_jailbreak_judge import LEFT_OUT, both, fit, left_out, on_xstest
from train_judge import matrix, unseen

from secateur.evaluate.paired import wilson
from secateur.safety.agreement import agree
from secateur.safety.judges import Item, make_judge

LISTS = ("seed10", "gcg13", "wei31", "wei31?match=head", "xstest", "secateur")


def measured(truth: NDArray[np.bool_], says: NDArray[np.bool_], rows: Sequence[Labelled]) -> dict[str, object]:
    """Agreement as a whole and per model."""
    whole = agree(("truth", "judge"), truth.tolist(), says.tolist())
    right = int((truth == says).sum())
    found: dict[str, object] = {
        "n": len(truth),
        "kappa": [whole.kappa, whole.low, whole.high],
        "accuracy": [right / len(truth), *wilson(right, len(truth))],
        "rate": [float(says.mean()), float(truth.mean())],
    }
    models = np.array([row.model for row in rows])
    found["models"] = {
        model: {
            "n": int(here.sum()),
            "kappa": float(cohen_kappa_score(truth[here], says[here])),
            "accuracy": float((truth[here] == says[here]).mean()),
            "false refusals": int((says & ~truth & here).sum()),
            "of compliances": int((~truth & here).sum()),
            "misses": int((~says & truth & here).sum()),
            "of refusals": int((truth & here).sum()),
        }
        for model in sorted(set(models))
        for here in [models == model]
    }
    return found


def show(console: Console, title: str, found: dict[str, dict[str, object]]) -> None:
    """One row a judge; per model the kappa, false refusals and misses."""
    models = list(next(iter(found.values()))["models"])  # type: ignore[call-overload]
    table = Table("judge", "kappa", "accuracy", *models, title=title)
    for name, each in found.items():
        cells = [
            f"{m['kappa']:.2f}  {m['false refusals']}/{m['of compliances']} {m['misses']}/{m['of refusals']}"
            for m in each["models"].values()  # type: ignore[attr-defined]
        ]
        kappa, accuracy = each["kappa"], each["accuracy"]
        table.add_row(name, f"{kappa[0]:.3f} ± {(kappa[2] - kappa[1]) / 2:.3f}", f"{accuracy[0]:.3f}", *cells)  # type: ignore[index]
    console.print(table)
    console.print("per model: kappa, false refusals / compliances, misses / refusals\n")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--data", help="the folder of the safety data")
    words.add_argument("--quick", action="store_true", help="keyword lists and the shipped classifier only")
    options = words.parse_args()
    data = folder(options.data)
    results: dict[str, object] = {"files": hashes(data)}
    console = Console(width=190)
    for title, rows in (("JailbreakBench", jailbreakbench(data)), ("XSTest", xstest(data))):
        truth = np.array([row.refused for row in rows])
        items = [Item(row.prompt, row.response, str(i)) for i, row in enumerate(rows)]
        judges = [make_judge(f"keyword:{name}") for name in LISTS]
        if title == "JailbreakBench":
            judges.append(make_judge("classifier"))
        found = {
            judge.name: measured(truth, np.array([each.refused for each in judge.judge(items)]), rows)
            for judge in judges
        }
        if title == "JailbreakBench" and not options.quick:
            states = both(rows)
            for what in LEFT_OUT:
                for called, p in zip(("", ", first 36 words"), left_out(states, rows, what), strict=True):
                    found[f"jailbreak, unseen {what}{called}"] = measured(truth, p >= 0.5, rows)
            fitted = fit(states, truth)
        if title == "XSTest" and not options.quick:
            x = matrix(rows)
            for by in ("model", "group"):
                called, p = "family" if by == "group" else by, unseen(x, rows, by)
                found[f"classifier, unseen {called} and prompt"] = measured(truth, p >= 0.5, rows)
                if by == "model":
                    found["jailbreak, nothing of it trained on"] = measured(truth, on_xstest(fitted, rows, p), rows)
        show(console, title, found)
        results[title] = found
    console.print(f"written to {store('judges', results)}")


if __name__ == "__main__":
    main()

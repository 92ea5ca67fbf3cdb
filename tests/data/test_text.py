"""Named texts and local files, whole and broken."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from secateur.data import text as text_module
from secateur.data.text import TEXTS, Text, read_text
from secateur.errors import LoadFailure, TextTooShort, UnknownName, UsageError


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_text_joins_and_hashes() -> None:
    text = Text("t", "test", ("a", "", "ü"), "here", separator=" ")
    assert text.joined == "a  ü"
    assert text.sha256 == hashlib.sha256("a  ü".encode()).hexdigest()
    assert "ü" not in repr(text)


# Names


def test_every_name_has_one_line_and_a_source() -> None:
    assert list(TEXTS) == ["wikitext2", "c4", "alpaca", "gutenberg", "pydoc"]
    for named in TEXTS.values():
        assert named.summary
        assert named.source
        assert "\n" not in named.summary + named.source


@pytest.mark.parametrize(("wrong", "near"), [("wikitext-2", "wikitext2"), ("gutenburg", "gutenberg")])
def test_unknown_names_offer_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UnknownName, match=f"Did you mean '{near}'") as error:
        read_text(wrong)
    assert "FILE.jsonl:FIELD" in one_line(error)


@pytest.mark.parametrize("name", ["", ":", "a" * 5000, "nul\0l", "pydoc:text"])
def test_odd_names_are_unknown(name: str) -> None:
    with pytest.raises(UnknownName):
        read_text(name)


def test_unknown_split() -> None:
    with pytest.raises(UnknownName, match="There is no split 'train'"):
        read_text("pydoc", "train")  # type: ignore[arg-type]


# pydoc


def test_pydoc_sides_share_no_paragraph() -> None:
    sides = [read_text("pydoc", split) for split in ("calibration", "test")]
    assert [side.split for side in sides] == ["calibration", "test"]
    paragraphs = [{part.strip() for document in side.documents for part in document.split("\n\n")} for side in sides]
    assert min(len(part) for part in paragraphs) > 300
    assert not paragraphs[0] & paragraphs[1]


def test_pydoc_names_its_python_and_repeats_itself() -> None:
    text = read_text("pydoc")
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}." in text.source
    assert text == read_text("pydoc")
    assert not text.shared


# The hub, played by a module


class FakeHub(ModuleType):
    """Stands for `datasets`; remembers how it was called."""

    def __init__(self, rows: dict[str, list[str]]) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.calls: list[tuple[tuple[str, ...], dict[str, Any]]] = []
        self.config = SimpleNamespace(HF_HUB_OFFLINE=True)

    def load_dataset(self, *names: str, **options: Any) -> list[dict[str, str]]:
        self.calls.append((names, options))
        return [{"text": row} for row in self.rows[options["split"]]]


def test_wikitext2_is_joined_as_the_field_does(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub({"train": ["", " = A = \n"], "test": ["", " = B = \n"]})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_text("wikitext2").joined == "\n\n = A = \n"
    assert read_text("wikitext2", "test").joined == "\n\n = B = \n"
    assert [names for names, _ in hub.calls] == [("Salesforce/wikitext", "wikitext-2-raw-v1")] * 2
    assert [options for _, options in hub.calls] == [{"split": "train"}, {"split": "test"}]


def test_c4_takes_the_first_documents_of_two_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub({"train": ["a"] * 9_000, "validation": ["b"] * 9_000})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    calibration, test = read_text("c4"), read_text("c4", "test")
    assert (len(calibration.documents), calibration.separator) == (5_000, "\n\n")
    assert (len(test.documents), test.separator) == (1_100, " ")
    assert [options["data_files"] for _, options in hub.calls] == [
        {"train": "en/c4-train.00000-of-01024.json.gz"},
        {"validation": "en/c4-validation.00000-of-00008.json.gz"},
    ]
    assert all(options["streaming"] and "trust_remote_code" not in options for _, options in hub.calls)


def test_alpaca_holds_out_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub({"train": [str(i) for i in range(5_000)]}))
    calibration, test = read_text("alpaca").documents, read_text("alpaca", "test").documents
    assert len(test) == 2_000
    assert (*calibration, *test) == tuple(str(i) for i in range(5_000))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LoadFailure, match=r"pip install 'secateur\[hub\]', or give a local") as error:
        read_text("wikitext2")
    one_line(error)


def test_an_unreachable_hub_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Down(FakeHub):
        def load_dataset(self, *names: str, **options: Any) -> list[dict[str, str]]:
            raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", Down({}))
    with pytest.raises(LoadFailure, match="ConnectionError: no route to host") as error:
        read_text("c4")
    assert "connect to a network" in one_line(error)


def test_the_hub_is_asked_quickly_before_datasets_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub = FakeHub({"train": ["a"]})
    hub.config.HF_HUB_OFFLINE = False
    asked: list[tuple[str, float]] = []

    def dataset_info(self: object, repository: str, *, timeout: float) -> None:
        asked.append((repository, timeout))
        raise TimeoutError("slow")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(LoadFailure, match="TimeoutError: slow"):
        read_text("alpaca")
    assert asked == [("tatsu-lab/alpaca", text_module.HUB_TIMEOUT)]
    assert not hub.calls


# Local files


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, an extra")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    return path


def test_txt_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffZeile ä\r\n\r\nzwei".encode())
    text = read_text(path)
    assert text.documents == ("Zeile ä\n\nzwei",)
    assert text.name == str(path)
    assert text.shared
    assert "the same text for calibration and test" in text.source
    assert read_text(str(path), "test").sha256 == text.sha256


def test_jsonl_with_and_without_a_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "one", "body": "eins"}, {"text": "two", "body": "zwei"})
    path.write_text(path.read_text().replace("\n", "\n\n"))  # blank lines are nothing
    assert read_text(str(path)).documents == ("one", "two")
    assert read_text(f"{path}:").documents == ("one", "two")
    assert read_text(f"{path}:body").documents == ("eins", "zwei")
    assert "field 'body'" in read_text(f"{path}:body").source


def test_parquet_with_and_without_a_field(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["one", "two"], body=["eins", "zwei"])
    assert read_text(str(path)).documents == ("one", "two")
    assert read_text(f"{path}:body").documents == ("eins", "zwei")


@pytest.mark.skipif(sys.platform == "win32", reason="no colons in names there")
def test_paths_may_hold_colons(tmp_path: Path) -> None:
    folder = tmp_path / "C:" / "at 12:30"
    folder.mkdir(parents=True)
    path = write_jsonl(folder / "a:b.jsonl", {"text": "one", "x:y": "colon"})
    (folder / "a:b.txt").write_text("plain")
    assert read_text(str(path)).documents == ("one",)
    assert read_text(f"{path}:x:y").documents == ("colon",)
    assert read_text(str(folder / "a:b.txt")).documents == ("plain",)


def test_windows_paths_are_paths() -> None:
    with pytest.raises(LoadFailure, match=r"There is no file 'C:\\texts\\a.jsonl'"):
        read_text("C:\\texts\\a.jsonl:body")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl:body", "a.parquet:body"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoadFailure, match="There is no file") as error:
        read_text(str(tmp_path / name))
    assert ":body" not in one_line(error)


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    for path in (tmp_path / "a.csv", tmp_path):
        with pytest.raises(LoadFailure, match=r"\.txt, \.jsonl, \.parquet"):
            read_text(str(path))
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(LoadFailure, match="could not be read"):
        read_text(str(tmp_path / "b.txt"))


def test_a_field_of_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="leave out ':body'"):
        read_text(str(tmp_path / "a.txt:body"))


@pytest.mark.parametrize(("name", "content"), [("a.txt", b"caf\xe9 au lait"), ("a.jsonl", b'{"text": "caf\xe9"}')])
def test_other_encodings_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoadFailure, match=r"is not UTF-8 \(byte 0xe9.*iconv") as error:
        read_text(tmp_path / name)
    one_line(error)


def test_a_missing_field_names_the_line_and_the_fields(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"txt": "two", "id": 3})
    with pytest.raises(UnknownName, match=r"no field 'text'. Did you mean 'txt'\? Known: id, txt. .*line 2"):
        read_text(path)
    path = write_parquet(tmp_path / "a.parquet", body=["one"], number=[1])
    with pytest.raises(UnknownName, match="Known: body, number"):
        read_text(path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "cut', "Line 2 of .* is not JSON"),
        ('["text"]', "Line 2 of .* is no JSON object but a list"),
        ('{"text": null}', "Line 2 of .* holds NoneType in the field 'text'"),
        ('{"text": 7}', "Line 2 of .* holds int in the field 'text'"),
        ('{"text": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "Line 2 of .* is not JSON"),
    ],
    ids=["cut", "list", "null", "number", "surrogate", "deep"],
)
def test_broken_lines_are_named(line: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(LoadFailure, match=complaint) as error:
        read_text(path)
    one_line(error)


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["one", None])
    with pytest.raises(LoadFailure, match=r"Row 2 of .* holds NoneType"):
        read_text(path)
    for content in (path.read_bytes()[:-20], b"PAR1", b""):
        path.write_bytes(content)
        with pytest.raises(LoadFailure, match=r"a\.parquet") as error:
            read_text(path)
        one_line(error)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LoadFailure, match=r"pip install 'secateur\[parquet\]'"):
        read_text(tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "content"), [("a.txt", " \n\t"), ("a.txt", ""), ("a.jsonl", '{"text": ""}')])
def test_empty_texts_are_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TextTooShort, match="is empty"):
        read_text(tmp_path / name)

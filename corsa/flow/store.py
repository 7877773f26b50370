"""Where results live: one directory or bucket. Files are written first; a record, written last, makes them visible.

    steps/<fingerprint>/<attempt>/...      files of an attempt; nothing until a record names it
    steps/<fingerprint>/record.json        what was run, with what, and the size and SHA-256 of every file
    partial/<fingerprint>/                 checkpoints of a step in progress
    leases/<fingerprint>.json              who is running it (`corsa.flow.lease`)

The first record of a step wins; it is replaced only when its files are found damaged.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Annotated, Any
from uuid import uuid4

from pyarrow import fs
from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from corsa.config import Frozen
from corsa.errors import CorsaError
from corsa.flow.files import Files
from corsa.flow.names import below, part, relative
from corsa.flow.step import Step


class MissingError(CorsaError):
    """The step has no committed result."""


class DamagedError(CorsaError):
    """The record or files of a committed result differ from what was written."""


Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(Frozen):
    """What `record.json` holds. Fields that a later version adds are ignored.

    Anybody who can write to the store can write a record: its names of files and folders are checked here.
    """

    model_config = ConfigDict(extra="ignore")

    name: str
    kind: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, Fingerprint]  # by input name
    fingerprint: Fingerprint
    attempt: Annotated[str, AfterValidator(part)]
    metrics: dict[str, Any]
    seconds: float
    created: str  # UTC, ISO 8601
    versions: dict[str, str]  # package -> version, and the commit of this source
    files: dict[Annotated[str, AfterValidator(relative)], tuple[int, Digest]]  # path in the artifact -> bytes, SHA-256


@dataclass(frozen=True)
class Artifact:
    """The result of a step, finished or not. Until it is finished, all but `fingerprint` raises `MissingError`."""

    store: Store
    fingerprint: str

    @cached_property
    def record(self) -> Record:
        """Raises `MissingError`, or `DamagedError` if it cannot be read."""
        path = self.store.record_path(self.fingerprint)
        text = self.store.files.read(path)
        if text is None:
            raise MissingError(f"{self.store.url}/{path} does not exist: the step is not finished")
        try:
            record = Record.model_validate_json(text)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            reason = f"{where}: {error.errors()[0]['msg']}" if where else error.errors()[0]["msg"]
            raise DamagedError(f"{self.store.url}/{path} is not a record: {reason}") from error
        if record.fingerprint != self.fingerprint:
            raise DamagedError(f"{self.store.url}/{path} is the record of another step, {record.name!r}")
        return record

    @property
    def metrics(self) -> dict[str, Any]:
        return self.record.metrics

    @property
    def url(self) -> str:
        """Path or URL of the directory of its files."""
        return f"{self.store.url}/{self._directory}"

    @property
    def _directory(self) -> str:
        return f"steps/{self.fingerprint[:16]}/{self.record.attempt}"

    def path(self, name: str) -> str:
        """Path or URL of a file or folder of the artifact. Raises `CorsaError` if there is none of that name."""
        self._files(name)
        if self.store.files.local:
            below(Path(self.store.files.inside("steps")), f"{self._directory.removeprefix('steps/')}/{name}")
        return f"{self.url}/{name}"

    def _files(self, name: str) -> list[str]:
        found = [file for file in self.record.files if file == name or file.startswith(f"{name}/")]
        if not found:
            raise CorsaError(f"{self.record.name!r} has no file {name!r}, only: {', '.join(self.record.files)}")
        return found

    def read(self, name: str) -> bytes:
        """The content of one file. Raises `DamagedError` if it is not what was written."""
        self.path(name)
        content = self.store.files.read(f"{self._directory}/{name}")
        if content is None or hashlib.sha256(content).hexdigest() != self.record.files[name][1]:
            raise DamagedError(f"{self.url}/{name} is damaged. Run the same command again: it is made again")
        return content

    def local(self, name: str) -> Path:
        """A file or folder of the artifact as a local path; fetched once per machine from a store that is not local."""
        if self.store.files.local:
            return Path(self.path(name))
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "corsa" / "artifacts"
        for file in self._files(name):
            cache.mkdir(parents=True, exist_ok=True)
            place = below(cache, f"{self.record.attempt}/{file}")
            if not place.is_file() or _sha256(place) != self.record.files[file][1]:
                place.parent.mkdir(parents=True, exist_ok=True)
                aside = place.with_name(f"{place.name}.{uuid4().hex}")
                aside.write_bytes(self.read(file))
                aside.replace(place)
        return cache / self.record.attempt / name

    def check(self, checksums: bool = False) -> None:
        """Raises `MissingError` or `DamagedError`. Looks at the size of every file and, if asked, at its content."""
        files = self.record.files
        found = self.store.files.info([f"{self._directory}/{name}" for name in files])
        for info, (name, (size, digest)) in zip(found, files.items(), strict=True):
            if info.type != fs.FileType.File:
                raise DamagedError(f"{self.url}/{name} is gone")
            if info.size != size:
                raise DamagedError(f"{self.url}/{name} has {info.size} bytes, {size} were written")
            if checksums and self.store.files.digest(f"{self._directory}/{name}") != digest:
                raise DamagedError(
                    f"{self.url}/{name} has the right size but not the content that was written (SHA-256)"
                )


class Store:
    """All results below one root: a local path, an `s3://` or `gs://` URL, or a path on `filesystem`. Picklable."""

    def __init__(self, root: str | Path, filesystem: fs.FileSystem | None = None) -> None:
        self.files = Files(root, filesystem)
        self.url = self.files.url

    def within(self, folder: str) -> Store:
        """A store in a folder of this one."""
        other = copy(self)
        other.files = self.files.within(folder)
        other.url = other.files.url
        return other

    # What is there

    def artifact(self, fingerprint: str) -> Artifact:
        """The result with this fingerprint. Reading it shows whether it exists."""
        return Artifact(self, fingerprint)

    def find(
        self, step: Step, checksums: bool = False, say: Callable[[str], object] = lambda damage: None
    ) -> Artifact | None:
        """The result of a step; None if it is missing or damaged (`Artifact.check`). `say` gets the damage."""
        artifact = self.artifact(step.fingerprint)
        try:
            artifact.check(checksums)
        except MissingError:
            return None
        except DamagedError as damage:
            say(str(damage))
            return None
        return artifact

    def records(self) -> list[Record]:
        """Every finished step, oldest first. Damaged records are left out."""
        return self.records_and_damage()[0]

    def records_and_damage(self) -> tuple[list[Record], list[str]]:
        """Every finished step, oldest first, and the paths of the records that cannot be read."""
        found, damaged = [], []
        for name in self.files.names("steps"):
            path = f"steps/{name}/record.json"
            text = self.files.read(path)
            if text is None:
                continue
            try:
                record = Record.model_validate_json(text)
            except ValidationError:
                damaged.append(path)
                continue
            if record.fingerprint[:16] == name:
                found.append(record)
            else:
                damaged.append(path)
        return sorted(found, key=lambda record: record.created), sorted(damaged)

    def partial(self, fingerprint: str) -> str:
        """Path or URL for checkpoints of a step in progress; removed when the step is committed."""
        return f"{self.url}/partial/{fingerprint[:16]}"

    def record_path(self, fingerprint: str) -> str:
        return f"steps/{fingerprint[:16]}/record.json"

    # Adding a result

    def prepare(self) -> None:
        """Raises `CorsaError` if the store cannot be written to."""
        probe = f"leases/probe.{uuid4().hex}"
        self.files.publish(probe, b"")
        self.files.remove(probe)

    def workspace(self, step: Step) -> Path:
        """A new empty local directory for the files of one attempt at a step; `commit` takes it from there."""
        with self.files.writing():
            if self.files.local:
                parent = Path(self.files.inside(f"steps/{step.fingerprint[:16]}"))
                parent.mkdir(parents=True, exist_ok=True)
            else:
                parent = Path(tempfile.mkdtemp(prefix="corsa-"))
            path = parent / uuid4().hex
            path.mkdir()
            return path

    def commit(self, step: Step, output: Path, metrics: Mapping[str, Any], seconds: float) -> Artifact:
        """Make the files in `output` the result of a step. An intact existing result is returned instead.

        Raises `CorsaError` if the store cannot be written to or a metric is not JSON. NaN and infinity become null.
        """
        folder = f"steps/{step.fingerprint[:16]}"
        written = sorted(file for file in output.rglob("*") if file.is_file())
        for file in written:
            try:
                relative(str(file.relative_to(output)))
            except ValueError as error:
                raise CorsaError(f"step {step.name!r} wrote a file that cannot be kept: {error}") from error
        record = Record(
            name=step.name,
            kind=step.kind.name,
            version=step.kind.version,
            config=step.config.canonical(),
            inputs={name: needed.fingerprint for name, needed in step.inputs.items()},
            fingerprint=step.fingerprint,
            attempt=output.name,
            metrics={name: _json(value, f"{step.name}: metric {name!r}") for name, value in metrics.items()},
            seconds=round(seconds, 3),
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            versions=_versions(),
            files={str(file.relative_to(output)): (file.stat().st_size, _sha256(file)) for file in written},
        )
        if not self.files.local:
            self.files.upload(output, f"{folder}/{output.name}")
            shutil.rmtree(output.parent)
        text = record.model_dump_json(indent=1).encode()
        path = self.record_path(step.fingerprint)
        if not self.files.publish(path, text):
            if first := self.find(step, checksums=True):
                if first.record.attempt != output.name:  # else it is ours, and only the answer was lost
                    self.files.remove(f"{folder}/{output.name}")
                return first
            self.files.replace(path, text)
        self.files.remove(f"partial/{step.fingerprint[:16]}")
        return self.artifact(step.fingerprint)

    def sweep(self, steps: Iterable[Step]) -> None:
        """Remove what failed or killed attempts at steps left behind. The caller holds their leases.

        Does nothing on a store that is not local, where a lease prevents nobody from writing.
        """
        for step in steps if self.files.local else ():
            try:
                keep = self.artifact(step.fingerprint).record.attempt
            except (MissingError, DamagedError):
                keep = ""
            for attempt in Path(self.files.inside(f"steps/{step.fingerprint[:16]}")).glob("*/"):
                if attempt.name != keep:
                    shutil.rmtree(attempt, ignore_errors=True)


def _json(value: Any, where: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _json(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item, where) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "item"):  # a number of numpy or torch
        return _json(value.item(), where)
    raise CorsaError(f"{where}: a {type(value).__name__} is not JSON")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": python_version()} | _commit()
    for package in ("corsa", "torch", "ray", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def _commit() -> dict[str, str]:
    """The commit of this source, with "-dirty" if files were changed after it; {} outside of a repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return {}
    described = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(described, capture_output=True, text=True, timeout=10, check=True)
        return {"commit": found.stdout.strip()}
    return {}

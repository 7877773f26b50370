"""Files below one root, local or on an object store. Creates a file exclusively and with its whole content, retries
while the storage fails temporarily, and raises errors that say what to do.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar
from urllib.parse import unquote
from uuid import uuid4

from pyarrow import fs
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from corsa.errors import CorsaError
from corsa.terminal import visible

PATIENCE = 120.0
"""Seconds during which operations on a failing storage are retried."""

_log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class Files:
    """The files below a local path, an `s3://`, `gs://` or `file://` URL, or a path on `filesystem`. Picklable.

    A temporary failure (a lost connection, server or network share) is retried for `patience` seconds, at growing
    intervals and with a warning. After that it raises `CorsaError`, as does a root of any other form.
    """

    def __init__(self, root: str | Path, filesystem: fs.FileSystem | None = None, patience: float = PATIENCE) -> None:
        self.url = str(root).rstrip("/")
        self.patience = patience
        if not str(root).strip():
            raise CorsaError("the storage has no name: give a local path, s3://... or gs://...")
        if filesystem is not None:
            self.system, self.root = filesystem, self.url
        elif "://" in self.url or re.match("(s3|gs|file):", self.url):
            if "://" not in self.url:
                scheme, _, rest = self.url.partition(":")
                shown = f"{scheme}:..." if re.search("[:@]", unquote(rest)) else str(root)  # these are credentials
                raise CorsaError(f"storage {shown!r} names no bucket: write s3://BUCKET/FOLDER")
            _refuse_credentials(self.url)
            try:
                self.system, self.root = fs.FileSystem.from_uri(self.url)
            except (ValueError, OSError) as error:
                where = self.url.partition("?")[0]
                raise CorsaError(f"storage {where!r}: {error}. Give a local path, s3://... or gs://...") from error
        else:
            self.system, self.root = fs.LocalFileSystem(), str(Path(root).expanduser().absolute())
        self.local = isinstance(self.system, fs.LocalFileSystem)
        if self.local:
            self.url = self.root
            above = next(place for place in (Path(self.root), *Path(self.root).parents) if place.exists())
            if not above.is_dir():
                raise CorsaError(f"cannot write to {self.root}: Not a directory. {_CLOSED}")

    def hasty(self) -> Files:
        """The same files without retries, for operations that are repeated soon anyway."""
        other = copy(self)
        other.patience = 0.0
        return other

    def within(self, folder: str) -> Files:
        """The files below a folder of these."""
        other = copy(self)
        other.root, other.url = f"{self.root}/{folder}", f"{self.url}/{folder}"
        return other

    def inside(self, path: str) -> str:
        """The path as the file system knows it."""
        return f"{self.root}/{path}"

    def read(self, path: str) -> bytes | None:
        """The content of a file, None if it does not exist."""
        if self.local:
            with suppress(OSError):  # thousands of records are read at once; what fails is tried again below
                return Path(self.inside(path)).read_bytes()
        try:
            return self._patiently(self._read, path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _read(self, path: str) -> bytes:
        with self.system.open_input_stream(self.inside(path), compression=None) as stream:
            return stream.read()

    def digest(self, path: str) -> str:
        """SHA-256 of a file, hex."""
        return self._patiently(self._digest, path)

    def _digest(self, path: str) -> str:
        with self.system.open_input_stream(self.inside(path), compression=None) as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()

    def info(self, paths: Sequence[str]) -> list[fs.FileInfo]:
        """Type, size and modification time of each path; missing paths are included."""
        return self._patiently(self.system.get_file_info, [self.inside(path) for path in paths])

    def names(self, folder: str) -> list[str]:
        """Names directly in a folder; empty if it does not exist."""
        selector = fs.FileSelector(self.inside(folder), allow_not_found=True)
        return [entry.base_name for entry in self._patiently(self.system.get_file_info, selector)]

    def publish(self, path: str, content: bytes) -> bool:
        """Create a file with its whole content; False if it exists. Atomic on POSIX, check-then-put elsewhere.

        False may also mean that an earlier attempt created it and its answer was lost.
        """
        with self.writing():
            return self._patiently(self._publish, path, content)

    def _publish(self, path: str, content: bytes) -> bool:
        if not self.local:
            if self.system.get_file_info(self.inside(path)).type != fs.FileType.NotFound:
                return False
            self._replace(path, content)
            return True
        with self._aside(path, content) as aside:
            target = Path(self.inside(path))
            try:
                os.link(aside, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if target.exists():
                    return False
                aside.replace(target)
            return True

    def replace(self, path: str, content: bytes) -> None:
        """Write a file atomically, replacing an existing one."""
        with self.writing():
            self._patiently(self._replace, path, content)

    def _replace(self, path: str, content: bytes) -> None:
        if self.local:
            with self._aside(path, content) as aside:
                aside.replace(self.inside(path))
        else:
            self._send(path, io.BytesIO(content))

    def _send(self, path: str, content: BinaryIO) -> None:
        """Write a file of a file system that is not local."""
        self.system.create_dir(self.inside(path).rpartition("/")[0])
        with self.system.open_output_stream(self.inside(path), compression=None) as stream:
            shutil.copyfileobj(content, stream, 1 << 20)

    @contextmanager
    def _aside(self, path: str, content: bytes) -> Iterator[Path]:
        target = Path(self.inside(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid4().hex}")
        try:
            with aside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield aside
        finally:
            aside.unlink(missing_ok=True)

    def upload(self, source: Path, folder: str) -> None:
        """Copy all files below a local directory into a folder."""
        with self.writing():
            self._patiently(self._upload, source, folder)

    def _upload(self, source: Path, folder: str) -> None:
        # Not by `fs.copy_files`: it ignores an error when a stream is closed, so a file can be lost in silence.
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            with file.open("rb") as content:
                self._send(f"{folder}/{file.relative_to(source).as_posix()}", content)

    def remove(self, path: str) -> None:
        """Delete a file or a folder if it exists."""
        with self.writing():
            self._patiently(self._remove, path)

    def _remove(self, path: str) -> None:
        kind = self.system.get_file_info(self.inside(path)).type
        if kind == fs.FileType.Directory:
            self.system.delete_dir(self.inside(path))
        elif kind == fs.FileType.File:
            self.system.delete_file(self.inside(path))

    def _patiently(self, deed: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `deed`, and retry it while its failure may be temporary."""
        attempts = Retrying(
            retry=retry_if_exception(self._may_pass),
            stop=stop_after_delay(self.patience),
            wait=wait_exponential(multiplier=0.5, max=15),
            before_sleep=self._warn,
            reraise=True,
        )
        try:
            return attempts(deed, *args, **kwargs)
        except OSError as error:
            if not self._may_pass(error):
                raise
            raise CorsaError(
                f"storage {self.url} does not answer, for {self.patience:g} s now: {_first_line(error)}. Once it does, "
                "the same command continues from here; finished steps are intact"
            ) from error

    def _may_pass(self, error: BaseException) -> bool:
        """Whether the error may be temporary: caused by the connection or the storage, not by the request."""
        if not isinstance(error, OSError):
            return False
        return error.errno in _TRANSIENT or any(word in str(error) for word in _TRANSIENT_WORDS)

    def _warn(self, attempts: RetryCallState) -> None:
        error = attempts.outcome.exception() if attempts.outcome else None
        wait = attempts.next_action.sleep if attempts.next_action else 0.0
        _log.warning("storage %s: %s: trying again in %.1f s", self.url, _first_line(error), wait)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns errors of the storage itself into a `CorsaError` that says what to do."""
        try:
            yield
        except OSError as error:
            if known := self.explained(error):
                raise known from error
            if isinstance(error, FileNotFoundError):  # writing creates missing folders where permitted
                raise CorsaError(f"cannot write to {self.url}: {error.strerror}. {_CLOSED}") from error
            if self.local:
                raise
            reason = _first_line(error)
            raise CorsaError(f"cannot write to {self.url}: {reason}. Check the address and the credentials") from error

    def explained(self, error: OSError) -> CorsaError | None:
        """The error to show if the store is full or not writable, None for any other error."""
        where = error.filename or self.url
        if error.errno and error.errno in _REMEDY and str(where).startswith(self.url):
            reason = os.strerror(error.errno)
            return CorsaError(f"cannot write to {where}: {reason}. {_REMEDY[error.errno]}; finished steps are intact")
        return None


_USER = re.compile(r"[\w+.-]+://(?:[^/?@]*@|[^?@]*:[^?@]*@|[^/?@]*:(?!\d*(?:[/?]|$)))")
"""The beginning of an address, including its user information. An AWS secret may contain slashes."""
_SECRET = re.compile(r"[^=]*(key|secret|token|passw|credential|signature|sas)[^=]*=|[^=]*=.*@", re.IGNORECASE)
"""A parameter of an address that names a secret, or whose value is an address with user information."""


def _refuse_credentials(url: str) -> None:
    """Raises `CorsaError` for an address that holds credentials. The error shows no part of them."""
    plain = unquote(url)
    scheme, _, rest = plain.partition("://")
    user = _USER.match(plain) and not url.startswith("gs://anonymous@")
    if user or any(_SECRET.match(one) for one in re.split("[&;]", rest.partition("?")[2])):
        raise CorsaError(
            f"storage {scheme}://...: credentials do not belong in an address, which logs and reports show. Set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or GOOGLE_APPLICATION_CREDENTIALS) in the environment"
        )


def _first_line(error: BaseException | None) -> str:
    return visible((str(error).splitlines() or [type(error).__name__])[0])


_TRANSIENT = {
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ENOTCONN, errno.EPIPE),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
}
"""Errors of a network share or a mounted bucket whose server is unavailable."""
_TRANSIENT_WORDS = (
    *("NETWORK_CONNECTION", "SLOW_DOWN", "INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "THROTTLING", "REQUEST_TIMEOUT"),
    *("HTTP status 429", "HTTP status 5", "kUnavailable", "kDeadlineExceeded", "Retry policy exhausted", "timed out"),
)
"""The same in Arrow's error texts: Arrow reports nothing else about a response from S3 or GCS."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # as mounted buckets and some network shares answer
_FULL = "Free some space there or choose another --storage"
_CLOSED = "Choose a --storage that can be written to"
_REMEDY = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL} | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR), _CLOSED
)

"""Files below one root, local or on an object store, with the two things a store of results rests on: creating a file
exclusively and with its whole content, and errors that say what to do.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from pyarrow import fs

from corsa.errors import CorsaError


class Files:
    """The files below a local path, an `s3://`, `gs://` or `file://` URL, or a path on `filesystem`. Picklable.

    Raises `CorsaError` for a root that is none of these.
    """

    def __init__(self, root: str | Path, filesystem: fs.FileSystem | None = None) -> None:
        self.url = str(root).rstrip("/")
        if filesystem is not None:
            self.system, self.root = filesystem, self.url
        elif "://" in self.url:
            try:
                self.system, self.root = fs.FileSystem.from_uri(self.url)
            except (ValueError, OSError) as error:
                raise CorsaError(f"storage {self.url!r}: {error}. Give a local path, s3://... or gs://...") from error
        else:
            self.system, self.root = fs.LocalFileSystem(), str(Path(self.url).expanduser().absolute())
        self.local = isinstance(self.system, fs.LocalFileSystem)
        if self.local:
            self.url = self.root

    def inside(self, path: str) -> str:
        """The path as the file system knows it."""
        return f"{self.root}/{path}"

    def read(self, path: str) -> bytes | None:
        """The content of a file, None if there is none."""
        try:
            with self.system.open_input_stream(self.inside(path), compression=None) as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def digest(self, path: str) -> str:
        """SHA-256 of a file, hex."""
        with self.system.open_input_stream(self.inside(path), compression=None) as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()

    def publish(self, path: str, content: bytes) -> bool:
        """Create a file with its whole content; False if there is one. Atomic on POSIX, check-then-put elsewhere."""
        if not self.local:
            if self.system.get_file_info(self.inside(path)).type != fs.FileType.NotFound:
                return False
            self.replace(path, content)
            return True
        with self.writing(), self._aside(path, content) as aside:
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
        """Write a file, in one atomic change, over what is there."""
        with self.writing():
            if self.local:
                with self._aside(path, content) as aside:
                    aside.replace(self.inside(path))
            else:
                self.system.create_dir(self.inside(path).rpartition("/")[0])
                with self.system.open_output_stream(self.inside(path), compression=None) as stream:
                    stream.write(content)

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

    def remove(self, path: str) -> None:
        """Delete a file or a folder, if it is there."""
        kind = self.system.get_file_info(self.inside(path)).type
        with self.writing():
            if kind == fs.FileType.Directory:
                self.system.delete_dir(self.inside(path))
            elif kind == fs.FileType.File:
                self.system.delete_file(self.inside(path))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns what can go wrong with the storage itself into a `CorsaError` that says what to do."""
        try:
            yield
        except OSError as error:
            if refusal := self.refusal(error):
                raise refusal from error
            if isinstance(error, FileNotFoundError):  # what is written makes its own folders, where it may
                raise CorsaError(f"cannot write to {self.url}: {error.strerror}. {_CLOSED}") from error
            if self.local:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CorsaError(f"cannot write to {self.url}: {reason}. Check the address and the credentials") from error

    def refusal(self, error: OSError) -> CorsaError | None:
        """The error to show if this one says that the store is full or closed, None if it is about something else."""
        where = error.filename or self.url
        if error.errno and error.errno in _REMEDY and str(where).startswith(self.url):
            reason = os.strerror(error.errno)
            return CorsaError(f"cannot write to {where}: {reason}. {_REMEDY[error.errno]}; finished steps are intact")
        return None


_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # as mounted buckets and some network shares answer
_FULL = "Free some space there or choose another --storage"
_CLOSED = "Choose a --storage that can be written to"
_REMEDY = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL} | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR), _CLOSED
)

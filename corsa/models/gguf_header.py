"""Reads the header of a GGUF file: its metadata and the table of its tensors, but no weights. The file is untrusted.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from corsa.errors import CorsaError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DIMENSIONS = 4  # ggml's largest number of dimensions


@dataclass(frozen=True)
class Header:
    """Metadata, {key: value}, and the shape of every tensor, {name: sizes in torch's order}."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata.get("general.architecture", ""))

    def of_the_architecture(self, key: str) -> Any:
        """The metadata under the architecture's own prefix; None if the file does not have it."""
        return self.metadata.get(f"{self.architecture}.{key}")


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        CorsaError: the file cannot be read, is not GGUF, is one part of several, is truncated or damaged, or holds
            tensors of a type that the gguf package does not know.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CorsaError(f"model file {path} is not a GGUF file: it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise CorsaError(f"model file {path} cannot be read: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise CorsaError(f"model file {path} is truncated or damaged: its header cannot be read ({error})") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4

    def header(self) -> Header:
        (version,) = self._take("I")
        if version not in _VERSIONS:
            raise CorsaError(f"model file {self.path} is GGUF version {version}: only versions 2 and 3 are read")
        tensors, entries = self._take("QQ")
        metadata = {}
        for _ in range(entries):
            key = self._string()
            metadata[key] = self._value(*self._take("I"))
        parts = metadata.get("split.count", 1)
        if parts > 1:
            raise CorsaError(
                f"model file {self.path} is one of {parts} parts: join them first "
                "(llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf)"
            )
        return Header(metadata, self._tensors(tensors, int(metadata.get("general.alignment", 32))))

    def _tensors(self, count: int, alignment: int) -> dict[str, tuple[int, ...]]:
        from gguf import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        shapes, end = {}, 0
        for _ in range(count):
            name = self._string()
            (dimensions,) = self._take("I")
            if dimensions > _DIMENSIONS:
                raise ValueError(f"tensor {name[:80]} has {dimensions} dimensions")
            shape = self._take(f"{dimensions}Q")
            kind, offset = self._take("IQ")
            if kind not in sizes:
                raise CorsaError(
                    f"model file {self.path} has weights of type {kind}, which the installed gguf package does not "
                    "know: a newer one may (pip install --upgrade gguf)"
                )
            block, stored = sizes[kind]
            end = max(end, offset + prod(shape) // block * stored)
            shapes[name] = tuple(reversed(shape))  # ggml has the innermost dimension first
        needed = -(-self.at // alignment) * alignment + end
        if needed > len(self.data):
            raise CorsaError(
                f"model file {self.path} is truncated: it has {len(self.data)} of {needed} bytes. Download it again"
            )
        return shapes

    def _take(self, kinds: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{kinds}", self.data, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return found

    def _string(self) -> str:
        (length,) = self._take("Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"a text of {length} bytes at byte {self.at}")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._take(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind} at byte {self.at}")
        inner, count = self._take("IQ")
        if count > len(self.data) - self.at:  # an element has a byte at least
            raise ValueError(f"a list of {count} values at byte {self.at}")
        return list(self._take(f"{count}{_NUMBERS[inner]}")) if inner in _NUMBERS else self._strings(inner, count)

    def _strings(self, kind: int, count: int) -> list[str]:
        if kind != _STRING:
            raise ValueError(f"a list of values of type {kind} at byte {self.at}")
        return [self._string() for _ in range(count)]

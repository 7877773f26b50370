"""What passes between a program and its examiner: calls, results, exceptions, and values as data.

Values are pickled. The examiner reads them with a loader that makes plain data alone (numbers, text, containers,
arrays, tensors, symbolic expressions): no class of the program's own, so no `__eq__` that says yes to everything; no
callable that would run on reading; and nothing is given an attribute. Functions and iterators stay where they are; the
other side gets a stand-in.
"""

from __future__ import annotations

import builtins
import io
import pickle
import socket
import struct
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from corsa.sandbox.values import MAKERS, CannotCrossError, reduced

LARGEST = 512 << 20
"""Bytes of one message at most."""

_ALLOWED = {
    "builtins": frozenset(
        {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int"}
        | {"list", "range", "set", "slice", "str", "tuple"}
    ),
    "collections": frozenset({"Counter", "OrderedDict", "defaultdict", "deque"}),
    "datetime": frozenset({"date", "datetime", "time", "timedelta", "timezone"}),
    "decimal": frozenset({"Decimal"}),
    "fractions": frozenset({"Fraction"}),
    "re": frozenset({"RegexFlag"}),
    "numpy": frozenset({"dtype", "ndarray"}),
    "numpy._core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "torch": frozenset({"Size", "device"}),
    "corsa.sandbox.values": frozenset({"tensor", "frame", "expression", "mapping", "match", "pattern"}),
}
"""What the examiner's loader makes."""


_BY_NAME = ("copyreg", "numpy", "torch")


class ProgramGone(BaseException):
    """The program ended where it should have answered: no test may catch this, so it is no Exception."""


class _Standing:
    """What both loaders have: the peer whose stand-ins they make."""

    def __init__(self, raw: bytes, peer: Peer) -> None:
        super().__init__(io.BytesIO(raw))  # type: ignore[call-arg]
        self._peer = peer

    def persistent_load(self, pid: Any) -> Any:
        kind, number = pid
        if kind == "own":
            return self._peer.kept[number]
        if kind == "iterator":
            return RemoteIterator(self._peer, number)
        return partial(self._peer.call, number)


class _Loader(_Standing, pickle.Unpickler):
    """Makes whatever it is told to: the program reads what the examiner says with it."""


class _DataLoader(_Standing, pickle._Unpickler):
    """Makes data alone. It is Python's own loader in Python, because that in C sets attributes on whatever it is told
    to: of `Counter` itself, of a tensor, of the examiner's own functions.
    """

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "builtins" and name.endswith(("Error", "Exception", "Iteration")):
            return super().find_class(module, name)
        if module.partition(".")[0] in ("numpy", "torch"):  # number types, such as numpy.float64 and torch.int8
            found = super().find_class(module, name)
            if (isinstance(found, type) and issubclass(found, _numbers())) or type(found).__name__ == "dtype":
                return found
        raise CannotCrossError(f"a value of {module}.{name}, which is not plain data")

    def load_build(self) -> None:
        """Give an object its state: an array its numbers and nothing else."""
        numpy: Any = sys.modules.get("numpy")
        if numpy is None or not isinstance(self.stack[-2], numpy.ndarray | numpy.dtype):  # type: ignore[attr-defined]
            raise CannotCrossError("a value whose attributes would be set")
        super().load_build()  # type: ignore[misc]

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # type: ignore[attr-defined]  # noqa: RUF012


def _numbers() -> tuple[type, ...]:
    numpy: Any = sys.modules.get("numpy")
    return (numpy.generic, numpy.dtype) if numpy else ()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, peer: Peer) -> None:
        super().__init__(file, protocol=4)
        self._peer = peer

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, RemoteIterator) and obj.peer is self._peer:
            return ("own", obj.number)
        if isinstance(obj, partial) and obj.func == self._peer.call:
            return ("own", obj.args[0])
        if isinstance(obj, types.FunctionType | types.BuiltinFunctionType | types.MethodType | partial):
            root = str(getattr(obj, "__module__", "")).partition(".")[0]
            own = obj in MAKERS or root in _BY_NAME  # what values are made by again
            return None if own else ("function", self._peer.keep(obj))
        if hasattr(obj, "__next__") and not isinstance(obj, type):
            return ("iterator", self._peer.keep(obj))
        return None

    def reducer_override(self, obj: Any) -> Any:
        return reduced(obj)


class RemoteIterator:
    """An iterator of the other side, drawn from item by item."""

    def __init__(self, peer: Peer, number: int) -> None:
        self.peer, self.number = peer, number

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.peer.call(self.number, kind="next")


class Peer:
    """One end of the wire. Either side may call the other while it is being called itself."""

    def __init__(self, end: socket.socket, *, strict: bool) -> None:
        self.end, self.strict = end, strict
        self.kept: list[Any] = []
        self.functions: dict[str, Any] = {}

    def keep(self, obj: Any) -> int:
        """Hold what the other side gets a stand-in for."""
        for number, known in enumerate(self.kept):
            if known is obj:
                return number
        self.kept.append(obj)
        return len(self.kept) - 1

    def send(self, *message: Any) -> None:
        """Send a message. Raises CannotCrossError where a value in it cannot be pickled."""
        raw = self.pickled(message)
        if len(raw) > LARGEST:
            raise CannotCrossError(f"a value of {len(raw)} bytes, more than {LARGEST}")
        self.end.sendall(struct.pack("!I", len(raw)) + raw)

    def pickled(self, value: Any) -> bytes:
        """A value as bytes. Raises CannotCrossError where that cannot be."""
        file = io.BytesIO()
        try:
            _Pickler(file, self).dump(value)
        except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
            raise CannotCrossError(str(error)) from error
        return file.getvalue()

    def receive(self) -> tuple[Any, ...]:
        """The next message. Raises ProgramGone at the end of the wire, CannotCrossError for what is not data."""
        (size,) = struct.unpack("!I", self._exactly(4))
        if size > LARGEST:
            raise CannotCrossError(f"a message of {size} bytes, more than {LARGEST}")
        raw = self._exactly(size)
        try:
            message = (_DataLoader if self.strict else _Loader)(raw, self).load()
        except CannotCrossError:
            raise
        except Exception as error:
            raise CannotCrossError(f"{type(error).__name__}: {error}") from error
        if type(message) is not tuple or not message:
            raise CannotCrossError("a message that is none")
        return message

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self.end.recv(min(size - len(parts), 1 << 20))
            except ConnectionError:
                part = b""
            if not part:
                raise ProgramGone("the program ended before it had answered")
            parts += part
        return bytes(parts)

    def call(self, target: Any, /, *args: Any, kind: str = "call", **kwargs: Any) -> Any:
        """Call a function of the other side (by name, or by the number of a stand-in), as if it were here.

        What the call changes in its arguments' lists, dictionaries, sets and arrays is changed here too.
        """
        self.send(kind, target, args, kwargs)
        while True:
            answer, *rest = self.receive()
            if answer == "returned":
                value, after = rest
                for mine, theirs in zip([*args, *kwargs.values()], after or (), strict=False):
                    _copy_into(mine, theirs)
                return value
            if answer == "raised":
                raise _exception(*rest)
            self.answer(answer, *rest)

    def answer(self, kind: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        """Do what the other side asks, and send it the result."""
        try:
            if kind == "next":
                value, after = next(self.kept[target]), None
            else:
                function: Callable[..., Any] = self.functions[target] if isinstance(target, str) else self.kept[target]
                given = [*args, *(kwargs or {}).values()]
                before = self._picture(given)
                value = function(*args, **(kwargs or {}))
                after = None if before is None or self._picture(given) == before else given
            self.send("returned", value, after)
        except Exception as error:
            self.send("raised", *described(error))

    def _picture(self, args: list[Any]) -> bytes | None:
        """What shows whether a call changed its arguments; None where there is nothing to change."""
        if not any(isinstance(a, list | dict | set | bytearray) or hasattr(a, "__array__") for a in args):
            return None
        try:
            return self.pickled(args)
        except CannotCrossError:
            return None


def _copy_into(mine: Any, theirs: Any) -> None:
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, list | bytearray):
        mine[:] = theirs
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(theirs)
    elif hasattr(mine, "__array__"):
        try:
            if mine.shape != theirs.shape and hasattr(mine, "resize_"):  # an `out` of torch
                mine.resize_(theirs.shape)
            mine[...] = theirs
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError):
            return


def described(error: BaseException) -> tuple[list[tuple[str, str]], str]:
    """An exception as the other side may know it: its classes, nearest first, and its text."""
    classes = [(kind.__module__, kind.__qualname__) for kind in type(error).__mro__]
    try:
        text = str(error)
    except Exception:
        text = ""
    return classes, text[:2000]


def _exception(classes: Any, text: Any) -> BaseException:
    """The exception of the other side, as the nearest of its classes that is known here."""
    for module, name in classes:
        found = None
        if module == "builtins":
            found = getattr(builtins, name, None)
        elif str(module).partition(".")[0] in ("numpy", "torch", "sympy", "pandas", "re", "decimal"):
            found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, type) and issubclass(found, Exception):
            try:
                return found(str(text))
            except Exception:
                continue
    return ProgramGone(str(text))

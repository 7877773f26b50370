"""Messages between a program and its tests: calls, results, exceptions, and values as data.

Functions and iterators stay in their process. The other side gets a stand-in that calls back. Every other value is
sent as one of the kinds in `values.py` and `packages.py`.
"""

from __future__ import annotations

import builtins
import socket
import struct
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

from corsa.sandbox.texts import clean
from corsa.sandbox.values import CannotCrossError, decoded, encoded

LARGEST = 512 << 20
"""Maximum size of a message in bytes."""
_STRUCTURE = 128 << 20
"""Maximum size of its JSON in bytes. The objects built from it take several times as much."""
_TEXT = 2000
"""Maximum length of an exception's text in characters."""
_HEAD = struct.Struct("!II")
_KEPT = 1 << 16
"""Maximum number of functions and iterators that the other side can refer to."""


class ProgramGone(BaseException):
    """The program ended instead of answering. Not an Exception, so that tests do not catch it."""


class RemoteIterator:
    """A stand-in for an iterator of the other side. Each item is requested when it is needed."""

    def __init__(self, peer: Peer, number: int) -> None:
        self.peer, self.number = peer, number

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.peer.item(self.number)


class Peer:
    """One end of the socket. Each side may call the other during a call.

    `strict`: the side of the tests, which does not trust what it receives. `spoilt`: the first failure of the
    connection. It remains set if a test catches the exception.
    """

    def __init__(self, end: socket.socket, *, strict: bool) -> None:
        self.end, self.strict = end, strict
        self.kept: list[Any] = []
        self.spoilt: BaseException | None = None
        self.functions: dict[str, Any] = {}
        self._read: dict[str, Callable[[Any], Any]] = {
            "function": lambda number: partial(self.call, self._number(number)),
            "iterator": lambda number: RemoteIterator(self, self._number(number)),
            "own": lambda number: self.kept[self._number(number)],
        }
        if not strict:
            self._read["named"] = _named

    def keep(self, obj: Any) -> int:
        """Keep an object for which the other side gets a stand-in. Returns its number."""
        for number, known in enumerate(self.kept):
            if known is obj:
                return number
        if len(self.kept) >= _KEPT:
            raise CannotCrossError(f"more than {_KEPT} functions")
        self.kept.append(obj)
        return len(self.kept) - 1

    def send(self, *message: Any) -> None:
        """Send a message. Raises CannotCrossError if a value in it is not data."""
        raw, area = self.encoded(message)
        if len(raw) > _STRUCTURE or len(raw) + len(area) > LARGEST:
            raise CannotCrossError(f"a value of {len(raw) + len(area)} bytes, more than {LARGEST}")
        try:
            self.end.sendall(_HEAD.pack(len(raw), len(area)) + raw)
            if area:  # if the other side has read everything it may be gone, so an empty part is not sent
                self.end.sendall(area)
        except ConnectionError as error:
            raise ProgramGone("the program ended before it was called") from error

    def encoded(self, value: Any) -> tuple[bytes, bytes]:
        """A value as JSON and bytes. Raises CannotCrossError if it is not data."""
        return encoded(value, self._stand_in)

    def receive(self) -> list[Any]:
        """The next message: its name and its parts.

        Raises:
            ProgramGone: the other side has ended.
            CannotCrossError: the data received is not a message.
        """
        try:
            return self._receive()
        except (ProgramGone, CannotCrossError) as error:
            self.spoilt = self.spoilt or error
            raise

    def _receive(self) -> list[Any]:
        sizes = _HEAD.unpack(self._exactly(_HEAD.size))
        if sizes[0] > _STRUCTURE or sum(sizes) > LARGEST:
            raise CannotCrossError(f"a message of {sum(sizes)} bytes, more than {LARGEST}")
        raw = bytes(self._exactly(sizes[0]))
        message = decoded(raw, memoryview(self._exactly(sizes[1])), self._read)
        if type(message) is not tuple or not message or type(message[0]) is not str:
            raise CannotCrossError("not a message")
        return list(message)

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the other side, by its name or by the number of a stand-in.

        If the call changes a list, dictionary, set or array among its arguments, the argument here changes too.
        """
        return self._asked("call", target, args, kwargs)

    def item(self, number: int) -> Any:
        """The next item of an iterator of the other side. Raises StopIteration at its end."""
        return self._asked("next", number, (), {})

    def _asked(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.send(kind, target, args, kwargs)
        while True:
            answer, *rest = self.receive()
            if answer == "returned" and len(rest) == 2:
                value, after = rest
                after = after if type(after) is list else []
                for mine, theirs in zip([*args, *kwargs.values()], after, strict=False):
                    _copy_into(mine, theirs)
                return value
            if answer == "raised" and len(rest) == 2:
                error = _exception(*rest)
                if kind == "call" and isinstance(error, StopIteration):  # it would end a loop of the caller
                    raise RuntimeError(f"the function raised StopIteration: {error}")
                raise error
            if answer not in ("call", "next") or len(rest) != 3:
                self.spoilt = CannotCrossError("not an answer")
                raise self.spoilt
            self.answer(answer, *rest)

    def answer(self, kind: str, target: Any, args: Any, kwargs: Any) -> None:
        """Execute a call of the other side and send the result."""
        try:
            if kind == "next":
                value, after = next(self.kept[self._number(target)]), None
            else:
                function: Callable[..., Any] = (
                    self.functions[target] if type(target) is str else self.kept[self._number(target)]
                )
                given = [*args, *kwargs.values()]
                before = self._picture(given)
                value = function(*args, **kwargs)
                after = None if before is None or self._picture(given) == before else given
            self.send("returned", value, after)
        except Exception as error:
            self.send("raised", *described(error))

    def _stand_in(self, value: Any) -> dict[str, Any] | None:
        if isinstance(value, RemoteIterator) and value.peer is self:
            return {"own": value.number}
        if isinstance(value, partial) and value.func == self.call:
            return {"own": value.args[0]}
        if isinstance(value, type):
            return None
        # Send a package's function by its name. If it were kept here, a program could call it with any values.
        if self.strict and callable(value) and (named := _name(value)):
            return named
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType | partial):
            return {"function": self.keep(value)}
        if hasattr(value, "__next__"):
            return {"iterator": self.keep(value)}
        return None

    def _number(self, tree: Any) -> int:
        if type(tree) is not int or tree < 0:
            raise CannotCrossError("not the number of a stand-in")
        return tree

    def _exactly(self, size: int) -> bytearray:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self.end.recv(min(size - len(parts), 1 << 20))
            except ConnectionError:
                part = b""
            if not part:
                raise ProgramGone("the program ended before it had answered")
            parts += part
        return parts

    def _picture(self, args: list[Any]) -> tuple[bytes, bytes] | None:
        """The encoded arguments, to detect whether a call changes them; None if they cannot change."""
        if not any(isinstance(a, list | dict | set | bytearray) or hasattr(a, "__array__") for a in args):
            return None
        try:
            return self.encoded(args)
        except CannotCrossError:
            return None


def _name(function: Any) -> dict[str, Any] | None:
    module = getattr(function, "__module__", None) or type(function).__module__
    name = getattr(function, "__name__", "")
    found = getattr(sys.modules.get(module), name, None)
    return {"named": [module, name]} if found is function and module != "__tests__" else None


def _named(tree: Any) -> Any:
    module, name = tree
    return getattr(import_module(module), name)


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
            if mine.shape != theirs.shape and hasattr(mine, "resize_"):  # an `out` argument of torch
                mine.resize_(theirs.shape)
            mine[...] = theirs
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError):
            return


def described(error: BaseException) -> tuple[list[list[str]], str]:
    """An exception as it is sent: its classes, most specific first, and its text."""
    classes = [[kind.__module__, kind.__qualname__] for kind in type(error).__mro__]
    try:
        text = str(error)
    except Exception:
        text = ""
    return classes, clean(text, _TEXT)


def _exception(classes: Any, text: Any) -> BaseException:
    """The exception of the other side, as the most specific of its classes that is known here."""
    text = clean(text, _TEXT)
    for pair in classes if type(classes) is list else []:
        if type(pair) is not list or len(pair) != 2 or any(type(part) is not str for part in pair):
            continue
        module, name = pair
        found = None
        if module == "builtins":
            found = getattr(builtins, name, None)
        elif module.partition(".")[0] in ("numpy", "torch", "sympy", "pandas", "re", "decimal"):
            found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, type) and issubclass(found, Exception):
            try:
                return found(text)
            except Exception:
                continue
    return ProgramGone(text)

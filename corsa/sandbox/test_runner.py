"""The process that runs the tests. The program runs in another process and can only answer calls, with data.

Only this process has the pipe for the verdict.
"""

from __future__ import annotations

import builtins
import gc
import json
import os
import socket
import symtable
import types
from collections.abc import Mapping
from functools import partial
from typing import Any

from corsa.sandbox.confinement import empty_environment
from corsa.sandbox.expressions import read_no_expressions_of_others
from corsa.sandbox.protocol import Peer, ProgramGone
from corsa.sandbox.values import CannotCrossError

_TEXT = 500
"""Maximum length of a test's message in characters."""


def free_names(tests: str) -> list[str]:
    """The names that tests use but do not define. They may request these from a program."""
    table = symtable.symtable(tests, "<tests>", "exec")
    defined = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used: set[str] = set()
    scopes = [table]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        top = scope.get_type() == "module"
        used |= {s.get_name() for s in scope.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return sorted(used - defined - set(dir(builtins)))


def examine(files: list[int]) -> None:
    """Run tests against a program. files: the request {tests, entry}, the socket, the pipe for the verdict (JSON)."""
    request, connection, verdict = files
    with os.fdopen(request, "rb") as file:
        asked = json.load(file)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    empty_environment()
    raw = json.dumps(examined(socket.socket(fileno=connection), asked)).encode()
    while raw:
        raw = raw[os.write(verdict, raw) :]


def examined(end: socket.socket, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run every function `test_*` of the tests against the program: {outcome, detail, tests: {name: "" or message}}.

    outcome: passed, failed (an assertion), error (an exception), gone (the program ended), or faulty (the tests do not
    load).
    """
    gc.disable()
    entry, tests = request["entry"], request["tests"]
    known = {entry, *free_names(tests)} - {""}
    peer = Peer(end, strict=True)
    try:
        peer.send("names", sorted(known))
        functions, values = _greeting(peer.receive())
    except ProgramGone as error:
        return _unasked("gone", str(error))
    except Exception as error:
        return _unasked("error", str(error))
    # Take only names that the tests request, so that a program's own `all` or `isinstance` does not reach the tests.
    if entry and entry not in functions:
        return _unasked("error", f"the program defines no function {entry}")
    module = types.ModuleType("__tests__")
    namespace = module.__dict__
    namespace.update({name: value for name, value in values.items() if name in known})
    namespace.update({name: partial(peer.call, name) for name in functions if name in known})
    try:
        read_no_expressions_of_others(tests)
        exec(compile(tests, "<tests>", "exec"), namespace)
        read_no_expressions_of_others(tests)  # the tests may have loaded SymPy
    except ProgramGone as gone:
        return _unasked("gone", str(gone))
    except BaseException as error:
        return _unasked("faulty", f"{type(error).__name__}: {error}")
    if entry:
        namespace[entry] = partial(peer.call, entry)
    tests_ = {n: f for n, f in namespace.items() if n.startswith("test") and isinstance(f, types.FunctionType)}
    found = _each(tests_)
    if peer.spoilt:  # even if a test caught the exception
        outcome = "gone" if isinstance(peer.spoilt, ProgramGone) else "error"
        return found | {"outcome": outcome, "detail": found["detail"] or _text(peer.spoilt)}
    return found


def _unasked(outcome: str, detail: str) -> dict[str, Any]:
    return {"outcome": outcome, "detail": detail[:_TEXT], "tests": {}}


def _greeting(message: list[Any]) -> tuple[list[str], dict[str, Any]]:
    """The first message of a program: the names of its functions, and its values by name.

    Raises:
        CannotCrossError: the program failed, or the message has another form.
    """
    match message:
        case ["ready", list() as functions, dict() as values] if all(type(n) is str for n in [*functions, *values]):
            return functions, values
        case ["failed", str() as kind, str() as text]:
            raise CannotCrossError(f"{kind}: {text}")
    raise CannotCrossError("the program does not report what it defines")


def _each(tests: Mapping[str, types.FunctionType]) -> dict[str, Any]:
    if not tests:
        return _unasked("faulty", "the tests define no function test_*")
    found: dict[str, str] = {}
    outcome = "passed"
    for name, test in tests.items():
        try:
            test()
            found[name] = ""
        except AssertionError as error:
            found[name] = f"AssertionError: {_text(error)}".rstrip(": ")
            outcome = "failed" if outcome == "passed" else outcome
        except ProgramGone as gone:
            found[name] = _text(gone)
            outcome = "gone"
            break
        except BaseException as error:
            found[name] = f"{type(error).__name__}: {_text(error)}"
            outcome = "error" if outcome in ("passed", "failed") else outcome
    detail = next((f"{name}: {text}" for name, text in found.items() if text), "")
    return {"outcome": outcome, "detail": detail, "tests": found}


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_TEXT]
    except Exception:
        return ""

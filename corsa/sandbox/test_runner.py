"""The process that runs the tests. The program is elsewhere: all it can do here is answer a call, with data.

It alone holds the pipe that the verdict goes through.
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

from corsa.sandbox.protocol import CannotCrossError, Peer, ProgramGone


def free_names(tests: str) -> list[str]:
    """The names that tests use and do not define: what they may ask of a program."""
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


def examine(end: socket.socket, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run every function `test_*` of the tests against the program: {outcome, tests: {name: "" or what went wrong}}.

    outcome: passed, failed (an assertion), error (an exception), gone (the program ended), or faulty (the tests
    themselves cannot be run: no verdict on the program).
    """
    gc.disable()
    peer = Peer(end, strict=True)
    try:
        greeting, *rest = peer.receive()
    except (ProgramGone, CannotCrossError) as error:
        return {"outcome": "gone", "detail": str(error), "tests": {}}
    if greeting != "ready":
        return {"outcome": "error", "detail": ": ".join(str(part) for part in rest), "tests": {}}
    module = types.ModuleType("__tests__")
    namespace = module.__dict__
    functions, values = rest
    # Only what the tests ask for: a program that defines `all` or `isinstance` redefines them for itself alone.
    known, entry = set(request["names"]), request["entry"]
    if entry and entry not in functions:
        return {"outcome": "error", "detail": f"the program defines no function {entry}", "tests": {}}
    namespace.update({name: value for name, value in dict(values).items() if name in known})
    namespace.update({name: partial(peer.call, name) for name in functions if name in known})
    try:
        exec(compile(request["tests"], "<tests>", "exec"), namespace)
    except ProgramGone as gone:
        return {"outcome": "gone", "detail": str(gone), "tests": {}}
    except Exception as error:
        return {"outcome": "faulty", "detail": f"{type(error).__name__}: {error}", "tests": {}}
    if entry:
        namespace[entry] = partial(peer.call, entry)
    tests = {n: f for n, f in namespace.items() if n.startswith("test") and isinstance(f, types.FunctionType)}
    if not tests:
        return {"outcome": "faulty", "detail": "there is no function test_* among the tests", "tests": {}}
    found: dict[str, str] = {}
    outcome = "passed"
    for name, test in tests.items():
        try:
            test()
            found[name] = ""
        except AssertionError as error:
            found[name] = f"AssertionError: {error}"[:500].rstrip(": ")
            outcome = "failed" if outcome == "passed" else outcome
        except ProgramGone as gone:
            found[name] = str(gone)
            outcome = "gone"
            break
        except BaseException as error:
            found[name] = f"{type(error).__name__}: {error}"[:500]
            outcome = "error" if outcome in ("passed", "failed") else outcome
    detail = next((f"{name}: {text}" for name, text in found.items() if text), "")
    return {"outcome": outcome, "detail": detail, "tests": found}


def report(end: socket.socket, request: Mapping[str, Any], verdict: int) -> None:
    """Examine, and write the verdict as JSON to the pipe."""
    raw = json.dumps(examine(end, request)).encode()
    while raw:
        raw = raw[os.write(verdict, raw) :]

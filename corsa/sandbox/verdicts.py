"""The verdict on a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from corsa.sandbox.texts import clean

Outcome = Literal[
    "passed",
    "failed",
    "error",
    "timeout",
    "cpu",
    "memory",
    "processes",
    "disk",
    "files",
    "output",
    "crashed",
    "exited",
    "sandbox",
]
"""How a program ended. `sandbox`: nothing is known about the program, because the sandbox broke, or the tests did not
load, with a known-good program as well."""

_DETAIL, _NAME, _TESTS, _OUTPUT = 1000, 200, 1000, 2000


@dataclass(frozen=True)
class Verdict:
    """The outcome of a program. `tests`: test name -> error ("" if it passed). `output`: the end of its output.

    Every text has a maximum length and is safe for tables and terminals (`texts.clean`).
    """

    outcome: Outcome
    detail: str = ""
    tests: dict[str, str] = field(default_factory=dict)
    output: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        tests = list(self.tests.items())[:_TESTS] if isinstance(self.tests, Mapping) else []
        cleaned = {
            "detail": clean(self.detail, _DETAIL),
            "tests": {clean(name, _NAME): clean(text, _DETAIL) for name, text in tests},
            "output": clean(self.output[-_OUTPUT:], _OUTPUT),
        }
        for name, value in cleaned.items():
            object.__setattr__(self, name, value)

    @property
    def passed(self) -> bool:
        """Whether every test passed."""
        return self.outcome == "passed"


def verdict(found: Any) -> Verdict | None:
    """The verdict in a message of a sandbox; None if the message contains none."""
    if not isinstance(found, Mapping) or found.get("outcome") not in get_args(Outcome):
        return None
    known = {name: found[name] for name in ("outcome", "detail", "tests", "output", "seconds") if name in found}
    if any(not isinstance(known.get(name, ""), str) for name in ("detail", "output")):
        return None
    return Verdict(**known)

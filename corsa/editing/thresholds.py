"""Checks the result of an update against the gates, so that `corsa edit` can guard a release."""

from __future__ import annotations

from typing import Any, NamedTuple

from corsa.editing.options import Gates

_OF = {"min_success": "edit_success", "min_generality": "generality", "max_forgetting": "forgetting"}


class Verdict(NamedTuple):
    """One gate and the value measured for it."""

    gate: str
    bound: float
    value: float | None
    passed: bool

    def __str__(self) -> str:
        measured = "nothing to measure" if self.value is None else f"{100 * self.value:.1f} %"
        return f"{self.gate} {self.bound:g}: {'passed' if self.passed else 'NOT PASSED'} ({measured})"


def judged(gates: Gates, metrics: dict[str, Any]) -> list[Verdict]:
    """Checks every gate that is set.

    Without an earlier fact, forgetting passes. Success or generality that cannot be measured fails.
    """
    row = metrics["rows"][-1]["metrics"]
    found = []
    for name, bound in gates:
        if bound is None:
            continue
        value = row[_OF[name]]["value"]
        least = name.startswith("min_")
        passed = not least if value is None else (value >= bound if least else value <= bound)
        found.append(Verdict(f"--{name.replace('_', '-')}", bound, value, passed))
    return found

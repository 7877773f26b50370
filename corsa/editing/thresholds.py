"""Conditions on the result of an update: what makes `corsa edit` a gate of a release."""

from __future__ import annotations

from typing import Any, NamedTuple

from corsa.editing.options import Gates

_OF = {"min_success": "edit_success", "min_generality": "generality", "max_forgetting": "forgetting"}


class Verdict(NamedTuple):
    """One gate, and what was measured."""

    gate: str
    bound: float
    value: float | None
    passed: bool

    def __str__(self) -> str:
        measured = "nothing to measure" if self.value is None else f"{100 * self.value:.1f} %"
        return f"{self.gate} {self.bound:g}: {'passed' if self.passed else 'NOT PASSED'} ({measured})"


def judged(gates: Gates, metrics: dict[str, Any]) -> list[Verdict]:
    """Every gate that is set. Forgetting without an earlier fact passes; success or generality that cannot be measured
    does not.
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

"""Checks the result of an update against the gates, so that `corsa edit` can guard a release."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from corsa.editing.options import Gates, Thresholds
from corsa.evaluation.capability import EVERYDAY, PERPLEXITY, told

_OF = {"min_success": "edit_success", "min_generality": "generality", "max_forgetting": "forgetting"}


class Verdict(NamedTuple):
    """One gate and the value measured for it. `measured`: the value as text, if it is not a share alone."""

    gate: str
    bound: float
    value: float | None
    passed: bool
    measured: str = ""

    def __str__(self) -> str:
        share = "nothing to measure" if self.value is None else f"{100 * self.value:.1f} %"
        return f"{self.gate} {self.bound:g}: {'passed' if self.passed else 'NOT PASSED'} ({self.measured or share})"


def judged(gates: Thresholds, metrics: dict[str, Any]) -> list[Verdict]:
    """Checks every gate that is set.

    Without an earlier fact, forgetting passes. Success, generality or a capability that cannot be measured fails. If a
    sample of the earlier facts was asked, the worse end of the 95 % interval decides: asking all of them would hardly
    ever give a worse value.
    """
    row = metrics["rows"][-1]["metrics"]
    found = []
    for name, of in _OF.items():
        bound = getattr(gates, name)
        if bound is None:
            continue
        value, measured = row[of]["value"], ""
        least = name.startswith("min_")
        worst = value
        if row[of].get("interval") == "sample":
            worst = row[of]["low" if least else "high"]
            end = f"at {'least' if least else 'most'} {100 * worst:.1f} %"
            measured = f"{100 * value:.1f} % by a sample, over all facts {end}"
        passed = not least if worst is None else (worst >= bound if least else worst <= bound)
        found.append(Verdict(f"--{name.replace('_', '-')}", bound, value, passed, measured))
    if isinstance(gates, Gates):
        found += _capabilities(gates, metrics.get("capability") or [])
    return found


def _capabilities(gates: Gates, changes: list[dict[str, Any]]) -> Iterator[Verdict]:
    """One verdict per measure; a failed one per gate that measured nothing. A loss above --max-loss fails, however wide
    its interval is.
    """
    for gate in dict.fromkeys(name if name == "capability" else "lm-eval" for name in gates.gate):
        own = [one for one in changes if (one["measure"] in (EVERYDAY, PERPLEXITY)) == (gate == "capability")]
        for one in own:
            passed = one["loss"] <= gates.max_loss
            yield Verdict(
                f"--gate {gate}, {one['measure']}, --max-loss", gates.max_loss, one["loss"], passed, told(one)
            )
        if not own:
            yield Verdict(f"--gate {gate}, --max-loss", gates.max_loss, None, passed=False)

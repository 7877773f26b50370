"""The result of a run in sentences. Only primary metrics with a significant corrected test lead to claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corsa.methods import METHODS

HEADLINES = ("efficacy", "forgetting", "generality", "retention", "activation")
"""The default metrics of the main table."""

_SHORT = {
    "efficacy": "update efficacy",
    "retention": "retention of old",
    "activation": "activation of old",
    "edit_success": "edit success",
    "multihop": "multi-hop",
    "upass_1": "UPass@1",
    "upass_5": "UPass@5",
    "upass_single": "UPass single",
    "spass_1": "SPass@1",
    "spass_5": "SPass@5",
    "spass_single": "SPass single",
    "spass_subset_1": "SPass@1 subset",
    "spass_subset_5": "SPass@5 subset",
}

_FEW = 5
"""With more methods than this, only the table shows them."""


def headlines(metrics: dict[str, Any]) -> dict[str, str]:
    """The metrics of a report's main table that have a value, with their short names for sentences."""
    chosen: Sequence[str] = metrics.get("headlines", HEADLINES)
    measured = [n for n in chosen if any(row["metrics"][n]["value"] is not None for row in metrics["rows"])]
    return {name: _SHORT.get(name, name) for name in measured or chosen}


def label(method: str) -> str:
    """A method's display name. A setting after the name stays unchanged."""
    name, blank, setting = method.partition(" ")
    return f"{METHODS[name].label if name in METHODS else name}{blank}{setting}"


LOOKS_BACK = "* looks back: it is given facts of earlier rounds again. Compare it with methods marked alike."
"""What the mark of `marked` says."""


def marked(method: str, metrics: dict[str, Any]) -> str:
    """A method's display name, with a mark if it is given facts of earlier rounds again."""
    return label(method) + " *" * (method in metrics.get("looks_back", ()))


def shown(entry: dict[str, Any], unit: str) -> tuple[str, str]:
    """A value and its interval as text: shares in percent, points as pt; ("–", "") if there is no value."""
    if entry["value"] is None:
        return "–", ""
    scale, suffix = (1, " nats") if unit == "nats" else (100, " pt" if unit == "points" else " %")
    numbers = {
        key: round(scale * entry[key], 1) + 0.0 for key in ("value", "low", "high") if entry[key] is not None
    }  # + 0.0: never "-0.0"
    value = f"{numbers['value']:.1f}{suffix}"
    if "low" not in numbers:
        return value, ""
    return value, f"{numbers['low']:.1f}{' to ' if numbers['low'] < 0 else '–'}{numbers['high']:.1f}"


def drawn(metrics: dict[str, Any]) -> str:
    """The random units that the intervals of a report are computed over, such as "facts and seeds"."""
    over = metrics.get("over", "facts")
    return f"{over} and seeds" if len(metrics["seeds"]) > 1 else over


def findings(metrics: dict[str, Any]) -> list[str]:
    """For each pair of methods: which is better on which primary metric, and which metrics show no difference. With one
    seed: the differences between the two adapters.
    """
    primary = [entry for entry in metrics["comparisons"] if entry["primary"]]
    sentences = []
    if metrics["comparisons"] and not primary:
        sentences.append("This report is exploratory: no primary metric was named beforehand, so there is no verdict.")
    if any(entry["p"] is None for entry in primary):
        sentences.append(
            "With one seed this report compares these two adapters, not the methods: it gives no p and no verdict. "
            "--seeds 0,1,2 or more would compare the methods."
        )
    tests = sum(entry["corrected"] is not None for entry in primary)
    for a, b in dict.fromkeys((entry["a"], entry["b"]) for entry in primary):
        found = [entry for entry in primary if (entry["a"], entry["b"]) == (a, b)]
        sentences += _adapters(metrics, [entry for entry in found if entry["p"] is None])
        sentences += _verdicts(metrics, [entry for entry in found if entry["p"] is not None])
    if tests:
        sentences.append(
            f"Verdicts: {tests} test{'s' * (tests > 1)} of primary metrics, over {drawn(metrics)}"
            f"{', corrected for their number (Holm)' if tests > 1 else ''}, 5 % level. All else is exploratory."
        )
    if metrics["probe_kind"] == "edit":
        missing = "This data has no paraphrases" if _asked(metrics) else "Paraphrases were not asked"
        sentences.append(f"{missing}: the numbers are counted on the edit prompts themselves.")
    elif fallback := metrics.get("fallback"):
        ids = _listed([f"{name}/..." for name in fallback])
        sentences.append(f"The edits {ids} have no paraphrases: they are counted on the edit prompts themselves.")
    return sentences


def _asked(metrics: dict[str, Any]) -> bool:
    """Whether the run asked paraphrases (if the data has them)."""
    return "paraphrase" in (metrics.get("kinds") or ("paraphrase",))


def summary(metrics: dict[str, Any]) -> str:
    """One paragraph: what the run did, and what each method learnt and forgot."""
    rounds = len(metrics["rounds"])
    seeds = len(metrics["seeds"])
    what = "the edit prompts" if metrics["probe_kind"] == "edit" else "paraphrases"
    opening = (
        f"{metrics['chains']} facts were taught{f' over {rounds} rounds of edits' if rounds > 1 else ''}"
        f"{f', with {seeds} seeds' if seeds > 1 else ''}, and {what} of them were asked"
        f"{' after every round' if rounds > 1 else ' afterwards'}."
    )
    sentences = [opening]
    edited = [row for row in metrics["rows"] if row["method"] != "base"]
    for row in edited if len(edited) <= _FEW else []:
        efficacy, forgetting = (row["metrics"][name] for name in ("efficacy", "forgetting"))
        if efficacy["value"] is None:
            continue
        right = shown(efficacy, "share")[0]
        facts = "the latest round's wordings" if rounds > 1 else "the wordings"
        learnt = f"{label(row['method'])} answers {right} of {facts} with the new answer"
        lost = (
            f" and has forgotten {shown(forgetting, 'share')[0]} of what it had learnt before"
            if forgetting["value"] is not None
            else ""
        )
        sentences.append(f"{learnt}{lost}.")
    return " ".join(sentences)


def _adapters(metrics: dict[str, Any], found: Sequence[dict[str, Any]]) -> list[str]:
    """The differences between two adapters of one seed."""
    if not found:
        return []
    ours, theirs = _order(found[0])
    over = metrics.get("over", "facts")
    parts = [f"{_short(metrics, entry['metric'])} {difference(metrics, entry, ours)}" for entry in found]
    return [f"These two adapters, {label(ours)} minus {label(theirs)}: {_listed(parts)} (95 % intervals over {over})."]


def _verdicts(metrics: dict[str, Any], found: Sequence[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    ours, theirs = _order(found[0])
    better = [_measured(metrics, entry, ours, theirs) for entry in found if entry["better"] == ours]
    worse = [_measured(metrics, entry, ours, theirs) for entry in found if entry["better"] == theirs]
    unsure = [entry for entry in found if not entry["distinguishable"]]
    alike = [f"{_short(metrics, entry['metric'])} ({undecided(metrics, entry)})" for entry in unsure]
    sentences = []
    if ours == "corsa" and not better:
        tail = "it is worse on " + _listed(worse) if worse else "no primary metric shows a difference"
        sentences.append(f"{label(ours)} does not beat {label(theirs)} here: {tail}.")
    elif better:
        tail = f", and worse on {_listed(worse)}" if worse else ""
        sentences.append(f"{label(ours)} is better than {label(theirs)} on {_listed(better)}{tail}.")
    elif worse:
        sentences.append(f"{label(theirs)} is better than {label(ours)} on {_listed(worse)}.")
    if alike:
        sentences.append(f"{label(theirs)} and {label(ours)} cannot be told apart on {_listed(alike)}.")
    return sentences


def _order(entry: dict[str, Any]) -> tuple[str, str]:
    """The two methods of a comparison, CoRSA first."""
    return (entry["b"], entry["a"]) if entry["b"].partition(" ")[0] == "corsa" else (entry["a"], entry["b"])


def difference(metrics: dict[str, Any], entry: dict[str, Any], ours: str) -> str:
    """The difference of a comparison (`ours` minus the other) as text, with its interval."""
    value, low, high = entry["difference"], entry["low"], entry["high"]
    if ours == entry["b"]:
        value, low, high = -value, None if high is None else -high, None if low is None else -low
    text, ends = shown({"value": value, "low": low, "high": high}, _points(metrics, entry["metric"]))
    return f"{text} ({ends})" if ends else text


def undecided(metrics: dict[str, Any], entry: dict[str, Any]) -> str:
    """The smallest detectable true difference, as text."""
    if entry["detectable"] is None:
        return f"too few {metrics.get('over', 'facts')} to show any difference"
    size = shown({"value": entry["detectable"], "low": None, "high": None}, _points(metrics, entry["metric"]))[0]
    return f"a true difference of {size} would have shown with 80 % power"


def _points(metrics: dict[str, Any], name: str) -> str:
    """The unit of a metric's differences."""
    return "nats" if metrics["definitions"][name]["unit"] == "nats" else "points"


def _short(metrics: dict[str, Any], name: str) -> str:
    return _SHORT.get(name) or metrics["definitions"][name]["label"].lower()


def _measured(metrics: dict[str, Any], entry: dict[str, Any], ours: str, theirs: str) -> str:
    name = entry["metric"]
    unit = metrics["definitions"][name]["unit"]
    values = {row["method"]: shown(row["metrics"][name], unit)[0] for row in metrics["rows"]}
    return f"{_short(metrics, name)} ({values[ours]} against {values[theirs]}, corrected p = {entry['corrected']:.2g})"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
